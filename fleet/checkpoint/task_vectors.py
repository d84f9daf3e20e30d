"""Task vectors read from checkpoints: what a model adds to the aligned one, tensor by tensor, in float32.

A task vector is always relative to the *aligned* model. A LoRA's is its product, kept as factors; what an adapter or a
full fine-tune holds whole is the difference of the weights, subtracted in float32; a DoRA is folded into that.

Weights are in canonical orientation, (d_out, d_in) and (E, d_out, d_in) for stacked experts, whatever the file holds.
"""

from __future__ import annotations

from typing import cast

import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.factors import Factors
from fleet.checkpoint.adapter import Adapter, LoraModule
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo
from fleet.checkpoint.model import Model
from fleet.checkpoint.modules import is_transposed
from fleet.checkpoint.tensors import read_tensor
from fleet.core.errors import CheckpointError


def read_weight(model: FullModel, name: str) -> torch.Tensor:
    """A base tensor's values in float32 and canonical orientation (`canonical_shape`)."""
    value = read_tensor(model.folder, model.tensors[name]).float()
    return value.mT if is_transposed(model, name) else value


def to_stored(model: FullModel, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A tensor in canonical orientation, turned into the one that the model's files hold; any dtype, shares memory."""
    return weight.mT if is_transposed(model, name) else weight


def read_factors(adapter: Adapter, name: str) -> LowRank | None:
    """A LoRA's ΔW of one base tensor `{module}.weight`, float32; None where it leaves the tensor alone.

    Raises:
        CheckpointError: the adapter is more than a LoRA on Linears, which its factors alone don't say.
    """
    module = _plain_module(adapter, name)
    return None if module is None else _product(adapter, module)


def read_unscaled_factors(adapter: Adapter, name: str) -> Factors | None:
    """The same with the scale apart, float32: what averages factors instead of products needs them so."""
    module = _plain_module(adapter, name)
    return None if module is None else Factors(_read(adapter, module.b), _read(adapter, module.a), module.scale)


def read_delta(model: Model, name: str, aligned_weight: torch.Tensor) -> Delta | None:
    """ΔW of one base tensor of any model, float32; None where an adapter leaves the tensor alone.

    It is low-rank where a LoRA on a Linear or an embedding is all there is, and dense elsewhere.

    Args:
        aligned_weight: the aligned model's values of the tensor, as `read_weight` gives them.
    """
    if isinstance(model, FullModel):
        return Dense(read_weight(model, name) - aligned_weight)
    replaced = model.replaced.get(name)
    base = aligned_weight if replaced is None else _read(model, replaced)
    update = _update(model, name, base)
    # With a LoRA on an embedding PEFT saves the frozen table too; if it is the base's, the LoRA is all there is.
    if replaced is None or (update is not None and torch.equal(base, aligned_weight)):
        return update
    moved = Dense(base - aligned_weight)
    return moved if update is None else moved.plus(update)


def _update(adapter: Adapter, name: str, base: torch.Tensor) -> Delta | None:
    """What the trained factors add to `base`, the weight that the adapter puts them on."""
    module_name, _, leaf = name.rpartition(".")
    module = adapter.modules.get(module_name)
    if module is None:
        return None
    if leaf == "bias":
        return None if module.bias is None else Dense(_read(adapter, module.bias) * module.scale)
    if leaf != "weight":
        return None
    product = _product(adapter, module)
    if module.magnitude is None:
        return product
    # W' = m (W + ΔW) / ‖W + ΔW‖ with the norm of each output feature: a row of a Linear, a column of an embedding's
    # table (peft 0.21.2, tuners/lora/variants.py, merge_safe of DoraLinearVariant and DoraEmbeddingVariant).
    across = 0 if module.embedding else 1
    moved = base + product.dense()
    found = torch.linalg.vector_norm(moved, dim=across, keepdim=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    norm = cast("torch.Tensor", found)
    return Dense(_read(adapter, module.magnitude).unsqueeze(across) / norm * moved - base)


def _product(adapter: Adapter, module: LoraModule) -> LowRank:
    a, b = _read(adapter, module.a), _read(adapter, module.b)
    return LowRank(a.T * module.scale, b.T) if module.embedding else LowRank(b * module.scale, a)


def _plain_module(adapter: Adapter, name: str) -> LoraModule | None:
    if not adapter.is_lora:
        raise CheckpointError(
            f"{adapter.folder.uri}: the adapter {adapter.why_not_lora()}: its factors are not its task vector; "
            "use it where the output is a full model, or fold it into its base (PEFT's merge_and_unload)"
        )
    return adapter.modules.get(name.removesuffix(".weight"))


def _read(adapter: Adapter, info: TensorInfo) -> torch.Tensor:
    return read_tensor(adapter.folder, info).float()
