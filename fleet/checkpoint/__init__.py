"""safetensors checkpoints and LoRA adapters.

`opened` gives the model at any address. What reads only headers and JSON (`headers`, `full_model`, `adapter`,
`modules`, `vocabulary`, `curvature`) needs no torch, and is what planning uses. `tensors`, `task_vectors`,
`curvature_tensors` and `write` read and write values.
"""
