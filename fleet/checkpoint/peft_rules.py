"""What the `adapter_config.json` of a PEFT LoRA means: whether its tensors say all, and the rank and scale of a module.

Follows peft 0.21.2: `tuners/lora/config.py` for the fields, `tuners/lora/layer.py` for what each initialisation does,
`utils/other.py` (`get_pattern_key`) for how a pattern is matched.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import regex

from fleet.core.errors import CheckpointError, shown
from fleet.core.identity import Json

MATCHING_SECONDS = 1.0
"""Processor time that the patterns of one adapter may take: some need time exponential in a name's length."""

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

_FLOAT32_MAX = 3.4028234663852886e38
"""An update is computed in float32."""

_BIAS_MODES = (None, "none", "all", "lora_only")

_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
"""Fields that are true, false or null; PEFT would take a text as true, "false" too."""

_NAME_LISTS = ("modules_to_save", "target_modules", "exclude_modules")
"""Fields that hold names of modules."""

_NAME_PATTERNS = ("target_modules", "exclude_modules")
"""Of these, the fields that may hold a regular expression instead."""

_PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
"""Initialisations by name that choose only the factors' first values; two are truth values written as text."""

_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of those that also subtract the first product from the base weight, so that what was trained is an update
of that changed base. Of a name that is not known here, the same has to be feared."""


def changes_base(config: Mapping[str, Json]) -> bool:
    """Whether the factors are an update of another base than the model's own, as far as can be known."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in _PLAIN_INITS


def check_values(where: str, config: Mapping[str, Json]) -> None:
    """
    Raises:
        CheckpointError: a field that is read here holds a value of another kind than PEFT's, or a pattern that is no
            regular expression; begins with `where`, names the field.
    """
    for name in _FLAGS:
        if config.get(name) not in (None, False, True):
            raise _refused(where, name, config[name], "neither true nor false; write one of them, without quotes")
    if not isinstance(init := config.get("init_lora_weights"), bool | str | None):
        raise _refused(where, "init_lora_weights", init, "neither true, false nor the name of an initialisation")
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise _refused(where, "base_model_name_or_path", base, "not the name of a model")
    for name in _NAME_LISTS:
        match config.get(name):
            case None:
                pass
            case str() as pattern if name in _NAME_PATTERNS:
                _compiled(where, f"{name}={shown(pattern)}", pattern, pattern)
            case [*names] if all(isinstance(item, str) for item in names):
                pass
            case value:
                raise _refused(where, name, value, "not a list of modules' names")


def plain_config(config: Mapping[str, Json]) -> dict[str, Json]:
    """A config that `check_values` takes, as PEFT would have written it: whole numbers, and truth values, as such."""

    def plain(value: Json) -> Json:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    written = {**config}
    for name in ("r", "lora_alpha"):
        if name in config:
            written[name] = plain(config[name])
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(patterns := config.get(name), dict):
            written[name] = {key: plain(value) for key, value in patterns.items()}
    if isinstance(init := config.get("init_lora_weights"), str) and init.lower() in ("true", "false"):
        written["init_lora_weights"] = init.lower() == "true"
    return written


