"""safetensors checkpoints and LoRA adapters.

`headers` and `models` read headers as bytes and need no torch: planning uses them. `tensors` reads and writes values.
"""
