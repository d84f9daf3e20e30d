"""The plain transformers model that a mask is learned on: the aligned model, built without memory and then filled.

Parameters are made on the meta device and cut by FSDP2; then each worker allocates its own rows and reads them from the
checkpoint. So no worker of several ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs] - accelerate ships none
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fleet.checkpoint.full_model import FullModel
from fleet.core.errors import CheckpointError
from fleet.masks.masked_model import Group, local, named_parameters, stored_rows


def build_network(
    aligned: FullModel, dtype: torch.dtype, device: torch.device, group: Group, activation_checkpointing: bool
) -> PreTrainedModel:
    """The aligned model, frozen, without dropout, in `dtype`, sharded over the group.

    Raises:
        CheckpointError: transformers knows no such architecture, or has parameters that the checkpoint doesn't hold.
    """
    settings = dict(aligned.config)
    kind = settings.pop("model_type", None)
    config_of = cast(Callable[..., PreTrainedConfig], AutoConfig.for_model)  # pyright: ignore[reportUnknownMemberType]
    build = cast(Callable[..., PreTrainedModel], AutoModelForCausalLM.from_config)  # pyright: ignore[reportUnknownMemberType]
    try:
        config = config_of(str(kind), **settings)
        with init_empty_weights(include_buffers=False):
            network = build(config, dtype=dtype)
    except (ValueError, KeyError) as e:
        raise CheckpointError(f"base.aligned: transformers can't build a {kind!r} to learn a mask on: {e}") from e
    network.requires_grad_(False)
    if activation_checkpointing:
        enable = cast(Callable[[dict[str, bool]], None], network.gradient_checkpointing_enable)  # pyright: ignore[reportUnknownMemberType]
        enable({"use_reentrant": False})
    network.train()  # transformers recomputes activations in this mode only
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


def _materialise(network: PreTrainedModel, device: torch.device, group: Group) -> None:
    """Allocate this worker's rows of every parameter, still unfilled; buffers keep their computed values."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    if group.mesh is not None:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        layers = set(network._no_split_modules or ())  # pyright: ignore[reportPrivateUsage] - a model's layers by class, nowhere public
        for module in [m for m in network.modules() if type(m).__name__ in layers]:
            fully_shard(module, mesh=group.mesh, mp_policy=policy)
        # By default the root keeps its gathered weights after a forward pass; they'd be stale once θ is written anew.
        fully_shard(network, mesh=group.mesh, mp_policy=policy, reshard_after_forward=True)
    network.to_empty(device=device)
    network.tie_weights()  # `to_empty` gave tied modules memory of their own
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
