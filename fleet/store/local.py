"""A store and a folder on a file system, shared between nodes or not.

A new object is a hidden temporary file in the key's own directory, flushed to disk, then given its
name in one step: `link`, which fails if the name is taken, for `create`; `rename` otherwise.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from fleet.core.errors import FleetError, SourceError, StoreError
from fleet.store.base import StoreWriter
from fleet.store.digest import file_digest
from fleet.store.file_writer import FileWriter
from fleet.store.keys import check_key, check_prefix, is_visible
from fleet.store.links import linked


def read_file_into(path: Path | str, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `start` of `path`. Raises SourceError if the file ends too early."""
    view = buffer.cast("B")
    done = 0
    file = os.open(path, os.O_RDONLY)
    try:
        while done < len(view):
            count = os.preadv(file, [view[done:]], start + done)
            if not count:
                raise SourceError(
                    f"{path}: ends at byte {start + done}, but {len(view)} bytes from {start} were "
                    "expected; the file is truncated: copy it again"
                )
            done += count
    finally:
        os.close(file)


@dataclass(frozen=True)
class LocalFolder:
    """The regular files under `path`, an absolute path; links to files count as files. `names`: these alone."""

    path: Path
    names: frozenset[str] | None = None

    @property
    def uri(self) -> str:
        return str(self.path)

    def files(self) -> dict[str, int]:
        with _explained(SourceError, self.path):
            if not self.path.is_dir():
                raise SourceError(f"{self.path}: {_why_no_folder(self.path)}")
            found = _sizes(self.path, self.path)
        if self.names is not None:
            found = {name: size for name, size in found.items() if name in self.names}
        if not found:
            raise SourceError(f"{self.path}: the folder holds no files")
        return found

    def only(self, names: Collection[str]) -> LocalFolder:
        return replace(self, names=frozenset(names))

    def digests(self) -> dict[str, str]:
        names = self.files()
        with _explained(SourceError, self.path):
            return {name: file_digest(self.path / name) for name in names}

    def read(self, name: str) -> bytes:
        with _explained(SourceError, self.path / check_key(name)):
            return (self.path / name).read_bytes()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        path = f"{self.path}/{check_key(name)}"
        with _explained(SourceError, path):
            read_file_into(path, start, buffer)

    def local(self, scratch: Path) -> Path:
        names = self.files()
        if self.names is None:
            return self.path
        with _explained(SourceError, self.path):
            return linked(self.path, names, scratch)


def _why_no_folder(path: Path) -> str:
    if path.exists():
        return "a file; give the folder that it is in"
    if scheme := re.search(r"/(s3|https?):/", f"{path}/"):
        return f"no such folder; an address has two slashes after its scheme: {scheme[1]}://"
    owner = re.fullmatch(r"(?:hf:)?([\w.-]+)", path.parent.name)
    if path.parent.exists() or owner is None:
        return "no such folder"
    hub = f"hf://{owner[1]}/{path.name}@<40 hexadecimal digits of its commit>"
    return f"no such folder; if it is a model on the Hugging Face Hub, write {hub}"


@dataclass(frozen=True)
class LocalStore:
    """Objects as files under `root`, an absolute path, made when first written to."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def read(self, key: str) -> bytes | None:
        path = self.root / check_key(key)
        with _explained(StoreError, path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def create(self, key: str, data: bytes) -> bool:
        path = self.root / check_key(key)
        with _explained(StoreError, path):
            return _create(path, data)

    def replace(self, key: str, data: bytes) -> None:
        with self.writer(key) as writer:
            writer.write(data)

    @contextmanager
    def writer(self, key: str) -> Generator[StoreWriter]:
        path = self.root / check_key(key)
        with _explained(StoreError, path):
            scratch = _scratch(path)
            writer = _Writer(scratch, path)
        try:
            yield writer
            writer.publish()
        finally:
            writer.close()

    def list(self, prefix: str) -> dict[str, int]:
        # Only the directory that the prefix names in full has to be walked.
        top = self.root / check_prefix(prefix).rpartition("/")[0]
        with _explained(StoreError, top):
            found = _sizes(top, self.root)
        return {key: size for key, size in found.items() if key.startswith(prefix)}

    def folder(self, prefix: str) -> LocalFolder:
        return LocalFolder(self.root / check_prefix(prefix))

    def check(self) -> None:
        path = self.root / ".check"
        if self.root.is_file():
            raise SourceError(f"{self.root}: a file; artifacts need a folder, which is made if it isn't there")
        with _explained(SourceError, self.root):
            _create(path, b"")
            if _create(path, b""):
                raise SourceError(
                    f"{self.root}: this file system lets two processes create one file; "
                    "keep artifacts on a local disk, NFS, or in S3"
                )


class _Writer:
    """Writes one hidden file, and at the end gives it its name."""

    def __init__(self, scratch: Path, path: Path) -> None:
        self._scratch = scratch
        self._path = path
        self._file = FileWriter(scratch)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with _explained(StoreError, self._path):
            self._file.write(data)

    def publish(self) -> None:
        with _explained(StoreError, self._path):
            self._file.flush()
            os.replace(self._scratch, self._path)

    def close(self) -> None:
        """Close, and remove what was not published."""
        with _explained(StoreError, self._path):
            try:
                self._file.close()
            finally:
                self._scratch.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    """A new hidden name beside `path`, whose directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".tmp-{uuid.uuid4().hex}"


def _create(path: Path, data: bytes) -> bool:
    scratch = _scratch(path)
    try:
        with open(scratch, "xb") as file:
            file.write(data)
            _flush(file)
        try:
            os.link(scratch, path)
        except FileExistsError:
            return False
        return True
    finally:
        scratch.unlink(missing_ok=True)


def _flush(file: BinaryIO) -> None:
    # A record that survives a power cut must not name weights that did not.
    file.flush()
    os.fsync(file.fileno())


def _sizes(top: Path, root: Path) -> dict[str, int]:
    """Name relative to `root` -> size of every visible regular file under `top`, sorted by name."""
    found: dict[str, int] = {}
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if is_visible(name)]
        for name in filter(is_visible, names):
            path = Path(directory, name)
            # is_file() follows links: a snapshot in the Hub's cache is made of links to files.
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


@contextmanager
def _explained(kind: type[FleetError], path: Path | str) -> Generator[None]:
    """Raise the operating system's errors as `kind`, with the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{path}: no such file") from error
    except PermissionError as error:
        raise kind(f"{path}: permission denied; give this user access to it") from error
    except OSError as error:
        raise kind(f"{path}: {error.strerror or error}") from error
