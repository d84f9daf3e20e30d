"""Which tasks, groups and tags there are, of lm-eval and of one's own folders, without importing lm-eval; light.

The rules are lm-eval's own (its `TaskIndex` and `TaskFactory`): a YAML with `group:` is a group, whose `task:` lists
tasks, groups, tags, and definitions on the spot; another with `task:` is a task; a `tag:` stands for all tasks that
have it. An `include:` is read first, and the outer file wins.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.suites.yaml_files import read_yaml
from fleet.core.errors import SuiteError
from fleet.core.identity import Json

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}

_GROUP_FIELDS = {"group", "group_alias", "task", "aggregate_metric_list", "version", "metadata", "tag"}
"""What describes a group; its other fields go to its tasks."""


def lm_eval_version() -> str:
    """The installed version: part of the identity of every task suite."""
    return importlib.metadata.version("lm_eval")


@functools.cache
def lm_eval_folder() -> Path:
    """Where the installed lm-eval has its tasks; importing it would take ten times as long as reading them all."""
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.origin or "").parent / "tasks" if spec is not None else Path("/nonexistent")


def is_lm_evals(path: Path) -> bool:
    """Whether a file is part of the installed lm-eval: its version identifies it, and every node has it."""
    return path.is_relative_to(lm_eval_folder())


@dataclass(frozen=True)
class Definition:
    """A task or group as YAML defines it."""

    name: str
    files: tuple[Path, ...]
    """The YAML files that make it, in the order in which later ones win: includes first."""
    config: Mapping[str, Json]
    """Of all of them together."""

    @property
    def is_group(self) -> bool:
        return "group" in self.config and "class" not in self.config


@dataclass(frozen=True)
class Member:
    """One task of a group, and what the group changes in it."""

    name: str
    files: tuple[Path, ...]
    config: Mapping[str, Json]
    overrides: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """Fields that win over the files'."""

    @property
    def merged(self) -> Mapping[str, Json]:
        return {**self.config, **self.overrides}


def read_definition(path: Path) -> Definition:
    """The task or group in a YAML file, with what it includes.

    Raises:
        SuiteError: A file cannot be read, or files include each other.
    """
    files, config = _read(path, ())
    name = config.get("group", config.get("task"))
    return Definition(name if isinstance(name, str) else "", tuple(files), config)


def _read(path: Path, outer: tuple[Path, ...]) -> tuple[list[Path], dict[str, Json]]:
    path = Path(os.path.abspath(path))
    if path in outer:
        raise SuiteError(f"{outer[-1]}: include: {path} includes it in turn; take one of the two out")
    config = dict(task_yaml(path))
    files: list[Path] = []
    merged: dict[str, Json] = {}
    names = config.pop("include", [])
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not (file := path.parent / name).is_file():
            raise SuiteError(f"{path}: include: no file {name!r}; it is looked for in {path.parent}")
        more, included = _read(file, (*outer, path))
        included.pop("task_list", None)
        merged |= included
        files += more
    return [*files, path], merged | config


def task_yaml(path: Path) -> Mapping[str, Json]:
    """The fields of one YAML, without those of its includes; lm-eval's own are read once.

    Raises:
        SuiteError: It cannot be read.
    """
    return _lm_eval_yaml(path) if is_lm_evals(path) else read_yaml(path)


_lm_eval_yaml = functools.cache(read_yaml)


