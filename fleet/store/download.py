"""A remote folder as a local directory, downloaded once per content and node."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from fleet.store.base import Folder
from fleet.store.digest import folder_digest

CHUNK_BYTES = 128 * 2**20  # one read_into, which an S3 folder splits into four parallel parts


def download(folder: Folder, scratch: Path) -> Path:
    """`scratch/<digest>` with every file of `folder`, which is downloaded if it is not there yet.

    Files are written to a hidden directory that gets its name at the end, so a directory that is
    there is complete; when several processes download one folder, all use the first to finish.
    """
    target = scratch / folder_digest(folder).removeprefix("sha256:")
    if target.is_dir():
        return target
    partial = scratch / f".tmp-{uuid.uuid4().hex}"
    try:
        for name, size in folder.files().items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
            with open(path, "xb") as file:
                for start in range(0, size, CHUNK_BYTES):
                    chunk = buffer[: min(CHUNK_BYTES, size - start)]
                    folder.read_into(name, start, chunk)
                    file.write(chunk)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # not a race lost, but a real failure
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
