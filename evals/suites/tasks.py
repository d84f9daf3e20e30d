"""Task suites: lm-eval's own tasks, groups and tags, and files in its format. Light: nothing of lm-eval is imported.

A group or a tag is one suite: all its tasks' samples together. The digest covers every file that decides a score, and
no path; of what is lm-eval's own, its version.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from evals.suites.limit import limit_value
from evals.suites.local_data import local_data
from evals.suites.published import READERS
from evals.suites.python_files import PythonFiles
from evals.suites.suite import SUITE_VERSION, Suite, TaskPart
from evals.suites.task_files import task_files
from evals.suites.task_index import (
    Definition,
    Member,
    TaskIndex,
    is_lm_evals,
    lm_eval_folder,
    lm_eval_index,
    lm_eval_version,
    read_definition,
    task_yaml,
)
from evals.suites.yaml_files import FunctionName, functions
from fleet.core.errors import SuiteError, some
from fleet.core.identity import Json

DRAWS_VERSION = 2
"""Bumped by hand when a task that samples would draw other completions; no other task's digest has it."""

_OUTPUT_TYPES = ("generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling")

_TEMPLATE_FIELDS = ("description", "doc_to_text", "doc_to_target", "doc_to_choice")
"""Fields of a task that lm-eval reads as Jinja."""

_FIRST_METRIC = {"loglikelihood": "perplexity", "loglikelihood_rolling": "word_perplexity", "multiple_choice": "acc"}
"""Kind of output -> lm-eval's first metric, where a task names none; else it is exact_match."""

_RUNS_CODE = (
    "its score comes from running code that a model wrote, and nothing here walls that off from the node's "
    "credentials; leave it out, and run lm-eval itself where that is safe"
)


def task_suite(path: Path, folders: Sequence[Path] = ()) -> Suite:
    """The suite of a task's or a group's file; a group's tasks are looked for beside it, in `folders` and in lm-eval.

    Raises:
        SuiteError: It has no name, runs code that models write, lacks a file or a package, or is a group that is no
            one suite.
    """
    definition = read_definition(path)
    if definition.is_group:
        if not definition.name:
            raise SuiteError(f"{path}: group is {definition.config['group']!r}, but must be one group's name")
        index = TaskIndex.of(dict.fromkeys([path.parent, *folders])) | lm_eval_index()
        return _own_suite(definition, index.group_members(definition))
    if not definition.name:
        name = definition.config.get("task")
        raise SuiteError(f"{path}: task is {name!r}, but must be one task's name; a list of tasks needs group: NAME")
    return _own_suite(definition, [Member(definition.name, definition.files, definition.config)])


