"""What a record says about a file that was written."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict


class FileEntry(BaseModel):
    """A file's size and digest, as records hold them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        """The entry of a file with these bytes."""
        return cls(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
