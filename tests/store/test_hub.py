"""`HubFolder` against a small server that speaks the few routes of the Hub it needs."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fleet.core.errors import SourceError
from fleet.store import open_folder
from fleet.store.hub import HubFolder

COMMIT = "0123456789abcdef" * 2 + "01234567"
WEIGHTS = bytes(range(256)) * 40
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "sub/extra.json": b"[1]",
}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `org/model` at COMMIT; keeps (method, path, range, bytes sent) of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, str | None, int]] = []
        self.break_off_after: int | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/org/model/revision/{COMMIT}":
            self.answer(200, json.dumps({"id": "org/model", "siblings": self.siblings()}).encode())
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            self.answer(200, json.dumps(self.tree()).encode())
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            self.send_file(path.removeprefix(f"/org/model/resolve/{COMMIT}/"))
        elif path.startswith("/api/models/org/model/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/gated/"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/broken/"):
            self.answer(500, b"{}")
        else:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def siblings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, data in reversed(FILES.items()):
            entry = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            lfs = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            found.append(entry | ({"lfs": lfs} if name.endswith(".safetensors") else {}))
        return found

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": len(data), "oid": git_id(data)} for name, data in FILES.items()]

    def send_file(self, name: str) -> None:
        if name not in FILES:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, wanted = FILES[name], self.headers.get("Range")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data)}"'}
        if wanted is None:
            return self.answer(200, data, headers)
        first, last = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.answer(416, b"", headers)
        return self.answer(206, data[first : last + 1], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if status == 206 and self.hub.break_off_after is not None:
            body, self.hub.break_off_after = body[: self.hub.break_off_after], None
            self.close_connection = True
        sent = b"" if self.command == "HEAD" else body
        # Kept before it is sent, because the test goes on as soon as it arrives.
        self.hub.requests.append((self.command, self.path, self.headers.get("Range"), len(sent)))
        self.wfile.write(sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


@pytest.fixture
def folder(hub: Hub) -> HubFolder:
    return HubFolder("org/model", COMMIT)


def read_into(folder: HubFolder, name: str, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    folder.read_into(name, start, memoryview(buffer))
    return bytes(buffer)


def test_hub_open_folder_keeps_the_commit() -> None:
    folder = open_folder(f"hf://org/model@{COMMIT}")
    assert folder == HubFolder("org/model", COMMIT)
    assert open_folder(folder.uri) == folder
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_hub_files_are_visible_sorted_and_listed_once(hub: Hub, folder: HubFolder) -> None:
    expected = [("config.json", 2), ("model.safetensors", len(WEIGHTS)), ("sub/extra.json", 3)]
    assert list(folder.files().items()) == expected
    assert list(folder.files()) == list(folder.digests())
    assert len(hub.requests) == 1


def test_hub_digests_are_of_content(folder: HubFolder) -> None:
    assert folder.digests() == {
        "config.json": f"git:{git_id(b'{}')}",
        "model.safetensors": f"sha256:{sha256(WEIGHTS)}",
        "sub/extra.json": f"git:{git_id(b'[1]')}",
    }


def test_hub_read_downloads_once(hub: Hub, folder: HubFolder) -> None:
    assert folder.read("sub/extra.json") == b"[1]"
    count = len(hub.requests)
    assert folder.read("sub/extra.json") == b"[1]"
    assert len(hub.requests) == count


def test_hub_read_into_fetches_only_the_range(hub: Hub, folder: HubFolder) -> None:
    assert read_into(folder, "model.safetensors", 100, 50) == WEIGHTS[100:150]
    assert [(wanted, sent) for _, _, wanted, sent in hub.requests] == [("bytes=100-149", 50)]


def test_hub_read_into_uses_a_cached_file(hub: Hub, folder: HubFolder) -> None:
    folder.read("model.safetensors")
    count = len(hub.requests)
    assert read_into(folder, "model.safetensors", 100, 50) == WEIGHTS[100:150]
    assert len(hub.requests) == count


@pytest.mark.parametrize("start", [len(WEIGHTS) - 3, len(WEIGHTS)])
def test_hub_read_into_beyond_the_end_is_a_source_error(folder: HubFolder, start: int) -> None:
    with pytest.raises(SourceError, match="truncated"):
        read_into(folder, "model.safetensors", start, 4)


@pytest.mark.slow
def test_hub_read_into_goes_on_after_a_broken_answer(hub: Hub, folder: HubFolder) -> None:
    hub.break_off_after = 20
    assert read_into(folder, "model.safetensors", 100, 50) == WEIGHTS[100:150]
    assert [wanted for _, _, wanted, _ in hub.requests] == ["bytes=100-149", "bytes=120-149"]


def test_hub_folder_of_some_files_downloads_and_shows_no_other(hub: Hub, folder: HubFolder, tmp_path: Path) -> None:
    """Not even one that is in the snapshot from before."""
    folder.read("sub/extra.json")
    some = folder.only(["config.json"])
    assert list(some.files()) == list(some.digests()) == ["config.json"]
    where = some.local(tmp_path / "scratch")
    assert [path.relative_to(where).as_posix() for path in where.rglob("*") if path.is_file()] == ["config.json"]
    assert not any("model.safetensors" in str(request) for request in hub.requests)


def test_hub_local_holds_the_visible_files(folder: HubFolder, tmp_path: Path) -> None:
    where = folder.local(tmp_path / "scratch")
    found = {path.relative_to(where).as_posix() for path in where.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "sub/extra.json"}
    assert (where / "model.safetensors").read_bytes() == WEIGHTS
    assert open_folder(str(where)).files() == folder.files()


def test_hub_missing_file_is_named(folder: HubFolder) -> None:
    with pytest.raises(SourceError, match=r"no such file: none\.json"):
        folder.read("none.json")
    with pytest.raises(SourceError, match=r"no such file: none\.json"):
        read_into(folder, "none.json", 0, 1)


@pytest.mark.parametrize(
    ("repo", "commit", "message"),
    [
        ("org/none", COMMIT, "no such repository, or a private one"),
        ("org/gated", COMMIT, "gated repository; accept its terms"),
        ("org/model", "f" * 40, "the repository has no such commit"),
        ("org/broken", COMMIT, "the Hub answered 500"),
    ],
)
def test_hub_refusal_is_explained_in_one_line(hub: Hub, repo: str, commit: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        HubFolder(repo, commit).files()
    assert str(caught.value).startswith(f"hf://{repo}@{commit}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_hub_unreachable_fails_soon(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        folder = HubFolder("org/model", COMMIT)
        started = time.monotonic()
        for act in (
            folder.files,
            lambda: folder.read("config.json"),
            lambda: read_into(folder, "x", 0, 1),
        ):
            with pytest.raises(SourceError, match="the Hub cannot be reached") as caught:
                act()
            assert "HF_ENDPOINT" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_hub_offline_is_explained(hub: Hub, folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        folder.files()
