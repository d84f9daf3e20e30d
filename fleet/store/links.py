"""Some files of a directory as a directory of their own: links, for what reads all that it finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fleet.store.made_once import made_once


def linked(directory: Path, names: Iterable[str], scratch: Path) -> Path:
    """A directory under `scratch` with links to these files of `directory`; the same one for the same files.

    Any number of processes may ask for it at once.
    """
    names = sorted(names)
    identity = json.dumps([str(directory), names])

    def fill(partial: Path) -> None:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).symlink_to(directory.absolute() / name)

    return made_once(scratch / f"links-{hashlib.sha256(identity.encode()).hexdigest()}", fill)
