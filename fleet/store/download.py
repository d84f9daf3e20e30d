"""A remote folder as a local directory, downloaded once per content and node."""

from __future__ import annotations

from pathlib import Path

from fleet.store.base import Folder
from fleet.store.digest import folder_digest
from fleet.store.made_once import made_once

CHUNK_BYTES = 128 * 2**20  # one read_into, which an S3 folder splits into four parallel parts


def download(folder: Folder, scratch: Path) -> Path:
    """`scratch/<digest>` with every file of `folder`, which is downloaded if it is not there yet.

    A directory that is there is complete; when several processes download one folder, all use the first to finish.
    """

    def fill(partial: Path) -> None:
        for name, size in folder.files().items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
            with open(path, "xb") as file:
                for start in range(0, size, CHUNK_BYTES):
                    chunk = buffer[: min(CHUNK_BYTES, size - start)]
                    folder.read_into(name, start, chunk)
                    file.write(chunk)

    return made_once(scratch / folder_digest(folder).removeprefix("sha256:"), fill)
