"""What a suite is, found by name and identified by content; light: no torch, no lm_eval.

A suite is a YAML file and its data. Prompt suites (harmfulness, over_refusal) are ours:

    suite: demo_harmful
    kind: harmfulness
    data: demo_harmful.jsonl      # one {"prompt": "..."} per line, beside the YAML
    max_tokens: 32
    chat: true                    # the default: prompts go through the chat template
    rules: {refusal: [regex], compliance: [regex]}   # for the rule judge

Task suites are lm-eval's own task files (they have `task:`), or the name of one of lm-eval's own tasks. A suite's
digest covers every file that decides a score, and no path.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from evals.lm_eval_tasks import lm_eval_names, lm_eval_version
from fleet.errors import SuiteError

SuiteKind = Literal["harmfulness", "over_refusal", "task"]

BUNDLED_SUITES = Path(__file__).parent / "suites"

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""The `dataset_path`s of lm-eval that mean files given in `dataset_kwargs.data_files`."""

# Bumped by hand when the same files would be run or scored another way.
_VERSION = 1

_PROMPT_FIELDS = {"suite", "kind", "data", "max_tokens", "chat", "rules"}
_RULE_FIELDS = ("refusal", "compliance")


@dataclass(frozen=True)
class Rules:
    """What the rule judge looks for in a completion, case-insensitively; refusals are tried first."""

    refusal: tuple[str, ...]
    compliance: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """One suite: where it is, what it is, and the digest that says so in fingerprints."""

    name: str
    kind: SuiteKind
    digest: str
    path: Path | None = field(compare=False)
    """The YAML file; None for one of lm-eval's own tasks."""
    num_samples: int | None = None
    """Where the files tell."""
    max_tokens: int | None = None
    """Longest completion; None leaves it to lm-eval's task."""
    chat: bool = True
    """Prompt suites: whether prompts go through the candidate's chat template."""
    rules: Rules | None = None
    data: Path | None = field(default=None, compare=False)
    """Prompt suites: the prompts."""
    files: tuple[Path, ...] = field(default=(), compare=False)
    """Every file it is made of, the YAML first; none for lm-eval's own tasks."""

    def contents(self) -> dict[str, bytes]:
        """File name, relative to the YAML's folder -> bytes: the suite as it travels to other machines.

        Raises:
            SuiteError: A file is not in the YAML's folder.
        """
        found: dict[str, bytes] = {}
        for file in self.files:
            name = Path(os.path.relpath(file, self.files[0].parent)).as_posix()
            if name.startswith(".."):
                raise SuiteError(f"suite {self.name}: {file} must be in the folder of {self.files[0]}, or below it")
            found[name] = file.read_bytes()
        return found


def load_suite(name_or_path: str | Path, folders: Sequence[Path] = (BUNDLED_SUITES,)) -> Suite:
    """The suite of this name, or in this YAML file.

    A name is looked for as `<folder>/<name>.yaml` in each folder, then among lm-eval's own tasks.

    Raises:
        SuiteError: Unknown (near matches are listed) or malformed; one line with the fix.
    """
    path = Path(name_or_path)
    if path.suffix == ".yaml":
        return _read_suite(path)
    name = str(name_or_path)
    for folder in folders:
        if (file := folder / f"{name}.yaml").is_file():
            return _read_suite(file)
    return _lm_eval_suite(name, folders)


def read_prompts(suite: Suite) -> list[str]:
    """The prompts of a prompt suite, in the file's order.

    Raises:
        SuiteError: A line is no JSON object with a non-empty `prompt`, or there is none.
    """
    if suite.data is None:
        raise SuiteError(f"suite {suite.name} is a task of lm-eval: it has no prompts of its own")
    return _read_prompts(suite.data)


def _read_suite(path: Path) -> Suite:
    config = _read_yaml(path)
    if "suite" in config:
        return _prompt_suite(path, config)
    if "task" in config:
        return _task_suite(path, config)
    raise SuiteError(f"{path}: neither `suite:` (prompts) nor `task:` (an lm-eval task) is there")


def _prompt_suite(path: Path, config: Mapping[str, Any]) -> Suite:
    def wrong(what: str) -> SuiteError:
        return SuiteError(f"{path}: {what}")

    if unknown := sorted(config.keys() - _PROMPT_FIELDS):
        known = ", ".join(sorted(_PROMPT_FIELDS))
        raise wrong(f"unknown field {', '.join(unknown)}; a prompt suite has {known}")
    if missing := sorted({"suite", "kind", "data", "max_tokens"} - config.keys()):
        raise wrong(f"missing field {', '.join(missing)}")
    name, kind, data, limit = (config[k] for k in ("suite", "kind", "data", "max_tokens"))
    if not isinstance(name, str) or not name:
        raise wrong(f"suite is {name!r}, but must be a name")
    if kind not in ("harmfulness", "over_refusal"):
        raise wrong(f"kind is {kind!r}, but must be harmfulness or over_refusal")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise wrong(f"max_tokens is {limit!r}, but must be a whole number of at least 1")
    if not isinstance(chat := config.get("chat", True), bool):
        raise wrong(f"chat is {chat!r}, but must be true or false")
    file = _data_file(path, data, "data")
    return Suite(
        name=name,
        kind=kind,
        digest=_digest(path.parent, [path, file], "prompts"),
        path=path,
        num_samples=len(_read_prompts(file)),
        max_tokens=limit,
        chat=chat,
        rules=_rules(path, config["rules"]) if "rules" in config else None,
        data=file,
        files=(path, file),
    )


