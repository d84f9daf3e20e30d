"""Task vectors read from checkpoints: what a model adds to the aligned one, tensor by tensor, in float32.

A task vector is always relative to the *aligned* model. A LoRA's is its product, kept as factors; a full fine-tune's is
the difference of the weights, subtracted in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.checkpoint.models import Adapter, FullModel, Model
from fleet.checkpoint.tensors import read_tensor


def read_weight(model: FullModel, name: str) -> torch.Tensor:
    """A base tensor's values in float32, of its own shape."""
    return read_tensor(model.folder, model.tensors[name]).float()


def read_factors(adapter: Adapter, name: str) -> LowRank | None:
    """An adapter's ΔW of one base tensor `{module}.weight`, float32; None where it leaves the tensor alone."""
    module = adapter.modules.get(name.removesuffix(".weight"))
    if module is None:
        return None
    a, b = (read_tensor(adapter.folder, info).float() for info in (module.a, module.b))
    return LowRank(b * module.scale, a)


def factor_shapes(adapter: Adapter, name: str) -> LowRank | None:
    """The same as meta tensors, which have shapes and no values; reads nothing. Algebra on them lays an output out."""
    module = adapter.modules.get(name.removesuffix(".weight"))
    if module is None:
        return None
    a, b = (torch.empty(info.shape, device="meta") for info in (module.a, module.b))
    return LowRank(b, a)


FactorReader: TypeAlias = Callable[[Adapter, str], LowRank | None]


def read_delta(model: Model, name: str, aligned_weight: torch.Tensor) -> Delta | None:
    """ΔW of one base tensor of any model, float32; None where an adapter leaves the tensor alone.

    Args:
        aligned_weight: the aligned model's values of the tensor, float32.
    """
    if isinstance(model, Adapter):
        return read_factors(model, name)
    return Dense(read_weight(model, name) - aligned_weight)
