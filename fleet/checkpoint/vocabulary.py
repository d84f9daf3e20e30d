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
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import KNOWN_DTYPE_BYTES, TensorInfo
from fleet.checkpoint.model import content_identity, is_companion, read_model, require_full_model
from fleet.checkpoint.modules import HEADS, TOKEN_TABLES
from fleet.checkpoint.views import VIEW_BYTES, Stored, TensorView, ViewFolder
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json, canonical_json
from fleet.store import Folder, open_folder

if TYPE_CHECKING:
    import torch

VOCABULARY_SCHEME = "vocabulary:"
"""URI scheme of a model that is read through another vocabulary than its own: JSON follows, of the `Vocabulary` and
the model's address. `fleet.checkpoint.opened` opens it."""

_VERSION = 1
"""Bumped by hand when the same models would come out otherwise."""

_TOKENIZER = "tokenizer.json"
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


@dataclass(frozen=True)
class _Tokens:
    """One model's tokens that have a row in its tables."""

    ids: dict[str, int]
    num_rows: int
    kind: str | None
    """Of the tokenizer, by which its tokens are written; None where the model has no tokenizer of its own."""


def chosen_vocabulary(choice: str, aligned: str, models: Sequence[str], named: str | None) -> Vocabulary:
    """The vocabulary of a run.

    Args:
        choice: `aligned`, `union` or `model`.
        aligned: the aligned model's address, as are all others.
        models: all full models of the catalogue, in the manifest's order.
        named: for `model`, whose.

    Raises:
        CheckpointError: a model's tokens can't be told, or tokenizers of different kinds.
    """
    if choice == "aligned":
        return Vocabulary(aligned=aligned, base=aligned)
    own = _tokens(aligned, aligned).ids
    added = tuple(dict.fromkeys(m for m in models if _tokens(m, aligned).ids.keys() - own.keys()))
    if choice == "union":
        return Vocabulary(aligned=aligned, base=aligned, with_added=True, models=added)
    assert named is not None
    return Vocabulary(aligned=aligned, base=named, models=added)


def is_in(vocabulary: Vocabulary, model: str) -> bool:
    """Whether a full model has the vocabulary as it is."""
    tokens, target = _tokens(model, vocabulary.aligned), _target(vocabulary)
    return tokens.num_rows == len(target.tokens) and tokens.ids == target.ids


def renumbered(folder: Folder, aligned: Folder) -> list[str]:
    """Tokens that two models' tokenizers number differently; none, if one of them has no tokenizer."""
    if not all(_TOKENIZER in f.files() for f in (folder, aligned)) or folder.read(_TOKENIZER) == aligned.read(
        _TOKENIZER
    ):
        return []
    ours, theirs = (_tokenizer(f).get_vocab(with_added_tokens=True) for f in (folder, aligned))
    return sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])


def open_in_vocabulary(address: str) -> ViewFolder:
    """The folder at an address of `Vocabulary.address`."""
    found: Any = json.loads(address.removeprefix(VOCABULARY_SCHEME))
    fields = found["vocabulary"]
    return _view(address, Vocabulary(**fields | {"models": tuple(fields["models"])}), found["model"])


def _view(address: str, vocabulary: Vocabulary, uri: str) -> ViewFolder:
    model, target = _full(uri), _target(vocabulary)
    tables = _tables(model)
    files: dict[str, dict[str, TensorView]] = {info.file: {} for info in model.tensors.values()}
    for name, info in sorted(model.tensors.items(), key=lambda item: item[1].start):
        table = _table(vocabulary, target, uri, name) if name in tables else None
        files[info.file][name] = Stored(model.folder, info) if table is None else table
    small = {**target.small, "config.json": _config(model.config, target)}
    passed = {name: target.folder for name in target.folder.files() if is_companion(name, model) and name not in small}

    def identity() -> Json:
        parts = (vocabulary.aligned, vocabulary.base, *vocabulary.models, uri)
        contents: list[Json] = [_identity(part) for part in parts]
        return ["vocabulary", _VERSION, vocabulary.with_added, contents]

    sources = tuple(_full(part).folder for part in (vocabulary.aligned, vocabulary.base, *vocabulary.models, uri))
    return ViewFolder(address, identity, files, passed, small, sources)


