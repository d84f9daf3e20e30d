"""Models of several vocabularies in one: rows of embeddings and heads are matched by token, never by position.

All models of a run are read in one vocabulary, the base models too, so that task vectors, scores and outputs have it:

    aligned   the aligned model's; tokens that others added are dropped
    union     the aligned model's, then the tokens that others added, in the manifest's order of models and then by id
    a model's the named one's, with its numbering and its tokenizer files

A token that the aligned model has no row for gets one: the mean of the rows of all models that have the token. A model
that has no row for a token gets the aligned one's, so its task vector there is zero. So a token that one model added
keeps exactly its row under every fusion method, and one that all members have gets, from an average with weights, their
weighted mean.

A model in another vocabulary than its own is a view (`fleet.checkpoint.views`), whose address says what it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from fleet.checkpoint.companions import is_companion
from fleet.checkpoint.configs import has_field, is_nested, text_field, with_text_fields, without_text_fields
from fleet.checkpoint.heads import open_base_folder
from fleet.checkpoint.model import content_identity
from fleet.checkpoint.row_tables import Row, RowTable, runs_of
from fleet.checkpoint.tokens import TOKENIZER, full_model, token_tables, tokenizer_json, tokenizer_of, tokens_of
from fleet.checkpoint.views import Stored, TensorView, ViewFolder
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json, canonical_json
from fleet.store import Folder

VOCABULARY_SCHEME = "vocabulary:"
"""URI scheme of a model that is read through another vocabulary than its own: JSON follows, of the `Vocabulary` and
the model's address. `fleet.checkpoint.opened` opens it."""

_VERSION = 1
_NESTED_VERSION = 2
"""Bumped by hand when the same models would come out otherwise; the second, those whose language model has a config of
its own within theirs."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """Which vocabulary a run has; models are named by their addresses."""

    aligned: str
    base: str
    """Whose tokens come first, and whose tokenizer files it has: the aligned model's, or the named one's."""
    with_added: bool = False
    """Whether the tokens that other models added come after them."""
    models: tuple[str, ...] = ()
    """Models that have tokens which the aligned one lacks, in the manifest's order; where nothing is added, none."""

    def address(self, model: str) -> str:
        """The URI of a model read in this vocabulary, for `fleet.checkpoint.opened`."""
        return VOCABULARY_SCHEME + canonical_json({"vocabulary": asdict(self), "model": model})


def chosen_vocabulary(choice: str, aligned: str, models: Sequence[str], named: str | None) -> Vocabulary:
    """The vocabulary of a run.

    Args:
        choice: `aligned`, `union` or `model`.
        aligned: the aligned model's address, as are all others.
        models: all full models of the catalogue, in the manifest's order.
        named: for `model`, whose.

    Raises:
        CheckpointError: nothing tells a model's tokens, or tokenizers are of different kinds.
    """
    if choice == "aligned":
        return Vocabulary(aligned=aligned, base=aligned)
    own = tokens_of(aligned, aligned).ids
    added = tuple(dict.fromkeys(m for m in models if tokens_of(m, aligned).ids.keys() - own.keys()))
    if choice == "union":
        return Vocabulary(aligned=aligned, base=aligned, with_added=True, models=added)
    assert named is not None
    return Vocabulary(aligned=aligned, base=named, models=added)


def is_in(vocabulary: Vocabulary, model: str) -> bool:
    """Whether a full model, as it is, has exactly this vocabulary: then it needs no view."""
    tokens, target = tokens_of(model, vocabulary.aligned), _target(vocabulary)
    return tokens.num_rows == len(target.tokens) and tokens.ids == target.ids


def open_in_vocabulary(address: str) -> ViewFolder:
    """The folder at an address that `Vocabulary.address` made.

    Raises:
        CheckpointError: a model can't be read, or the models don't go together.
    """
    found: Any = json.loads(address.removeprefix(VOCABULARY_SCHEME))
    fields = found["vocabulary"]
    return _view(address, Vocabulary(**fields | {"models": tuple(fields["models"])}), found["model"])


