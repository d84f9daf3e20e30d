"""Whose turn it is in lm-eval, whose tasks draw from process-wide random numbers and import by process-wide names."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_lock = threading.Lock()
"""Held by the one thread that runs lm-eval's code."""


class Turn:
    """One thread's turns.

    Args:
        folders: While a turn lasts, modules in them can be imported by their bare names, as if Python had been started
            there: the modules that lie beside a task's own. Another task's of the same name is another module.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = [str(folder) for folder in folders]
        self._modules: set[str] = set()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Wait for the turn."""
        _lock.acquire()
        self._modules = set(sys.modules)
        sys.path[:0] = self._folders

    def release(self) -> None:
        """Give the turn to others."""
        for folder in self._folders:
            sys.path.remove(folder)
        for name in set(sys.modules) - self._modules:
            file = getattr(sys.modules[name], "__file__", None)
            # lm-eval keeps the modules that YAML names under their whole path, which no other task has.
            if isinstance(file, str) and file.startswith(tuple(f"{f}/" for f in self._folders)) and "/" not in name:
                del sys.modules[name]
        _lock.release()