@lru_cache(maxsize=256)
def _identity(uri: str) -> str:
    folder = open_folder(uri)
    return content_identity(folder, read_model(folder))


def _config(config: Mapping[str, Json], target: _Target) -> bytes:
    """A model's own, but what depends on the vocabulary is the vocabulary's."""
    own = {field: value for field, value in config.items() if field not in _TOKEN_IDS}
    own |= {field: target.config[field] for field in _TOKEN_IDS if field in target.config}
    own["vocab_size"] = len(target.tokens)
    return (json.dumps(own, indent=2) + "\n").encode()


# -- tokens ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _full(uri: str) -> FullModel:
    return require_full_model(read_model(open_folder(uri)), uri)


def _tables(model: FullModel) -> dict[str, TensorInfo]:
    """The tensors that have a row per token."""
    return {
        name: info
        for name, info in model.tensors.items()
        if set(name.split(".")) & (TOKEN_TABLES | HEADS) and name.rpartition(".")[2] in ("weight", "bias")
    }


def _num_rows(model: FullModel) -> int:
    sizes = {name: info.shape[0] for name, info in _tables(model).items()}
    if len(set(sizes.values())) != 1:
        raise CheckpointError(
            f"{model.folder.uri}: a vocabulary needs an embedding and a head of as many rows, but there are {sizes}"
        )
    return next(iter(sizes.values()))


@lru_cache(maxsize=64)
def _tokens(uri: str, aligned: str) -> _Tokens:
    """A model's tokens; the aligned one's if it has no tokenizer and as many rows."""
    model, folder = _full(uri), open_folder(uri)
    rows = _num_rows(model)
    if _TOKENIZER not in folder.files():
        if uri != aligned and rows == _num_rows(_full(aligned)):
            return _Tokens(_tokens(aligned, aligned).ids, rows, None)
        raise CheckpointError(
            f"{uri}: no {_TOKENIZER}, so nothing tells which row of its {rows} is which token's; write one with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = _tokenizer(folder)
    kind, listed = type(tokenizer.model).__name__, tokenizer.get_vocab(with_added_tokens=True)
    if uri != aligned and (theirs := _tokens(aligned, aligned).kind) not in (None, kind):
        raise CheckpointError(
            f"{uri}: its tokenizer is {kind}, the aligned model's {theirs}: their tokens can't be matched"
        )
    return _Tokens({token: i for token, i in listed.items() if i < rows}, rows, kind)


def _tokenizer_json(folder: Folder) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(_TOKENIZER))
    except ValueError as e:
        raise CheckpointError(f"{folder.uri}/{_TOKENIZER}: not valid JSON ({e})") from e
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict) or "vocab" not in found["model"]:
        raise CheckpointError(f"{folder.uri}/{_TOKENIZER}: holds no vocabulary; save the tokenizer again")
    return found


def _tokenizer(folder: Folder) -> Any:
    """By the library, which has its own way with ids that a file gives to added tokens."""
    from tokenizers import Tokenizer

    _tokenizer_json(folder)
    return Tokenizer.from_str(folder.read(_TOKENIZER).decode())


# -- the vocabulary that all models get --------------------------------------------------------------------------

_Row: TypeAlias = tuple[str, int]
"""A model's address, and the row of its tables."""


@dataclass(frozen=True)
class _Target:
    tokens: list[str | None]
    """Of each row; None of one that pads the table."""
    origins: list[tuple[_Row, ...]]
    """Of each row of the aligned model, what it is the mean of; nothing: zeros."""
    folder: Folder
    """Where files come from that aren't in `small`."""
    config: dict[str, Json]
    small: dict[str, bytes]

    @property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if token is not None}


