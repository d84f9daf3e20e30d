"""What a `config.json` says of a model: where its fields are, whether its head is tied, and whether two compute alike.

The same tensors compute something else under another rope, norm or activation. So two configs are compared whole, as
their class in transformers reads them: defaults filled in, old and new spellings of one thing made one. What can change
no forward pass is left out (`_HARMLESS`, `_HARMLESS_NAMES` say what and why).
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from fleet.core.errors import CheckpointError
from fleet.core.identity import Json

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Under what a model of several modalities keeps its language model's config."""

TIED_BY_DEFAULT = frozenset({
    "aya_vision", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
    "blenderbot-small", "blip", "bloom", "camembert", "cohere", "cohere2", "cohere2_moe", "cohere2_vision",
    "cohere_compass_text", "cpmant", "ctrl", "data2vec-text", "deepseek_vl", "deepseek_vl_hybrid",
    "diffusion_gemma", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "falcon",
    "falcon_mamba", "florence2", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text",
    "gemma4", "gemma4_assistant", "gemma4_text", "gemma4_unified", "gemma4_unified_assistant",
    "gemma4_unified_text", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese",
    "granite_swa", "hunyuan_vl", "hyperclovax_vision_v2", "internvl", "janus", "jetmoe", "kimi_k25", "kosmos-2",
    "kosmos-2.5", "lfm2", "lfm2_moe", "lfm2_vl", "lighton_ocr", "mamba", "marian", "mbart", "megatron-bert",
    "minicpm3", "mistral3", "modernbert-decoder", "mpt", "mvp", "openai-gpt", "opt", "ovis2", "paddleocr_vl",
    "paligemma", "pegasus", "plbart", "pp_chart2table", "prophetnet", "recurrent_gemma", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "smollm3", "starcoder2", "t5gemma2", "trocr", "udop",
    "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "youtu", "zamba",
    "zamba2", "zaya",
})  # fmt: skip
"""The `model_type`s with a language model whose config class in transformers 5 ties the head where a file is silent."""

_HARMLESS = frozenset({
    # Where it comes from. A class's name in `architectures` adds nothing to model_type and the tensors' names.
    "name_or_path", "transformers_version", "architectures", "auto_map", "model_name", "finetuning_task",
    "task_specific_params", "unsloth_version", "unsloth_fixed",
    # How values are stored: fp8 is read as float32, other quantisations are refused, an engine has one dtype.
    "dtype", "torch_dtype", "quantization_config", "use_bfloat16",
    # How the same is computed: to rounding, nothing else changes.
    "use_cache", "attn_implementation", "pretraining_tp", "chunk_size_feed_forward", "gradient_checkpointing",
    "use_mamba_kernels", "torchscript", "cache_implementation",
    # What is returned beside logits, and what classifiers call their classes.
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "return_dict",
    "return_dict_in_generate", "id2label", "label2id", "num_labels", "problem_type",
    # Losses and noise of training.
    "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "input_jitter_noise", "aux_loss_alpha",
    "seq_aux", "layerdrop",
    # How to decode: an evaluation says that itself.
    "max_length", "min_length", "max_new_tokens", "do_sample", "num_beams", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "early_stopping", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    # Decided by tensors: whether there is a head of its own, and how many positions are learned.
    "tie_word_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
})  # fmt: skip

_HARMLESS_NAMES = re.compile(
    r"_.*"  # a library's own notes, as _name_or_path
    r"|.*dropout.*|.*_pdrop|.*drop_path.*"  # training only
    r"|initiali[sz]er_.*|init_(std|method|device)"  # of a model that is loaded, nothing is initialised
    r"|.*_token_(id|ids|index)"  # where a reply ends is each model's own
)

_LENGTH_SCALED_ROPES = frozenset({"dynamic", "yarn", "longrope", "su"})
"""Kinds of rope whose frequencies or scale follow from `max_position_embeddings`; for others it is only a limit."""

