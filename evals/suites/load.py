"""From a name or a YAML file to a suite; prompt suites are read here, lm-eval's tasks in `evals.suites.tasks`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evals.suites.limit import limit_value
from evals.suites.prompts import PLAIN, Prompt, read_files
from evals.suites.published import READERS, DataPolicy, Reader
from evals.suites.suite import (
    PACKED_TASK,
    RULE_FIELDS,
    TEMPLATES,
    Rules,
    Suite,
    SuiteKind,
    named_template,
    unpacked_task,
)
from evals.suites.tasks import indexed_suite, task_suite
from evals.suites.yaml_files import data_files, read_yaml
from fleet.core.errors import SuiteError
from fleet.core.identity import Json

logger = logging.getLogger(__name__)

BUNDLED_SUITES = Path(__file__).parent


_MAX_TOKENS = 512
"""Longest completion of a published set that is named without a YAML."""


_PROMPT_FIELDS = {"suite", "kind", "reader", "data", "max_tokens", "chat", "template", "rules", "limit"}


def load_suite(
    name_or_path: str | Path, folders: Sequence[Path] = (BUNDLED_SUITES,), policy: DataPolicy | None = None
) -> Suite:
    """The suite of this name, or in this YAML file.

    A name is looked for as `<folder>/<name>.yaml` in each folder, then among the published sets, which come from the
    hub, then among lm-eval's own tasks. After a `+` it names an attack template to put around the prompts.

    Args:
        name_or_path: A name, or a path that ends in `.yaml`.
        folders: Where YAML files are looked for, the first first.
        policy: Which published sets may be used; by default the open ones that allow commercial use.

    Raises:
        SuiteError: Unknown (near matches are listed), refused by the policy, or malformed; one line with the fix.
    """
    allowed = policy or DataPolicy()
    path = Path(name_or_path)
    if path.name == PACKED_TASK:
        return unpacked_task(path)
    if path.suffix == ".yaml":
        if not path.is_absolute() and not os.path.isfile(path):
            raise SuiteError(f"suite {path}: no such file; a manifest has a suite's name, such as {path.stem}")
        return _read_suite(path, allowed, folders)
    name = str(name_or_path)
    for folder in folders:
        # Not Path.is_file(), which raises for a name that is too long for a file.
        if os.path.isfile(file := folder / f"{name}.yaml"):
            return _read_suite(file, allowed, folders)
    if name in READERS:
        reader = _allowed(f"suite {name}", name, allowed)
        return _prompt_suite(name, reader.kind, reader.read_hub(), _MAX_TOKENS, reader=reader)
    base, plus, template = name.rpartition("+")
    if plus:
        named_template(name, template)
        return load_suite(base, folders, allowed).inside(template)
    return indexed_suite(name, folders)


def _read_suite(path: Path, policy: DataPolicy, folders: Sequence[Path]) -> Suite:
    config = read_yaml(path)
    if "suite" in config:
        return _own_prompt_suite(path, read_yaml(path, unique=True), policy)
    if {"task", "group", "include"} & config.keys():
        return task_suite(path, folders)
    raise SuiteError(f"{path}: neither `suite:` (prompts) nor `task:` or `group:` (of lm-eval) is there")


def _own_prompt_suite(path: Path, config: Mapping[str, Json], policy: DataPolicy) -> Suite:
    def wrong(what: str) -> SuiteError:
        return SuiteError(f"{path}: {what}")

    if unknown := sorted(map(str, config.keys() - _PROMPT_FIELDS)):
        known = ", ".join(sorted(_PROMPT_FIELDS))
        raise wrong(f"unknown field {', '.join(unknown)}; a prompt suite has {known}")
    published = config.get("reader")
    needed = {"suite", "max_tokens"} if published is not None else {"suite", "kind", "data", "max_tokens"}
    if missing := sorted(needed - config.keys()):
        raise wrong(f"missing field {', '.join(missing)}")
    name, limit = config["suite"], config["max_tokens"]
    if not isinstance(name, str) or not name:
        raise wrong(f"suite is {name!r}, but must be a name")
    if published is not None and published not in list(READERS):
        raise wrong(f"reader is {published!r}, but must be one of {', '.join(READERS)}")
    reader = _allowed(f"{path}", published, policy) if published is not None else None
    kind = config.get("kind", reader.kind if reader else None)
    if kind not in ("harmfulness", "over_refusal"):
        raise wrong(f"kind is {kind!r}, but must be harmfulness or over_refusal")
    if reader is not None and kind != reader.kind:
        raise wrong(f"kind is {kind}, but {published} is a set of {reader.kind}; leave kind out")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise wrong(f"max_tokens is {limit!r}, but must be a whole number of at least 1")
    if not isinstance(chat := config.get("chat", True), bool):
        raise wrong(f"chat is {chat!r}, but must be true or false")
    template = _template(f"{path}: template", config["template"]) if "template" in config else None
    rules = _rules(path, config["rules"]) if "rules" in config else None
    try:
        own_limit = limit_value(config["limit"]) if "limit" in config else None
    except ValueError as error:
        raise wrong(f"limit {error}") from error
    if reader is None:
        prompts = read_files(data_files(path, config["data"]), PLAIN)
    elif "data" in config:
        prompts = reader.read_files(data_files(path, config["data"]))
    else:
        prompts = reader.read_hub()
    suite = _prompt_suite(name, kind, prompts, limit, reader, path, chat, template, rules)
    return replace(suite, own_limit=own_limit)


def _prompt_suite(
    name: str,
    kind: SuiteKind,
    prompts: tuple[Prompt, ...],
    max_tokens: int,
    reader: Reader | None = None,
    path: Path | None = None,
    chat: bool = True,
    template: str | None = None,
    rules: Rules | None = None,
) -> Suite:
    if reader is not None and len(prompts) != reader.num_prompts:
        logger.warning(
            "suite %s: %d prompts, but %s has %d: a part of it, or another edition",
            *(name, len(prompts), reader.title, reader.num_prompts),
        )
    return Suite(
        name=name,
        kind=kind,
        digest="",
        path=path,
        num_samples=len(prompts),
        max_tokens=max_tokens,
        chat=chat,
        rules=rules,
        template=template,
        prompts=prompts,
    ).identified()


def _allowed(where: str, name: str, policy: DataPolicy) -> Reader:
    reader = READERS[name]
    if reason := reader.why_refused(policy):
        raise SuiteError(f"{where}: {reason}")
    return reader


def _template(where: str, value: object) -> str:
    """The text of a template given by its name, or as text."""
    if isinstance(value, str) and value in TEMPLATES:
        return TEMPLATES[value]
    if not isinstance(value, str) or value.count("{prompt}") != 1:
        raise SuiteError(
            f"{where}: {value!r} is no template; there is {', '.join(TEMPLATES)}, and a YAML may give its own text "
            "with {prompt} in it once"
        )
    return value


def _rules(path: Path, value: Json) -> Rules:
    if not isinstance(value, dict) or set(value) != set(RULE_FIELDS):
        raise SuiteError(f"{path}: rules must have exactly the lists refusal and compliance")
    return Rules(*(_patterns(f"{path}: rules.{key}", value[key]) for key in RULE_FIELDS))


def _patterns(where: str, value: Json) -> tuple[str, ...]:
    patterns = [p for p in value if isinstance(p, str) and p] if isinstance(value, list) else None
    if patterns is None or patterns != value:
        raise SuiteError(f"{where} must be a list of regular expressions")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise SuiteError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return tuple(patterns)
