"""fleet: safety realignment for a whole catalogue of fine-tuned models.

Start reading at `fleet.realign` (the command), then `fleet.run.plan` and `fleet.run.coordinator`.
Nothing is re-exported here, so that `--help` and planning stay free of torch, ray, vllm and mlflow.
"""