def _view(address: str, vocabulary: Vocabulary, uri: str) -> ViewFolder:
    model, target = full_model(uri), _target(vocabulary)
    tables = token_tables(model)
    files: dict[str, dict[str, TensorView]] = {info.file: {} for info in model.tensors.values()}
    for name, info in sorted(model.tensors.items(), key=lambda item: item[1].start):
        table = _table(vocabulary, target, uri, name) if name in tables else None
        files[info.file][name] = Stored(model.folder, info) if table is None else table
    small = {**target.small, "config.json": _config(model.config, target)}
    passed = {name: target.folder for name in target.folder.files() if is_companion(name) and name not in small}

    def identity() -> Json:
        parts = (vocabulary.aligned, vocabulary.base, *vocabulary.models, uri)
        contents: list[Json] = [_identity(part) for part in parts]
        version = _NESTED_VERSION if is_nested(model.config) else _VERSION
        return ["vocabulary", version, vocabulary.with_added, contents]

    sources = tuple(full_model(part).folder for part in (vocabulary.aligned, vocabulary.base, *vocabulary.models, uri))
    return ViewFolder(address, identity, files, passed, small, sources)


@lru_cache(maxsize=256)
def _identity(uri: str) -> str:
    return content_identity(open_base_folder(uri))


def _config(config: Mapping[str, Json], target: _Target) -> bytes:
    """A model's `config.json` with the size and the special tokens' ids of the vocabulary."""
    ids = {field: text_field(target.config, field) for field in _TOKEN_IDS if has_field(target.config, field)}
    kept = without_text_fields(config, [field for field in _TOKEN_IDS if field not in ids])
    written = with_text_fields(kept, {**ids, "vocab_size": len(target.tokens)})
    # The ids come last, in one order: the same model is the same bytes.
    last = {field: written.pop(field) for field in _TOKEN_IDS if field in written}
    return (json.dumps(written | last, indent=2) + "\n").encode()


# -- the vocabulary that all models get --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A vocabulary worked out: what its rows and its files are."""

    tokens: list[str | None]
    """Row -> its token; None for one that pads the table."""
    origins: list[tuple[Row, ...]]
    """Row -> the rows, by model, whose mean the aligned model gets there; none: zeros."""
    folder: Folder
    """Where tokenizer files come from that aren't in `small`."""
    config: dict[str, Json]
    """The `config.json` that has the special tokens' ids."""
    small: dict[str, bytes]
    """Tokenizer files that differ from the folder's: those that list added tokens."""

    @property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if token is not None}


@lru_cache(maxsize=8)
def _target(vocabulary: Vocabulary) -> _Target:
    aligned, base = (tokens_of(uri, vocabulary.aligned) for uri in (vocabulary.aligned, vocabulary.base))
    others = {uri: tokens_of(uri, vocabulary.aligned) for uri in vocabulary.models}
    folder, small, ids = open_base_folder(vocabulary.base), dict[str, bytes](), dict(base.ids)
    if vocabulary.with_added:
        added = [t for o in others.values() for t in sorted(o.ids, key=o.ids.__getitem__)]
        new = [t for t in dict.fromkeys(added) if t not in ids]
        given, small = _with_added(folder, {t: _entry(vocabulary.models, t) for t in new})
        ids |= given
    tokens: list[str | None] = [None] * max(base.num_rows, max(ids.values(), default=-1) + 1)
    for token, i in ids.items():
        tokens[i] = token
    origins: list[tuple[Row, ...]] = []
    for i, token in enumerate(tokens):
        if token is None:
            origins.append(((vocabulary.base, i),) if i < base.num_rows else ())
        elif token in aligned.ids:
            origins.append(((vocabulary.aligned, aligned.ids[token]),))
        else:
            origins.append(tuple((uri, other.ids[token]) for uri, other in others.items() if token in other.ids))
    return _Target(tokens, origins, folder, full_model(vocabulary.base).config, small)


