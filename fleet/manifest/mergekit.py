"""A mergekit configuration -> a manifest, so that a merge which exists already can be run, realigned and scored here.

    python -m fleet.realign --from-mergekit config.yml > models.json
    python -m fleet.realign --manifest models.json --dry-run

The merge becomes one variant with `realign: null`, to which you add variants that realign. Weights, densities and the
like become schedules: a number, a gradient over the layers, or rules by tensor name. A model's own come first, then its
slice's, then the configuration's, as in mergekit. `base_model` becomes `base.aligned`; where mergekit merges it too, as
`linear` and `karcher` do though it isn't listed, it is a model as well. mergekit has no unaligned model, and a fusion
needs none; `--unaligned` names it for the variants you add. A run wants Hub models pinned to a commit. A setting that
changes nothing, here or in mergekit, is left out with a remark on stderr. One that would change the fused weights but
has no equal here is refused, and so is what mergekit itself would not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fleet.checkpoint.configs import text_field
from fleet.core.errors import ManifestError
from fleet.manifest import Manifest, parse
from fleet.manifest.schema import RESERVED_NAMES

Numbers: TypeAlias = float | list[float]
"""A number, or a gradient over the layers."""


class Rule(TypedDict):
    """The value in tensors whose name contains the filter; without one, in all that no rule before it matches."""

    filter: NotRequired[str]
    value: Numbers


Setting: TypeAlias = Numbers | list[Rule]
"""A schedule, as a manifest has it."""

UNSET = "unset://base.{}"
"""The address of a base model that isn't known. A run refuses it by name, because no source has such an address."""

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FLAG = TypeAdapter(bool)


class Conversion(NamedTuple):
    """A configuration as a manifest."""

    manifest: dict[str, Any]
    """The manifest's JSON document."""
    remarks: list[str]
    """What the user has to fill in, and what was left out or is done another way: a line each."""


def from_mergekit(path: Path, unaligned: str | None = None) -> Conversion:
    """The manifest of a mergekit configuration's merge; it keeps to the schema.

    Args:
        unaligned: the model the configuration's base model was aligned from.

    Raises:
        ManifestError: the file is missing, is no configuration, or asks for what can't be done here.
    """
    merge = _read(path)
    if merge.config.merge_method not in _METHODS:
        reason = _REFUSED.get(merge.config.merge_method, f"unknown here; there are {', '.join(_METHODS)}")
        raise merge.error("merge_method", f"{merge.config.merge_method}: {reason}")
    inputs, fuse = _METHODS[merge.config.merge_method](merge)
    aligned = merge.source("base_model", merge.base) if merge.base else UNSET.format("aligned")
    if not merge.base:
        merge.remarks.append("base_model: not given; set base.aligned to the model all others were tuned from")
    names = _names([i.model for i in inputs])
    document: dict[str, Any] = {
        "schema": 1,
        "name": _name(merge.config.name or path.stem),
        "base": ({"unaligned": merge.source("--unaligned", unaligned)} if unaligned else {}) | {"aligned": aligned},
        "models": [{"name": names[i.model], "source": merge.source(f"models: {i.model}", i.model)} for i in inputs],
        "variants": [{"name": merge.config.merge_method, "realign": None, "fuse": _renamed(fuse, names)}],
        "evaluation": {"harmfulness": ["demo_harmful"], "judge": {"kind": "rule"}},
        "artifacts": "artifacts",
    }
    if (vocabulary := _vocabulary(merge, names)) is not None:
        document["checkpoint"] = {"vocabulary": vocabulary}
    merge.remarks += [*merge.dropped(), "evaluation: the demo's suite, to start with; name your own, and models.suites"]
    parse(Manifest, document, Path.cwd(), f"{path}, as a manifest")
    return Conversion(document, [*dict.fromkeys(merge.remarks)])


# -- the configuration ---------------------------------------------------------------------------------------------


