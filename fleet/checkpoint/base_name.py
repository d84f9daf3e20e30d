"""Whether the base model that an adapter names is plainly another than the one it is used on.

PEFT writes `base_model_name_or_path`: a Hub name, a folder of the machine it was trained on, or a quantised copy. So
names are compared by what they say of a model, its family and its size, and whole only where both are Hub names.
"""

from __future__ import annotations

import math
import re

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel

_FAMILIES = (
    *("llama", "qwen", "mistral", "mixtral", "gemma", "phi", "falcon", "bloom", "olmo", "granite", "gpt2", "opt"),
    *("glm", "internlm", "stablelm", "exaone"),
)
"""Names of families that are also in their `model_type`."""
_OTHERWISE = ("falcon3",)
"""Names that begin like a family's, of models that have another `model_type`."""
_GLUED = ("phi", "opt", "glm")
"""Those too short to be looked for inside of words."""
_SIZE = re.compile(r"(?<![a-z\d.])(?:(\d{1,4})x)?(\d{1,4}(?:[._]\d{1,4})?)([bm])(?![a-z\d])")
"""As in 7b, 0.5b, 1_8b, 135m, 8x7b; active parameters (a3b) and effective ones (e2b) say another thing."""
_COPIES = re.compile(
    r"(-unsloth)?(-bnb)?(-([48]-?bit|gptq|awq|hqq|nf4|fp8|nvfp4|int[48]|bf16|fp16|gguf|mlx|hf|dynamic|"
    r"(quantized\.)?w\d+a\d+))*$"
)
"""Endings of copies of a model in another format."""
_NAMED_SIZES = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6}
"""Parameters of models whose name says their size in words."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

SIZE_FACTOR = 1.5
"""A name's size and the count of the parameters differ by less: gemma-2b has 2.5 billion, 8x7b 47 instead of 56."""


def why_other_base(adapter: Adapter, aligned: FullModel, address: str) -> str | None:
    """What tells that an adapter was trained on another model, to be read after its name; None if nothing does.

    Args:
        address: the aligned model's, as the manifest has it.
    """
    declared = adapter.config.get("base_model_name_or_path")
    if not isinstance(declared, str) or not (name := _model_name(declared)):
        return None
    own = [_model_name(a) for a in (address, str(aligned.config.get("_name_or_path") or ""))]
    if name in own:
        return None
    families, kinds = _families(name), _model_types(aligned)
    if families and kinds and not any(family in kind.replace("_", "") for family in families for kind in kinds):
        return f"which is a {families[0]}, and the aligned model a {kinds[0]}"
    size, count = _size(name), sum(math.prod(info.shape) for info in aligned.tensors.values())
    if size is not None and count and not 1 / SIZE_FACTOR <= size / count <= SIZE_FACTOR:
        return f"of {_count(size)} parameters, and the aligned model has {_count(count)}"
    known = address.startswith("hf://") and _HUB_NAME.fullmatch(declared) is not None
    if known and (families or size is not None):
        return f"and the aligned model is {address}"
    return None


def _model_name(address: str) -> str:
    """The last part of an address or path, without what copies of a model add to its name."""
    cached = _HUB_CACHE.search(address)
    path = cached[2] if cached else address.rstrip("/\\")
    name = re.split(r"[/\\]", path)[-1].split("@")[0].lower()
    return _COPIES.sub("", name).removeprefix("meta-")


def _model_types(model: FullModel) -> list[str]:
    """Its own, and its language model's where that is a part of it."""
    inner = model.config.get("text_config")
    configs = (model.config, inner if isinstance(inner, dict) else {})
    return [kind for config in configs if isinstance(kind := config.get("model_type"), str)]


def _families(name: str) -> list[str]:
    if name.startswith(_OTHERWISE):
        return []
    words = set(re.findall(r"[a-z]+", name))
    joined = name.replace("-", "")
    return [f for f in _FAMILIES if (f in words if f in _GLUED else f in joined)]


def _size(name: str) -> float | None:
    """The parameters that a name says; None if it says none, or several numbers."""
    if name in _NAMED_SIZES:
        return _NAMED_SIZES[name]
    found = {(times, number, unit) for times, number, unit in _SIZE.findall(name)}
    if len(found) != 1:
        return None
    ((times, number, unit),) = found
    return int(times or 1) * float(number.replace("_", ".")) * {"b": 1e9, "m": 1e6}[unit]


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"
