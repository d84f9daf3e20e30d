"""Whether a model belongs to the aligned one: every tensor has its partner, of the same shape, and computes alike."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.configs import differences, is_nested, text_field, ties_head
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model
from fleet.checkpoint.modules import canonical_shape, is_transposed
from fleet.checkpoint.tables import HEADS, TOKEN_TABLES, output_head, same_values, token_table
from fleet.core.errors import CheckpointError, shown, some

_MODELS_WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes are called that need an output head to say anything."""


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.")

_UNTIE = (
    "save the aligned model with a head of its own (m = AutoModelForCausalLM.from_pretrained(ALIGNED, "
    "tie_word_embeddings=False); m.lm_head.weight.data = m.get_input_embeddings().weight.data.clone(); "
    "m.save_pretrained(OUT); the tokenizer too) and give it as base.aligned: tied full models are read likewise"
)


def check_belongs(model: Model, aligned: FullModel) -> None:
    """Every tensor of `model` has its partner in the aligned model, of the same shape, and the two compute the same
    with the same tensors: what is subtracted, fused and served under the aligned model's config is weights alone.

    An adapter has no config of its own to compare. A base model that is only subtracted is held to the same: where its
    config differs, alignment changed more than its weights say.

    Raises:
        CheckpointError: listing missing, extra and mis-shaped tensors and every field of the configs that differs.
    """
    problems = _adapter_problems(model, aligned) if isinstance(model, Adapter) else _full_model_problems(model, aligned)
    if problems:
        raise CheckpointError(f"{model.folder.uri} doesn't fit {aligned.folder.uri}: " + "; ".join(problems))


def check_config(model: FullModel) -> None:
    """A base model's config can be that of its tensors: engines build by the one and load the other.

    Raises:
        CheckpointError: a size is no size, or not that of the tensors; no `model_type`.
    """
    if problem := next(_config_problems(model), ""):
        raise CheckpointError(f"{model.folder.uri}: config.json: {problem}")


def _config_problems(model: FullModel) -> Iterator[str]:
    config, table = model.config, token_table(model.tensors)
    if not isinstance(kind := config.get("model_type"), str):
        yield f"model_type is {shown(kind)}, not the name of an architecture; copy config.json from the original again"
    sizes = {name: text_field(config, name) for name in _SIZES}
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
            yield f"{name} is {shown(size)}, not a positive whole number; copy config.json from the original again"
    rows = table.shape[0] if table is not None else None
    if rows is not None and sizes["vocab_size"] not in (None, rows):
        yield f"vocab_size is {sizes['vocab_size']}, but {table and table.name} has {rows} rows; write {rows}"
    layers = {int(m[1]) for name in model.tensors if (m := _LAYER.search(name))}
    count, extra = sizes["num_hidden_layers"], text_field(config, "num_nextn_predict_layers")
    if layers and not is_nested(config) and not extra and count not in (None, max(layers) + 1):
        yield f"num_hidden_layers is {count}, but the files hold {max(layers) + 1} layers; write that"


def check_head(model: FullModel) -> None:
    """A model's output head is what its config says: the embedding, or a tensor of its own.

    Raises:
        CheckpointError: it is tied and its files hold another head; or it isn't, and they hold none.
    """
    if problem := _head_problem(model):
        raise CheckpointError(f"{model.folder.uri}: {problem}")


def _head_problem(model: FullModel) -> str:
    """What is wrong with a model's output head, and what to do; empty if nothing is."""
    head, table = model.tied_head, token_table(model.tensors)
    if head is not None and table is not None and not same_values(model.folder, head, table):
        return (
            f"config.json ties the output head to the embedding, but {head.name} differs from {table.name}, and some "
            'engines would take the one, some the other; write "tie_word_embeddings": false if the head was trained, '
            "or save the model without it"
        )
    if (alone := model.head_for_table) is not None:
        return (
            f"config.json ties the output head to the embedding, and the files hold {alone.name} alone, where an "
            "engine would find no embedding; save it with transformers, which takes either: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT), the tokenizer too"
        )
    classes = model.config.get("architectures")
    needs_head = isinstance(classes, list) and any(str(name).endswith(_MODELS_WITH_HEADS) for name in classes)
    if table is None or not needs_head or ties_head(model.config):
        return ""
    others = [t for t in model.tensors.values() if t.shape == table.shape and t is not table]
    return (
        ""
        if others
        else (
            f"config.json says that the output head is no copy of the embedding, but the files hold no head beside "
            f'{table.name}; write "tie_word_embeddings": true if they are one, or save the model with its lm_head'
        )
    )


