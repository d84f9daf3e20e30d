"""Some files of a directory as a directory of their own: links, for what reads all that it finds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path


def linked(directory: Path, names: Iterable[str], scratch: Path) -> Path:
    """A directory under `scratch` with links to these files of `directory`; the same one for the same files.

    It gets its name when it is complete, so any number of processes may ask for it at once.
    """
    names = sorted(names)
    identity = json.dumps([str(directory), names])
    target = scratch / f"links-{hashlib.sha256(identity.encode()).hexdigest()}"
    if target.is_dir():
        return target
    partial = scratch / f".tmp-{uuid.uuid4().hex}"
    try:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).symlink_to(directory.absolute() / name)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # not a race lost, but a real failure
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