class _Parametrised(BaseModel):
    """What may have parameters; the values are checked when a method asks for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: dict[str, object] | None = None


class _Input(_Parametrised):
    model: str


class _Source(_Input):
    layer_range: tuple[int, int]


class _Slice(_Parametrised):
    sources: list[_Source] = Field(min_length=1)
    base_model: str | None = None


class _Tokenizer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "union"
    tokens: dict[str, object] | None = None
    pad_to_multiple_of: int | None = None


class _Config(_Parametrised):
    merge_method: str
    name: str | None = None
    base_model: str | None = None
    models: list[_Input] | None = None
    slices: list[_Slice] | None = None
    modules: dict[str, object] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None


@dataclass
class _Merge:
    """A configuration that merges whole models, and what has been read of it so far."""

    path: Path
    config: _Config
    base: str | None
    """`base_model`, as the configuration or its slice gives it."""
    inputs: list[_Input]
    """Every model that mergekit reads; the base model may be among them, whether it is listed or not."""
    shared: list[tuple[str, Mapping[str, object]]]
    """Parameters for all models: what messages call their place, and the parameters. The slice's come first."""
    remarks: list[str] = field(default_factory=list[str])
    used: set[str] = field(default_factory=set[str])
    """Names of the parameters that were asked for; others change nothing."""

    @property
    def method(self) -> str:
        return self.config.merge_method

    @property
    def members(self) -> list[_Input]:
        """The models that have a task vector on the base model."""
        return [i for i in self.inputs if i.model != self.base]

    @property
    def adds_base(self) -> bool:
        """Whether the base model is read only because mergekit adds it to the models."""
        return (
            self.base is not None
            and self.config.models is not None
            and all(i.model != self.base for i in self.config.models)
        )

    def error(self, where: str, problem: str) -> ManifestError:
        return ManifestError(f"{self.path}: {where}: {problem}")

    # -- sources -------------------------------------------------------------------------------------------------

    def source(self, where: str, reference: str) -> str:
        """The address, as a manifest has it, of what mergekit calls `path`, `org/name@revision` or `model+lora`."""
        model, _, lora = reference.partition("+")
        if lora and model != self.base:
            raise self.error(where, f"a LoRA has to be on the base model; set base_model: {model}, or merge it first")
        address = lora or model
        path, _, revision = address.partition("@")
        if "://" in address or Path(address).expanduser().exists() or not _HUB.fullmatch(path) or path[0] in "./~":
            return str(Path(address).expanduser()) if address.startswith("~") else address
        if not _COMMIT.fullmatch(revision):
            self.remarks.append(
                f"{path}: not pinned to a commit, so a run refuses it; write hf://{path}@<40 hexadecimal digits>; "
                f"`git ls-remote https://huggingface.co/{path}` prints them"
            )
        return f"hf://{path}@{revision or 'main'}"

    # -- parameters ----------------------------------------------------------------------------------------------

    def schedule(self, name: str, model: _Input | None, default: float | None) -> Setting:
        """A parameter's value in every tensor: by the first rule that matches, the model's own before the others.

        Args:
            model: whose parameter it is; None for one that is given once for all models.
            default: mergekit's, where no rule matches; None where mergekit has none either.
        """
        given = self._given(name, model)
        rules = [rule for where, setting in given for rule in self._rules(where, setting)]
        end = next((i for i, rule in enumerate(rules) if "filter" not in rule), None)
        if end is None:
            if default is None:
                where = f"models: {model.model}: parameters.{name}" if model else f"parameters.{name}"
                lacks = "its rules leave tensors out; end them with one without a filter" if rules else "missing"
                raise self.error(where, f"{lacks}; {self.method} needs it for every tensor")
            rules, end = [*rules, Rule(value=default)], len(rules)
        if any(isinstance(rule["value"], list) for rule in rules[: end + 1]):
            self.remarks.append(
                "gradients: the final norm and a head of its own take the last number here; mergekit 0.1.5 gives them "
                "the first"
            )
        return rules[0]["value"] if end == 0 else rules[: end + 1]

    def _given(self, name: str, model: _Input | None) -> list[tuple[str, object]]:
        """Where a parameter is given, and its setting there: the model's own first, then the slice's, then the rest."""
        self.used.add(name)
        own = [i for i in self.inputs if name in (i.parameters or {}) and model in (None, i)]
        if model is None and own:
            raise self.error(
                f"models: {own[0].model}: parameters.{name}",
                f"{self.method} has one for all models; move it to parameters",
            )
        found = [(f"models: {i.model}: parameters", i.parameters or {}) for i in own]
        return [
            (f"{where}.{name}", parameters[name]) for where, parameters in [*found, *self.shared] if name in parameters
        ]

    def by_model(self, name: str, default: float) -> Setting | dict[str, Setting]:
        """A parameter that each model may have its own of: by model, or one setting where all have the same."""
        found = {i.model: self.schedule(name, i, default) for i in self.members}
        (first, *others) = found.values()
        return found if any(other != first for other in others) else first

    def common(self, name: str, default: float) -> Setting:
        """A parameter that each model may have its own of in mergekit, but all share here."""
        (first, *others) = self.members
        found = self.schedule(name, first, default)
        for other in others:
            if (its := self.schedule(name, other, default)) != found:
                raise self.error(
                    f"models: {other.model}: parameters.{name}",
                    f"{json.dumps(its)}, but {json.dumps(found)} for {first.model}; {self.method} has one {name} for "
                    "all models here: make them the same",
                )
        return found

    def number(self, name: str, setting: Setting) -> float:
        """Refuse a setting that isn't one number."""
        if isinstance(setting, list):
            raise self.error(f"parameters.{name}", f"{self.method} has one number for all tensors here, not a schedule")
        return setting

    def flag(self, name: str, default: bool) -> bool:
        """A parameter that is true or false, for all models and tensors; in any way that mergekit reads as one."""
        for where, value in self._given(name, None):
            try:
                return _FLAG.validate_python(value)
            except ValidationError as e:
                raise self.error(where, "true or false is expected, for all tensors") from e
        return default

    def weights(self, inputs: Sequence[_Input]) -> dict[str, Setting]:
        return {i.model: self.schedule("weight", i, None) for i in inputs}

    def dropped(self) -> list[str]:
        """Remarks on what was given but changes nothing."""
        own = [(f"models: {i.model}: parameters", i.parameters or {}) for i in self.inputs]
        given = [(where, name) for where, parameters in [*own, *self.shared] for name in parameters]
        remarks = [f"{where}.{name}: changes nothing here; left out" for where, name in given if name not in self.used]
        for name in ("dtype", "out_dtype"):
            if getattr(self.config, name) is not None:
                remarks.append(f"{name}: left out; sums are in float32, and the aligned model's dtypes are written")
        return remarks

    def _rules(self, where: str, setting: object) -> list[Rule]:
        """A setting as rules; the one that matches every tensor has no filter."""
        rules = _listed(setting) or [setting]
        if not isinstance(rules[0], dict):
            return [{"value": self._numbers(where, setting)}]
        return [self._rule(where, rule) for rule in rules]

    def _rule(self, where: str, rule: object) -> Rule:
        given = cast("dict[str, object]", rule) if isinstance(rule, dict) else {}
        if not {"value"} <= set(given) <= {"filter", "value"}:
            raise self.error(where, f"{rule}: a rule is a value and perhaps a filter")
        numbers, name = self._numbers(where, given["value"]), given.get("filter")
        return {"value": numbers} if name in (None, "*", "") else {"filter": str(name), "value": numbers}

    def _numbers(self, where: str, value: object) -> Numbers:
        if numbers := _listed(value):
            return [self._number(where, number) for number in numbers]
        return self._number(where, value)

    def _number(self, where: str, value: object) -> float:
        try:
            number = float(str(value))  # YAML reads 1e-5 as a string
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(where, f"{value}: a number, a list of numbers or rules are expected")
        return value if isinstance(value, int) else number


