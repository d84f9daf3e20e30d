"""From the rows of a data file (csv, json, jsonl, parquet) to prompts. Light."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.parquet import read_rows
from fleet.core.errors import SuiteError
from fleet.core.identity import Json
from fleet.core.json_lines import decode_text, json_lines, json_value

LocatedRow = tuple[str, Mapping[str, Json]]
"""Where a row stands, for messages, and its columns."""


_CONTEXT = "{context}\n\n---\n\n{prompt}"
"""How HarmBench's `DirectRequest` puts a context before a behaviour."""


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt suite."""

    text: str
    category: str = ""
    """As the set names it; empty where it names none."""
    context: str = ""
    """What the prompt is about, where it stands apart from it."""
    language: str = ""
    """ISO 639-1; empty where the set does not say."""

    @property
    def request(self) -> str:
        """Context and prompt together: what a model is asked, and a judge told."""
        return _CONTEXT.format(context=self.context, prompt=self.text) if self.context else self.text


@dataclass(frozen=True)
class Form:
    """Which columns of a row mean what. Of several names the first that a row has counts: copies differ."""

    prompt: tuple[str, ...]
    """A text, or a list of one."""
    category: tuple[str, ...] = ("category",)
    context: tuple[str, ...] = ()
    language: str = ""
    """The language of rows without a column `language`."""
    keep: tuple[str, frozenset[str]] | None = None
    """Column and values of the rows that are taken; None takes all."""
    header: bool = True
    """Whether CSV files name their columns. Else the first cell is the prompt, and the file is its category."""

    def prompts(self, rows: Iterator[LocatedRow]) -> tuple[Prompt, ...]:
        """The prompts of these rows, in their order.

        Raises:
            SuiteError: A row lacks a column, or its prompt is empty.
        """
        return tuple(self._prompt(where, row) for where, row in rows if self._is_kept(where, row))

    def _is_kept(self, where: str, row: Mapping[str, Json]) -> bool:
        if self.keep is None:
            return True
        column, values = self.keep
        if column not in row:
            raise SuiteError(f"{where}: no column {column}, which says which rows count; give the file as published")
        return row[column] in values

    def _prompt(self, where: str, row: Mapping[str, Json]) -> Prompt:
        text = _cell(row, self.prompt)
        if not text.strip():
            columns = '" or "'.join(self.prompt)
            raise SuiteError(f'{where}: must be an object with a text "{columns}"')
        language = _cell(row, ("language",)) or self.language
        return Prompt(text, _cell(row, self.category), _cell(row, self.context), language)


PLAIN = Form(("prompt",), context=("context",))
"""The form of a user's own suite."""


def read_files(files: Sequence[Path], form: Form) -> tuple[Prompt, ...]:
    """The prompts of all these files, one after the other.

    Raises:
        SuiteError: A file is damaged, of an unknown kind, or holds no prompt.
    """
    prompts = form.prompts(row for file in files for row in _file_rows(file, form.header))
    if not prompts:
        raise SuiteError(f"{', '.join(map(str, files))}: holds no prompt")
    return prompts


def jsonl(prompts: Sequence[Prompt]) -> bytes:
    """Prompts as lines of JSON, which `PLAIN` reads back."""
    rows = ({"prompt": p.text, "category": p.category, "context": p.context, "language": p.language} for p in prompts)
    return "".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows).encode()


def _cell(row: Mapping[str, Json], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if name in row), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else str(value) if type(value) is int else ""


def _file_rows(file: Path, header: bool) -> Iterator[LocatedRow]:
    if file.suffix not in _FORMATS:
        raise SuiteError(f"{file}: is of no kind that is read; there is {', '.join(_FORMATS)}")
    if file.suffix == ".csv" and not header:
        return _bare_rows(file)
    return _FORMATS[file.suffix](file)


def _csv_rows(file: Path) -> Iterator[LocatedRow]:
    """Rows below a header. A row with too many cells is refused: a comma in a text without quotes cut it in two."""
    cells = _csv_cells(file)
    header = next((row for _, row in cells), list[str]())
    if duplicates := {name for name in header if header.count(name) > 1}:
        raise SuiteError(f"{file}: its header has {', '.join(sorted(duplicates))} twice; leave one")
    for number, (_, row) in enumerate(cells, start=1):
        where = f"{file}, row {number}"
        if len(row) > len(header):
            raise SuiteError(f"{where}: has {len(row)} cells under {len(header)} columns; put texts in quotes")
        yield where, dict(zip(header, row, strict=False))


def _bare_rows(file: Path) -> Iterator[LocatedRow]:
    for where, row in _csv_cells(file):
        yield where, {"prompt": row[0], "category": file.stem}


def _csv_cells(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Where a row stands, and its cells; empty rows are skipped."""
    rows = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        for number, row in enumerate(rows, start=1):
            if row:
                yield f"{file}, row {number}", row
    except csv.Error as error:
        raise SuiteError(f"{file}: line {rows.line_num}: no valid CSV: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[LocatedRow]:
    for number, row in json_lines(file.read_bytes(), str(file), SuiteError):
        yield f"{file}: line {number}", row if isinstance(row, dict) else {}


def _json_rows(file: Path) -> Iterator[LocatedRow]:
    text = _text(file)
    # Some sets name lines of JSON `.json`.
    if not text.lstrip().startswith("["):
        yield from _jsonl_rows(file)
        return
    rows = json_value(text, str(file), SuiteError)
    assert isinstance(rows, list)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise SuiteError(f"{file}, row {number}: must be an object of columns")
        yield f"{file}, row {number}", row


def _parquet_rows(file: Path) -> Iterator[LocatedRow]:
    try:
        _, rows = read_rows(file.read_bytes())
    except ValueError as error:
        raise SuiteError(f"{file}: no readable Parquet: {one_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


_FORMATS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _text(file: Path) -> str:
    # Not read_text(), which turns every line end inside a prompt into "\n".
    return decode_text(file.read_bytes(), str(file), SuiteError)


def one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
