"""What runs on the nodes: units of tensor work, of training and of scoring, from the store to the store."""
