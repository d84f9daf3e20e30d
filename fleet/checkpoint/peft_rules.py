"""What the `adapter_config.json` of a PEFT LoRA means: whether its tensors say all, whether an engine can serve it, and
the rank and scale of a module.

Follows peft 0.21.2: `tuners/lora/config.py` for the fields, `tuners/lora/layer.py` for what each initialisation does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from fleet.core.errors import CheckpointError
from fleet.core.identity import Json

_NO_FLAG: tuple[object, ...] = (None, False)
_NO_LIST: tuple[object, ...] = (None, [])
_NO_CONFIG: tuple[object, ...] = (None,)  # to PEFT `{}` is a config of defaults, which asks for the feature


class _Feature(NamedTuple):
    name: str
    off: tuple[object, ...]
    """The field's values that ask for nothing."""


_UNREADABLE = {
    "layer_replication": _Feature("layer replication", _NO_LIST),
    "trainable_token_indices": _Feature("trained token embeddings (trainable_token_indices)", (*_NO_LIST, {})),
    "alora_invocation_tokens": _Feature("activated LoRA", _NO_LIST),
    "target_parameters": _Feature("LoRA on bare parameters (target_parameters)", _NO_LIST),
    "use_qalora": _Feature("QALoRA", _NO_FLAG),
    "use_bdlora": _Feature("block-diagonal LoRA", _NO_FLAG),
    "arrow_config": _Feature("Arrow routing", _NO_CONFIG),
    "kasa_config": _Feature("KaSA", _NO_CONFIG),
    "monteclora_config": _Feature("MonteCLoRA", _NO_CONFIG),
    "velora_config": _Feature("VeLoRA", _NO_CONFIG),
}
"""Features with which an adapter does something else than its tensors say."""

_UNSERVED = {
    "use_dora": _Feature("DoRA", _NO_FLAG),
    "lora_bias": _Feature("a bias on the LoRA factors", _NO_FLAG),
    "modules_to_save": _Feature("fully trained modules (modules_to_save)", _NO_LIST),
}
"""Features that the tensors do say, and that vLLM refuses or, worse, leaves out."""

_BIAS_MODES = (None, "none", "all", "lora_only")

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations by name that choose only the factors' first values.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also subtract the first product from the base weight, so what was trained is an
update of that changed base. Of a name that is not known here, the same has to be feared.
"""


def changes_base(config: Mapping[str, Json]) -> bool:
    """Whether the factors are an update of another base than the model's own, as far as can be known."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in _PLAIN_INITS


def why_unreadable(config: Mapping[str, Json]) -> str:
    """Why the adapter's tensors don't say its update, and what to do about it; empty if they do."""
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')!r} is not supported; only LORA is"
    asked = [field for field, feature in _UNREADABLE.items() if config.get(field) not in feature.off]
    if config.get("bias") not in _BIAS_MODES:
        asked.append("bias")
    if asked:
        told = ", ".join(f"{field}={config[field]!r}" for field in asked)
        return (
            f"{told}: this adapter is more than its tensors say; "
            "fold it into its base (PEFT's merge_and_unload) and give the full model"
        )
    if changes_base(config):
        return (
            f"init_lora_weights={config['init_lora_weights']!r} trained against a changed base; convert it to a plain "
            "LoRA first (PEFT's save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    return ""


def why_unservable(config: Mapping[str, Json]) -> list[str]:
    """Every reason in a config for which vLLM can't serve the adapter as a LoRA, as "it uses DoRA"; ranks apart."""
    reasons: list[str] = []
    if (kind := config.get("peft_type")) != "LORA":
        reasons.append(f"its peft_type is {kind}, not LORA")
    features = (_UNREADABLE | _UNSERVED).items()
    reasons += [f"it uses {feature.name}" for field, feature in features if config.get(field) not in feature.off]
    if (bias := config.get("bias")) not in (None, "none"):
        reasons.append(f"it trains biases (bias={bias!r})")
    if changes_base(config):
        reasons.append(f"init_lora_weights={config['init_lora_weights']!r} changes the base weights")
    return reasons


def declared_ranks(config: Mapping[str, Json]) -> list[Json]:
    """Every rank that a config speaks of, as it stands there: `r`, then those of single modules."""
    pattern = config.get("rank_pattern")
    return [config.get("r", 0), *(pattern.values() if isinstance(pattern, dict) else ())]


def declared_rank(where: str, config: Mapping[str, Json], module: str) -> float:
    """The rank that the config gives a module.

    Raises:
        CheckpointError: it is no number; begins with `where`.
    """
    return _of_module(where, config, "r", "rank_pattern", module)


def declared_scale(where: str, config: Mapping[str, Json], module: str, rank: int) -> float:
    """What a module's product B A is multiplied by: alpha / rank, or alpha / √rank with rsLoRA.

    Raises:
        CheckpointError: alpha is no number; begins with `where`.
    """
    alpha = _of_module(where, config, "lora_alpha", "alpha_pattern", module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(where: str, config: Mapping[str, Json], field: str, pattern_field: str, module: str) -> float:
    """A field's value, or the one that a pattern has for the module: the first key that matches the end of its name."""
    name, value = field, config.get(field)
    pattern = config.get(pattern_field)
    for key, special in pattern.items() if isinstance(pattern, dict) else ():
        if re.match(rf"(.*\.)?({key})$", module):
            name, value = f"{pattern_field}[{key!r}]", special
            break
    if not isinstance(value, int | float):
        raise CheckpointError(f"{where}: adapter_config.json: {name} is {value!r}, not a number")
    return float(value)
