"""The steps of a plan, one file a kind: what each is made of, what it asks of workers, what its record says."""
