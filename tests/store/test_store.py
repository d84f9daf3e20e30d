"""The contract that every store and its folders keep; then what is special to each."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.core.errors import SourceError, StoreError
from fleet.store import Folder, Store, digest, download, folder_digest, open_folder, open_store
from fleet.store.keys import check_key
from fleet.store.local import LocalFolder, LocalStore
from fleet.store.s3 import S3Folder, S3Store

PART = 5 * 2**20  # S3's smallest part


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("s3_bucket"), "some/prefix", part_bytes=PART)


def fill(store: Store, **files: bytes) -> Folder:
    """A folder `model` in `store`; in names, `__` stands for a slash."""
    for name, data in files.items():
        store.replace(f"model/{name.replace('__', '/')}", data)
    return store.folder("model")


def read_into(folder: Folder, name: str, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    folder.read_into(name, start, memoryview(buffer))
    return bytes(buffer)


# Store


def test_store_read_missing_key_is_none(store: Store) -> None:
    assert store.read("a/b") is None


def test_store_replace_then_read_round_trips(store: Store) -> None:
    store.replace("a/b.json", b"one")
    store.replace("a/b.json", b"two")
    assert store.read("a/b.json") == b"two"


def test_store_create_taken_key_is_false_and_keeps_content(store: Store) -> None:
    assert store.create("a/record.json", b"first")
    assert not store.create("a/record.json", b"second")
    assert store.read("a/record.json") == b"first"


def test_store_create_race_has_exactly_one_winner(store: Store) -> None:
    count = 16
    barrier = threading.Barrier(count)

    def claim(number: int) -> bool:
        barrier.wait()
        return store.create("race/record.json", str(number).encode())

    with ThreadPoolExecutor(count) as pool:
        won = list(pool.map(claim, range(count)))
    assert won.count(True) == 1
    assert store.read("race/record.json") == str(won.index(True)).encode()
    assert store.list("") == {"race/record.json": len(str(won.index(True)))}


def test_store_writer_streams_many_parts_in_order(store: Store) -> None:
    data = random.Random(0).randbytes(3 * PART + 12345)
    with store.writer("big.bin") as writer:
        buffer = bytearray(7 * 10**5)
        for start in range(0, len(data), len(buffer)):
            chunk = data[start : start + len(buffer)]
            buffer[: len(chunk)] = chunk  # one buffer, reused as the contract allows
            writer.write(memoryview(buffer)[: len(chunk)])
        assert store.list("") == {}
    assert store.read("big.bin") == data


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 2 * PART])
def test_store_writer_part_boundaries_round_trip(store: Store, size: int) -> None:
    with store.writer("a.bin") as writer:
        writer.write(bytes(size))
    assert store.list("") == {"a.bin": size}


@pytest.mark.parametrize("size", [3, 2 * PART])
def test_store_writer_exception_leaves_what_was_there(store: Store, size: int) -> None:
    store.replace("old.bin", b"old")
    for key in ("new.bin", "old.bin"):
        with pytest.raises(RuntimeError, match="stop"), store.writer(key) as writer:
            writer.write(bytes(size))
            raise RuntimeError("stop")
    assert store.list("") == {"old.bin": 3}
    assert store.read("old.bin") == b"old"


def test_store_list_takes_a_string_prefix_and_sorts(store: Store) -> None:
    for key in ("b/2", "b/1", "b/10/x", "bc", "a"):
        store.replace(key, key.encode())
    assert list(store.list("").items()) == [
        ("a", 1),
        ("b/1", 3),
        ("b/10/x", 6),
        ("b/2", 3),
        ("bc", 2),
    ]
    assert list(store.list("b")) == ["b/1", "b/10/x", "b/2", "bc"]
    assert list(store.list("b/")) == ["b/1", "b/10/x", "b/2"]
    assert list(store.list("b/1")) == ["b/1", "b/10/x"]
    assert store.list("nothing/") == {}


def test_store_list_hides_hidden_parts(store: Store) -> None:
    for key in (".hidden", "a/.hidden/b", "a/b"):
        store.replace(key, b"")
    assert store.list("") == {"a/b": 0}
    assert store.folder("a").files() == {"b": 0}


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a/./b"])
def test_store_bad_key_is_refused(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.read(key)
    with pytest.raises(ValueError, match="not a key"):
        store.create(key, b"")
    with pytest.raises(ValueError, match="not a key"):
        store.replace(key, b"")
    with pytest.raises(ValueError, match="not a key"), store.writer(key):
        pass
    with pytest.raises(ValueError, match="not a key"):
        fill(store, x=b"").read(key)


@pytest.mark.parametrize("prefix", ["/", "/a", "a//", "../a", "a/.."])
def test_store_bad_prefix_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.list(prefix)
    with pytest.raises(ValueError, match="not a key"):
        store.folder(prefix)


@given(st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "…", "a b"]), min_size=1, max_size=4))
def test_key_of_parts_is_accepted_only_if_it_stays_inside(parts: list[str]) -> None:
    key = "/".join(parts)
    inside = os.path.normpath(f"root/{key}") == f"root/{key}" and ".." not in parts
    if inside:
        assert check_key(key) == key
    else:
        with pytest.raises(ValueError, match="not a key"):
            check_key(key)


def test_store_pickle_round_trip_reads_the_same(store: Store) -> None:
    store.replace("a", b"1")
    folder = fill(store, x=b"22")
    again, folder_again = pickle.loads(pickle.dumps((store, folder)))
    assert again == store and again.read("a") == b"1"
    assert folder_again == folder and folder_again.read("x") == b"22"


def test_store_uri_opens_the_same_store(store: Store) -> None:
    store.replace("model/x", b"1")
    assert open_store(store.uri).read("model/x") == b"1"
    assert open_folder(store.folder("model").uri).read("x") == b"1"


def test_store_check_passes_twice_and_shows_nothing(store: Store) -> None:
    store.check()
    store.check()
    assert store.list("") == {}


# Folder


def test_folder_files_are_relative_and_sorted(store: Store) -> None:
    store.replace("model2/other", b"")
    folder = fill(store, b=b"22", a=b"1", sub__c=b"333")
    assert list(folder.files().items()) == [("a", 1), ("b", 2), ("sub/c", 3)]
    assert store.folder("model/sub").files() == {"c": 3}


def test_folder_missing_is_a_source_error(store: Store) -> None:
    with pytest.raises(SourceError, match="none"):
        store.folder("none").files()
    with pytest.raises(SourceError, match="none"):
        store.folder("none").read("config.json")
    with pytest.raises(SourceError, match="none"):
        read_into(store.folder("none"), "config.json", 0, 4)


def test_folder_read_into_fills_the_range(store: Store) -> None:
    folder = fill(store, x=bytes(range(100)))
    assert read_into(folder, "x", 10, 30) == bytes(range(10, 40))
    assert read_into(folder, "x", 0, 100) == bytes(range(100))
    assert read_into(folder, "x", 50, 0) == b""


def test_folder_read_into_takes_a_typed_buffer(store: Store) -> None:
    folder = fill(store, x=bytes(range(16)))
    buffer = memoryview(bytearray(8)).cast("I")
    folder.read_into("x", 4, buffer)
    assert buffer.tobytes() == bytes(range(4, 12))


@pytest.mark.parametrize("start", [95, 100, 200])
def test_folder_read_into_beyond_the_end_is_a_source_error(store: Store, start: int) -> None:
    folder = fill(store, x=bytes(100))
    with pytest.raises(SourceError, match=r"x: .*(truncated|shorter)"):
        read_into(folder, "x", start, 6)


def test_folder_digests_change_with_content_only(store: Store) -> None:
    folder = fill(store, a=b"1", b=b"2")
    first = folder.digests()
    assert list(first) == ["a", "b"]
    assert folder.digests() == first
    assert store.folder("model").digests() == first
    store.replace("elsewhere/a", b"1")
    store.replace("elsewhere/b", b"2")
    assert store.folder("elsewhere").digests() == first
    store.replace("model/b", b"3")
    changed = store.folder("model").digests()
    assert changed["a"] == first["a"] and changed["b"] != first["b"]


def test_folder_digests_hold_no_location(store: Store) -> None:
    folder = fill(store, a=b"1")
    text = repr(folder.digests())
    for part in ("model", "test-", "prefix", "store", "/"):
        assert part not in text


def test_folder_digest_names_count(store: Store) -> None:
    assert folder_digest(fill(store, a=b"1")) != folder_digest(fill(store, a=b"1", b=b"1"))


def test_folder_of_some_files_lists_hashes_and_brings_no_other(store: Store, tmp_path: Path) -> None:
    whole = fill(store, a=b"1", b=b"2", sub__c=b"3")
    folder = whole.only(["a", "sub/c", "absent"])
    assert folder.uri == whole.uri
    assert folder.files() == {"a": 1, "sub/c": 1}
    assert folder.digests() == {name: whole.digests()[name] for name in ("a", "sub/c")}
    assert pickle.loads(pickle.dumps(folder)) == folder
    for _ in range(2):
        where = folder.local(tmp_path / "scratch")
        found = {path.relative_to(where).as_posix(): path.read_bytes() for path in where.rglob("*") if path.is_file()}
        assert found == {"a": b"1", "sub/c": b"3"}


def test_folder_of_no_file_that_is_there_is_a_source_error(store: Store) -> None:
    with pytest.raises(SourceError):
        fill(store, a=b"1").only(["b"]).files()


def test_folder_pin_matches_or_names_both(store: Store) -> None:
    folder = fill(store, a=b"1")
    pin = folder_digest(folder)
    assert open_folder(f"{folder.uri}@{pin}").read("a") == b"1"
    store.replace("model/a", b"2")
    with pytest.raises(SourceError) as caught:
        open_folder(f"{folder.uri}@{pin}")
    now = folder_digest(store.folder("model"))
    assert pin in str(caught.value) and now in str(caught.value) and pin != now


def test_folder_local_holds_all_files(store: Store, tmp_path: Path) -> None:
    folder = fill(store, a=b"1", sub__b=b"22", empty=b"")
    where = folder.local(tmp_path / "scratch")
    assert LocalFolder(where).files() == {"a": 1, "empty": 0, "sub/b": 2}
    assert (where / "sub" / "b").read_bytes() == b"22"


# Addresses


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "local folder"),
        ("gs://bucket/x", "s3://bucket/prefix"),
        ("s3://", "s3://bucket/prefix"),
        ("s3://bucket/a//b", "s3://bucket/prefix"),
        ("s3://bucket/../b", "s3://bucket/prefix"),
        ("hf://name@" + "0" * 40, "hf://org/name@commit"),
        ("hf://org/name", "hf://org/name@<40"),
        ("hf://org/name@main", "hf://org/name@<40"),
        ("hf://org/name@" + "0" * 39, "hf://org/name@<40"),
        ("hf://org/name@" + "0" * 40 + "@sha256:" + "0" * 64, "pinned by its commit"),
        ("folder@sha256:123", "64 lower-case"),
    ],
)
def test_open_folder_bad_address_names_the_fix(uri: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_folder(uri)
    assert message in str(caught.value)


@pytest.mark.parametrize("uri", ["", "hf://org/name", "file:///x", "s3:///x"])
def test_open_store_bad_address_is_refused(uri: str) -> None:
    with pytest.raises(SourceError):
        open_store(uri)


def test_open_relative_path_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_bytes(b"1")
    folder, store = open_folder("m"), open_store("m")
    monkeypatch.chdir("/")
    assert folder.read("x") == b"1" and store.read("x") == b"1"


def test_open_s3_whole_bucket_lists_it(s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}")
    store.replace("a/b", b"1")
    assert store.list("a") == {"a/b": 1}
    assert open_folder(f"s3://{s3_bucket}/").files() == {"a/b": 1}
    assert store.folder("").files() == {"a/b": 1}


def test_import_store_pulls_in_nothing_heavy() -> None:
    script = (
        "import sys, fleet.store; fleet.store.open_folder('x');"
        "heavy = {'torch', 'ray', 'boto3', 'botocore', 'huggingface_hub', 'mlflow'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Local


def test_local_folder_missing_or_empty_says_which(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: no such folder"):
        LocalFolder(tmp_path / "nowhere").files()
    (tmp_path / ".hidden").write_bytes(b"1")
    with pytest.raises(SourceError, match="holds no files"):
        LocalFolder(tmp_path).files()


def test_local_folder_follows_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"1234")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").symlink_to(tmp_path / "blob")
    (tmp_path / "m" / "dangling").symlink_to(tmp_path / "none")
    assert LocalFolder(tmp_path / "m").files() == {"w": 4}


def test_local_folder_digest_is_sha256_of_content(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    expected = f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
    assert LocalFolder(tmp_path).digests() == {"x": expected}


def test_local_digest_cache_is_used_until_the_file_changes(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "SETTLE_SECONDS", -1.0)
    folder, path = LocalFolder(tmp_path), tmp_path / "x"
    path.write_bytes(b"abc")
    first = folder.digests()
    (entry,) = [path for path in cache_home.rglob("*") if path.is_file()]
    entry.write_text("sha256:" + "0" * 64)
    assert folder.digests() == {"x": "sha256:" + "0" * 64}
    entry.write_text("sha256:damaged")
    assert folder.digests() == first
    assert entry.read_text() == first["x"]
    times = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder.digests() != first


def test_local_digest_of_a_fresh_file_is_not_cached(tmp_path: Path, cache_home: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    LocalFolder(tmp_path).digests()
    assert [path for path in cache_home.rglob("*") if path.is_file()] == []


def test_local_digest_cache_unwritable_still_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SETTLE_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    (tmp_path / "x").write_bytes(b"abc")
    assert list(LocalFolder(tmp_path).digests()) == ["x"]


def test_local_store_leaves_no_temporary_files(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a", b"")
    store.create("a", b"")
    store.replace("a", b"1")
    with pytest.raises(RuntimeError), store.writer("b"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_local_store_check_unwritable_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="file"):
        LocalStore(tmp_path / "file").check()
    with pytest.raises(StoreError, match="file"):
        LocalStore(tmp_path / "file").create("a", b"")


def test_local_folder_is_its_own_local_directory(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    assert LocalFolder(tmp_path).local(tmp_path / "scratch") == tmp_path
    assert not (tmp_path / "scratch").exists()


# S3


def s3_client() -> Any:
    session: Any = boto3.session.Session()
    return session.client("s3")


def test_s3_writer_exception_leaves_no_upload_behind(s3_bucket: str) -> None:
    store = S3Store(s3_bucket, "p", part_bytes=PART)
    with pytest.raises(RuntimeError), store.writer("a") as writer:
        writer.write(bytes(3 * PART))
        assert s3_client().list_multipart_uploads(Bucket=s3_bucket)["Uploads"]
        raise RuntimeError
    assert "Uploads" not in s3_client().list_multipart_uploads(Bucket=s3_bucket)


def test_s3_read_into_in_parallel_parts_round_trips(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.store.s3_transfer.PART_BYTES", 1000)
    data = random.Random(0).randbytes(10_500)
    folder = fill(S3Store(s3_bucket, ""), x=data)
    assert read_into(folder, "x", 123, 10_000) == data[123:10_123]
    assert read_into(folder, "x", 123, 10_000) == data[123:10_123]  # now with a known ETag
    with pytest.raises(SourceError, match=r"truncated|shorter"):
        read_into(folder, "x", 1000, 10_000)


@pytest.mark.parametrize("travels", [False, True])
def test_s3_object_replaced_after_planning_is_noticed(s3_bucket: str, travels: bool) -> None:
    store = S3Store(s3_bucket, "")
    folder = fill(store, x=b"old")
    folder.digests()
    if travels:
        folder = pickle.loads(pickle.dumps(folder))
    store.replace("model/x", b"new")
    with pytest.raises(SourceError, match="replaced while"):
        read_into(folder, "x", 0, 3)
    with pytest.raises(SourceError, match="replaced while"):
        folder.read("x")
    assert store.folder("model").read("x") == b"new"


def test_s3_object_replaced_between_two_reads_is_noticed(s3_bucket: str) -> None:
    store = S3Store(s3_bucket, "")
    folder = fill(store, x=b"old")
    read_into(folder, "x", 0, 1)
    store.replace("model/x", b"new")
    with pytest.raises(SourceError, match="replaced while"):
        read_into(folder, "x", 1, 2)


def test_s3_create_whose_answer_was_lost_is_still_ours(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = s3_client()

    def repeat_once(attempts: int, **_: object) -> float | None:
        return 0.0 if attempts == 1 else None

    client.meta.events.register_first("needs-retry.s3.PutObject", repeat_once)
    monkeypatch.setattr("fleet.store.s3.client", lambda patient=True: client)
    store = S3Store(s3_bucket, "")
    assert store.create("a", b"1")
    assert not store.create("a", b"1")


def test_s3_local_downloads_once_per_content(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store(s3_bucket, "")
    folder = fill(store, a=b"12345", sub__b=b"2")
    monkeypatch.setattr(download, "CHUNK_BYTES", 2)
    first = folder.local(tmp_path)
    assert (first / "a").read_bytes() == b"12345"
    copy = fill(S3Store(s3_bucket, "copy"), a=b"12345", sub__b=b"2")
    with monkeypatch.context() as patch:
        patch.delattr(S3Folder, "read_into")
        assert copy.local(tmp_path) == first
    store.replace("model/a", b"other")
    second = store.folder("model").local(tmp_path)
    assert second != first and (second / "a").read_bytes() == b"other"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name])


def test_s3_local_race_has_one_result(s3_bucket: str, tmp_path: Path) -> None:
    folder = fill(S3Store(s3_bucket, ""), a=bytes(1000), b=b"1")
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(folder.local, [tmp_path] * 4))
    assert list(tmp_path.iterdir()) == list(found)


def test_s3_local_failure_leaves_nothing(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket, "")
    folder = fill(store, a=b"1")
    target = folder.local(tmp_path / "one")

    def vanish(self: S3Folder) -> dict[str, int]:
        return {"a": 1, "gone": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Folder, "files", vanish)
        with pytest.raises(SourceError, match="gone: no such object"):
            folder.local(tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []
    assert target.is_dir()


def test_s3_missing_bucket_is_named(s3_endpoint: str) -> None:
    store = S3Store("no-such-bucket", "x")
    with pytest.raises(SourceError, match=r"s3://no-such-bucket/x: no such bucket; create it"):
        store.check()
    with pytest.raises(SourceError, match=r"s3://no-such-bucket/x/m: no such bucket; create it"):
        store.folder("m").files()
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x/a: no such bucket; create it"):
        store.create("a", b"")


def test_s3_unreachable_endpoint_fails_soon(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(SourceError, match="cannot be reached") as caught:
            S3Store("bucket", "x").check()
    assert time.monotonic() - started < 5
    assert "AWS_ENDPOINT_URL" in str(caught.value) and "\n" not in str(caught.value)


def test_s3_malformed_endpoint_is_named(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(SourceError, match="AWS_ENDPOINT_URL"):
        S3Store("bucket", "x").check()


def test_s3_without_credentials_says_what_to_set(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceError, match="set AWS_ACCESS_KEY_ID"):
        S3Store("bucket", "x").check()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(SourceError, match="nobody"):
        S3Store("bucket", "x").check()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied; these credentials need s3:ListBucket"),
        (403, "SignatureDoesNotMatch", "refuses these credentials"),
        (501, "NotImplemented", "answered NotImplemented to ListObjectsV2: says no"),
    ],
)
def test_s3_refusal_is_explained(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>says no</Message></Error>".encode()

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(SourceError) as caught:
            S3Folder("bucket", "x").files()
        server.shutdown()
    assert str(caught.value).startswith("s3://bucket/x: ") and message in str(caught.value)


def test_s3_read_goes_on_after_a_broken_answer(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = bytes(range(100)), list[str]()

    class BreakOff(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "bytes=0-99")
            first, last = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
            asked.append(wanted)
            self.send_response(206)
            self.send_header("ETag", '"tag"')
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(data[first : last + 1 if len(asked) > 1 else first + 20])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), BreakOff) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            assert read_into(S3Folder("bucket", "x"), "a", 10, 50) == data[10:60]
            assert asked == ["bytes=10-59", "bytes=30-59"]
            asked.clear()
            assert S3Folder("bucket", "x").read("a") == data
        finally:
            server.shutdown()
    assert len(asked) == 2


def test_s3_server_without_conditional_writes_fails_the_check(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = s3_client()

    def forget(params: dict[str, Any], **_: object) -> None:
        params["headers"].pop("If-None-Match", None)

    client.meta.events.register("before-call.s3.PutObject", forget)
    monkeypatch.setattr("fleet.store.s3.client", lambda patient=True: client)
    with pytest.raises(SourceError, match="ignores If-None-Match"):
        S3Store(s3_bucket, "x").check()


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "hf:meta-llama/Llama-3.1-8B"])
def test_hub_name_taken_for_a_folder_says_how_to_write_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"no such folder; .* write hf://meta-llama/Llama-3\.1-8B@<40 hexadecimal"):
        LocalFolder(tmp_path / name).files()


def test_address_of_a_web_page_or_file_says_how_to_write_it() -> None:
    with pytest.raises(SourceError, match=r"; write hf://org/name@<40 hexadecimal digits of its commit>"):
        open_folder("https://huggingface.co/org/name/tree/main")
    with pytest.raises(SourceError, match=r"; write /models/x"):
        open_folder("file:///models/x")


def test_file_in_place_of_a_folder_or_store_is_called_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="a file; give the folder that it is in"):
        LocalFolder(file).files()
    with pytest.raises(SourceError, match="a file; artifacts need a folder"):
        LocalStore(file).check()
