"""Which files a task is made of: all that decide a score, so that they identify it and travel with it. Light.

- The YAML, what it includes, and the rows' files.
- The Python it names, and what that imports from beside it.
- If there is such Python, which may open any file: whatever else is in the folder of the YAML that names it, or below.
  Other tasks, and files that only they name, stay out; so do hidden files, caches and texts for people (README,
  LICENSE, CHANGELOG). Either is taken if the Python has its name in a text.

What is part of the installed lm-eval is identified by its version, and is on every node.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from evals.suites.local_data import local_data
from evals.suites.python_files import PythonFiles
from evals.suites.task_index import Definition, is_lm_evals, read_definition, task_yaml
from evals.suites.yaml_files import data_files, functions
from fleet.core.errors import SuiteError

MAX_FILES = 1000
"""Most files that a task may find in its folder beside those it names."""

MAX_BYTES = 64 << 20
"""And how large they may be together."""

_FOR_PEOPLE = ("readme", "license", "licence", "changelog")


def task_files(name: str, yamls: Sequence[Path], rows: Iterable[Path]) -> tuple[Path, ...]:
    """Every file of a task that is not lm-eval's own, the outermost YAML first.

    Args:
        name: The task's, for messages.
        yamls: The files of its definition, the outermost last.
        rows: The files of its rows.

    Raises:
        SuiteError: Python that can't be loaded, lacks a package, or reads what can't travel; or a folder with too much
            in it.
    """
    python = follow_python(yamls)
    python.check_installed(name)
    named = [*reversed(yamls), *rows, *python.files]
    roots = dict.fromkeys(yaml.parent for yaml in yamls if not is_lm_evals(yaml) and _calls(yaml))
    rest = [file for root in roots for file in _rest(root, python, set(named))]
    return tuple(file for file in dict.fromkeys([*named, *rest]) if not is_lm_evals(file))


def follow_python(yamls: Sequence[Path]) -> PythonFiles:
    """The Python that these files name.

    Raises:
        SuiteError: It can't be loaded.
    """
    own = [yaml for yaml in reversed(yamls) if not is_lm_evals(yaml)]
    python = PythonFiles(list(dict.fromkeys(yaml.parent for yaml in own)))
    for yaml in yamls:
        for function in functions(task_yaml(yaml)):
            python.follow(function, yaml)
    return python


def _calls(yaml: Path) -> bool:
    return any(True for _ in functions(task_yaml(yaml)))


def _rest(root: Path, python: PythonFiles, named: set[Path]) -> list[Path]:
    python.check_paths(root)
    found = _walk(root)
    others = _of_others(root, found, named)
    rest = [file for file in found if file not in named and (not _stays_out(file, root, others) or python.names(file))]
    size = sum(file.stat().st_size for file in rest)
    if len(rest) > MAX_FILES or size > MAX_BYTES:
        raise SuiteError(
            f"{root}: the task's Python may read any of {len(rest)} files ({size >> 20} MiB) beside it, too many to "
            "travel with it; put the task in a folder of its own"
        )
    return rest


def _walk(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "__pycache__")))
        found += [Path(folder, name) for name in sorted(names) if not name.endswith(".pyc")]
        if len(found) > 20 * MAX_FILES:
            raise SuiteError(f"{root}: holds over {20 * MAX_FILES} files; put the task in a folder of its own")
    return [file for file in found if file.is_file()]


def _stays_out(file: Path, root: Path, others: set[Path]) -> bool:
    name = file.name.lower()
    return file in others or name.startswith((".", *_FOR_PEOPLE))


def _of_others(root: Path, found: Sequence[Path], named: set[Path]) -> set[Path]:
    """The files of the other tasks and suites in a folder."""
    others: set[Path] = set()
    for yaml in (file for file in found if file.suffix in (".yaml", ".yml") and file not in named):
        try:
            definition = read_definition(yaml)
            others |= _own_files(yaml, definition)
        except SuiteError:
            continue  # no suite, or a broken one: then it may be a file that the Python reads
    return others


def _own_files(yaml: Path, definition: Definition) -> set[Path]:
    config = definition.config
    if "suite" in config:
        data = config.get("data")
        return {yaml, *(Path(os.path.abspath(file)) for file in data_files(yaml, data))} if data else {yaml}
    if not definition.name:
        return set()
    data = None if definition.is_group else local_data(yaml, config)
    return {*definition.files, *follow_python(definition.files).files, *(data.files if data else [])}