def _adapter_problems(adapter: Adapter, aligned: FullModel) -> list[str]:
    problems: list[str] = []
    weights = {f"{name}.weight" for name in (*adapter.modules, *_saved_modules(adapter))}
    tables = {name for name in weights | set(adapter.replaced) if set(name.split(".")) & (TOKEN_TABLES | HEADS)}
    # With `ensure_weight_tying` PEFT keeps the two uses of a tied table one, and what is left of the adapter says it.
    apart = not adapter.keeps_tie or any(set(name.split(".")) & HEADS for name in (*adapter.modules, *adapter.replaced))
    tied = tables if _is_tied(aligned) and apart else set[str]()
    if tied:
        problems.append(_untied_by_adapter(adapter, aligned, tied))
    if tables and adapter.keeps_tie and output_head(aligned.tensors) is not None:
        problems.append(
            "ensure_weight_tying: the adapter changes a tied base's embedding and output head as one, but this base "
            "has a head of its own; give the tied base it was trained on, or merge it there and give the full model"
        )
    absent: list[str] = []
    for name, module in adapter.modules.items():
        base = aligned.tensors.get(f"{name}.weight")
        if base is None:
            if f"{name}.weight" not in tied:
                absent.append(name)
        elif (shape := canonical_shape(aligned, base.name)) != module.shape:
            problems.append(f"module {name} is {module.shape}, but the base's is {shape}")
        if module.bias is not None and f"{name}.bias" not in aligned.tensors:
            problems.append(f"module {name} has no bias in the base that the adapter's lora_bias could be added to")
    if absent:
        problems.append(f"module {some(absent)} is not in the base")
    for name, info in adapter.replaced.items():
        base = aligned.tensors.get(name)
        if base is None:
            if name not in tied:
                problems.append(f"tensor {name} is not in the base")
        elif base.shape != info.shape:
            if name not in tied:
                problems.append(
                    f"tensor {name} is {info.shape}, but the base's is {base.shape}; an adapter with a vocabulary of "
                    "its own size has no task vector: fold it into its base with that vocabulary (PEFT's "
                    "merge_and_unload), give the full model with its tokenizer, and set checkpoint.vocabulary"
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


def _untied_by_adapter(adapter: Adapter, aligned: FullModel, tied: set[str]) -> str:
    """What to do where an adapter changes one of a tied table's two uses, or both apart.

    PEFT treats the two apart: a LoRA changes one use when the adapter runs and both when it is merged, and merging a
    saved embedding or head unties them.
    """
    table = token_table(aligned.tensors)
    rows = {info.shape[0] for name, info in adapter.replaced.items() if name in tied and info.shape}
    grown = sorted(rows - {table.shape[0]}) if table is not None else []
    steps = [_UNTIE]
    if grown:
        steps += [
            f"fold the adapter, whose tables have {grown[-1]} rows, into that (m.resize_token_embeddings("
            f"{grown[-1]}); PeftModel.from_pretrained(m, ADAPTER).merge_and_unload().save_pretrained(MERGED); the "
            "adapter's tokenizer too)",
            'give MERGED as the model\'s source, and set checkpoint.vocabulary to "union"',
        ]
    told = steps[0] if len(steps) == 1 else "; ".join(f"({i}) {step}" for i, step in enumerate(steps, 1))
    return (
        f"the base ties its output head to its embedding, and the adapter changes them apart ({some(tied)}), which no "
        f"tied model says: {told}"
    )


def _is_tied(aligned: FullModel) -> bool:
    """Whether the base's head is its embedding: there is no head in its files, and no word against it in its config."""
    said = text_field(aligned.config, "tie_word_embeddings")
    return said is not False and not any(set(name.split(".")) & HEADS for name in aligned.tensors)


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
    problems: list[str] = []
    if unlike := differences(model.config, aligned.config):
        problems.append(
            f"its config.json computes something else with the same weights ({', '.join(map(str, unlike))}); write the "
            "base's values if that is a slip, else give base models of its configuration"
        )
    if problem := _head_problem(model):
        problems.append(problem)
    if missing := sorted(set(aligned.tensors) - set(model.tensors)):
        problems.append(f"missing tensors: {some(missing)}")
    if extra := sorted(set(model.tensors) - set(aligned.tensors)):
        problems.append(f"extra tensors: {some(extra)}")
    if _is_tied(aligned) and (head := output_head(model.tensors)) is not None:
        problems.append(f"{head.name} is a head of its own, and the base ties its head to its embedding: {_UNTIE}")
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
