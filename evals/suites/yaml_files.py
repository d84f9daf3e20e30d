"""Reading a suite's YAML, and finding the files it names beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from fleet.core.errors import SuiteError
from fleet.core.identity import Json
from fleet.core.json_lines import decode_text

_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C, where PyYAML was built with it, takes a tenth of the time."""


class FunctionName(str):
    """The text after `!function`, lm-eval's way to name code: `module.name`."""

    __slots__ = ()


class _Loader(_SafeLoader):
    """YAML in which code is named, and not run."""


_Loader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(cast(Any, node))))


def read_yaml(path: Path) -> dict[str, Json]:
    """The fields of a YAML file.

    Raises:
        SuiteError: It cannot be read, or is no mapping.
    """
    try:
        config: Any = yaml.load(decode_text(path.read_bytes(), str(path), SuiteError), Loader=_Loader)
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise SuiteError(f"{path}: must be a mapping of fields, not {type(config).__name__}")
    return cast(dict[str, Json], config)


def functions(value: object) -> Iterator[FunctionName]:
    """Every piece of code that a YAML's value names."""
    if isinstance(value, FunctionName):
        yield value
    elif isinstance(value, dict):
        for item in cast(Mapping[object, object], value).values():
            yield from functions(item)
    elif isinstance(value, list):
        for item in cast(list[object], value):
            yield from functions(item)


def data_files(path: Path, value: object) -> list[Path]:
    """The file of this name beside the YAML, or all that a pattern with `*` matches.

    Raises:
        SuiteError: There is none, or the value is no name.
    """
    if isinstance(value, str) and "*" in value and "://" not in value:
        if not (found := sorted(path.parent.glob(value))):
            raise SuiteError(f"{path}: data: no file matches {path.parent / value}")
        return found
    return [data_file(path, value, "data")]


def data_file(path: Path, name: object, where: str) -> Path:
    """The file of this name beside the YAML; `where` is what messages call the field.

    Raises:
        SuiteError: There is none, or the value is no name.
    """
    if not isinstance(name, str) or not name or "://" in name:
        raise SuiteError(f"{path}: {where} is {name!r}, but must name a file beside the YAML")
    file = path.parent / name
    if not file.is_file():
        raise SuiteError(f"{path}: {where}: no file {file}")
    return file