def _listed(value: object) -> list[object] | None:
    """A list as YAML gives it; None for anything else."""
    return cast("list[object]", value) if isinstance(value, list) else None


def _read(path: Path) -> _Merge:
    """
    Raises:
        ManifestError: it can't be read, is no configuration, or merges parts of models.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError as e:
        raise ManifestError(f"{path}: no such configuration") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ManifestError(f"{path}: can't be read ({e})") from e
    except yaml.YAMLError as e:
        raise ManifestError(f"{path}: no YAML of one document: {' '.join(str(e).split())}") from e
    config = parse(_Config, document, path.parent, str(path))
    merge = _Merge(path, config, config.base_model, [], [("parameters", config.parameters or {})])
    if config.modules:
        raise merge.error("modules", "models of several modules aren't merged here; merge the language model by models")
    if (config.models is None) == (config.slices is None):
        raise merge.error("models", "give models, or slices, but not both")
    if config.models is not None:
        merge.inputs = [*config.models]
        if merge.base is not None and merge.adds_base:
            merge.inputs.append(_Input(model=merge.base))  # whatever the method makes of it
    else:
        _take_slices(merge, config.slices or [])
    listed = [i.model for i in merge.inputs]
    if twice := sorted({model for model in listed if listed.count(model) > 1}):
        raise merge.error("models", f"{twice[0]} is listed twice; list it once")
    if not merge.members:
        raise merge.error("models", "there is none but the base model")
    return merge


def _take_slices(merge: _Merge, slices: Sequence[_Slice]) -> None:
    """Take a configuration's slice as its models, which is the same if there is one slice and it has all layers."""
    if len(slices) != 1:
        raise merge.error("slices", "models aren't put together from layers here; give one slice over all layers")
    (only,) = slices
    ranges = {source.layer_range for source in only.sources}
    (whole, *others) = ranges
    if others or whole[0] != 0:
        raise merge.error("slices.0", "every source needs the same layer_range, from 0 to the number of layers")
    for source in only.sources:
        found = _num_layers(source.model)
        if found is not None and found != whole[1]:
            raise merge.error("slices.0", f"{source.model} has {found} layers, not {whole[1]}; none can be left out")
    merge.remarks.append(f"slices: taken as models; layers 0 to {whole[1]} have to be all there are")
    merge.inputs = [*only.sources]
    merge.base = only.base_model or merge.base
    listed = [source.model for source in only.sources]
    if merge.base is not None and merge.base not in listed and merge.method not in _TAKES_ALL:
        raise merge.error(
            "slices.0.sources", f"{merge.base} isn't among them, and mergekit's {merge.method} needs base_model there"
        )
    merge.shared.insert(0, ("slices.0.parameters", only.parameters or {}))


