"""What is wrong with a manifest, in a user's words: pydantic's errors -> one line per mistake, with field and fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fleet.core.identity import Json

_TAGS = ("method", "kind")
"""Fields that say which of several things an object is."""

_SIMPLE = {
    "tuple_type": "should be a list, in [ ]",
    "list_type": "should be a list, in [ ]",
    "model_type": "should be an object, in { }",
    "model_attributes_type": "should be an object, in { }",
    "dict_type": "should be an object, in { }",
    "mapping_type": "should be an object, in { }",
    "string_type": "should be a text, in quotes",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "missing": "missing",
}

_Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors, where it is in the document."""

    error: ErrorDetails
    path: _Path
    """Keys and indexes that lead there."""
    union: _Path | None
    """Where the value is that could be of several types, and was tried as each; None if there was one to try."""
    member: str
    """Which type it was tried as."""


def describe(error: ValidationError, kind: type[BaseModel], document: Json) -> list[str]:
    """One line per mistake.

    Args:
        error: What pydantic said of `document`.
        kind: What the document should be.
        document: What was checked.
    """
    found = [_located(e, document) for e in error.errors(include_url=False)]
    found = [*(m for m in found if m.union is None), *_meant(m for m in found if m.union is not None)]
    fields = {m.path: _fields(kind.model_json_schema(), m.path, document) for m in found if _is_unknown(m)}
    meant = {path: _close(str(path[-1]), names) for path, names in fields.items()}
    # A field that is there under a wrong name isn't missing, too.
    there = {(*path[:-1], name) for path, name in meant.items() if name is not None}
    lines: dict[str, list[str]] = {}
    for mistake in found:
        if mistake.path in there or _follows(mistake, found):
            continue
        where = ".".join(str(part) for part in mistake.path)
        text = _unknown(meant[mistake.path]) if _is_unknown(mistake) else _message(mistake.error)
        if text not in (texts := lines.setdefault(where, [])):
            texts.append(text)
    return [f"{where}: {_either(texts)}" if where else _either(texts) for where, texts in lines.items()]


def _located(error: ErrorDetails, document: Json) -> _Mistake:
    """Parts of pydantic's location that are no keys of the document are its names for the types it tried."""
    path: list[str | int] = []
    union: _Path | None = None
    member: list[str] = []
    value = document
    parts = error["loc"]
    for i, part in enumerate(parts):
        if _leads_on(value, part):
            path.append(part)
            value = _into(value, part)
        elif i == len(parts) - 1 and error["type"] == "missing":
            path.append(part)
        elif union in (None, tuple(path)) and not _is_tag(value, part):
            union = tuple(path)
            member.append(str(part))
    return _Mistake(error, tuple(path), union, " ".join(member))


def _is_tag(value: Json, part: str | int) -> bool:
    return isinstance(value, dict) and part in [value.get(tag) for tag in _TAGS]


def _leads_on(value: Json, part: str | int) -> bool:
    if isinstance(part, str):
        return isinstance(value, dict) and part in value
    return isinstance(value, list | tuple) and part < len(value)


def _into(value: Json, part: str | int) -> Json:
    if isinstance(part, str):
        assert isinstance(value, dict)
        return value[part]
    assert isinstance(value, list | tuple)
    return value[part]


def _meant(mistakes: Iterable[_Mistake]) -> Iterator[_Mistake]:
    """Of the types that a value was tried as, the mistakes of the one it came furthest with."""
    unions: dict[_Path, dict[str, list[_Mistake]]] = {}
    for mistake in mistakes:
        assert mistake.union is not None
        unions.setdefault(mistake.union, {}).setdefault(mistake.member, []).append(mistake)
    for members in unions.values():
        depths = {member: max(len(m.path) for m in found) for member, found in members.items()}
        for member, found in members.items():
            if depths[member] == max(depths.values()):
                yield from found


def _follows(mistake: _Mistake, others: Sequence[_Mistake]) -> bool:
    """Whether a list is called too short only because what is in it is wrong."""
    return mistake.error["type"] == "too_short" and any(
        len(o.path) > len(mistake.path) and o.path[: len(mistake.path)] == mistake.path for o in others
    )


