"""Task suites: lm-eval's own tasks, and task files in its format; the digest covers every file that decides a score."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evals.suites.lm_eval_names import lm_eval_code_names, lm_eval_names, lm_eval_version
from evals.suites.published import READERS
from evals.suites.suite import SUITE_VERSION, Suite
from evals.suites.yaml_files import data_file, read_yaml
from fleet.core.errors import SuiteError
from fleet.core.identity import Json

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""The `dataset_path`s of lm-eval that mean files given in `dataset_kwargs.data_files`."""


_RUNS_CODE = (
    "its score comes from running code that a model wrote, and nothing here walls that off from the node's "
    "credentials; leave it out, and run lm-eval itself where that is safe"
)


def task_suite(path: Path, config: Mapping[str, Json]) -> Suite:
    """The suite of a task file.

    Raises:
        SuiteError: The task has no name, runs code that models write, or lacks a file.
    """
    name = config["task"]
    if not isinstance(name, str) or not name:
        raise SuiteError(f"{path}: task is {name!r}, but must be one task's name")
    files = [path, *_included(path)]
    # An include is part of the task: lm-eval reads it first and lets the outer file win.
    merged = {k: v for f in reversed(files) if f.suffix != ".py" for k, v in read_yaml(f).items()}
    if merged.get("unsafe_code"):
        raise SuiteError(f"{path}: {_RUNS_CODE}")
    data = local_data_files(path, merged)
    files += [file for split in data.values() for file in split]
    test = data.get(str(merged.get("test_split") or merged.get("validation_split")), [])
    limit = _fields(merged, "generation_kwargs").get("max_gen_toks")
    return Suite(
        name=name,
        kind="task",
        digest=_digest(path.parent, files, f"lm_eval {lm_eval_version()}"),
        path=path,
        num_samples=_num_lines(test) if merged.get("dataset_path") == "json" and test else None,
        max_tokens=limit if isinstance(limit, int) else None,
        files=tuple(dict.fromkeys(files)),
    )


def local_data_files(path: Path, config: Mapping[str, Json]) -> dict[str, list[Path]]:
    """Split -> files of a task YAML that names local data, resolved against the YAML's folder.

    Empty for a task whose data comes from a hub or from code.

    Raises:
        SuiteError: A file is missing, or the field is of another form.
    """
    if config.get("dataset_path") not in LOCAL_FORMATS:
        return {}
    files = _fields(config, "dataset_kwargs").get("data_files")
    splits = files if isinstance(files, dict) else {"train": files}
    return {
        str(split): [
            data_file(path, name, "dataset_kwargs.data_files")
            for name in (names if isinstance(names, list) else [names])
        ]
        for split, names in splits.items()
    }


def _fields(config: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    fields = config.get(name)
    return fields if isinstance(fields, dict) else {}


def _included(path: Path) -> list[Path]:
    """The other files a task YAML is made of: its includes, theirs, and Python beside them that it calls."""
    found: list[Path] = []
    queue = [path]
    while queue:
        file = queue.pop(0)
        config = read_yaml(file)
        names = config.get("include", [])
        more = [data_file(file, n, "include") for n in (names if isinstance(names, list) else [names])]
        for module in re.findall(r"!function\s+([\w.]+)\.\w+", file.read_text(encoding="utf-8")):
            python = file.parent / f"{module.replace('.', '/')}.py"
            more += [python] if python.is_file() else []
        new = [m for m in dict.fromkeys(more) if m not in found and m != path]
        found += new
        queue += [m for m in new if m.suffix != ".py"]
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SuiteError(f"{file}: is not UTF-8: {error}") from error
    # Not splitlines(): JSON may hold a bare U+2028 or U+0085, which is not the end of its line.
    return ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def _num_lines(files: Sequence[Path]) -> int | None:
    if any(file.suffix != ".jsonl" for file in files):
        return None
    return sum(1 for file in files for _ in _lines(file))


def _digest(folder: Path, files: Sequence[Path], how: str) -> str:
    """sha256 over what the files hold and what they call each other; moving them together changes nothing."""
    entries = sorted(
        (
            Path(os.path.relpath(file, folder)).as_posix(),
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in set(files)
    )
    text = json.dumps([SUITE_VERSION, how, entries])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def lm_eval_suite(name: str, folders: Sequence[Path]) -> Suite:
    """The suite of one of lm-eval's own tasks; `folders` are where near matches are looked for beside its names.

    Raises:
        SuiteError: Unknown, or its score comes from running code that models write.
    """
    if name not in (known := lm_eval_names()):
        own = {file.stem for folder in folders for file in folder.glob("*.yaml")} | READERS.keys()
        near = difflib.get_close_matches(name, sorted(own | known), n=5, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SuiteError(
            f"suite {name}: no {name}.yaml in {', '.join(map(str, folders))}, "
            f"no published set, and no task of lm-eval {lm_eval_version()}{hint}"
        )
    if name in lm_eval_code_names():
        raise SuiteError(f"suite {name}: {_RUNS_CODE}")
    identity = json.dumps([SUITE_VERSION, "lm_eval", lm_eval_version(), name])
    digest = "sha256:" + hashlib.sha256(identity.encode()).hexdigest()
    return Suite(name=name, kind="task", digest=digest, path=None)
