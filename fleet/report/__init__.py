"""What a run found, as people read it: the table, the pages, MLflow."""
