"""The names of lm-eval's own tasks, without importing it; light: no torch, no lm_eval."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

_NAME_LINE = re.compile(r"""^["']?(task|group|tag)["']?:[ \t]*([^\s#\[]*)""", re.MULTILINE)
_CODE_LINE = re.compile(r"^unsafe_code:[ \t]*[Tt]rue", re.MULTILINE)
_INCLUDE_LINE = re.compile(r"^include:[ \t]*([^\s#]+)", re.MULTILINE)
_TAG_ITEMS = re.compile(r"""^["']?tag["']?:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)""", re.MULTILINE)


def lm_eval_version() -> str:
    """The installed version: part of the identity of every task suite."""
    return importlib.metadata.version("lm_eval")


@functools.cache
def lm_eval_names() -> frozenset[str]:
    """Every task, group and tag of the installed lm-eval, from the text of its YAML files.

    Importing lm_eval to ask it takes ten times as long, and torch.
    """
    names: set[str] = set()
    for text in _texts().values():
        names.update(_names(text))
    return frozenset(names - {"", "null"})


@functools.cache
def lm_eval_code_names() -> frozenset[str]:
    """The tasks among them that are marked as running code a model writes, or include a file that is."""
    texts = _texts()
    found = {file for file, text in texts.items() if _CODE_LINE.search(text)}
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {
            file
            for file, text in texts.items()
            if any(_beside(file, m[1].strip("\"'")) in found for m in _INCLUDE_LINE.finditer(text))
        }
    return frozenset(name for file in found for name in _names(texts[file]))


def _beside(file: Path, name: str) -> Path:
    return Path(os.path.normpath(file.parent / name))


def _names(text: str) -> set[str]:
    names = {match[2].strip("\"'") for match in _NAME_LINE.finditer(text)}
    for block in _TAG_ITEMS.finditer(text):
        names.update(line.strip(" \t-\"'") for line in block[1].splitlines())
    return names


@functools.cache
def _texts() -> dict[Path, str]:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return {}
    # Its templates, which may hold the tags, have no suffix.
    return {
        file: file.read_text(encoding="utf-8")
        for file in (Path(spec.origin).parent / "tasks").rglob("*")
        if file.suffix in (".yaml", "") and file.is_file()
    }