def _entry(models: Iterable[str], token: str) -> dict[str, Any]:
    """The `added_tokens` entry of the first model that has the token.

    Where the token is no added one but a piece of the model's vocabulary, it is matched as it is written.
    """
    for uri in models:
        listed = _added_entries(uri)
        if token in tokens_of(uri, uri).ids:
            return listed.get(token, {"normalized": False})
    raise AssertionError(f"{token!r} is nobody's")


@lru_cache(maxsize=64)
def _added_entries(uri: str) -> dict[str, dict[str, Any]]:
    """Token -> what a model's `tokenizer.json` says of it, of all its added tokens."""
    folder = open_base_folder(uri)
    if TOKENIZER not in folder.files():
        return {}
    entries = tokenizer_json(folder).get("added_tokens") or ()
    return {e["content"]: {k: v for k, v in e.items() if k not in ("id", "content")} for e in entries}


def _with_added(folder: Folder, new: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Add tokens to a model's tokenizer.

    Args:
        new: token -> its `added_tokens` entry, without id and content.

    Returns:
        The ids that the tokenizer gives to them, and the contents of its files that list tokens, by name.
    """
    if not new:
        return {}, {}
    from tokenizers import AddedToken

    tokenizer: Any = tokenizer_of(folder)  # its own types say nothing of what is in a list
    for content, entry in new.items():
        token = AddedToken(content, **entry)
        if entry.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    ids = {content: int(tokenizer.token_to_id(content)) for content in new}
    files: dict[str, Any] = {TOKENIZER: json.loads(tokenizer.to_str(pretty=False))}
    there = folder.files()
    if "added_tokens.json" in there:
        files["added_tokens.json"] = json.loads(folder.read("added_tokens.json")) | ids
    if "tokenizer_config.json" in there:
        config = json.loads(folder.read("tokenizer_config.json"))
        if "added_tokens_decoder" in config:
            by_id = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in files[TOKENIZER]["added_tokens"]}
            files["tokenizer_config.json"] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | by_id}
    return ids, {name: (json.dumps(v, indent=2, ensure_ascii=False) + "\n").encode() for name, v in files.items()}


# -- tables ------------------------------------------------------------------------------------------------------


def _table(vocabulary: Vocabulary, target: _Target, uri: str, name: str) -> TensorView | None:
    """One table of a model in the vocabulary; None where the aligned model has no such table."""
    if name not in full_model(vocabulary.aligned).tensors:
        return None
    origin = _aligned_table(vocabulary, target, name)
    if uri == vocabulary.aligned:
        return origin
    tokens = tokens_of(uri, vocabulary.aligned)
    own, origins = _stored(uri, name), "origin"
    rows = [
        ((uri, tokens.ids[t]),) if t is not None and t in tokens.ids else ((origins, i),)
        for i, t in enumerate(target.tokens)
    ]
    is_whole = all(source != origins for ((source, _),) in rows)
    dtype = own.dtype if is_whole or own.dtype == origin.dtype else "F32"
    return RowTable(dtype, (len(rows), *own.shape[1:]), runs_of(rows), {uri: own, origins: origin})


def _stored(uri: str, name: str) -> Stored:
    model = full_model(uri)
    return Stored(model.folder, model.tensors[name])


def _aligned_table(vocabulary: Vocabulary, target: _Target, name: str) -> TensorView:
    """The aligned model's table in the vocabulary, in its own dtype: whoever takes rows of it takes its very values."""
    own = _stored(vocabulary.aligned, name)
    uris = {uri for rows in target.origins for uri, _ in rows}
    absent = [uri for uri in uris if name not in full_model(uri).tensors]
    if absent:
        raise CheckpointError(f"{sorted(absent)[0]}: has no tensor {name}, which the aligned model has")
    sources = {uri: _stored(uri, name) for uri in sorted(uris)}
    if wrong := [uri for uri, source in sources.items() if source.shape[1:] != own.shape[1:]]:
        raise CheckpointError(
            f"{wrong[0]}: rows of {name} are {sources[wrong[0]].shape[1:]}, the aligned model's {own.shape[1:]}"
        )
    return RowTable(own.dtype, (len(target.tokens), *own.shape[1:]), runs_of(target.origins), sources)
