"""What a PEFT LoRA config means, once: what its tensors don't say, and which configs no plain LoRA has."""

from __future__ import annotations

import re

from fleet.core.errors import CheckpointError
from fleet.core.identity import Json

# What a LoRA config may ask for that its tensors don't say; each with the values that ask for nothing.
_UNSUPPORTED_ADAPTER_FIELDS: dict[str, tuple[object, ...]] = {
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
_BIAS_MODES = (None, "none", "all", "lora_only")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_adapter_config(where: str, config: dict[str, Json]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; only LORA is")
    asked = [f for f, off in _UNSUPPORTED_ADAPTER_FIELDS.items() if f in config and config[f] not in off]
    if config.get("bias") not in _BIAS_MODES:
        asked.append("bias")
    if asked:
        told = ", ".join(f"{f}={config[f]!r}" for f in asked)
        raise CheckpointError(
            f"{where}: {told}: this adapter is more than its tensors say; "
            "fold it into its base (PEFT's merge_and_unload) and give the full model"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{where}: init_lora_weights={init!r} trained against a changed base; convert it to a plain LoRA first "
            "(PEFT's save_pretrained(path_initial_model_for_weight_conversion=…))"
        )


def pattern_value(pattern: Json, module: str, default: float) -> float:
    """A module's entry in PEFT's `rank_pattern` or `alpha_pattern`: the first key that matches the end of its name."""
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)  # type: ignore[arg-type]
    return default