def _num_layers(model: str) -> int | None:
    """Of a model in a local folder; None for any other, which isn't looked at."""
    try:
        config = json.loads(Path(model).expanduser().joinpath("config.json").read_text())
        layers = text_field(config, "num_hidden_layers", "n_layer")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None


def _vocabulary(merge: _Merge, names: Mapping[str, str]) -> str | dict[str, str] | None:
    """The manifest's `checkpoint.vocabulary` for the tokenizer asked for; None if none is."""
    tokenizer, template = merge.config.tokenizer, merge.config.chat_template
    if tokenizer is not None and (tokenizer.tokens or tokenizer.pad_to_multiple_of):
        raise merge.error("tokenizer", "tokens and pad_to_multiple_of: no row is chosen or padded here")
    if template not in (None, "auto"):
        raise merge.error("chat_template", "it comes with the tokenizer; leave it out, put yours beside that")
    if template is not None:
        merge.remarks.append("chat_template: left out; it comes with the tokenizer")
    source = tokenizer.source if tokenizer is not None else merge.config.tokenizer_source
    if source is None or source == "union":
        return source
    source = source.removeprefix("model:")
    if source in ("base", merge.base):
        return "aligned"
    if source not in names:
        raise merge.error("tokenizer", f"{source} is no model of this merge; say base, union, or {', '.join(names)}")
    return {"model": names[source]}


# -- the methods ---------------------------------------------------------------------------------------------------


class _TaskVectors(NamedTuple):
    """One of mergekit's methods on task vectors, with its defaults."""

    method: str
    """What a manifest calls it."""
    elects: bool
    """Whether entries are kept by an election of their sign, as in TIES."""
    normalize: bool
    rescale: bool | None = None
    """None for a method that drops no entries."""


