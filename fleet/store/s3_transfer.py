"""Bytes in and out of S3: ranged reads in parallel parts, uploads streamed in bounded memory."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from fleet.core.errors import SourceError

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20  # the default 8 MB is measurably slow, both ways
_PARALLEL = 4
_ATTEMPTS = 4

# boto3 repeats a request that fails, but not one whose body breaks off. (And `with body as stream`
# gives the raw stream, which takes a lost connection for the end: hence `closing`.)
_BROKEN = (ResponseStreamingError, ReadTimeoutError, IncompleteReadError)


def read_object(s3: Any, bucket: str, key: str, etag: str | None) -> tuple[bytes, str]:
    """A whole small object and its ETag; if `etag` is given, only that content (412 otherwise)."""
    attempt = 0
    while True:
        response = s3.get_object(Bucket=bucket, Key=key, **_match(etag))
        try:
            with closing(response["Body"]) as body:
                return body.read(), str(response["ETag"]).strip('"')
        except _BROKEN as error:
            _pause(attempt, key, error)
            attempt += 1


def read_range(s3: Any, bucket: str, key: str, start: int, buffer: memoryview, etag: str | None) -> str | None:
    """Fill `buffer` from byte `start`, and return the object's ETag (None for no bytes).

    A range of more than one part is read by several threads, all from the content that the first
    part came from. Raises SourceError if the object ends too early.
    """
    view = buffer.cast("B")
    parts = [view[at : at + PART_BYTES] for at in range(0, len(view), PART_BYTES)]
    if not parts:
        return etag
    if len(parts) == 1 or etag is None:
        etag = _read_part(s3, bucket, key, start, parts[0], etag)
        start, parts = start + len(parts[0]), parts[1:]
    if parts:
        with ThreadPoolExecutor(min(_PARALLEL, len(parts))) as pool:
            futures = [
                pool.submit(_read_part, s3, bucket, key, start + at * PART_BYTES, part, etag)
                for at, part in enumerate(parts)
            ]
            for future in futures:
                future.result()
    return etag


def _read_part(s3: Any, bucket: str, key: str, start: int, part: memoryview, etag: str | None) -> str:
    done, attempt = 0, 0
    while True:
        wanted = f"bytes={start + done}-{start + len(part) - 1}"
        response = s3.get_object(Bucket=bucket, Key=key, Range=wanted, **_match(etag))
        etag = str(response["ETag"]).strip('"')
        try:
            with closing(response["Body"]) as body:
                while done < len(part) and (count := body.readinto(part[done:])):
                    done += count
        except _BROKEN as error:
            if done < len(part):
                _pause(attempt, key, error)
                attempt += 1
                continue
        if done < len(part):
            raise SourceError(
                f"s3://{bucket}/{key}: ends at byte {start + done}, but {len(part)} bytes from "
                f"{start} were expected; the file is truncated: upload it again"
            )
        return etag


def _match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"IfMatch": f'"{etag}"'}


def _pause(attempt: int, key: str, error: BotoCoreError) -> None:
    if attempt == _ATTEMPTS - 1:
        raise error
    logger.warning("reading %s broke off, trying again: %s", key, error)
    time.sleep(0.2 * 2**attempt)


class MultipartWriter:
    """Uploads what is written, part by part, in the background; one put if it all fits one part.

    Holds at most `part_bytes` x 5: four parts on their way, and the one being filled.
    """

    def __init__(self, s3: Any, bucket: str, key: str, part_bytes: int) -> None:
        self._s3 = s3
        self._object = {"Bucket": bucket, "Key": key}
        self._part_bytes = part_bytes
        self._buffer = bytearray()
        self._upload: str | None = None
        self._etags: list[str] = []
        self._pending: deque[Future[str]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`, waiting while four parts are still on their way."""
        view = memoryview(data).cast("B")
        while view:
            if len(self._buffer) == self._part_bytes:
                self._send()
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]

    def publish(self) -> None:
        """Send the rest and make the object appear."""
        if self._upload is None:
            self._s3.put_object(**self._object, Body=self._buffer)
            return
        self._send()
        while self._pending:
            self._etags.append(self._pending.popleft().result())
        parts = [{"PartNumber": at, "ETag": etag} for at, etag in enumerate(self._etags, start=1)]
        self._s3.complete_multipart_upload(**self._object, UploadId=self._upload, MultipartUpload={"Parts": parts})
        self._upload = None

    def close(self) -> None:
        """Stop, and discard the parts of an upload that was not published."""
        if self._pool is not None:
            # An abort only removes the parts that have arrived, so wait for those on their way.
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._upload is None:
            return
        try:
            self._s3.abort_multipart_upload(**self._object, UploadId=self._upload)
        except (BotoCoreError, ClientError) as error:
            # Nothing is visible under the key; only a lifecycle rule of the bucket can free it now.
            logger.warning("parts of %s are left behind: %s", self._object["Key"], error)

    def _send(self) -> None:
        if self._upload is None or self._pool is None:
            self._upload = self._s3.create_multipart_upload(**self._object)["UploadId"]
            self._pool = ThreadPoolExecutor(_PARALLEL)
        if len(self._pending) == _PARALLEL:
            self._etags.append(self._pending.popleft().result())
        number = len(self._etags) + len(self._pending) + 1
        self._pending.append(self._pool.submit(self._upload_part, number, self._buffer))
        self._buffer = bytearray()

    def _upload_part(self, number: int, part: bytearray) -> str:
        answer = self._s3.upload_part(**self._object, UploadId=self._upload, PartNumber=number, Body=part)
        return answer["ETag"]