@dataclass(frozen=True)
class TaskIndex:
    """Every task, group and tag of some folders. Of two with one name the first in the order of paths counts."""

    paths: Mapping[str, Path]
    """Name of a task or group -> its YAML."""
    tags: Mapping[str, Sequence[str]]
    """Tag -> the tasks that have it, in order of name."""

    @classmethod
    def of(cls, folders: Iterable[Path]) -> TaskIndex:
        """An index of these folders and all below them; a file that is no task's is passed over."""
        paths: dict[str, Path] = {}
        tags: dict[str, set[str]] = {}
        for path in (path for folder in folders for path in _yaml_paths(folder)):
            try:
                definition = read_definition(path)
            except SuiteError:
                continue  # whoever names it is told what is wrong with it
            if not definition.name or definition.name in paths or "suite" in definition.config:
                continue
            paths[definition.name] = path
            tag = definition.config.get("tag")
            for name in tag if isinstance(tag, list) else [tag]:
                if isinstance(name, str) and not definition.is_group:
                    tags.setdefault(name, set()).add(definition.name)
        return cls(paths, {tag: sorted(tasks) for tag, tasks in tags.items() if tag not in paths})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.paths, *self.tags})

    def __or__(self, other: TaskIndex) -> TaskIndex:
        """Both; what is in both is this one's."""
        tags = {tag: tasks for tag, tasks in other.tags.items() if tag not in self.names}
        return TaskIndex({**other.paths, **self.paths}, {**tags, **self.tags})

    def members(self, name: str) -> list[Member]:
        """The tasks that a name stands for: a task for itself, a group or a tag for all in it.

        Raises:
            SuiteError: A group lists what there is not, or what it lists comes back to it.
        """
        return list(self._members(name, {}, ()))

    def group_members(self, definition: Definition) -> list[Member]:
        """The tasks of a group.

        Raises:
            SuiteError: As for `members`.
        """
        return list(self._of_group(definition.name, definition.config, definition.files, {}, ()))

    def _members(self, name: str, overrides: Mapping[str, Json], outer: tuple[str, ...]) -> Iterator[Member]:
        if name in self.tags:
            for task in self.tags[name]:
                yield from self._members(task, overrides, outer)
            return
        definition = read_definition(self.paths[name])
        if not definition.is_group:
            yield Member(name, definition.files, definition.config, overrides)
            return
        yield from self._of_group(name, definition.config, definition.files, overrides, outer)

    def _of_group(
        self,
        name: str,
        config: Mapping[str, Json],
        files: tuple[Path, ...],
        overrides: Mapping[str, Json],
        outer: tuple[str, ...],
    ) -> Iterator[Member]:
        if name in outer:
            raise SuiteError(f"group {name}: contains itself by way of {outer[-1]}; take one of the two out")
        # What a group says for all its tasks, and what whoever lists the group says, which wins.
        shared = {key: value for key, value in config.items() if key not in _GROUP_FIELDS} | dict(overrides)
        items = config.get("task")
        for item in items if isinstance(items, list) else [items]:
            yield from self._of_item(name, item, files, shared, (*outer, name))

    def _of_item(
        self, group: str, item: Json, files: tuple[Path, ...], shared: Mapping[str, Json], outer: tuple[str, ...]
    ) -> Iterator[Member]:
        own = (
            {key: value for key, value in item.items() if key not in ("task", "group")}
            if isinstance(item, dict)
            else {}
        )
        name = item.get("group", item.get("task")) if isinstance(item, dict) else item
        if isinstance(name, str) and name in self.names:
            yield from self._members(name, {**shared, **own}, outer)
        elif isinstance(item, dict) and isinstance(name, str) and "group" in item:
            yield from self._of_group(f"{group}::{name}", item, files, shared, outer)
        elif isinstance(item, dict) and isinstance(name, str) and "dataset_path" in {**shared, **own}:
            yield Member(f"{group}::{name}", (), {}, {**shared, **own})
        else:
            raise SuiteError(
                f"group {group} ({files[-1] if files else 'lm-eval'}): lists {name!r}, which is no task, group or tag; "
                "correct the name, or give its YAML beside the group's"
            )


def _yaml_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.yaml") if not _IGNORED & set(path.parts) and path.is_file())


@functools.cache
def lm_eval_index() -> TaskIndex:
    """Every task, group and tag of the installed lm-eval: a second or two."""
    return TaskIndex.of([lm_eval_folder()])
