"""The local store's writer: the same bytes in whatever pieces they come and whatever the file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.core.errors import StoreError
from fleet.store import file_writer
from fleet.store.file_writer import FileWriter
from fleet.store.local import LocalStore

BLOCK = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_writer, "_BLOCK_BYTES", BLOCK)


def write(path: Path, pieces: list[int]) -> bytes:
    """Write pieces of these sizes, from one buffer that is used again, and return what they are."""
    expected = bytearray()
    writer = FileWriter(path)
    for number, size in enumerate(pieces):
        buffer = bytearray((i * 31 + number) % 251 for i in range(size))
        expected += buffer
        writer.write(buffer)
        buffer[:] = bytes(size)
    writer.flush()
    writer.close()
    return bytes(expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.integers(0, 3 * BLOCK), max_size=6))
def test_file_holds_all_pieces_in_order(tmp_path: Path, pieces: list[int]) -> None:
    (tmp_path / "f").unlink(missing_ok=True)
    assert write(tmp_path / "f", pieces) == (tmp_path / "f").read_bytes()


def test_file_system_without_direct_writes_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(fd, command, flags)

    control = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert write(tmp_path / "f", [3 * BLOCK + 7]) == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("written_before", [0, BLOCK // 2])
def test_direct_write_that_is_refused_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before: int
) -> None:
    """Wholly, or after a part of the block."""
    refused: list[int] = []

    def refuse(fd: int, data: memoryview) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if refused or not written_before:
                refused.append(len(data))
                raise OSError(errno.EINVAL, "Invalid argument")
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            count = put(fd, data[:written_before])
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            refused.append(count)
            return count
        return put(fd, data)

    put = os.write
    monkeypatch.setattr(os, "write", refuse)
    assert write(tmp_path / "f", [2 * BLOCK + 5, BLOCK]) == (tmp_path / "f").read_bytes()
    assert refused


@pytest.mark.parametrize("size", [1, 2 * BLOCK + 1])
def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """In the background, too."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match="No space left"), LocalStore(tmp_path).writer("f") as writer:
        writer.write(bytes(size))
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        FileWriter(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"mine"