def indexed_suite(name: str, folders: Sequence[Path]) -> Suite:
    """The suite of a task, group or tag by the name that a YAML gives it: in one of the folders, or below one, whatever
    the file is called, or in lm-eval.

    Raises:
        SuiteError: Unknown (near matches are listed), or as for `task_suite`.
    """
    own = TaskIndex.of(folders)
    if name in own.paths:
        return task_suite(own.paths[name], folders)
    if name in own.tags:
        members = (own | lm_eval_index()).members(name)
        return _own_suite(Definition(name, (), {"tag": name}), members)
    if name not in (known := lm_eval_index().names):
        names = {file.stem for folder in folders for file in folder.glob("*.yaml")} | READERS.keys() | own.names
        near = difflib.get_close_matches(name, sorted(names | known), n=5, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SuiteError(
            f"suite {name}: no {name}.yaml in {', '.join(map(str, folders))}, "
            f"no published set, and no task of lm-eval {lm_eval_version()}{hint}"
        )
    return _lm_eval_suite(name)


def _lm_eval_suite(name: str) -> Suite:
    members = lm_eval_index().members(name)
    _check_members(name, members)
    python = PythonFiles([])
    for yaml in dict.fromkeys(file for member in members for file in member.files):
        for function in functions(task_yaml(yaml)):
            python.follow(function, yaml)
    python.check_installed(name)
    path = lm_eval_index().paths.get(name)
    return Suite(
        name=name,
        kind="task",
        digest=_digest(["lm_eval", lm_eval_version(), name, *_draws(members)]),
        path=None,
        max_tokens=_max_tokens(members),
        notes=_notes(name, read_definition(path).config if path else {}),
    )


def _own_suite(definition: Definition, members: Sequence[Member]) -> Suite:
    name, config = definition.name, definition.config
    _check_members(name, members)
    parts = [_part(member) for member in members]
    yamls = [yaml for member in members for yaml in member.files]
    found = [
        task_files(part.name, part.files, part.data.files if part.data else ()) if part.files else _data_files(part)
        for part in parts
    ]
    outer = [file for file in reversed(definition.files) if not is_lm_evals(file)]
    files = tuple(dict.fromkeys([*outer, *(file for files in found for file in files)]))
    lm_evals = sorted({str(yaml.relative_to(lm_eval_folder())) for yaml in yamls if is_lm_evals(yaml)})
    how: list[Json] = [f"lm_eval {lm_eval_version()}", *_draws(members), *lm_evals]
    if "task" not in config or definition.is_group:
        how.append(name)
        for part in parts:
            how.append([part.name, dict(part.overrides)])
    path = outer[0] if outer else files[0]
    counts = [
        part.data.num_rows(_test_split(member)) if part.data else None
        for part, member in zip(parts, members, strict=True)
    ]
    own_limit = _limit(path, config)
    return Suite(
        name=name,
        kind="task",
        digest=_files_digest(path.parent, files, how),
        path=path,
        num_samples=None if None in counts else sum(count or 0 for count in counts),
        max_tokens=_max_tokens(members),
        files=files,
        parts=tuple(parts),
        own_limit=own_limit,
        notes=_notes(name, config),
    )


def _part(member: Member) -> TaskPart:
    where = member.files[-1] if member.files else Path(member.name)
    if any(True for _ in functions(dict(member.overrides))):
        raise SuiteError(f"task {member.name}: its group names a !function for it; write it into the task's own YAML")
    if not is_lm_evals(where):
        _check_fields(where, member.merged)
    data = None if is_lm_evals(where) else local_data(where, member.merged)
    return TaskPart(member.name, member.files, member.overrides, data)


def _check_fields(path: Path, config: Mapping[str, Json]) -> None:
    """Refuse what lm-eval would refuse in a task of one's own, when the engine is up.

    Raises:
        SuiteError: It names the field.
    """
    if "class" in config:
        return
    if not config.get("dataset_path") and "custom_dataset" not in config:
        raise SuiteError(
            f"{path}: dataset_path is missing: `json` with dataset_kwargs.data_files, or a data set's name"
        )
    kind = config.get("output_type", "generate_until")
    if kind not in _OUTPUT_TYPES:
        raise SuiteError(f"{path}: output_type is {kind!r}, but must be one of {', '.join(_OUTPUT_TYPES)}")
    for name in _TEMPLATE_FIELDS:
        text = config.get(name)
        if isinstance(text, str) and not isinstance(text, FunctionName):
            try:
                Environment().parse(text)
            except TemplateSyntaxError as error:
                raise SuiteError(f"{path}: {name}: line {error.lineno} of the template: {error.message}") from error


def _data_files(part: TaskPart) -> tuple[Path, ...]:
    return tuple(part.data.files) if part.data else ()


def _check_members(name: str, members: Sequence[Member]) -> None:
    """Refuse a suite that is known not to come to one rate.

    Raises:
        SuiteError: It names the tasks.
    """
    if not members:
        raise SuiteError(f"suite {name}: the group lists no task; give them below `task:`")
    if unsafe := [member.name for member in members if member.merged.get("unsafe_code")]:
        which = "" if len(members) == 1 else f"{some(unsafe)}: "
        raise SuiteError(f"suite {name}: {which}{_RUNS_CODE}")
    twice = [task for task, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        raise SuiteError(f"suite {name}: lists {some(twice)} twice, by way of a group or a tag; leave one out")
    metrics = {metric for member in members if (metric := _metric(member)) is not None}
    if len(metrics) > 1 or (len(members) > 1 and any("perplexity" in m or m == "bits_per_byte" for m in metrics)):
        names = ", ".join(member.name for member in members)
        raise SuiteError(
            f"suite {name}: its tasks are scored by {', '.join(sorted(metrics))}, which no one rate adds up; name "
            f"tasks instead of the group: {names}"
        )


def _metric(member: Member) -> str | None:
    """The first metric, by which a task is scored; None where only its code says."""
    config = member.merged
    if "class" in config:
        return None
    listed = config.get("metric_list")
    if isinstance(listed, list) and listed:
        first = listed[0]
        return str(first.get("metric")) if isinstance(first, dict) else None
    return _FIRST_METRIC.get(str(config.get("output_type")), "exact_match")


def _draws(members: Iterable[Member]) -> list[Json]:
    """What the digest of a task that samples has beside others'."""
    return [f"draws {DRAWS_VERSION}"] if any(map(_samples, members)) else []


def _samples(member: Member) -> bool:
    """Whether completions are drawn: as lm-eval reads `generation_kwargs`, at a temperature, unless it says not to."""
    settings = member.merged.get("generation_kwargs")
    if not isinstance(settings, dict) or settings.get("do_sample") is False:
        return False
    temperature = settings.get("temperature")
    return isinstance(temperature, int | float) and temperature > 0


def _max_tokens(members: Sequence[Member]) -> int | None:
    settings = members[0].merged.get("generation_kwargs")
    limit = settings.get("max_gen_toks") if isinstance(settings, dict) and len(members) == 1 else None
    return limit if isinstance(limit, int) else None


def _test_split(member: Member) -> str:
    return str(member.merged.get("test_split") or member.merged.get("validation_split"))


def _limit(path: Path, config: Mapping[str, Json]) -> int | float | None:
    try:
        return limit_value(config["limit"]) if "limit" in config else None
    except ValueError as error:
        raise SuiteError(f"{path}: limit {error}") from error


def _notes(name: str, config: Mapping[str, Json]) -> tuple[str, ...]:
    listed = config.get("aggregate_metric_list")
    rules = listed if isinstance(listed, list) else [listed]
    if any(isinstance(rule, dict) and rule.get("weight_by_size") is False for rule in rules):
        return (
            f"suite {name}: lm-eval's own score of this group is the mean of its tasks' scores; here it is the mean "
            "over all their samples, so that a large task counts for more",
        )
    return ()


def _digest(content: list[Json]) -> str:
    text = json.dumps([SUITE_VERSION, *content])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _files_digest(folder: Path, files: Sequence[Path], how: Sequence[Json]) -> str:
    """sha256 over what the files hold and what they call each other; moving them together changes nothing."""
    entries = sorted(
        (Path(os.path.relpath(file, folder)).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest())
        for file in set(files)
    )
    return _digest([*how, [[name, digest] for name, digest in entries]])
