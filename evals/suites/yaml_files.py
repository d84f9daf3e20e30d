"""Reading a suite's YAML, and finding the files it names beside it."""

from __future__ import annotations

import glob
from collections.abc import Hashable, Iterable, Iterator
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


class _UniqueLoader(_Loader):
    """The same, and no field is there twice, of which YAML's readers take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is there twice; leave one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(cast(Any, node))))


def read_yaml(path: Path, unique: bool = False) -> dict[str, Json]:
    """The fields of a YAML file.

    Args:
        unique: Whether a field that is there twice is refused; lm-eval takes the last, and has such tasks.

    Raises:
        SuiteError: It cannot be read, or is no mapping.
    """
    loader = _UniqueLoader if unique else _Loader
    try:
        config: Any = yaml.load(decode_text(path.read_bytes(), str(path), SuiteError), Loader=loader)
    except RecursionError as error:
        raise SuiteError(f"{path}: no valid YAML: it is nested too deeply") from error
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise SuiteError(f"{path}: must be a mapping of fields, not {type(config).__name__}")
    return cast(dict[str, Json], config)


def functions(value: object) -> Iterator[FunctionName]:
    """Every piece of code that a YAML's value names.

    What an alias repeats is looked at once: aliases of aliases grow without bounds, and one may contain itself.
    """
    todo: list[object] = [value]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if isinstance(item, FunctionName):
            yield item
            continue
        inner: Iterable[object] = ()
        if isinstance(item, dict):
            inner = cast(dict[object, object], item).values()
        elif isinstance(item, list):
            inner = cast(list[object], item)
        if id(cast(object, item)) not in seen:
            seen.add(id(cast(object, item)))
            todo += reversed([*inner])


def data_files(path: Path, value: object) -> list[Path]:
    """The file of this name beside the YAML, or all that a pattern with `*` matches.

    Raises:
        SuiteError: There is none, or the value is no name.
    """
    if isinstance(value, str) and "*" in value and "://" not in value:
        matches = map(Path, glob.glob(str(Path(glob.escape(str(path.parent)), value)), recursive=True))
        if not (found := sorted(file for file in matches if file.is_file())):
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
