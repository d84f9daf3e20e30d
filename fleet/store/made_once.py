"""A directory that several processes may make at once: whoever finds it finds it complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def made_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, which is made if it isn't there yet.

    It is made as a hidden directory beside it that gets its name at the end; when several processes make it, all use
    the first to finish.

    Args:
        fill: writes what belongs in it into the directory it is given, which doesn't exist yet.
    """
    if target.is_dir():
        return target
    partial = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        fill(partial)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # not a race lost, but a real failure
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