def _either(texts: Sequence[str]) -> str:
    start = "should be "
    if all(text.startswith(start) for text in texts):
        return start + " or ".join(text.removeprefix(start) for text in texts)
    return ", or ".join(texts)


def _is_unknown(mistake: _Mistake) -> bool:
    return mistake.error["type"] == "extra_forbidden"


def _unknown(meant: str | None) -> str:
    return f"unknown field; did you mean {meant}?" if meant else "unknown field; remove it or correct its name"


def _message(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if kind in ("too_short", "string_too_short") and not error["input"]:
        return "is empty" if kind == "string_too_short" else "is empty; it needs at least one"
    if kind == "string_too_long":
        return f"has {len(error['input'])} characters; at most {context['max_length']} are taken"
    if kind == "union_tag_not_found":
        return f"no {str(context['discriminator']).strip(chr(39))} is given; add the field that says which one it is"
    if kind == "union_tag_invalid":
        names = re.findall(r"'([^']*)'", str(context["expected_tags"]))
        tag = str(context["discriminator"]).strip("'")
        return f"no {tag} is called {context['tag']!r}; {_choice(str(context['tag']), names)}"
    names = re.findall(r"'([^']*)'", str(context.get("expected")))
    if kind == "literal_error" and isinstance(error["input"], str) and names:
        return f"{error['input']!r} isn't known here; {_choice(error['input'], names)}"
    if kind == "string_pattern_mismatch":
        return f"{error['input']!r} doesn't match {context['pattern']}: correct the spelling"
    return re.sub(r"^(Value error, |Input )", "", error["msg"]) + _per_cent(error)


def _choice(given: str, names: Sequence[str]) -> str:
    """The name that was meant, or all there are."""
    close = _close(given, names)
    return f"did you mean {close}?" if close is not None else f"there are {', '.join(names)}"


def _close(given: str, names: Iterable[str]) -> str | None:
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in names}
    word = re.sub(r"[^a-z0-9]", "", given.lower())
    found = difflib.get_close_matches(word, plain, n=1, cutoff=0.7)
    found = found or [name for name in plain if len(word) > 3 and name.startswith(word)]
    return plain[found[0]] if len(found) == 1 else None


def _per_cent(error: ErrorDetails) -> str:
    """A hint, where a share was written as a percentage."""
    given, context = error["input"], error.get("ctx") or {}
    is_share = 1.0 in (context.get("le"), context.get("lt")) or re.search(r"\b(share|rate)\b", error["msg"])
    if is_share and isinstance(given, int | float) and 1.0 < given <= 100.0:
        return f"; for {given:g} % write {given / 100.0:g}"
    return ""


def _fields(schema: Mapping[str, Any], path: _Path, document: Json) -> list[str]:
    """The fields that the object around `path` may have and hasn't."""
    nodes, value = [schema], document
    for part in path[:-1]:
        nodes = [inner for node in nodes for inner in _inside(schema, node, part)]
        value = _into(value, part)
    given = value if isinstance(value, dict) else {}
    return [
        name
        for node in nodes
        for option in _options(schema, node)
        if _is_tagged(option, given)
        for name in option.get("properties", {})
        if name not in given
    ]


def _is_tagged(option: Mapping[str, Any], given: Mapping[str, object]) -> bool:
    """Whether an object's own tag, if it has one, says that it is of this type."""
    properties = option.get("properties", {})
    return all(properties.get(tag, {}).get("const", given.get(tag)) == given.get(tag) for tag in _TAGS)


def _inside(schema: Mapping[str, Any], node: Mapping[str, Any], part: str | int) -> Iterator[Mapping[str, Any]]:
    for option in _options(schema, node):
        found = option.get("properties", {}).get(part) if isinstance(part, str) else option.get("items")
        found = found or option.get("additionalProperties")
        if isinstance(found, Mapping):
            yield found


def _options(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A part of a JSON Schema with its references followed: every type it may be."""
    if "$ref" in node:
        yield from _options(schema, schema["$defs"][str(node["$ref"]).rpartition("/")[2]])
    for key in ("anyOf", "oneOf", "allOf"):
        for option in node.get(key, ()):
            yield from _options(schema, option)
    if "properties" in node or "items" in node or "additionalProperties" in node:
        yield node
