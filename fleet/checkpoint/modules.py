"""Which base tensors are modules, and how their weights are turned.

Algebra needs one orientation, (d_out, d_in), and some files hold the transpose: GPT-2's Conv1D, and the stacked experts
of a few architectures. `is_transposed` knows which; `task_vectors` reads and writes through it.
"""

from __future__ import annotations

from typing import NamedTuple

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo

MODULE_EXCLUDED = (
    "embed_tokens", "embed_positions", "embed_in", "embed_out", "word_embeddings", "lm_head",
    "wte", "wpe", "tokens_embed", "positions_embed",
)  # fmt: skip
"""2-D weights that are look-up tables or the output head, not modules in the sense of the realign methods."""

# transformers' Conv1D stores (d_in, d_out). The names alone decide nothing: GPT-Neo and StarCoder call Linears so too.
_CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

# A part of the name of a 3-D tensor that holds an expert per slice; the last two are Granite's.
_STACKED_EXPERTS = frozenset({"experts", "input_linear", "output_linear"})
# Their experts are (E, d_in, d_out), the layout of `x @ w`; all others keep a Linear's (E, d_out, d_in).
_TRANSPOSED_EXPERT_MODEL_TYPES = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text"})


class ModuleView(NamedTuple):
    """One module within a base tensor."""

    module: str
    """The tensor's name without `.weight`; of an expert in a stacked tensor, `tensor[expert]`."""
    tensor: str
    index: int | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    """Which expert of a stacked tensor."""


def _is_linear(info: TensorInfo) -> bool:
    """Whether a base tensor is the weight of a Linear that realign methods decide on."""
    parts = info.name.split(".")
    return len(info.shape) == 2 and parts[-1] == "weight" and not set(parts) & set(MODULE_EXCLUDED)


def module_views(model: FullModel, tensor: str) -> tuple[ModuleView, ...]:
    """The modules within a base tensor: one of a Linear, E of stacked experts, none of norms, embeddings and biases.

    A view's weight is `read_weight(model, tensor)`, or its slice `[index]`: (d_out, d_in) either way.
    """
    info = model.tensors[tensor]
    if _is_linear(info):
        return (ModuleView(tensor.removesuffix(".weight"), tensor, None),)
    if _is_stacked(info):
        return tuple(ModuleView(f"{tensor}[{e}]", tensor, e) for e in range(info.shape[0]))
    return ()


def is_transposed(model: FullModel, tensor: str) -> bool:
    """Whether the file holds the last two axes of a weight as (d_in, d_out)."""
    info = model.tensors[tensor]
    model_type = model.config.get("model_type")
    if _is_stacked(info):
        return model_type in _TRANSPOSED_EXPERT_MODEL_TYPES
    named = tensor.removesuffix(".weight").rpartition(".")[2] in _CONV1D_MODULES
    return model_type in _CONV1D_MODEL_TYPES and named and _is_linear(info)


def canonical_shape(model: FullModel, tensor: str) -> tuple[int, ...]:
    """The shape that `read_weight` gives a base tensor: weights are (d_out, d_in), stacked ones (E, d_out, d_in)."""
    shape = model.tensors[tensor].shape
    return (*shape[:-2], shape[-1], shape[-2]) if is_transposed(model, tensor) else shape


def _is_stacked(info: TensorInfo) -> bool:
    return len(info.shape) == 3 and bool(set(info.name.split(".")) & _STACKED_EXPERTS)
