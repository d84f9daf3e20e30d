"""The plain transformers model that a mask is learned on, built empty and filled rank by rank from the checkpoint.

No worker ever holds a whole model unless it is alone: parameters are laid out on no device, cut by FSDP2, and each
worker reads its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from fleet.checkpoint.full_model import FullModel
from fleet.core.errors import CheckpointError
from fleet.masks.masked_model import Group, local, named_parameters, stored_rows


def build_network(
    aligned: FullModel, dtype: torch.dtype, device: torch.device, group: Group, activation_checkpointing: bool
) -> Any:
    """The aligned model, frozen, without dropout, in `dtype`, cut over the group.

    Raises:
        CheckpointError: transformers knows no such architecture, or has parameters that the checkpoint doesn't hold.
    """
    settings = dict(aligned.config)
    kind = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(str(kind), **settings)
        with init_empty_weights(include_buffers=False):
            network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as e:
        raise CheckpointError(f"base.aligned: transformers can't build a {kind!r} to learn a mask on: {e}") from e
    network.requires_grad_(False)
    if activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()  # transformers checkpoints activations in this mode only
    for module in network.modules():
        for rate in ("p", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                module.__dict__[rate] = 0.0
    _materialise(network, device, group)
    missing = [name for name in named_parameters(network) if name not in aligned.tensors]
    if missing:
        raise CheckpointError(
            f"base.aligned: {type(network).__name__} needs {', '.join(missing[:4])} ({len(missing)} in all), which its "
            "checkpoint doesn't hold under these names"
        )
    with torch.no_grad():
        for name, parameter in named_parameters(network).items():
            local(parameter).copy_(stored_rows(aligned, name, group.rows(aligned.tensors[name].shape[0])))
    return network


def _materialise(network: Any, device: torch.device, group: Group) -> None:
    """Give every parameter memory, of this worker's rows; buffers, which hold computed values, keep theirs."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    if group.mesh is not None:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        layers = set(network._no_split_modules or ())
        for module in [m for m in network.modules() if type(m).__name__ in layers]:
            fully_shard(module, mesh=group.mesh, mp_policy=policy)
        # Without it the root keeps its gathered weights after a forward pass, and θ is written anew before the next.
        fully_shard(network, mesh=group.mesh, mp_policy=policy, reshard_after_forward=True)
    network.to_empty(device=device)
    network.tie_weights()  # each module was given memory of its own
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
