"""How a candidate is prompted: which chat template, and which date if it writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fleet.checkpoint.chat_templates import ChatTemplate, check_asks
from fleet.checkpoint.companions import is_prompting
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import read_json
from fleet.checkpoint.tokens import num_token_rows, rowless_tokens, same_tokenizer
from fleet.core.errors import CheckpointError, ManifestError, some
from fleet.core.identity import Json, digest
from fleet.steps.context import PlanContext
from fleet.steps.sources import Source

CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Prompting:
    """How one candidate is prompted."""

    template: str | None = None
    """None where no model brings one, and no suite needs one."""
    date: str | None = None
    """What the template writes, as 2026-11-25; None if it writes no date."""
    spec: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """What of it a score's other inputs don't say."""


def prompting_like(context: PlanContext, source: Source) -> Prompting:
    """How a source is prompted, and what a method makes of it alone. A fused model is prompted like the aligned one,
    whose small files it is written with."""
    template = _chosen(context, source)
    if template is None:
        return Prompting()
    implied = _implied(source, context.bases.aligned)
    spec: dict[str, Json] = {} if template.text == implied else {"chat_template": digest(template.text)}
    date = context.date if template.writes_date else None
    return Prompting(template.text, date, spec if date is None else {**spec, "date": date})


def check_prompting(context: PlanContext, scored: Mapping[str, Source]) -> None:
    """Look whether every model that is scored has a template, and say where it is not simply its own.

    Args:
        scored: the references and the fine-tuned models, by their names in the table.

    Raises:
        ManifestError: a suite asks through a template, and a model has none.
        CheckpointError: a template fails on a user's turn, or writes nothing of it.
    """
    suites = [suite for suite in context.suites.values() if suite.uses_chat_template]
    if not suites:
        return
    found = {name: _chosen(context, source) for name, source in scored.items()}
    asked = [suite.name for suite in suites if suite.kind != "task"]
    if asked and (without := [name for name, template in found.items() if template is None]):
        raise ManifestError(
            f"evaluation: {some(asked)} goes through a chat template, but neither {some(without)} nor base.aligned has "
            "one; set evaluation.chat_template to a file with one, put a chat_template.jinja beside the tokenizer of "
            "base.aligned, or set chat: false in the suite"
        )
    texts = {template.text: name for name, template in reversed(found.items()) if template is not None}
    for text, name in texts.items():
        check_asks(name, text)
    aligned = context.bases.aligned
    of_aligned = rowless_tokens(context.bases.aligned_model)
    for name, template in found.items():
        source = scored[name]
        if template is not None and isinstance(source.model, FullModel):
            same = source is aligned or same_tokenizer(source.model, context.bases.aligned_model)
            _check_rows(name, source.model, template, of_aligned if same else rowless_tokens(source.model))
    if context.manifest.evaluation.chat_template == "own":
        _warn_of_others(context, scored)
    _warn_of_dates(context, [name for name, template in found.items() if template is not None and template.writes_date])


def _chosen(context: PlanContext, source: Source) -> ChatTemplate | None:
    aligned = context.bases.aligned.chat_template
    match context.manifest.evaluation.chat_template:
        case "own":
            return source.chat_template or aligned
        case "aligned":
            return aligned
        case _:
            return context.chat_template


def _check_rows(name: str, model: FullModel, template: ChatTemplate, rowless: Sequence[str]) -> None:
    """
    Raises:
        CheckpointError: a template writes a token that the model's embedding has no row for.
    """
    if not rowless:
        return
    config = read_json(model.folder, CONFIG) if CONFIG in model.folder.files() else {}
    named = {role: _content(config.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    written = template.text + "".join(token for role, token in named.items() if role in template.text)
    if lost := [token for token in rowless if token in written]:
        raise CheckpointError(
            f"{name}: {model.folder.uri}: the chat template writes {some(lost)}, which the tokenizer has and "
            f"the embedding has no row for ({num_token_rows(model)} rows); resize it "
            "(resize_token_embeddings), or choose another with evaluation.chat_template"
        )


def _content(value: Json) -> str:
    """A special token in tokenizer_config.json: its text, or an object with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _implied(source: Source, aligned: Source) -> str | None:
    """The template that follows from the files in a score's identity: a full model's own, where it has a tokenizer; the
    aligned model's for all others."""
    own, model = source.chat_template, source.model
    if not isinstance(model, FullModel) or CONFIG not in model.folder.files():
        own = aligned.chat_template
    return own.text if own is not None and is_prompting(own.file) else None


def _warn_of_others(context: PlanContext, scored: Mapping[str, Source]) -> None:
    aligned = context.bases.aligned.chat_template
    full = {name: source for name, source in scored.items() if isinstance(source.model, FullModel)}
    if aligned and (lent := [name for name, source in full.items() if source.chat_template is None]):
        context.warn(
            f"{some(lent)}: without a chat template, so prompted with the aligned model's; evaluation.chat_template "
            "chooses another"
        )
    brought = [
        name
        for name, source in scored.items()
        if name not in full and source.chat_template and (aligned is None or source.chat_template.text != aligned.text)
    ]
    if brought:
        context.warn(
            f"{some(brought)}: the adapter brings a chat template that is not the aligned model's; it is scored with "
            'its own, as are its realigned models; evaluation.chat_template: "aligned" takes that for all'
        )


def _warn_of_dates(context: PlanContext, dated: list[str]) -> None:
    if context.judging.date is not None:
        dated = [*dated, "evaluation.judge.model"]
    if dated and context.manifest.evaluation.date is None:
        context.warn(
            f"{some(dated)}: the chat template writes the date, so what is scored, or learned, through it is of "
            f'{context.date} and is made anew on another day; set evaluation.date to "{context.date}" to keep it'
        )
