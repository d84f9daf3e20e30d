"""The names of lm-eval's own tasks, without importing it; light: no torch, no lm_eval."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path

_NAME_LINE = re.compile(r"""^["']?(task|group|tag)["']?:[ \t]*([^\s#\[]*)""", re.MULTILINE)
_TAG_ITEMS = re.compile(r"""^["']?tag["']?:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)""", re.MULTILINE)


def lm_eval_version() -> str:
    """The installed version: part of the identity of every task suite."""
    return importlib.metadata.version("lm_eval")


@functools.cache
def lm_eval_names() -> frozenset[str]:
    """Every task, group and tag of the installed lm-eval, from the text of its YAML files.

    Importing lm_eval to ask it takes ten times as long, and torch.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return frozenset()
    names: set[str] = set()
    # Its templates, which may hold the tags, have no suffix.
    for file in (Path(spec.origin).parent / "tasks").rglob("*"):
        if file.suffix not in (".yaml", "") or not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        names.update(match[2].strip("\"'") for match in _NAME_LINE.finditer(text))
        for block in _TAG_ITEMS.finditer(text):
            names.update(line.strip(" \t-\"'") for line in block[1].splitlines())
    return frozenset(names - {"", "null"})
