"""Whether a model belongs to the aligned one: every tensor has its partner, of the same shape."""

from __future__ import annotations

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model
from fleet.checkpoint.modules import HEADS, TOKEN_TABLES, canonical_shape, is_transposed
from fleet.core.errors import CheckpointError, some
from fleet.core.identity import Json

ARCHITECTURE_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rope_theta",
    "hidden_act", "num_local_experts", "num_experts",
)  # fmt: skip
"""What must agree in `config.json` between a base and a full fine-tune for their difference to mean anything."""


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
    weights = {f"{name}.weight" for name in (*adapter.modules, *_saved_modules(adapter))}
    tied = {name for name in weights | set(adapter.replaced) if _is_tied(aligned, name)}
    if tied:
        # One tensor of the base has two uses here, and PEFT treats them apart: a LoRA changes one use when the adapter
        # runs and both when it is merged, and merging a saved embedding or head unties the two.
        problems.append(
            f"the base ties its output head to its embedding, and the adapter changes one of them ({some(tied)}); no "
            "tied model says the same: give base models with an lm_head of their own (from_pretrained(…, "
            "tie_word_embeddings=False), copy the embedding into lm_head, save_pretrained)"
        )
    for name, module in adapter.modules.items():
        base = aligned.tensors.get(f"{name}.weight")
        if base is None:
            if f"{name}.weight" not in tied:
                problems.append(f"module {name} is not in the base")
        elif (shape := canonical_shape(aligned, base.name)) != module.shape:
            problems.append(f"module {name} is {module.shape}, but the base's is {shape}")
        if module.bias is not None and f"{name}.bias" not in aligned.tensors:
            problems.append(f"module {name} has no bias in the base that the adapter's lora_bias could be added to")
    for name, info in adapter.replaced.items():
        base = aligned.tensors.get(name)
        if base is None:
            if name not in tied:
                problems.append(f"tensor {name} is not in the base")
        elif base.shape != info.shape:
            problems.append(
                f"tensor {name} is {info.shape}, but the base's is {base.shape}; an adapter with a vocabulary of its "
                "own size has no task vector: fold it into its base with that vocabulary (PEFT's merge_and_unload), "
                "give the full model with its tokenizer, and set checkpoint.vocabulary"
            )
        elif is_transposed(aligned, name):
            # An adapter's own files don't say how its base stores a tensor, and a square one wouldn't show it.
            problems.append(
                f"tensor {name} is saved whole, as (d_in, d_out); fold the adapter into its base (PEFT's "
                "merge_and_unload) and give the full model"
            )
    for entry in _saved_modules(adapter):
        lost = [n for n in aligned.tensors if _is_within(n, entry) and n not in adapter.replaced]
        if lost:
            problems.append(f"modules_to_save names {entry}, but the adapter holds no {some(lost)}")
    return problems


def _is_tied(aligned: FullModel, name: str) -> bool:
    """Whether a tensor is the embedding or head of a tied base: one without a head of its own in its files."""
    if not set(name.split(".")) & (TOKEN_TABLES | HEADS) or aligned.config.get("tie_word_embeddings") is False:
        return False
    return not any(set(n.split(".")) & HEADS for n in aligned.tensors)


def _saved_modules(adapter: Adapter) -> list[str]:
    match adapter.config.get("modules_to_save"):
        case [*names]:
            return [name for name in names if isinstance(name, str)]
        case _:
            return []


def _is_within(tensor: str, entry: str) -> bool:
    """Whether a tensor is in a module that PEFT's `modules_to_save` names by the end of the module's name."""
    parts = tensor.split(".")[:-1]
    return any(".".join(parts[: i + 1]).endswith(entry) for i in range(len(parts)))


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
    grown = False
    for name in sorted(set(model.tensors) & set(aligned.tensors)):
        if model.tensors[name].shape != aligned.tensors[name].shape:
            problems.append(
                f"tensor {name} is {model.tensors[name].shape}, the base's is {aligned.tensors[name].shape}"
            )
            grown = grown or bool(set(name.split(".")) & (TOKEN_TABLES | HEADS))
    if grown:
        problems.append(
            'if tokens were added or rows padded, set checkpoint.vocabulary to "aligned", "union" or {"model": NAME}'
        )
    return problems


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