@lru_cache(maxsize=8)
def _target(vocabulary: Vocabulary) -> _Target:
    aligned, base = (_tokens(uri, vocabulary.aligned) for uri in (vocabulary.aligned, vocabulary.base))
    others = {uri: _tokens(uri, vocabulary.aligned) for uri in vocabulary.models}
    folder, small, ids = open_folder(vocabulary.base), dict[str, bytes](), dict(base.ids)
    if vocabulary.with_added:
        added = [t for o in others.values() for t in sorted(o.ids, key=o.ids.__getitem__)]
        new = [t for t in dict.fromkeys(added) if t not in ids]
        given, small = _with_added(folder, {t: _entry(vocabulary.models, t) for t in new})
        ids |= given
    tokens: list[str | None] = [None] * max(base.num_rows, max(ids.values(), default=-1) + 1)
    for token, i in ids.items():
        tokens[i] = token
    origins: list[tuple[_Row, ...]] = []
    for i, token in enumerate(tokens):
        if token is None:
            origins.append(((vocabulary.base, i),) if i < base.num_rows else ())
        elif token in aligned.ids:
            origins.append(((vocabulary.aligned, aligned.ids[token]),))
        else:
            origins.append(tuple((uri, other.ids[token]) for uri, other in others.items() if token in other.ids))
    return _Target(tokens, origins, folder, _full(vocabulary.base).config, small)


def _entry(models: Iterable[str], token: str) -> dict[str, Any]:
    """What the first model that has a token says of it; one of a model's own pieces is found as it is written."""
    for uri in models:
        listed = _added_entries(uri)
        if token in _tokens(uri, uri).ids:
            return listed.get(token, {"normalized": False})
    raise AssertionError(f"{token!r} is nobody's")


@lru_cache(maxsize=64)
def _added_entries(uri: str) -> dict[str, dict[str, Any]]:
    folder = open_folder(uri)
    if _TOKENIZER not in folder.files():
        return {}
    entries = _tokenizer_json(folder).get("added_tokens") or ()
    return {e["content"]: {k: v for k, v in e.items() if k not in ("id", "content")} for e in entries}


def _with_added(folder: Folder, new: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, bytes]]:
    """The ids that a tokenizer gives to new tokens, and its files with them."""
    if not new:
        return {}, {}
    from tokenizers import AddedToken

    tokenizer = _tokenizer(folder)
    for content, entry in new.items():
        token = AddedToken(content, **entry)
        if entry.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    ids = {content: int(tokenizer.token_to_id(content)) for content in new}
    files: dict[str, Any] = {_TOKENIZER: json.loads(tokenizer.to_str(pretty=False))}
    there = folder.files()
    if "added_tokens.json" in there:
        files["added_tokens.json"] = json.loads(folder.read("added_tokens.json")) | ids
    if "tokenizer_config.json" in there:
        config = json.loads(folder.read("tokenizer_config.json"))
        if "added_tokens_decoder" in config:
            by_id = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in files[_TOKENIZER]["added_tokens"]}
            files["tokenizer_config.json"] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | by_id}
    return ids, {name: (json.dumps(v, indent=2, ensure_ascii=False) + "\n").encode() for name, v in files.items()}


# -- tables ------------------------------------------------------------------------------------------------------


RUN_BYTES = 280
"""Memory of one `_Run` with one source (measured with tracemalloc); a renumbered vocabulary has one a token."""


class _Run(NamedTuple):
    """Rows [start, stop) that follow each other in one table, or each the mean of one row of several."""

    start: int
    stop: int
    sources: tuple[_Row, ...]
    """Of the first row."""


