"""What a model is, read from its headers and JSON alone: a full model, or a LoRA adapter on one.

Models are joined by canonical name: a module is named by its base tensor without `.weight`
(`model.layers.0.self_attn.q_proj`), whatever prefix PEFT or a wrapper puts before it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

from fleet.checkpoint.headers import DTYPE_BYTES, TensorInfo, read_headers
from fleet.errors import CheckpointError
from fleet.identity import Json
from fleet.store import Folder

PEFT_PREFIX = "base_model.model."

ARCHITECTURE_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rope_theta",
    "hidden_act", "num_local_experts", "num_experts",
)  # fmt: skip
"""What must agree in `config.json` between a base and a full fine-tune for their difference to mean anything."""

_DERIVED_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias)$")
"""Buffers that old checkpoints carry and every loader recomputes: they are dropped, from every model alike."""

MODULE_EXCLUDED = ("embed_tokens", "lm_head", "wte", "wpe")
"""2-D weights that are look-up tables or the output head, not modules in the sense of the realign methods."""

_LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

# What a LoRA config may ask for that W + (alpha/r) B A alone does not say; each with the value that asks for nothing.
_UNSUPPORTED_ADAPTER_FIELDS: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
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
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


_COMPANIONS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|chat_template\.jinja|tokenizer\.model|merges\.txt"
)


@dataclass(frozen=True)
class FullModel:
    """A full model's headers. `tensors` leaves out derived buffers and a tied `lm_head`."""

    folder: Folder
    config: dict[str, Json]
    tensors: dict[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())


@dataclass(frozen=True)
class LoraModule:
    """One adapted Linear: `a` is (rank, d_in), `b` is (d_out, rank), and the update is `scale * b @ a`."""

    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's headers: canonical module name -> factors."""

    folder: Folder
    config: dict[str, Json]
    modules: dict[str, LoraModule]

    @property
    def max_rank(self) -> int:
        return max(m.rank for m in self.modules.values())

    @property
    def num_bytes(self) -> int:
        return sum(m.a.num_bytes + m.b.num_bytes for m in self.modules.values())


Model: TypeAlias = FullModel | Adapter


def read_model(folder: Folder) -> Model:
    """A folder's model, told apart by its own files.

    Raises:
        CheckpointError: neither `config.json` nor `adapter_config.json`, damaged files, unsupported dtypes or LoRA
        options.
    """
    files = folder.files()
    if "adapter_config.json" in files:
        return _read_adapter(folder)
    if "config.json" in files:
        return _read_full_model(folder)
    raise CheckpointError(
        f"{folder.uri}: neither config.json (a model) nor adapter_config.json (an adapter) is there; "
        f"found: {', '.join(files) or 'nothing'}"
    )


def _read_json(folder: Folder, name: str) -> dict[str, Json]:
    try:
        value = json.loads(folder.read(name))
    except ValueError as e:
        raise CheckpointError(f"{folder.uri}/{name}: not valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder.uri}/{name}: not a JSON object")
    return value


def _check_dtypes(where: str, tensors: dict[str, TensorInfo]) -> None:
    wrong = [f"{t.name} ({t.dtype})" for t in tensors.values() if t.dtype not in DTYPE_BYTES]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors are neither float32, float16 nor bfloat16, so no exact task vector exists; "
            f"give the unquantised checkpoint: {', '.join(wrong[:8])}"
        )


def _read_full_model(folder: Folder) -> FullModel:
    config = _read_json(folder, "config.json")
    tensors = {n: t for n, t in read_headers(folder, "model").items() if not _DERIVED_BUFFER.search(n)}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    _check_dtypes(folder.uri, tensors)
    return FullModel(folder, config, tensors)


def _read_adapter(folder: Folder) -> Adapter:
    config = _read_json(folder, "adapter_config.json")
    _check_adapter_config(folder.uri, config)
    tensors = read_headers(folder, "adapter")
    _check_dtypes(folder.uri, tensors)
    factors: dict[str, dict[str, TensorInfo]] = {}
    unknown: list[str] = []
    for name, info in tensors.items():
        match = _LORA_TENSOR.fullmatch(name.removeprefix(PEFT_PREFIX))
        if match is None or len(info.shape) != 2:
            unknown.append(name)
        else:
            factors.setdefault(match["module"], {})[match["factor"]] = info
    if unknown:
        raise CheckpointError(f"{folder.uri}: tensors that are no LoRA factor of a Linear: {sorted(unknown)}")
    if not factors:
        raise CheckpointError(f"{folder.uri}: the adapter has no LoRA factors")
    return Adapter(folder, config, {m: _lora_module(folder.uri, config, m, f) for m, f in sorted(factors.items())})


