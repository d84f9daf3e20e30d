"""Content digests: of one local file, remembered on disk, and of a whole folder.

Planning a large catalogue every night must not hash every weight again, so a local file's sha256
is kept under `$XDG_CACHE_HOME/fleet/digests`, one tiny file per entry. An entry is found by what
`stat` says about the file, so a changed file finds none. Entries are published whole, by a rename,
so any number of processes may read and write them; a damaged entry is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
from pathlib import Path

from fleet.store.base import Folder

logger = logging.getLogger(__name__)

# A file written again within one tick of the file system's clock may keep size and times, so one
# that has just changed is not remembered. Two seconds is the coarsest clock in use (FAT, NFS).
SETTLE_SECONDS = 2.0

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def folder_digest(folder: Folder) -> str:
    """`sha256:…` over the canonical JSON of `folder.digests()`: what `@sha256:…` pins.

    For a folder in S3 this covers ETags, which depend on how an object was uploaded as well as on
    its bytes: the same files uploaded with other part sizes have another digest.
    """
    text = json.dumps(folder.digests(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes, from the cache if the file has not changed since."""
    before = os.stat(path)
    entry = _entry(path, before)
    known = _read(entry)
    if known is not None:
        return known
    with open(path, "rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLE_SECONDS
    if settled and _entry(path, os.stat(path)) == entry:
        _write(entry, digest)
    return digest


def _entry(path: Path, stat: os.stat_result) -> Path:
    # The inode's change time is there because tools that copy also set the modification time back.
    facts = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fleet" / "digests" / name[:2] / name


def _read(entry: Path) -> str | None:
    try:
        text = entry.read_bytes().decode("ascii", errors="replace")
    except OSError:
        return None
    return text if _DIGEST.fullmatch(text) else None


def _write(entry: Path, digest: str) -> None:
    scratch = entry.with_name(f".{uuid.uuid4().hex}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(digest, encoding="ascii")
        os.replace(scratch, entry)
    except OSError as error:  # a read-only home costs time, not correctness
        logger.debug("digest cache: %s", error)
