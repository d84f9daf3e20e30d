"""From an address, as written in a manifest, to a `Store` or a `Folder`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fleet.core.errors import SourceError
from fleet.store.base import Folder, Store
from fleet.store.digest import folder_digest
from fleet.store.local import LocalFolder, LocalStore

_PIN = re.compile(r"(?P<uri>.+)@(?P<digest>sha256:[0-9a-f]{64})", re.DOTALL)
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_store(uri: str) -> Store:
    """The store at a local folder or `s3://bucket/prefix`; nothing is created or contacted yet.

    Raises SourceError if `uri` is neither.
    """
    if uri.startswith("s3://"):
        from fleet.store.s3 import S3Store  # noqa: PLC0415 - boto3 only where S3 is used

        return S3Store(*_bucket_and_prefix(uri))
    return LocalStore(_local_path(uri, "a store is a local folder or s3://bucket/prefix"))


def open_folder(uri: str) -> Folder:
    """The folder at a local path, `s3://bucket/prefix` or `hf://org/name@commit`.

    Local and S3 addresses may end in `@sha256:…`, the expected `folder_digest`; then the folder is
    read (S3: listed) and compared here. Raises SourceError if `uri` is none of these, if a Hub
    address has no commit, or if the pin does not match.
    """
    pinned = _PIN.fullmatch(uri)
    if pinned is None:
        if "@sha256:" in uri:
            raise SourceError(f"{uri}: a pin is @sha256: and 64 lower-case hexadecimal digits")
        return _open_folder(uri)
    if uri.startswith("hf://"):
        raise SourceError(f"{uri}: a Hub source is pinned by its commit alone; drop @sha256:…")
    folder = _open_folder(pinned["uri"])
    found = folder_digest(folder)
    if found != pinned["digest"]:
        raise SourceError(
            f"{pinned['uri']}: content changed: pinned {pinned['digest']}, found {found}; "
            "restore the files, or pin what is there now"
        )
    return folder


def _open_folder(uri: str) -> Folder:
    if uri.startswith("s3://"):
        from fleet.store.s3 import S3Folder  # noqa: PLC0415 - boto3 only where S3 is used

        return S3Folder(*_bucket_and_prefix(uri))
    if uri.startswith("hf://"):
        from fleet.store.hub import HubFolder  # noqa: PLC0415 - the Hub only where it is used

        return HubFolder(*_repo_and_commit(uri))
    return LocalFolder(_local_path(uri, "a source is a local folder, s3://bucket/prefix or hf://org/name@commit"))


def _local_path(uri: str, expected: str) -> Path:
    if not uri or "://" in uri:
        raise SourceError(f"{uri!r}: {expected}{_scheme_hint(uri)}")
    # Absolute, because a worker's current directory is not the driver's.
    return Path(os.path.abspath(os.path.expanduser(uri)))


def _scheme_hint(uri: str) -> str:
    if page := re.match(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", uri):
        return f"; write hf://{page[1]}@<40 hexadecimal digits of its commit>"
    if uri.startswith("file://"):
        return f"; write {uri.removeprefix('file://')}"
    return ""


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.removesuffix("/")
    if not bucket or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise SourceError(f"{uri}: an S3 address is s3://bucket/prefix, without empty parts or `..`")
    return bucket, prefix


def _repo_and_commit(uri: str) -> tuple[str, str]:
    match = _HUB.fullmatch(uri)
    if match is None:
        raise SourceError(f"{uri}: a Hub address is hf://org/name@commit")
    repo, revision = match["repo"], match["revision"] or ""
    if not _COMMIT.fullmatch(revision):
        raise SourceError(
            f"{uri}: not pinned to a commit, so it may change between runs; write "
            f"hf://{repo}@<40 hexadecimal digits>; `git ls-remote https://huggingface.co/{repo}` "
            "prints them"
        )
    return repo, revision
