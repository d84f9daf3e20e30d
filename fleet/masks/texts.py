"""Preferences and task prompts: the texts a mask is learned from, checked before anything is computed.

Both are JSON lines, or a split of a Hub dataset pinned to a commit, `hf://datasets/org/name@commit/split`. A preference
has `prompt`, `chosen` and `rejected`; a task prompt has `prompt` and `response`. All are strings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias, cast

from fleet.core.errors import ManifestError
from fleet.core.identity import digest
from fleet.core.json_lines import json_lines
from fleet.store import open_folder

Row: TypeAlias = Mapping[str, str]
What: TypeAlias = Literal["preferences", "prompts"]

FIELDS: dict[What, tuple[str, ...]] = {
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt", "response"),
}

_DATASET = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<split>\w+)")


@dataclass(frozen=True)
class TextSet:
    """One file of texts, or one split of a dataset."""

    what: What
    uri: str
    """Of the file or dataset, as the manifest names it."""
    identity: str
    """Digest of the bytes, or the pinned commit and split."""

    @property
    def key(self) -> str:
        """Where the run puts a file's bytes in its store, because a node may not have the driver's disk."""
        return f"texts/{self.identity.removeprefix('sha256:')[:16]}.jsonl"

    @property
    def is_dataset(self) -> bool:
        return self.uri.startswith("hf://")

    def rows(self, data: bytes | None) -> list[Row]:
        """All rows, in order.

        Args:
            data: a file's bytes; None for a dataset, which is fetched from the Hub.

        Raises:
            ManifestError: a row is not what it should be, or there is none.
        """
        return parse_rows(self.what, self.uri, data) if data is not None else _dataset_rows(self.what, self.uri)


def open_texts(what: What, uri: str, field: str) -> tuple[TextSet, bytes | None]:
    """A set of texts by its URI, and a file's bytes; None for a dataset, which the workers fetch and check.

    Args:
        field: the manifest's field, for messages.

    Raises:
        ManifestError: a dataset is not pinned, or a file's row is not what it should be.
        SourceError: the file doesn't exist or can't be read.
    """
    if uri.startswith("hf://"):
        match = _DATASET.fullmatch(uri)
        if match is None:
            raise ManifestError(f"{field}: {uri}: a dataset is hf://datasets/org/name@<40 hexadecimal digits>/split")
        return TextSet(what, uri, digest([match["commit"], match["split"], match["name"]])), None
    path = PurePosixPath(uri)
    folder = str(path.parent) if "://" not in uri else uri.rpartition("/")[0]
    data = open_folder(folder).read(path.name)
    parse_rows(what, f"{field}: {uri}", data)
    return TextSet(what, uri, f"sha256:{hashlib.sha256(data).hexdigest()}"), data


def parse_rows(what: What, where: str, data: bytes) -> list[Row]:
    """The rows of a file of JSON lines; empty lines are skipped.

    Args:
        where: what messages call the file.

    Raises:
        ManifestError: the file is no UTF-8, a line is not JSON, a field is missing, empty or not a string, a
            preference's two replies are the same, or there is no row.
    """
    lines = json_lines(data, where, ManifestError)
    return _enough(where, [_checked(what, f"{where}: line {number}", row) for number, row in lines])


def held_out(row: Row, share: float) -> bool:
    """Whether a row is kept out of training: a hash of its prompt says so, so that no prompt is on both sides."""
    value = int.from_bytes(hashlib.sha256(row["prompt"].encode()).digest()[:8], "little")
    return value / 2**64 < share


def split(rows: Sequence[Row], share: float) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on, at least one, and of those to hold out: at least one, unless `share` is 0.

    Raises:
        ManifestError: all rows have the same prompt.
    """
    out = [i for i, row in enumerate(rows) if held_out(row, share)]
    if share and (not out or len(out) == len(rows)):  # so few prompts that the hash put all on one side: take one
        first = min(range(len(rows)), key=lambda i: hashlib.sha256(rows[i]["prompt"].encode()).digest())
        out = [i for i, row in enumerate(rows) if row["prompt"] == rows[first]["prompt"]]
    kept = sorted(set(range(len(rows))) - set(out))
    if not kept:
        raise ManifestError(
            "all rows have one prompt, so none can be held out; give more, or set training.held_out to 0"
        )
    return kept, out


def _checked(what: What, where: str, row: object) -> Row:
    given = cast("dict[str, object]", row) if isinstance(row, dict) else {}
    found = {f: value for f in FIELDS[what] if isinstance(value := given.get(f), str) and value}
    if len(found) < len(FIELDS[what]):
        raise ManifestError(f"{where}: needs {', '.join(FIELDS[what])}, each a string that is not empty")
    if what == "preferences" and found["chosen"] == found["rejected"]:
        raise ManifestError(f"{where}: chosen and rejected are the same")
    return found


def _enough(where: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ManifestError(f"{where}: no rows")
    return rows


def _dataset_rows(what: What, uri: str) -> list[Row]:
    import datasets  # noqa: PLC0415 - slow to import, and only needed where a dataset is named # pyright: ignore[reportMissingTypeStubs]

    match = _DATASET.fullmatch(uri)
    assert match is not None
    load = cast(Callable[..., Iterable[Any]], datasets.load_dataset)  # pyright: ignore[reportUnknownMemberType]
    found = load(match["name"], revision=match["commit"], split=match["split"])
    return _enough(uri, [_checked(what, f"{uri}: row {i}", dict(row)) for i, row in enumerate(found)])
