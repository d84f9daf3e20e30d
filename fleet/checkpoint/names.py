"""Names of tensors: what wrappers put into them, and which names of two checkpoints mean the same tensor.

`from_pretrained` takes a checkpoint with or without its class's `base_model_prefix`, and a text model's also under the
names that it has within a model of text and images. So do we, and write the names of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from fleet.checkpoint.tables import HEADS
from fleet.core.identity import Json

# torch.compile, FSDP and activation checkpointing put these into the middle of names; Lightning, DDP and DeepSpeed put
# theirs before.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_OUTER_WRAPPER = "module"

_PEFT_WRAPPER = "base_model.model."
"""Before the names of whole weights too, where a PeftModel's state dict was saved after its adapter was merged."""

_TRANSFORMER_MODEL_TYPES = frozenset({
    "gpt2", "gpt-sw3", "gpt_neo", "gptj", "gpt_bigcode", "bloom", "codegen", "ctrl", "dbrx", "falcon", "mpt",
    "openai-gpt", "xlm", "xlnet",
})  # fmt: skip
_BACKBONE_MODEL_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "xlstm"})
_OWN_NAME_MODEL_TYPES = frozenset({"gpt_neox", "gpt_neox_japanese", "biogpt", "cpmant", "rwkv"})
_ROOTS = frozenset({"model", "language_model", "transformer", "backbone"}) | _OWN_NAME_MODEL_TYPES
"""Modules that a causal language model of transformers has its decoder in."""

_STACKS = frozenset({"layers", "h", "blocks", "decoder"})
"""What a decoder calls its layers."""


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTER_WRAPPER:
        parts = parts[1:]
    return ".".join(parts)


def unwrapped_weight(name: str) -> str:
    """The same of a full model's tensor, without what PEFT puts before it."""
    return unwrapped(unwrapped(name).removeprefix(_PEFT_WRAPPER))


def class_names(config: Mapping[str, Json], names: Iterable[str]) -> Callable[[str], str]:
    """From a name in a full model's files to its name in the class that the config names: with the class's prefix.

    Args:
        names: those in the files, buffers and tied heads aside.
    """
    firsts = {unwrapped_weight(name).partition(".")[0] for name in names}
    if firsts & _ROOTS or not firsts & _STACKS:
        return unwrapped_weight
    prefix = _base_model_prefix(config.get("model_type"))

    def renamed(name: str) -> str:
        plain = unwrapped_weight(name)
        return plain if plain.partition(".")[0] in HEADS else f"{prefix}.{plain}"

    return renamed


def _base_model_prefix(model_type: Json) -> str:
    """`base_model_prefix` of a causal language model in transformers 5.19."""
    if model_type in _OWN_NAME_MODEL_TYPES:
        return str(model_type)
    if model_type in _TRANSFORMER_MODEL_TYPES:
        return "transformer"
    return "backbone" if model_type in _BACKBONE_MODEL_TYPES else "model"


class AlignedNames:
    """The aligned model's names, by what is left of them without the modules that the decoder lies in."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def of(self, name: str) -> str:
        """The aligned model's name of a tensor, or of a factor on it; the name itself where it has none."""
        plain = unwrapped(name)
        if plain in self._names:
            return plain
        end = len(plain)
        while end > 0:
            if len(found := self._by_core.get(_core(plain[:end]), ())) == 1:
                return next(iter(found)) + plain[end:]
            end = plain.rfind(".", 0, end)
        core = _core(plain)
        return core if core.partition(".")[0] in HEADS else plain

    @cached_property
    def _by_core(self) -> dict[str, set[str]]:
        """Of all tensors and the modules they are in."""
        found: dict[str, set[str]] = {}
        for name in self._names:
            while core := _core(name):
                found.setdefault(core, set()).add(name)
                name = name.rpartition(".")[0]
        return found


def _core(name: str) -> str:
    parts = name.split(".") if name else []
    while parts and parts[0] in _ROOTS:
        parts = parts[1:]
    return ".".join(parts)
