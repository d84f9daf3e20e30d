"""A full model's headers: its config and its tensors, as its files hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fleet.checkpoint.configs import ties_head
from fleet.checkpoint.fp8 import dequantised, fp8_method
from fleet.checkpoint.headers import (
    FP8_DTYPES,
    TENSOR_BYTES,
    TensorInfo,
    check_dtypes,
    check_gathered,
    read_headers,
    read_json,
)
from fleet.checkpoint.tables import output_head, token_table
from fleet.checkpoint.views import ViewFolder
from fleet.core.errors import CheckpointError, some
from fleet.core.identity import Json
from fleet.store import Folder

_BUFFER = re.compile(
    r"(^|\.)((rotary_emb|rotary_pos_emb|rotary)\.(original_)?(inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask"
    r"|position_ids|relative_position_index|embed_positions(\.weights|\._float_tensor)?|(en|de)coder\.version|_extra_state)$"
)
"""Buffers that old checkpoints carry and every loader recomputes, by the end of their names."""
_SKIPPED = re.compile(r"(^|\.)rotary_(pos_)?emb\.inv_freq$")
"""The one that every model of vLLM leaves out by itself."""
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.bias$")
"""The causal mask of GPT-2, GPT-Neo, GPT-J and GPT-NeoX, in any dtype: square, where a real bias has one axis."""


@dataclass(frozen=True)
class FullModel:
    """A full model's headers. `tensors` leaves out buffers (`is_buffer`) and a tied `lm_head`.

    An fp8 model's `folder` is a view of its files, in which the weights are float32.
    """

    folder: Folder
    config: dict[str, Json]
    tensors: dict[str, TensorInfo]
    is_quantised: bool = False
    """Whether the files themselves are fp8; one that is read in another vocabulary has float32 in its place."""
    tied_head: TensorInfo | None = None
    """The head that a tied model's files hold beside the embedding; `belongs` checks that it is the same."""
    left_out: tuple[str, ...] = ()
    """Buffers in its files that an engine would stumble over."""

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())

    @property
    def head_for_table(self) -> TensorInfo | None:
        """The head of a tied model whose files lack the embedding: of two names of one tensor, safetensors'
        `save_model` keeps the first, and `from_pretrained` takes either."""
        alone = token_table(self.tensors) is None and ties_head(self.config)
        return output_head(self.tensors) if alone else None

    @property
    def memory_bytes(self) -> int:
        """About how much memory the headers take, and the view of the files if there is one."""
        view_bytes = self.folder.memory_bytes if isinstance(self.folder, ViewFolder) else 0
        return len(self.tensors) * TENSOR_BYTES + view_bytes

    @property
    def is_view(self) -> bool:
        """Whether its values are computed from those in files, and may be in another dtype than there."""
        return isinstance(self.folder, ViewFolder) and self.folder.is_computed


def is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor is no parameter but a buffer, which every loader computes anew: dropped from all models alike.

    What transformers' classes ignore (`_keys_to_ignore_on_load_unexpected`), and what they have stopped saving.
    """
    if _MASK.search(info.name):
        return len(info.shape) >= 2 and info.shape[-1] == info.shape[-2]
    return _BUFFER.search(info.name) is not None


def read_full_model(folder: Folder) -> FullModel:
    """A full model's headers; of fp8 files, those of their view in float32.

    Raises:
        CheckpointError: damaged files, another quantisation than fp8, unsupported dtypes, or an adapter among the
            weights.
    """
    config = read_json(folder, "config.json")
    quantisation = config.get("quantization_config")
    if quantisation and not fp8_method(quantisation):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{folder.uri}: config.json says that the model is quantised (quant_method {method!r}), so no exact task "
            "vector exists; give the unquantised checkpoint"
        )
    found = read_headers(folder, "model")
    is_quantised = bool(quantisation) or any(info.dtype in FP8_DTYPES for info in found.values())
    if is_quantised:
        folder = dequantised(folder, config, found)
        config, found = read_json(folder, "config.json"), read_headers(folder, "model")
    tensors = {n: t for n, t in found.items() if not is_buffer(t)}
    left_out = tuple(name for name in found if name not in tensors and not _SKIPPED.search(name))
    _check_no_adapter(folder.uri, tensors)
    check_gathered(folder.uri, tensors.values())
    check_dtypes(folder.uri, tensors)
    head = output_head(tensors) if token_table(tensors) and ties_head(config) else None
    if head is not None:
        del tensors[head.name]
    return FullModel(folder, config, tensors, is_quantised, head, left_out)


def _check_no_adapter(where: str, names: Iterable[str]) -> None:
    if factors := [name for name in names if ".lora_A." in name or ".lora_B." in name]:
        raise CheckpointError(
            f"{where}: the weights hold a base and a LoRA on it side by side ({some(factors, 2)}); save the adapter "
            "alone (save_pretrained of the PeftModel), or merge it first (merge_and_unload)"
        )
