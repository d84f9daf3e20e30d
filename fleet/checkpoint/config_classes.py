"""What transformers' own classes make of a `config.json`: every field, defaults filled in, one spelling of each.

transformers imports torch, which planning must not: so `fleet.checkpoint.configs` runs this file as a program of its
own, JSON in and JSON out, where torch isn't loaded already. It imports nothing of ours.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_FOR_ENGINES = {
    "logit_scale": 1.0, "sliding_window": None, "layer_types": None, "is_causal": True, "qk_norm": False,
    "attention_bias": False, "bias": False, "mlp_bias": False, "head_dim": None, "layer_rope_theta": None,
}  # fmt: skip
"""What vLLM 0.32 reads of a config (`model_executor/models/llama.py` and its like) whether its class has it or not,
and what it takes where there is nothing."""


def class_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config as its class reads it: fields that the class has, nested configs likewise, as JSON.

    None where transformers has no class of that `model_type`, or the class refuses the config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        kind: Any = CONFIG_MAPPING[config.get("model_type")]  # pyright: ignore[reportArgumentType]
        return json.loads(json.dumps(_known(kind.from_dict(json.loads(json.dumps(config)))), default=str))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return None


def _known(config: Any) -> dict[str, Any]:
    """The fields that a class has; what else a file may say, nothing reads."""
    names = {field.name for field in fields(config)} | {"model_type"}
    values: dict[str, Any] = config.to_dict()
    known = {name: value for name, value in values.items() if name in names}
    known |= {
        n: values[n] for n, default in _FOR_ENGINES.items() if n not in names and values.get(n, default) != default
    }
    parts: dict[str, Any] = config.__dict__
    return known | {name: _known(part) for name, part in parts.items() if hasattr(part, "to_dict")}


if __name__ == "__main__":
    # Without torch transformers is there in half the time, and its configurations are the same.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    logging.disable(logging.WARNING)
    json.dump([class_fields(config) for config in json.load(sys.stdin)], sys.stdout)