_TASK_VECTORS = {
    "task_arithmetic": _TaskVectors("task_arithmetic", elects=False, normalize=False),
    "ties": _TaskVectors("ties", elects=True, normalize=True, rescale=False),
    "dare_linear": _TaskVectors("dare", elects=False, normalize=False, rescale=True),
    "dare_ties": _TaskVectors("dare", elects=True, normalize=False, rescale=True),
    "breadcrumbs": _TaskVectors("breadcrumbs", elects=False, normalize=False, rescale=False),
    "breadcrumbs_ties": _TaskVectors("breadcrumbs", elects=True, normalize=False, rescale=False),
    "della": _TaskVectors("della", elects=True, normalize=True, rescale=True),
    "della_linear": _TaskVectors("della", elects=False, normalize=False, rescale=True),
}

_Fuse: TypeAlias = tuple[list[_Input], dict[str, Any]]
"""The models that take part, and the manifest's `fuse`, in which models still have mergekit's names."""


def _linear(merge: _Merge) -> _Fuse:
    """A mean of the models. A sum that isn't one scales the base model too, which nothing here does."""
    if merge.adds_base and not any("weight" in parameters for _, parameters in merge.shared):
        raise merge.error(
            "base_model",
            f"mergekit adds {merge.base} to the models, as it isn't listed, but there is no weight for it; list it "
            "with a weight, give parameters.weight, or leave base_model out",
        )
    _tell_of_base(merge)
    weights = merge.weights(merge.inputs)
    if merge.flag("normalize", True):
        return merge.inputs, {"method": "weight_average", "weights": weights}
    if not _add_up_to_one([*weights.values()]):
        raise merge.error(
            "parameters.normalize",
            "false scales the base model too, unless the weights add up to 1 in every layer; set it to true, or take "
            "task_arithmetic",
        )
    members = {i.model: weights[i.model] for i in merge.members}
    return merge.members, {"method": "task_arithmetic", "scale": 1.0, "weights": members}


def _tell_of_base(merge: _Merge) -> None:
    if merge.adds_base:
        merge.remarks.append(
            f"base_model: not listed, but mergekit's {merge.method} merges it like any other model, so it is one here; "
            "if it is the base alone, leave it out, and set base.aligned"
        )


def _add_up_to_one(weights: Sequence[Setting]) -> bool:
    """Whether they do in every layer. Known for numbers and gradients of one length; taken as no for all others."""
    gradients = [weight for weight in weights if isinstance(weight, list)]
    if len({len(gradient) for gradient in gradients}) > 1 or any(isinstance(part[0], dict) for part in gradients):
        return False
    count = len(gradients[0]) if gradients else 1
    rows = [_all_numbers(weight) * (1 if isinstance(weight, list) else count) for weight in weights]
    return all(abs(sum(column) - 1.0) <= 1e-6 for column in zip(*rows, strict=True))


def _task_vectors(merge: _Merge) -> _Fuse:
    kind = _TASK_VECTORS[merge.method]
    _need_base(merge)
    fuse: dict[str, Any] = {"method": kind.method, "weights": merge.weights(merge.members)}
    normalize = merge.flag("normalize", kind.normalize)
    if normalize and kind.elects:
        _refuse_negative(merge, fuse["weights"])
    elif normalize:
        fuse["weights"] = _normalized(merge, fuse["weights"])
    scale = merge.schedule("lambda", None, 1.0)
    if kind.rescale is None:
        return merge.members, fuse | {"scale": scale}
    if (rescale := merge.flag("rescale", kind.rescale)) != kind.rescale:
        fuse["rescale"] = rescale
    fuse["consensus"] = ("mean" if normalize else "sum") if kind.elects else "none"
    fuse["scale"] = merge.number("lambda", scale)
    return merge.members, fuse | _sparse(merge, kind.method)


