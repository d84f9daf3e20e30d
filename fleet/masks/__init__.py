"""SOMF's masks: what they look like, how they are drawn, and how they are learned.

granularity.py   what one logit stands for: an entry, a row or column, a singular component, a factor's entry
concrete.py      the Concrete distribution: draw, harden, rescale, and the gradient of the dense mask
files.py         the files of a learned mask in the store
learned.py       a learned mask, read from there and applied to a task vector
texts.py         preferences and task prompts as files
batches.py       the same as tensors
objective.py     DPO against cached log-probabilities, and the divergence from the fine-tuned model
masked_model.py  a model whose weights are W + F({m ⊙ δ_t / mean(m)}), whole or sharded
network.py       the aligned model as transformers builds it, which that model is made of
tasks.py         what is asked of a training
training.py      the training loop, its evaluations and its checkpoints; `fleet.work.training` runs it on Ray Train
"""
