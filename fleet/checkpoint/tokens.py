"""Which tokens a model has rows for, and how its tokenizer numbers them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import HEADERS_CACHE_BYTES, TensorInfo
from fleet.checkpoint.heads import open_base_folder
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.tables import HEADS, TOKEN_TABLES
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.core.sized_cache import SizedCache
from fleet.store import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model's tokenizer that have a row in its tables."""

    ids: dict[str, int]
    """Token -> its row."""
    num_rows: int
    """Of an embedding or a head, which may be padded with rows of no token."""
    kind: str | None
    """The tokenizer's model (`BPE`, `Unigram`): each kind spells tokens in its own way. None without a tokenizer."""


def renumbered(folder: Folder, aligned: Folder) -> list[str]:
    """Tokens that two models' tokenizers number differently; none, if one of them has no tokenizer."""
    if not all(TOKENIZER in f.files() for f in (folder, aligned)) or folder.read(TOKENIZER) == aligned.read(TOKENIZER):
        return []
    ours, theirs = (tokenizer_of(f).get_vocab(with_added_tokens=True) for f in (folder, aligned))
    return sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])


def full_model(uri: str) -> FullModel:
    """A model's headers, as its own files hold them; read once while there is room for them.

    Raises:
        CheckpointError: as `read_model`, or it is an adapter.
    """
    return _full_models(uri)


def token_tables(model: FullModel) -> dict[str, TensorInfo]:
    """The tensors that have a row per token."""
    return {
        name: info
        for name, info in model.tensors.items()
        if set(name.split(".")) & (TOKEN_TABLES | HEADS) and name.rpartition(".")[2] in ("weight", "bias")
    }


def num_token_rows(model: FullModel) -> int | None:
    """How many tokens have a row in every table of a model; None of a model without such tables."""
    return min((info.shape[0] for info in token_tables(model).values()), default=None)


def same_tokenizer(model: FullModel, aligned: FullModel) -> bool:
    """Whether two models have the same `tokenizer.json`, and as many rows for its tokens."""
    folders = (model.folder, aligned.folder)
    if num_token_rows(model) != num_token_rows(aligned) or any(TOKENIZER not in f.files() for f in folders):
        return False
    return model.folder.read(TOKENIZER) == aligned.folder.read(TOKENIZER)


def rowless_tokens(model: FullModel) -> list[str]:
    """The tokens of a model's `tokenizer.json` that have no row in its tables: added by a trainer that didn't resize
    them. They harm nobody who doesn't write them.

    Raises:
        CheckpointError: the file is damaged, or no tokenizer's.
    """
    rows = num_token_rows(model)
    if rows is None or TOKENIZER not in model.folder.files():
        return []
    return sorted(t for t, i in tokenizer_of(model.folder).get_vocab(with_added_tokens=True).items() if i >= rows)


def _num_rows(model: FullModel) -> int:
    sizes = {name: info.shape[0] for name, info in token_tables(model).items()}
    if len(set(sizes.values())) != 1:
        raise CheckpointError(
            f"{model.folder.uri}: a vocabulary needs an embedding and a head of as many rows, but there are {sizes}"
        )
    return next(iter(sizes.values()))


@lru_cache(maxsize=64)
def tokens_of(uri: str, aligned: str) -> Tokens:
    """A model's tokens; those of the aligned model at `aligned` if it has no tokenizer and as many rows.

    Raises:
        CheckpointError: nothing tells which row is which token's, or its tokenizer is of another kind than the aligned
            model's.
    """
    model, folder = full_model(uri), open_base_folder(uri)
    rows = _num_rows(model)
    if TOKENIZER not in folder.files():
        if uri != aligned and rows == _num_rows(full_model(aligned)):
            return Tokens(tokens_of(aligned, aligned).ids, rows, None)
        raise CheckpointError(
            f"{uri}: no {TOKENIZER}, so nothing tells which row of its {rows} is which token's; write one with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = tokenizer_of(folder)
    kind, listed = type(tokenizer.model).__name__, tokenizer.get_vocab(with_added_tokens=True)
    if uri != aligned and (theirs := tokens_of(aligned, aligned).kind) not in (None, kind):
        raise CheckpointError(
            f"{uri}: its tokenizer is {kind}, the aligned model's {theirs}: their tokens can't be matched"
        )
    return Tokens({token: i for token, i in listed.items() if i < rows}, rows, kind)


def tokenizer_json(folder: Folder) -> dict[str, Any]:
    """What a model's `tokenizer.json` holds.

    Raises:
        CheckpointError: it is damaged, or no tokenizer's.
    """
    try:
        found: Json = json.loads(folder.read(TOKENIZER))
    except ValueError as e:
        raise CheckpointError(f"{folder.uri}/{TOKENIZER}: not valid JSON ({e})") from e
    match found:
        case {"model": {"vocab": _}}:
            return found
        case _:
            raise CheckpointError(f"{folder.uri}/{TOKENIZER}: holds no vocabulary; save the tokenizer again")


def tokenizer_of(folder: Folder) -> Tokenizer:
    """A model's tokenizer. The library numbers its tokens, for it needn't take the ids a file gives to added ones.

    Raises:
        CheckpointError: its file is damaged, or no tokenizer's.
    """
    from tokenizers import Tokenizer

    tokenizer_json(folder)
    try:
        return Tokenizer.from_str(folder.read(TOKENIZER).decode())
    except Exception as e:  # the library raises no class of its own
        raise CheckpointError(f"{folder.uri}/{TOKENIZER}: no tokenizer that can be read ({e}); save it again") from e


_full_models: SizedCache[str, FullModel] = SizedCache(
    lambda uri: require_full_model(read_model(open_base_folder(uri)), uri),
    lambda model: model.memory_bytes,
    HEADERS_CACHE_BYTES,
)