def _check_adapter_config(where: str, config: dict[str, Json]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; only LORA is")
    asked = [f for f, off in _UNSUPPORTED_ADAPTER_FIELDS.items() if f in config and config[f] not in off]
    if asked:
        told = ", ".join(f"{f}={config[f]!r}" for f in asked)
        raise CheckpointError(
            f"{where}: {told}: this adapter is more than W + (alpha/r) B A; "
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


def _lora_module(where: str, config: dict[str, Json], module: str, factors: dict[str, TensorInfo]) -> LoraModule:
    if set(factors) != {"A", "B"}:
        raise CheckpointError(f"{where}: module {module} has only lora_{''.join(factors)}; its other factor is missing")
    a, b = factors["A"], factors["B"]
    rank = a.shape[0]
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float):
            raise CheckpointError(f"{where}: adapter_config.json: {field} is {config.get(field)!r}, not a number")
    if rank == 0:
        raise CheckpointError(f"{where}: module {module}: lora_A is {a.shape}, an update of rank 0")
    declared = pattern_value(config.get("rank_pattern"), module, float(config["r"]))  # type: ignore[arg-type]
    if b.shape[1] != rank or rank != declared:
        raise CheckpointError(
            f"{where}: module {module}: lora_A is {a.shape} and lora_B is {b.shape}, but adapter_config.json says "
            f"rank {declared:g}"
        )
    alpha = pattern_value(config.get("alpha_pattern"), module, float(config["lora_alpha"]))  # type: ignore[arg-type]
    return LoraModule(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def is_companion(file: str, model: Model) -> bool:
    """Whether a file beside the weights decides what the model does: how it is built, and how it is prompted."""
    if isinstance(model, Adapter):
        return file == "adapter_config.json"
    return _COMPANIONS.fullmatch(file) is not None


def require_full_model(model: Model, role: str) -> FullModel:
    """The model itself, or a CheckpointError saying which role (`base.aligned`) needs a full one."""
    if isinstance(model, FullModel):
        return model
    raise CheckpointError(f"{role}: {model.folder.uri} is an adapter, but this has to be a full model")


def check_belongs(model: Model, aligned: FullModel) -> None:
    """Every tensor of `model` has its partner in the aligned model, of the same shape.

    Raises:
        CheckpointError: listing every missing, extra or mis-shaped tensor and every architecture field that differs.
    """
    problems = _adapter_problems(model, aligned) if isinstance(model, Adapter) else _full_model_problems(model, aligned)
    if problems:
        raise CheckpointError(f"{model.folder.uri} doesn't fit {aligned.folder.uri}: " + "; ".join(problems))


def _adapter_problems(adapter: Adapter, aligned: FullModel) -> list[str]:
    problems: list[str] = []
    for name, module in adapter.modules.items():
        base = aligned.tensors.get(f"{name}.weight")
        shape = (module.b.shape[0], module.a.shape[1])
        if base is None:
            problems.append(f"module {name} is not in the base")
        elif set(name.split(".")) & set(MODULE_EXCLUDED):
            problems.append(
                f"module {name} is an embedding or the output head, which no engine serves as LoRA; "
                "fold the adapter in (PEFT's merge_and_unload) and give the full model"
            )
        elif base.shape != shape:
            problems.append(f"module {name} is {shape}, but the base's is {base.shape}")
    return problems


def _full_model_problems(model: FullModel, aligned: FullModel) -> list[str]:
    ours, theirs = _architecture(model.config), _architecture(aligned.config)
    problems = [
        f"config.json: {field} is {ours[field]!r}, the base's is {theirs[field]!r}"
        for field in ARCHITECTURE_FIELDS
        if field in ours and field in theirs and ours[field] != theirs[field]
    ]
    if missing := sorted(set(aligned.tensors) - set(model.tensors)):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if extra := sorted(set(model.tensors) - set(aligned.tensors)):
        problems.append(f"extra tensors: {', '.join(extra)}")
    for name in sorted(set(model.tensors) & set(aligned.tensors)):
        if model.tensors[name].shape != aligned.tensors[name].shape:
            problems.append(
                f"tensor {name} is {model.tensors[name].shape}, the base's is {aligned.tensors[name].shape}"
            )
    return problems


def is_module(info: TensorInfo) -> bool:
    """Whether a base tensor is the weight of a Linear that realign methods decide on."""
    parts = info.name.split(".")
    return len(info.shape) == 2 and parts[-1] == "weight" and not set(parts) & set(MODULE_EXCLUDED)


def touched_tensors(model: Model) -> list[str]:
    """Names of the base tensors a model has a task vector in, sorted."""
    return sorted(f"{m}.weight" for m in model.modules) if isinstance(model, Adapter) else sorted(model.tensors)


def _architecture(config: dict[str, Json]) -> dict[str, Json]:
    """What a config says of the architecture. A field it leaves to the default is not compared: transformers writes
    fewer or more of them by version, and `rope_theta` inside `rope_parameters` since version 5."""
    found = {field: config[field] for field in ARCHITECTURE_FIELDS if config.get(field) is not None}
    match config.get("rope_parameters"):
        case {"rope_theta": int() | float() as theta}:
            found["rope_theta"] = theta
        case _:
            pass
    return found
