"""A store and a folder in S3, or in any server that speaks its API. The only user of boto3.

Endpoint, region, profile and credentials come from boto3's standard environment and files. Beyond
the basics, a server needs `PutObject` with `If-None-Match: *`, for `create` (`S3Store.check` proves
it), and ranged `GetObject` with `If-Match`. Whether `create` is atomic depends on the server: on
AWS it is; OpenStack Swift looks before it writes, so several creates of one key that arrive within
milliseconds may all succeed there, and the last one stays.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleet.core.errors import FleetError, SourceError, StoreError
from fleet.store.base import StoreWriter
from fleet.store.download import download
from fleet.store.keys import check_key, check_prefix, is_visible
from fleet.store.s3_client import BotoCoreError, ClientError, client, code, explain
from fleet.store.s3_transfer import PART_BYTES, MultipartWriter, read_object, read_range

_CONFLICT_ATTEMPTS = 5
_CONFLICT_SECONDS = 0.2
_MARK = "fleet-create"


@dataclass(frozen=True)
class S3Folder:
    """The objects under `s3://bucket/prefix/`.

    An object's digest is its ETag, which one listing gives for every file: it changes whenever the
    bytes do. It may also change when equal bytes are uploaded in another way, which costs a
    recomputation and nothing else. What `digests` found (or else the first read of an object) is
    kept in `etags` and travels with the folder. Reads ask for just that content, so an object that
    is replaced between planning and work is an error, not a mixture.
    """

    bucket: str
    prefix: str
    etags: dict[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)
    names: frozenset[str] | None = None
    """These objects alone."""

    @property
    def uri(self) -> str:
        return _uri(self.bucket, self.prefix)

    def files(self) -> dict[str, int]:
        return {name: int(item["Size"]) for name, item in self._objects().items()}

    def only(self, names: Collection[str]) -> S3Folder:
        return replace(self, names=frozenset(names))

    def digests(self) -> dict[str, str]:
        found = {name: str(item["ETag"]).strip('"') for name, item in self._objects().items()}
        self.etags.clear()
        self.etags.update(found)
        return {name: f"etag:{etag}" for name, etag in found.items()}

    def read(self, name: str) -> bytes:
        with self._explained(name):
            data, etag = read_object(client(), self.bucket, self._key(name), self.etags.get(name))
        self.etags.setdefault(name, etag)
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        with self._explained(name):
            etag = read_range(client(), self.bucket, self._key(name), start, buffer, self.etags.get(name))
        if etag is not None:
            self.etags.setdefault(name, etag)

    def local(self, scratch: Path) -> Path:
        return download(self, scratch)

    def _key(self, name: str) -> str:
        return _join(self.prefix, check_key(name))

    def _explained(self, name: str) -> AbstractContextManager[None]:
        return _explained(SourceError, _uri(self.bucket, self._key(name)))

    def _objects(self) -> dict[str, dict[str, Any]]:
        # This is where a source is first contacted, so it fails fast.
        with _explained(SourceError, self.uri):
            found = _list(client(patient=False), self.bucket, _join(self.prefix, ""))
        if self.names is not None:
            found = {name: item for name, item in found.items() if name in self.names}
        if not found:
            raise SourceError(f"{self.uri}: no objects there; check the bucket and the prefix")
        return found


@dataclass(frozen=True)
class S3Store:
    """Objects under `s3://bucket/prefix/`; `part_bytes` is the size of a part of an upload."""

    bucket: str
    prefix: str
    part_bytes: int = PART_BYTES

    @property
    def uri(self) -> str:
        return _uri(self.bucket, self.prefix)

    def read(self, key: str) -> bytes | None:
        with self._explained(key):
            try:
                return read_object(client(), self.bucket, self._key(key), None)[0]
            except ClientError as error:
                if code(error) in ("NoSuchKey", "404"):
                    return None
                raise

    def create(self, key: str, data: bytes) -> bool:
        with self._explained(key):
            return _create(client(), self.bucket, self._key(key), data)

    def replace(self, key: str, data: bytes) -> None:
        with self._explained(key):
            client().put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    @contextmanager
    def writer(self, key: str) -> Generator[StoreWriter]:
        uploader = MultipartWriter(client(), self.bucket, self._key(key), self.part_bytes)
        writer = _Writer(uploader, _uri(self.bucket, self._key(key)))
        try:
            yield writer
            writer.publish()
        finally:
            uploader.close()

    def list(self, prefix: str) -> dict[str, int]:
        with _explained(StoreError, self.uri):
            start = _join(self.prefix, "")
            found = _list(client(), self.bucket, start, start + check_prefix(prefix))
        return {key: int(item["Size"]) for key, item in found.items()}

    def folder(self, prefix: str) -> S3Folder:
        return S3Folder(self.bucket, _join(self.prefix, check_prefix(prefix)).removesuffix("/"))

    def check(self) -> None:
        impatient, key = client(patient=False), _join(self.prefix, ".check")
        with _explained(SourceError, self.uri):
            _list(impatient, self.bucket, key)
            _create(impatient, self.bucket, key, b"")
            if _create(impatient, self.bucket, key, b""):
                raise SourceError(
                    f"{self.uri}: this server ignores If-None-Match, so two runs could both claim "
                    "a step; use one with conditional writes, or a local folder"
                )

    def _key(self, key: str) -> str:
        return _join(self.prefix, check_key(key))

    def _explained(self, key: str) -> AbstractContextManager[None]:
        return _explained(StoreError, _uri(self.bucket, self._key(key)))


class _Writer:
    """A multipart upload whose errors name the object."""

    def __init__(self, uploader: MultipartWriter, uri: str) -> None:
        self._uploader = uploader
        self._uri = uri

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with _explained(StoreError, self._uri):
            self._uploader.write(data)

    def publish(self) -> None:
        with _explained(StoreError, self._uri):
            self._uploader.publish()


def _create(s3: Any, bucket: str, key: str, data: bytes) -> bool:
    mark = uuid.uuid4().hex
    attempt = 0
    while True:
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={_MARK: mark})
            return True
        except ClientError as error:
            if code(error) in ("PreconditionFailed", "412"):
                # boto3 repeats a request whose answer got lost: what is in the way may be ours.
                found = s3.head_object(Bucket=bucket, Key=key)
                return found["Metadata"].get(_MARK) == mark
            # 409: another conditional write to this key is under way, and may still fail.
            conflict = code(error) in ("ConditionalRequestConflict", "409")
            if not conflict or attempt == _CONFLICT_ATTEMPTS - 1:
                raise
        time.sleep(_CONFLICT_SECONDS * 2**attempt)
        attempt += 1


def _list(s3: Any, bucket: str, root: str, prefix: str | None = None) -> dict[str, dict[str, Any]]:
    """Name relative to `root` -> entry of every visible object under `prefix`, sorted by name."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix or root)
    found = {item["Key"][len(root) :]: item for page in pages for item in page.get("Contents", ())}
    return {name: found[name] for name in sorted(found) if is_visible(name)}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _uri(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}".removesuffix("/")


@contextmanager
def _explained(kind: type[FleetError], uri: str) -> Generator[None]:
    """Raise boto3's errors as `kind`, one line with the address and the fix."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise kind(explain(error, uri)) from error
