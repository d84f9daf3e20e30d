"""The two contracts of storage. `tests/store/test_store.py` runs one contract test over each of them.

Keys and names use forward slashes and never start with one, never contain `..` or an empty part
(ValueError). A part that begins with a dot is hidden: it can be written and read by name, but
`list` and `Folder` never show it. Implementations are small frozen dataclasses that hold
configuration, not connections: they pickle into actors.

Reading what the user gave (`Folder`, `Store.check`) fails with SourceError, everything else a store
does with StoreError.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class StoreWriter(Protocol):
    """Sequential writer of one object.

    Nothing is visible under the key until `Store.writer`'s block ends well.
    """

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; the caller may reuse the buffer as soon as this returns."""
        ...


class Folder(Protocol):
    """A read-only set of files: one model or adapter, wherever it is kept."""

    @property
    def uri(self) -> str:
        """Where this is, as a person would write it; `open_folder(uri)` opens it on any node."""
        ...

    def files(self) -> dict[str, int]:
        """Name -> size in bytes of every file, sorted by name.

        Raises SourceError if there is no such folder, or no file in it.
        """
        ...

    def digests(self) -> dict[str, str]:
        """Name -> content digest of every file, sorted by name: what enters fingerprints.

        `sha256:…`, or what the server knows instead: `etag:…` (S3), `git:…` (small files of the
        Hub). Never contains a path, a bucket or a branch.
        """
        ...

    def only(self, names: Collection[str]) -> Folder:
        """The same folder with these files alone: no other is listed, hashed or downloaded."""
        ...

    def read(self, name: str) -> bytes:
        """The whole of a small file. Raises SourceError if it is missing."""
        ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start`. Raises SourceError on a short read."""
        ...

    def local(self, scratch: Path) -> Path:
        """A local directory with all the files.

        Itself if local, else downloaded (under `scratch`, or to the Hub's own cache) once per
        content. Of an `only` it holds no other files: links under `scratch`, where others are beside them.
        """
        ...


class Store(Protocol):
    """A flat, durable map from key to bytes with one atomic primitive: `create`.

    A key may not also be a folder of other keys (`a` beside `a/b`): a file system cannot hold both.
    """

    @property
    def uri(self) -> str:
        """Where this is; `open_store(uri)` opens it again on any node."""
        ...

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None if there is no such key."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` if and only if the key is free; False if it was taken.

        Atomic among all processes: of many that create one key, exactly one gets True.
        """
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write `data` whether or not the key exists; readers see the old or the new bytes."""
        ...

    def writer(self, key: str) -> AbstractContextManager[StoreWriter]:
        """Stream one large object in order.

        On an exception inside the block nothing appears under the key (what was there stays).
        """
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """Key -> size of every object whose key starts with `prefix` (a string prefix), sorted."""
        ...

    def folder(self, prefix: str) -> Folder:
        """The objects under `prefix/`, deeper ones too, by relative name, as a folder to read."""
        ...

    def check(self) -> None:
        """Prove that the store can be listed and written, and that `create` refuses a taken key.

        Leaves one hidden, empty object named `.check`. Raises SourceError naming the fix.
        """
        ...