def _sparse(merge: _Merge, method: str) -> dict[str, Any]:
    """The settings for which entries of the task vectors are dropped: none, where no density is given."""
    density = merge.by_model("density", 1.0)
    if method == "ties":
        return {"density": density, "trim": "tensor"}
    if method == "breadcrumbs":
        return {"density": density, "outliers": merge.number("gamma", merge.common("gamma", 0.01))}
    if merge.flag("rescale", True):
        merge.remarks.append(f"{merge.method}: what stays is divided by its probability; mergekit keeps the L1 norm")
    if method == "della":
        return {"density": density, "epsilon": merge.number("epsilon", merge.common("epsilon", 0.15))}
    if isinstance(density, dict):
        return {"drop_rate": {model: _without(setting) for model, setting in density.items()}}
    return {"drop_rate": _without(density)}


def _without(share: Setting) -> Setting:
    """1 − every number of a schedule."""
    if not isinstance(share, list):
        return round(1.0 - share, 12)
    parts: list[Any] = [
        part | {"value": _without(part["value"])} if isinstance(part, dict) else _without(part) for part in share
    ]
    return parts


def _normalized(merge: _Merge, weights: Mapping[str, Setting]) -> dict[str, Setting]:
    """The weights, divided by their sum."""
    if any(isinstance(weight, list) for weight in weights.values()):
        raise merge.error(
            "parameters.normalize", "true needs plain numbers as weights here; or take merge_method linear"
        )
    numbers = {model: merge.number("weight", weight) for model, weight in weights.items()}
    if (total := sum(numbers.values())) <= 0.0:
        raise merge.error("parameters.normalize", f"the weights add up to {total:g}; more than 0 is needed")
    return {model: number / total for model, number in numbers.items()}


def _refuse_negative(merge: _Merge, weights: Mapping[str, Setting]) -> None:
    for model, weight in weights.items():
        if any(number < 0.0 for number in _all_numbers(weight)):
            raise merge.error(
                f"models: {model}: parameters.weight",
                "a mean with negative weights is another here; set parameters.normalize to false",
            )


def _all_numbers(setting: Setting) -> list[float]:
    if not isinstance(setting, list):
        return [setting]
    return [n for part in setting for n in _all_numbers(part["value"] if isinstance(part, dict) else part)]


def _slerp(merge: _Merge) -> _Fuse:
    """From the base model to another. The base model's task vector is zero, so the arc between the two is a line."""
    _need_base(merge)
    if len(merge.members) != 1:
        raise merge.error("models", f"slerp goes from base_model to one other model, not to {len(merge.members)}")
    merge.remarks.append(
        "slerp: a straight line from base_model, as mergekit's where the cosine is over 0.9995; with base.aligned set "
        "to a model that both were tuned from, it is an arc between their task vectors"
    )
    assert merge.base is not None
    return [_Input(model=merge.base), *merge.members], {"method": "slerp", "t": merge.schedule("t", None, None)}


def _multislerp(merge: _Merge) -> _Fuse:
    _tell_of_task_vectors(merge, merge.base is None)
    if len(merge.members) > 1:
        merge.remarks.append(
            "multislerp: one step of the Karcher mean of the directions here; mergekit's result is their normalised "
            "mean, since its tangents add up to zero"
        )
    fuse: dict[str, Any] = {"method": "multi_slerp", "weights": merge.weights(merge.members)}
    normalize = merge.flag("normalize_weights", True) or len(merge.members) == 1  # mergekit takes one as it is
    return merge.members, fuse if normalize else fuse | {"normalize_weights": False}


def _nuslerp(merge: _Merge) -> _Fuse:
    _tell_of_task_vectors(merge, merge.base is None)
    if len(merge.members) != 2:
        raise merge.error("models", f"nuslerp takes two models beside base_model, not {len(merge.members)}")
    fuse: dict[str, Any] = {"method": "nuslerp", "weights": merge.weights(merge.members)}
    by_column = merge.flag("nuslerp_row_wise", False)  # mergekit takes vectors along the first axis then
    if not merge.flag("nuslerp_flatten", True):
        fuse["vectors"] = "columns" if by_column else "rows"
    return merge.members, fuse


def _nearswap(merge: _Merge) -> _Fuse:
    _need_base(merge)
    if len(merge.members) != 1:
        raise merge.error("models", f"nearswap moves base_model towards one other model, not {len(merge.members)}")
    return merge.members, {"method": "nearswap", "t": merge.schedule("t", None, None)}