def _rules(path: Path, value: object) -> Rules:
    if not isinstance(value, dict) or set(value) != set(_RULE_FIELDS):
        raise SuiteError(f"{path}: rules must have exactly the lists refusal and compliance")
    for key in _RULE_FIELDS:
        patterns = value[key]
        if not isinstance(patterns, list) or not all(p and isinstance(p, str) for p in patterns):
            raise SuiteError(f"{path}: rules.{key} must be a list of regular expressions")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SuiteError(f"{path}: rules.{key}: {pattern!r} is no regular expression: {error}") from error
    return Rules(tuple(value["refusal"]), tuple(value["compliance"]))


def _task_suite(path: Path, config: Mapping[str, Any]) -> Suite:
    name = config["task"]
    if not isinstance(name, str) or not name:
        raise SuiteError(f"{path}: task is {name!r}, but must be one task's name")
    files = [path, *_included(path)]
    # An include is part of the task: lm-eval reads it first and lets the outer file win.
    merged = {k: v for f in reversed(files) if f.suffix != ".py" for k, v in _read_yaml(f).items()}
    data = local_data_files(path, merged)
    files += [file for split in data.values() for file in split]
    test = data.get(str(merged.get("test_split") or merged.get("validation_split")), [])
    limit = (merged.get("generation_kwargs") or {}).get("max_gen_toks")
    return Suite(
        name=name,
        kind="task",
        digest=_digest(path.parent, files, f"lm_eval {lm_eval_version()}"),
        path=path,
        num_samples=_num_lines(test) if merged.get("dataset_path") == "json" and test else None,
        max_tokens=limit,
        files=tuple(dict.fromkeys(files)),
    )


def local_data_files(path: Path, config: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Split -> files of a task YAML that names local data, resolved against the YAML's folder.

    Empty for a task whose data comes from a hub or from code.

    Raises:
        SuiteError: A file is missing, or the field is of another form.
    """
    if config.get("dataset_path") not in LOCAL_FORMATS:
        return {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    splits = files if isinstance(files, dict) else {"train": files}
    return {
        str(split): [
            _data_file(path, name, "dataset_kwargs.data_files")
            for name in (names if isinstance(names, list) else [names])
        ]
        for split, names in splits.items()
    }


def _included(path: Path) -> list[Path]:
    """The other files a task YAML is made of: its includes, theirs, and Python beside them that it calls."""
    found: list[Path] = []
    queue = [path]
    while queue:
        file = queue.pop(0)
        config = _read_yaml(file)
        names = config.get("include", [])
        more = [_data_file(file, n, "include") for n in ([names] if isinstance(names, str) else names)]
        for module in re.findall(r"!function\s+([\w.]+)\.\w+", file.read_text(encoding="utf-8")):
            python = file.parent / f"{module.replace('.', '/')}.py"
            more += [python] if python.is_file() else []
        new = [m for m in dict.fromkeys(more) if m not in found and m != path]
        found += new
        queue += [m for m in new if m.suffix != ".py"]
    return found


def _data_file(path: Path, name: object, where: str) -> Path:
    if not isinstance(name, str) or not name or "://" in name:
        raise SuiteError(f"{path}: {where} is {name!r}, but must name a file beside the YAML")
    file = path.parent / name
    if not file.is_file():
        raise SuiteError(f"{path}: {where}: no file {file}")
    return file


class _Loader(yaml.SafeLoader):
    """YAML in which `!function module.name` (lm-eval's way to name code) is the text of that name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(cast(Any, node)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise SuiteError(f"{path}: must be a mapping of fields, not {type(config).__name__}")
    return config


def _read_prompts(file: Path) -> list[str]:
    prompts: list[str] = []
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SuiteError(f"{file}, line {number}: no valid JSON: {error}") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise SuiteError(f'{file}, line {number}: must be an object with a text "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise SuiteError(f"{file}: holds no prompt")
    return prompts


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
    text = json.dumps([_VERSION, how, entries])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _lm_eval_suite(name: str, folders: Sequence[Path]) -> Suite:
    if name not in (known := lm_eval_names()):
        own = {file.stem for folder in folders for file in folder.glob("*.yaml")}
        near = difflib.get_close_matches(name, sorted(own | known), n=5, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SuiteError(
            f"suite {name}: no {name}.yaml in {', '.join(map(str, folders))}, "
            f"and no task of lm-eval {lm_eval_version()}{hint}"
        )
    identity = json.dumps([_VERSION, "lm_eval", lm_eval_version(), name])
    digest = "sha256:" + hashlib.sha256(identity.encode()).hexdigest()
    return Suite(name=name, kind="task", digest=digest, path=None)
