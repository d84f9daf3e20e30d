"""Preferences and task prompts: the files a mask is learned from, checked before anything is computed.

Both are JSON lines, or a split of a Hub dataset pinned to a commit, `hf://datasets/org/name@commit/split`. A preference
has `prompt`, `chosen` and `rejected`; a task prompt has `prompt` and `response`. All are strings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

from fleet.core.errors import ManifestError
from fleet.core.identity import digest
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
    """One such file or split.

    `key` is where the coordinator put a file's bytes in the store: a node may not have the driver's disk.
    """

    what: What
    uri: str
    identity: str
    """Digest of the bytes, or the pinned commit and split."""

    @property
    def key(self) -> str:
        return f"texts/{self.identity.removeprefix('sha256:')[:16]}.jsonl"

    @property
    def is_dataset(self) -> bool:
        return self.uri.startswith("hf://")

    def rows(self, data: bytes | None) -> list[Row]:
        """The rows, of a file from its bytes, of a dataset from the Hub.

        Raises:
            ManifestError: a row that is not what it should be.
        """
        return parse_rows(self.what, self.uri, data) if data is not None else _dataset_rows(self.what, self.uri)


def open_texts(what: What, uri: str, field: str) -> tuple[TextSet, bytes | None]:
    """Open and check one; the bytes of a file, None for a dataset, which the workers fetch.

    Raises:
        ManifestError: no such file, a dataset that is not pinned, or a row that is not what it should be.
        SourceError: it cannot be read.
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
    """
    Raises:
        ManifestError: no JSON lines, a field missing or not a string, a preference between equals, or no row at all.
    """
    rows: list[Row] = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ManifestError(f"{where}: line {number}: not JSON: {e}") from e
            rows.append(_checked(what, f"{where}: line {number}", row))
    return _enough(where, rows)


def held_out(row: Row, share: float) -> bool:
    """Whether a row is kept out of training: by a hash of its prompt, so the same prompt never stands on both sides."""
    value = int.from_bytes(hashlib.sha256(row["prompt"].encode()).digest()[:8], "little")
    return value / 2**64 < share


def split(rows: Sequence[Row], share: float) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out; each has at least one row.

    Raises:
        ManifestError: there is only one prompt.
    """
    out = [i for i, row in enumerate(rows) if held_out(row, share)]
    if share and (not out or len(out) == len(rows)):  # a set so small that the hash put all on one side
        first = min(range(len(rows)), key=lambda i: hashlib.sha256(rows[i]["prompt"].encode()).digest())
        out = [i for i, row in enumerate(rows) if row["prompt"] == rows[first]["prompt"]]
    kept = sorted(set(range(len(rows))) - set(out))
    if not kept:
        raise ManifestError(
            "all rows have one prompt, so none can be held out; give more, or set training.held_out to 0"
        )
    return kept, out


def _checked(what: What, where: str, row: Any) -> Row:
    fields = FIELDS[what]
    if not isinstance(row, dict) or not all(isinstance(row.get(f), str) and row[f] for f in fields):
        raise ManifestError(f"{where}: needs {', '.join(fields)}, each a string that is not empty")
    if what == "preferences" and row["chosen"] == row["rejected"]:
        raise ManifestError(f"{where}: chosen and rejected are the same")
    return {f: row[f] for f in fields}


def _enough(where: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ManifestError(f"{where}: no rows")
    return rows


def _dataset_rows(what: What, uri: str) -> list[Row]:
    from datasets import load_dataset  # noqa: PLC0415 - only where a dataset is named

    match = _DATASET.fullmatch(uri)
    assert match is not None
    found: Iterable[Any] = load_dataset(match["name"], revision=match["commit"], split=match["split"])
    return _enough(uri, [_checked(what, f"{uri}: row {i}", dict(row)) for i, row in enumerate(found)])