@dataclass(frozen=True)
class _Table:
    """An embedding or a head whose rows are others' rows, or their means, rounded once; a row is one token's."""

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[_Run, ...]
    sources: Mapping[str, TensorView]

    @property
    def row_bytes(self) -> int:
        return _row_numbers(self.shape) * KNOWN_DTYPE_BYTES[self.dtype]

    @property
    def memory_bytes(self) -> int:
        return VIEW_BYTES + RUN_BYTES * len(self.runs)

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        size = self.row_bytes
        at = bisect_right([run.start for run in self.runs], start) - 1
        while start < stop:
            run = self.runs[at]
            until = min(stop, run.stop)
            self._read_run(run, start, until, buffer[: (until - start) * size])
            buffer = buffer[(until - start) * size :]
            start, at = until, at + 1

    def _read_run(self, run: _Run, start: int, stop: int, buffer: memoryview) -> None:
        rows = [(self.sources[name], row + start - run.start) for name, row in run.sources]
        if len(rows) == 1 and rows[0][0].dtype == self.dtype:
            rows[0][0].read_rows(rows[0][1], rows[0][1] + stop - start, buffer)
            return
        import torch

        from fleet.checkpoint.tensors import TORCH_DTYPES

        if not len(buffer):
            return
        out = torch.frombuffer(buffer, dtype=TORCH_DTYPES[self.dtype]).zero_()
        values = [_values(source, row, stop - start) for source, row in rows]
        if len(values) == 1:
            out.copy_(values[0])
        elif values:
            out.copy_(torch.stack(values).double().mean(dim=0))


def _values(table: TensorView, row: int, count: int) -> torch.Tensor:
    import torch

    from fleet.checkpoint.tensors import TORCH_DTYPES

    data = torch.empty(count * table.row_bytes, dtype=torch.uint8)
    table.read_rows(row, row + count, data.numpy().data)
    return data.view(TORCH_DTYPES[table.dtype])


def _row_numbers(shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape[1:]:
        numbers *= size
    return numbers


def _table(vocabulary: Vocabulary, target: _Target, uri: str, name: str) -> TensorView | None:
    """One table of a model in the vocabulary; None where the aligned model has no such table."""
    if name not in _full(vocabulary.aligned).tensors:
        return None
    origin = _aligned_table(vocabulary, target, name)
    if uri == vocabulary.aligned:
        return origin
    tokens = _tokens(uri, vocabulary.aligned)
    own, origins = _stored(uri, name), "origin"
    rows = [
        ((uri, tokens.ids[t]),) if t is not None and t in tokens.ids else ((origins, i),)
        for i, t in enumerate(target.tokens)
    ]
    is_whole = all(source != origins for ((source, _),) in rows)
    dtype = own.dtype if is_whole or own.dtype == origin.dtype else "F32"
    return _Table(dtype, (len(rows), *own.shape[1:]), _runs(rows), {uri: own, origins: origin})


def _stored(uri: str, name: str) -> Stored:
    model = _full(uri)
    return Stored(model.folder, model.tensors[name])


def _aligned_table(vocabulary: Vocabulary, target: _Target, name: str) -> TensorView:
    """In the aligned model's dtype, so that what others take of it is exactly what it has."""
    own = _stored(vocabulary.aligned, name)
    uris = {uri for rows in target.origins for uri, _ in rows}
    absent = [uri for uri in uris if name not in _full(uri).tensors]
    if absent:
        raise CheckpointError(f"{sorted(absent)[0]}: has no tensor {name}, which the aligned model has")
    sources = {uri: _stored(uri, name) for uri in sorted(uris)}
    if wrong := [uri for uri, source in sources.items() if source.shape[1:] != own.shape[1:]]:
        raise CheckpointError(
            f"{wrong[0]}: rows of {name} are {sources[wrong[0]].shape[1:]}, the aligned model's {own.shape[1:]}"
        )
    return _Table(own.dtype, (len(target.tokens), *own.shape[1:]), _runs(target.origins), sources)


def _runs(rows: Sequence[tuple[_Row, ...]]) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    for i, sources in enumerate(rows):
        if runs and len(sources) == len(runs[-1].sources):
            last = runs[-1]
            expected = tuple((name, row + i - last.start) for name, row in last.sources)
            if expected == sources:
                runs[-1] = last._replace(stop=i + 1)
                continue
        runs.append(_Run(i, i + 1, sources))
    return tuple(runs)