def why_unreadable(config: Mapping[str, Json]) -> str:
    """Why the adapter's tensors don't say its update, and what to do about it; empty if they do."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"adapter_config.json: {_why_no_lora(kind)}"
    asked = [field for field, feature in _UNREADABLE.items() if config.get(field) not in feature.off]
    if config.get("bias") not in _BIAS_MODES:
        asked.append("bias")
    if asked:
        told = ", ".join(f"{field}={shown(config[field])}" for field in asked)
        return (
            f"adapter_config.json: {told}: this adapter is more than its tensors say; "
            "fold it into its base (PEFT's merge_and_unload) and give the full model"
        )
    return _why_not_of_its_base(config) if changes_base(config) else ""


def _why_no_lora(kind: Json) -> str:
    if kind is None or (isinstance(kind, str) and kind.upper() == "LORA"):
        return f'peft_type is {shown(kind)}, where PEFT writes "LORA"; write that if the adapter is a LoRA'
    return (
        f"peft_type is {shown(kind)}, and only LORA is supported; if PEFT can fold the adapter into its base "
        "(merge_and_unload), give the full model"
    )


def _why_not_of_its_base(config: Mapping[str, Json]) -> str:
    told = f"init_lora_weights={shown(init := str(config['init_lora_weights']))}"
    way_out = "convert it to a plain LoRA first (PEFT's save_pretrained(path_initial_model_for_weight_conversion=…))"
    if init.lower().startswith(_CHANGING_INITS):
        return f"{told} trained against a changed base; {way_out}"
    return (
        f"{told} is no initialisation that is known here, so it may have trained against a changed base: set it to "
        f"true in adapter_config.json if it only chose the first values of the factors, or {way_out}"
    )


@dataclass
class DeclaredValues:
    """The ranks and scales that an adapter's config gives to its modules.

    Args:
        where: what errors begin with.
    """

    where: str
    config: Mapping[str, Json]
    _seconds_left: float = field(default_factory=lambda: MATCHING_SECONDS, init=False)

    def rank(self, module: str) -> int:
        """The rank that the config gives a module.

        Raises:
            CheckpointError: it is no positive whole number, or a pattern can't be matched.
        """
        name, value = self._of("r", "rank_pattern", module)
        number = self._number(name, value)
        if number != int(number) or number <= 0:
            raise _refused(self.where, name, value, "not a positive whole number")
        return int(number)

    def alpha(self, module: str) -> float:
        """What a module's product B A is multiplied by, before its rank divides it.

        Raises:
            CheckpointError: it is no finite number, or a pattern can't be matched.
        """
        return self._number(*self._of("lora_alpha", "alpha_pattern", module))

    def scale(self, module: str, rank: int) -> float:
        """What a module's product B A is multiplied by: alpha / rank, or alpha / √rank with rsLoRA.

        Raises:
            CheckpointError: as `alpha`.
        """
        return self.alpha(module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _number(self, name: str, value: Json) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refused(self.where, name, value, "not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= _FLOAT32_MAX:
            raise _refused(self.where, name, value, "not a finite number, or none that float32 has")
        return number

    def _of(self, name: str, pattern_name: str, module: str) -> tuple[str, Json]:
        """A field, or the entry of a pattern for the module: the first key that matches the end of its name."""
        patterns = self.config.get(pattern_name)
        if not isinstance(patterns, dict | None):
            raise _refused(self.where, pattern_name, patterns, "not an object of patterns and numbers")
        for key, value in (patterns or {}).items():
            if self._matches(pattern_name, key, module):
                return f"{pattern_name}[{shown(key)}]", value
        return name, self.config.get(name)

    def _matches(self, name: str, key: str, module: str) -> bool:
        entry = f"{name}[{shown(key)}]"
        compiled = _compiled(self.where, entry, key, rf"(.*\.)?({key})$")
        if not _CHOOSES.search(key):
            return compiled.match(module) is not None
        # What repeats or has alternatives may take exponential time: (a+)+$ and (a|.)(a|.)(a|.)… Python's own engine
        # can't be stopped, this one can.
        before = time.process_time()
        try:
            found = regex.match(compiled.pattern, module, timeout=max(self._seconds_left, 1e-3))
        except TimeoutError as error:
            raise CheckpointError(
                f"{self.where}: adapter_config.json: {entry} takes more than {MATCHING_SECONDS:g} s to match against "
                "the adapter's modules; write the modules' names, or a simpler pattern"
            ) from error
        except (regex.error, RecursionError) as error:
            raise _refused(self.where, entry, key, f"no regular expression ({error})") from error
        self._seconds_left -= time.process_time() - before
        return found is not None


_CHOOSES = re.compile(r"[*+?{|]")


def _compiled(where: str, entry: str, written: str, pattern: str) -> re.Pattern[str]:
    """What was written, as PEFT compiles it; a star before a name is what people write who think of file names."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        why = error.msg if isinstance(error, re.error) else error
        meant = f"; did you mean {shown('.*' + written.lstrip('*'))}?" if written.startswith("*") else ""
        raise CheckpointError(
            f"{where}: adapter_config.json: {entry} is no regular expression ({why}){meant}"
        ) from error


def _refused(where: str, name: str, value: Json, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: adapter_config.json: {name} is {shown(value)}, {why}")
