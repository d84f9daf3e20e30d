"""The chat template of a model: where its folder keeps it, and how it is written on a given day."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fleet.checkpoint.headers import read_json
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.store import Folder

_TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates/default.jinja")
_TEMPLATE_FIELDS = ("tokenizer_config.json", "chat_template.json")
"""Files with a field `chat_template`: a tokenizer's, and a processor's of old."""

_SAID = "How are you"
"""What a user says to a template that is tried."""

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag, around what an assistant says."""


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja template of conversations without tools."""

    text: str
    file: str
    """The file it stands in."""

    @property
    def writes_date(self) -> bool:
        """Whether it can ask for the date of the day; transformers gives a template one function for that."""
        return "strftime_now" in self.text


def read_chat_template(folder: Folder) -> ChatTemplate | None:
    """A folder's template, as transformers finds it (`PreTrainedTokenizerBase.from_pretrained`): files of Jinja come
    before fields of JSON, and of several by name the one named `default` counts. None, if there is none.

    Raises:
        CheckpointError: a file is damaged, or the template is no Jinja.
    """
    files = folder.files()
    for name in _TEMPLATE_FILES:
        if name in files:
            return _checked(folder, name, _text(folder, name))
    for name in _TEMPLATE_FIELDS:
        if name in files and (found := _default(read_json(folder, name).get("chat_template"))):
            return _checked(folder, name, found)
    return None


def _text(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode()
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{folder.uri}/{name}: is not UTF-8 ({e}); save the template again") from e


def _default(value: Json) -> str | None:
    """The template of a field: itself, or of a list of `name` and `template`, or of a mapping, the default one."""
    match value:
        case str():
            return value
        case [*entries]:
            named = {e.get("name"): e.get("template") for e in entries if isinstance(e, dict)}
            found = named.get("default")
            return found if isinstance(found, str) else None
        case {"default": str(found)}:
            return found
        case _:
            return None


def _checked(folder: Folder, name: str, text: str) -> ChatTemplate | None:
    if not text.strip():
        return None
    check_chat_template(f"{folder.uri}/{name}", text)
    return ChatTemplate(text.removesuffix("\n"), name)  # as Jinja does, which so makes no other template of it


def check_chat_template(where: str, text: str) -> None:
    """
    Raises:
        CheckpointError: the text is no Jinja; begins with `where`.
    """
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", text))
    except TemplateSyntaxError as e:
        raise CheckpointError(f"{where}: line {e.lineno} of the chat template: {e.message}") from e


def check_asks(where: str, text: str) -> None:
    """Look whether a template puts what a user says into the prompt, by writing one turn as transformers does.

    Raises:
        CheckpointError: it fails, or what it writes doesn't depend on what is said; begins with `where`.
    """
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime(2026, 11, 25).strftime}
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")

    def prompt(content: Json) -> str:
        turns = [{"role": "user", "content": content}]
        return template.render(messages=turns, add_generation_prompt=True, tools=None, documents=None, **tokens)

    try:
        template = environment.from_string(_GENERATION_TAG.sub("", text))
        # Templates of models that also see take a list, which vLLM makes of a text.
        asks = _SAID in prompt(_SAID) or _SAID in prompt([{"type": "text", "text": _SAID}])
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as e:
        raise CheckpointError(f"{where}: the chat template takes no conversation of one user's turn: {e}") from e
    if not asks:
        raise CheckpointError(f"{where}: the chat template writes the same whatever a user says; is it another file?")


def _as_json(value: Json, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Chatting(Protocol):
    chat_template: Any

    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...


_AnyTokenizer = TypeVar("_AnyTokenizer", bound=_Chatting)


def prompting(tokenizer: _AnyTokenizer, template: str | None, day: str | None) -> _AnyTokenizer:
    """A tokenizer of transformers with this template, which writes this day; itself where neither is given.

    Every place that prompts a model goes through here, so that one run has one date. transformers' own
    `strftime_now` reads the clock at each call; what is passed to a template by name comes before it.

    Args:
        tokenizer: is left as it is.
        template: None keeps the tokenizer's own.
        day: as 2026-11-25; None leaves the clock to the template.
    """
    if template is None and day is None:
        return tokenizer
    own = copy.copy(tokenizer)
    if template is not None:
        own.chat_template = template
    if day is not None:
        midnight = datetime.fromisoformat(day)
        dated: Mapping[str, Any] = {"strftime_now": midnight.strftime}
        object.__setattr__(own, "apply_chat_template", partial(own.apply_chat_template, **dated))
    return own
