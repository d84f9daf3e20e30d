"""The rows of a task as files of one's own, in the ways that lm-eval (that is, `datasets`) lets one name them. Light.

A file, a list, a pattern, or a mapping from splits to these, below `dataset_kwargs.data_files`; a folder as
`dataset_kwargs.data_dir`, or as `dataset_path` itself. Paths are relative to the YAML's folder, patterns are glob's.
The splits of a folder are told from the names of its folders and files, as `datasets` does.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fleet.core.errors import SuiteError, some
from fleet.core.identity import Json
from fleet.core.json_lines import decode_text, json_lines

_SUFFIXES = {
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "text": (".txt",),
    "arrow": (".arrow",),
}
"""`dataset_path` that means files -> how their names end in a folder."""

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class LocalData:
    """Rows in files."""

    format: str
    """What `datasets` calls their form."""
    splits: Mapping[str, tuple[Path, ...]] = field(default_factory=dict[str, tuple[Path, ...]])
    is_utf8: bool = True
    """Whether the task leaves the encoding to us; else `datasets` reads the one it names."""

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(file for files in self.splits.values() for file in files))

    def num_rows(self, split: str) -> int | None:
        """How many rows a split has; None where only reading the files with `datasets` would tell.

        Raises:
            SuiteError: A line is no JSON.
        """
        files = self.splits.get(split, ())
        if (
            self.format != "json"
            or not self.is_utf8
            or not files
            or any(file.suffix not in (".jsonl", ".ndjson") for file in files)
        ):
            return None
        texts = {file: decode_text(file.read_bytes(), str(file), SuiteError) for file in files}
        if any(text.lstrip().startswith("[") for text in texts.values()):
            return None  # one array, which `datasets` takes too
        return sum(1 for file, text in texts.items() for _ in json_lines(text.encode(), str(file), SuiteError))


def local_data(path: Path, config: Mapping[str, Json]) -> LocalData | None:
    """The files of a task's rows; None if the rows come from the Hub or from code.

    Args:
        path: The task's YAML.
        config: Its fields, with those of what it includes.

    Raises:
        SuiteError: A file is missing or in another encoding, or a split that the task reads has none.
    """
    source, options = config.get("dataset_path"), config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    if not isinstance(source, str) or "custom_dataset" in config:
        return None
    if source in _SUFFIXES:
        data = _of_format(path, source, options)
    elif (folder := path.parent / os.path.expanduser(source)).is_dir():
        data = _of_folder(path, folder / str(options.get("data_dir", "")), None, options)
    elif folder.is_file():
        raise SuiteError(
            f"{path}: dataset_path is the file {source}; write dataset_path: {_format(path, [folder])} and "
            f"dataset_kwargs: {{data_files: {source}}}"
        )
    else:
        return None
    data = _with_splits(path, data, config)
    _check_form(path, data, _asked_splits(path, config))
    if {"encoding", "encoding_errors"} & options.keys():
        return replace(data, is_utf8=False)
    _check_encoding(data)
    return data


def _of_format(path: Path, name: str, options: Mapping[str, Json]) -> LocalData:
    base = path.parent / os.path.expanduser(str(options.get("data_dir") or ""))
    given = options.get("data_files")
    if given is None and options.get("data_dir"):
        return _of_folder(path, base, name, options)
    splits = given if isinstance(given, dict) else {"train": given}
    return LocalData(name, {str(split): tuple(_files(path, base, names)) for split, names in splits.items()})


def _of_folder(path: Path, folder: Path, name: str | None, options: Mapping[str, Json]) -> LocalData:
    if not folder.is_dir():
        raise SuiteError(f"{path}: dataset_kwargs.data_dir: no folder {folder}")
    if (given := options.get("data_files")) is not None:
        splits = given if isinstance(given, dict) else {"train": given}
        found = {str(split): tuple(_files(path, folder, names)) for split, names in splits.items()}
        return LocalData(name or _format(path, [file for files in found.values() for file in files]), found)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(folder))]
    name = name or _format(path, files)
    if not (rows := [file for file in files if _suffix(file) in _SUFFIXES[name]]):
        raise SuiteError(f"{path}: {folder} holds no file whose name ends with {' or '.join(_SUFFIXES[name])}")
    return LocalData(name, _told_splits(folder, rows))


def _files(path: Path, base: Path, names: Json) -> Iterator[Path]:
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name or "://" in name:
            raise SuiteError(f"{path}: dataset_kwargs.data_files is {name!r}, but must name a file beside the YAML")
        pattern = os.path.join(base, os.path.expanduser(name))
        if os.path.isfile(pattern):
            yield Path(os.path.abspath(pattern))
            continue
        found = [Path(os.path.abspath(file)) for file in glob.glob(_within(base, name), recursive=True)]
        found = [file for file in sorted(found) if file.is_file() and not file.name.startswith((".", "__"))]
        if not found:
            kind = "matches" if glob.has_magic(name) else "is named"
            raise SuiteError(f"{path}: dataset_kwargs.data_files: no file {kind} {pattern}")
        yield from found


def _within(base: Path, pattern: str) -> str:
    """A pattern below a folder, whose own name holds no pattern."""
    return os.path.join(glob.escape(str(base)), os.path.expanduser(pattern))


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in _PACKED else file.suffix


def _format(path: Path, files: Sequence[Path]) -> str:
    kinds = Counter(name for file in files for name, suffixes in _SUFFIXES.items() if _suffix(file) in suffixes)
    if not kinds:
        raise SuiteError(f"{path}: dataset_path: the folder holds no file that is {', '.join(_SUFFIXES)}")
    return kinds.most_common(1)[0][0]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _told_splits(folder: Path, files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Split -> files, by the names of folders, else of files, else all are "train"."""
    below = [file.relative_to(folder) for file in files]
    for names in ([file.parent.parts for file in below], [(file.name,) for file in below]):
        splits = {
            split: tuple(
                file for file, parts in zip(files, names, strict=True) if any(_tells(part, words) for part in parts)
            )
            for split, words in _KEYWORDS.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {"train": tuple(files)}


def _tells(name: str, keywords: Sequence[str]) -> bool:
    return any(re.search(rf"(^|[-._ 0-9]){word}([-._ 0-9]|$)", name) for word in keywords)


def _with_splits(path: Path, data: LocalData, config: Mapping[str, Json]) -> LocalData:
    """The data, whose splits have to be those that the task reads.

    A folder whose names tell splits apart, while the task reads "train" alone, is one split.
    """
    asked = _asked_splits(path, config)
    if missing := asked - data.splits.keys():
        if asked == {"train"} and _is_folder(config):
            return LocalData(data.format, {"train": tuple(data.files)})
        raise SuiteError(f"{path}: no data for the split {some(missing)}; there is {some(data.splits.keys())}")
    return data


def _is_folder(config: Mapping[str, Json]) -> bool:
    options = config.get("dataset_kwargs")
    return not isinstance(options, dict) or "data_files" not in options


def _asked_splits(path: Path, config: Mapping[str, Json]) -> set[str]:
    """The splits that lm-eval reads: that of the test, and that of the examples."""
    test = config.get("test_split") or config.get("validation_split")
    if test is None:
        raise SuiteError(f"{path}: names neither test_split nor validation_split")
    examples = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or test
    options = config.get("fewshot_config")
    if isinstance(options, dict):
        examples = test if "samples" in options else options.get("split") or examples
    return {str(test), str(examples)}


def _check_form(path: Path, data: LocalData, asked: set[str]) -> None:
    """Refuse a split that is read and has no row, and Parquet that is taken for another form or the reverse, which
    `datasets` would find out when the engine is up."""
    for split in sorted(asked):
        files = data.splits[split]
        if not any(file.stat().st_size for file in files):
            raise SuiteError(
                f"{path}: the split {split} has no rows: {some([str(file) for file in files]) or 'it lists no file'}"
            )
    for file in data.files:
        with open(file, "rb") as opened:
            is_parquet = opened.read(4) == b"PAR1"
        if is_parquet != (data.format == "parquet") and file.stat().st_size:
            form = "parquet" if is_parquet else _format(path, [file])
            raise SuiteError(f"{path}: {file} is not {data.format}; write dataset_path: {form}")


def _check_encoding(data: LocalData) -> None:
    """`datasets` reads UTF-8, and would say no more than that it can't, when the engine is up."""
    if data.format in ("json", "csv", "text"):
        for file in data.files:
            if file.suffix not in _PACKED:
                decode_text(file.read_bytes(), str(file), SuiteError)