def _ram(merge: _Merge) -> _Fuse:
    _need_base(merge)
    defaults = {"epsilon": 1e-5} | ({"r": 0.1, "alpha": 0.2} if merge.method == "ramplus_tl" else {})
    given = {name: merge.number(name, merge.schedule(name, None, default)) for name, default in defaults.items()}
    return merge.members, {"method": merge.method, **given}


def _karcher(merge: _Merge) -> _Fuse:
    _tell_of_base(merge)
    _tell_of_task_vectors(merge, True)
    steps = merge.number("max_iter", merge.schedule("max_iter", None, 10))
    tolerance = merge.number("tol", merge.schedule("tol", None, 1e-5))
    return merge.inputs, {"method": "karcher", "max_iter": steps, "tol": tolerance}


def _tell_of_task_vectors(merge: _Merge, differs: bool) -> None:
    if differs:
        merge.remarks.append(
            f"{merge.method}: of the task vectors on base.aligned here; mergekit's is of the weights, where it hardly "
            "differs from linear"
        )


def _model_stock(merge: _Merge) -> _Fuse:
    _need_base(merge)
    if len(merge.members) < 2:
        raise merge.error("models", "model_stock needs two or more beside the base model")
    filter_wise = merge.flag("filter_wise", False)
    merge.remarks.append(
        "model_stock: where the mean cosine of the task vectors is under 0 the base model stays here; mergekit's t is "
        "negative there, and moves away from them"
    )
    return merge.members, {"method": "model_stock"} | ({"filter_wise": True} if filter_wise else {})


def _sce(merge: _Merge) -> _Fuse:
    _need_base(merge)
    return merge.members, {"method": "sce", "select": merge.schedule("select_topk", None, 1.0)}


def _arcee_fusion(merge: _Merge) -> _Fuse:
    _need_base(merge)
    if len(merge.members) != 1:
        raise merge.error("models", f"arcee_fusion puts one model into base_model, not {len(merge.members)}")
    merge.remarks.append("arcee_fusion: quartiles of all entries; mergekit draws a million of a larger tensor's")
    return merge.members, {"method": "arcee_fusion"}


def _need_base(merge: _Merge) -> None:
    if merge.base is None:
        raise merge.error("base_model", f"missing; {merge.method} needs it")


_METHODS: dict[str, Callable[[_Merge], _Fuse]] = {
    "linear": _linear,
    **dict.fromkeys(_TASK_VECTORS, _task_vectors),
    "slerp": _slerp,
    "multislerp": _multislerp,
    "nuslerp": _nuslerp,
    "nearswap": _nearswap,
    **dict.fromkeys(("ram", "ramplus_tl"), _ram),
    "karcher": _karcher,
    "model_stock": _model_stock,
    "sce": _sce,
    "arcee_fusion": _arcee_fusion,
}

_TAKES_ALL = ("linear", "karcher")
"""Methods of mergekit's for which the base model is a model like any other, and need not be there."""

_REFUSED = {
    "passthrough": "it copies one model's layers, and models aren't put together from layers here; there is nothing to "
    "fuse in a single model: give it as a model, with a variant that realigns it"
}


# -- names ---------------------------------------------------------------------------------------------------------


def _renamed(fuse: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """`fuse` with the manifest's names in all settings by model."""
    by_model = {key: cast("dict[str, object]", value) for key, value in fuse.items() if isinstance(value, dict)}
    return {**fuse, **{key: {names[model]: v for model, v in value.items()} for key, value in by_model.items()}}


def _names(models: Sequence[str]) -> dict[str, str]:
    """A name for each model, made of the end of its path; a number is added where two would be the same."""
    found: dict[str, str] = {}
    for model in models:
        name = _name(model.rpartition("+")[2].partition("@")[0].rstrip("/").rpartition("/")[2])
        taken = {*found.values(), *RESERVED_NAMES}
        numbered = (f"{name[:76]}-{i}" for i in range(2, 1000))
        found[model] = name if name not in taken else next(n for n in numbered if n not in taken)
    return found


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).lstrip("-_")[:80] or "model"