_ROPE_DEFAULTS: dict[str, dict[str, Json]] = {"yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True}}
"""What transformers' ropes (`modeling_rope_utils.py`) and vLLM's take where a kind's parameters are silent."""

_ACTIVATIONS = {
    "swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
"""Activations that are one function under two names."""

_SHOWN = 80
"""Characters of a value in a message."""


class Difference(NamedTuple):
    """A field, by its path in a config, that makes two models compute differently; None where one has no such field."""

    field: str
    ours: Json
    theirs: Json

    def __str__(self) -> str:
        return f"{self.field} is {_shown(self.ours)}, not {_shown(self.theirs)}"


def text_field(config: Mapping[str, Json], *names: str) -> Json:
    """A field of the language model, wherever the config has it; the first of several names; None without it."""
    for level in _levels(config):
        for name in names:
            if level.get(name) is not None:
                return level[name]
    return None


def has_field(config: Mapping[str, Json], name: str) -> bool:
    """Whether a config has a field of the language model at all, null or not."""
    return any(name in level for level in _levels(config))


def is_nested(config: Mapping[str, Json]) -> bool:
    """Whether the language model has a config of its own within this one."""
    return _nested(config)[1] is not None


def with_text_fields(config: Mapping[str, Json], changes: Mapping[str, Json]) -> dict[str, Json]:
    """A config with fields of the language model written where it has them, or else among that model's own."""
    name, part = _nested(config)
    here = {field: value for field, value in changes.items() if part is None or field in config}
    if part is None:
        return {**config, **here}
    below = {field: value for field, value in changes.items() if field not in here or has_field(part, field)}
    return {**config, **here, name: with_text_fields(part, below)}


def without_text_fields(config: Mapping[str, Json], fields: Collection[str]) -> dict[str, Json]:
    """A config without some fields of the language model, wherever it has them."""
    name, part = _nested(config)
    kept = {field: value for field, value in config.items() if field not in fields}
    return kept if part is None else {**kept, name: without_text_fields(part, fields)}


def _nested(config: Mapping[str, Json]) -> tuple[str, dict[str, Json] | None]:
    for name in _NESTED:
        part = config.get(name)
        if isinstance(part, dict):
            return name, part
    return "", None


def _levels(config: Mapping[str, Json]) -> list[Mapping[str, Json]]:
    """The config of the language model, and those around it, innermost first."""
    levels, part = [config], _nested(config)[1]
    while part is not None:
        levels.insert(0, part)
        part = _nested(part)[1]
    return levels


def ties_head(config: Mapping[str, Json]) -> bool:
    """Whether a config says that the output head is the embedding: in its words, or by its class's default.

    The outermost word counts, as for transformers 5 and vLLM.
    """
    outermost_first = _levels(config)[::-1]
    for level in outermost_first:
        if isinstance(said := level.get("tie_word_embeddings"), bool):
            return said
    return any(level.get("model_type") in TIED_BY_DEFAULT for level in outermost_first)


def differences(ours: Mapping[str, Json], theirs: Mapping[str, Json]) -> list[Difference]:
    """Every field of two configs by which the same tensors compute something else.

    Where transformers has no class for both, or refuses one of them, they are compared as they are written.
    """
    if _decisive(ours) == _decisive(theirs):
        return []
    if ours.get("model_type") != theirs.get("model_type"):
        return [Difference("model_type", ours.get("model_type"), theirs.get("model_type"))]
    first, second = _through_classes([ours, theirs])
    if first is None or second is None:
        return list(_differences("", _without_limit(_decisive(ours)), _without_limit(_decisive(theirs))))
    return list(_differences("", _in_one_spelling(_decisive(first)), _in_one_spelling(_decisive(second))))


def prepare_differences(configs: Iterable[Mapping[str, Json]], theirs: Mapping[str, Json]) -> None:
    """Read through their classes, in one go, all configs that `differences` would have to read one by one: each time
    takes a second or two, however many they are."""
    unlike = [config for config in configs if _decisive(config) != _decisive(theirs)]
    if unlike:
        _through_classes([*unlike, theirs])


_read: dict[str, dict[str, Json] | None] = {}
"""Config -> what its class makes of it."""


def _through_classes(configs: Sequence[Mapping[str, Json]]) -> list[dict[str, Json] | None]:
    keys = [json.dumps(config, sort_keys=True) for config in configs]
    new = list(dict.fromkeys(key for key in keys if key not in _read))
    _read.update(zip(new, _read_configs(new), strict=True))
    return [_read[key] for key in keys]


def _read_configs(configs: Sequence[str]) -> list[dict[str, Json] | None]:
    if not configs:
        return []
    if "torch" in sys.modules:
        from fleet.checkpoint.config_classes import class_fields

        return [class_fields(json.loads(config)) for config in configs]
    program = [sys.executable, "-P", str(Path(__file__).with_name("config_classes.py"))]
    done = subprocess.run(program, input=f"[{','.join(configs)}]", capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CheckpointError(f"the models' configs can't be read with transformers: {reason}")
    return json.loads(done.stdout)


def _decisive(config: Mapping[str, Json]) -> dict[str, Json]:
    """A config without what is harmless."""
    return {
        name: _decisive(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _HARMLESS and not _HARMLESS_NAMES.fullmatch(name)
    }


def _in_one_spelling(config: Mapping[str, Json]) -> dict[str, Json]:
    """A config that its class has read, with one spelling of what has several: a null is a field that is not there."""
    kept: dict[str, Json] = {
        name: _in_one_spelling(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not None
    }
    for rope in _ropes(kept):
        rope.pop("type", None)
        for name, default in _ROPE_DEFAULTS.get(str(rope.get("rope_type")), {}).items():
            rope.setdefault(name, default)
        if rope.get("partial_rotary_factor") == 1:
            del rope["partial_rotary_factor"]
    if "rope_parameters" in kept:
        kept.pop("partial_rotary_factor", None)  # a class's leftover: the one in `rope_parameters` is read
    _layers(kept)
    _heads(kept)
    for name in kept.keys() & {"hidden_act", "hidden_activation", "activation_function"}:
        kept[name] = _ACTIVATIONS.get(str(kept[name]), kept[name])
    return _without_limit(kept)


def _ropes(config: Mapping[str, Json]) -> list[dict[str, Json]]:
    """The parameters of a config's rope, or of that of each type of layer; a rope is told by its kind."""
    found = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    parts = [part for rope in found if isinstance(rope, dict) for part in (rope, *rope.values())]
    return [part for part in parts if isinstance(part, dict) and part.keys() & {"rope_type", "type"}]


def _without_limit(config: Mapping[str, Json]) -> dict[str, Json]:
    """A config without `max_position_embeddings`, where nothing is computed from it."""
    if any(rope.get("rope_type", rope.get("type")) in _LENGTH_SCALED_ROPES for rope in _ropes(config)):
        return {**config}
    return {name: value for name, value in config.items() if name != "max_position_embeddings"}


def _layers(config: dict[str, Json]) -> None:
    """Drops what the list of each layer's type was made from, and a window that no layer has."""
    match config.get("layer_types"):
        case [*types]:
            for name in ("use_sliding_window", "max_window_layers", "sliding_window_pattern"):
                config.pop(name, None)
            if not any("sliding" in str(kind) for kind in types):
                config.pop("sliding_window", None)
        case _:
            pass


def _heads(config: dict[str, Json]) -> None:
    """Writes out what a class leaves at null, for its model to fill in."""
    match config:
        case {"hidden_size": int(width), "num_attention_heads": int(heads)} if heads > 0:
            config.setdefault("num_key_value_heads", heads)
            config.setdefault("head_dim", width // heads)
        case _:
            pass


def _differences(path: str, ours: Json, theirs: Json) -> Iterator[Difference]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            yield from _differences(f"{path}.{name}" if path else name, ours.get(name), theirs.get(name))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        unlike = (i for i, pair in enumerate(zip(ours, theirs, strict=True)) if not _alike(*pair))
        for i in itertools.islice(unlike, 1):  # one layer that differs is enough to say so
            yield from _differences(f"{path}[{i}]", ours[i], theirs[i])
    elif not _alike(ours, theirs):
        yield Difference(path, ours, theirs)


def _alike(ours: Json, theirs: Json) -> bool:
    """Whether two values are one, numbers to float32's precision: that is what computes with them."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return _is_number(ours) and _is_number(theirs) and math.isclose(_float(ours), _float(theirs), rel_tol=1e-7)
    return ours == theirs


def _is_number(value: Json) -> TypeGuard[int | float]:
    return isinstance(value, int | float)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number with more digits than a float has
        return math.inf


def _shown(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
