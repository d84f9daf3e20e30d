"""A folder in the Hugging Face Hub at one commit. The only user of huggingface_hub.

Endpoint, token and cache come from the Hub's own environment: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`.
"""

# huggingface_hub annotates some arguments with a bare `dict`.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import os
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import (
    HfApi,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from fleet.core.errors import SourceError
from fleet.store.keys import check_key, is_visible
from fleet.store.links import linked
from fleet.store.local import read_file_into

_TIMEOUT_SECONDS = 10.0
_ATTEMPTS = 3


class _File(NamedTuple):
    size: int
    digest: str


@dataclass(frozen=True)
class HubFolder:
    """The files of model repository `repo` at `commit`, 40 hexadecimal digits. `names`: these alone."""

    repo: str
    commit: str
    names: frozenset[str] | None = None

    @property
    def uri(self) -> str:
        return f"hf://{self.repo}@{self.commit}"

    def files(self) -> dict[str, int]:
        return {name: file.size for name, file in self._listing().items()}

    def only(self, names: Collection[str]) -> HubFolder:
        return replace(self, names=frozenset(names))

    def digests(self) -> dict[str, str]:
        return {name: file.digest for name, file in self._listing().items()}

    def read(self, name: str) -> bytes:
        # The listing is the first contact, and fails within seconds; a download tries for longer.
        if check_key(name) not in self._listing():
            raise SourceError(f"{self.uri}: no such file: {name}")
        with _explained(self.uri, name):
            path = hf_hub_download(self.repo, name, revision=self.commit, endpoint=_endpoint())
        return Path(path).read_bytes()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Reads the Hub's cache if the file is there, else just these bytes over the network."""
        cached = try_to_load_from_cache(self.repo, check_key(name), revision=self.commit)
        if isinstance(cached, str):
            read_file_into(Path(cached), start, buffer)
            return
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=_endpoint())
        with _explained(self.uri, name):
            done = _read_range(url, start, buffer.cast("B"))
        if done < len(buffer.cast("B")):
            raise SourceError(
                f"{self.uri}: {name} ends at byte {start + done}, but {buffer.nbytes} bytes from "
                f"{start} were expected; the file is truncated: publish it again"
            )

    def local(self, scratch: Path) -> Path:
        """The snapshot in the Hub's own cache, which also keeps one copy per content."""
        names = list(self._listing())
        with _explained(self.uri):
            path = snapshot_download(self.repo, revision=self.commit, endpoint=_endpoint(), allow_patterns=names)
        # Whoever asked for more of the repository has left that in the same snapshot.
        return Path(path) if self.names is None else linked(Path(path), names, scratch)

    def _listing(self) -> dict[str, _File]:
        with _explained(self.uri):
            found = _listing(_endpoint(), self.repo, self.commit)
        if not found:
            raise SourceError(f"{self.uri}: the repository holds no files at this commit")
        return {name: file for name, file in found if self.names is None or name in self.names}


def _endpoint() -> str | None:
    # Read here, because huggingface_hub reads it only once, when it is first imported.
    return os.environ.get("HF_ENDPOINT")


@cache
def _listing(endpoint: str | None, repo: str, commit: str) -> tuple[tuple[str, _File], ...]:
    """Every visible file, sorted by name; a commit never changes, so one request per process."""
    info = HfApi(endpoint=endpoint).model_info(repo, revision=commit, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    found: dict[str, _File] = {}
    for sibling in info.siblings or ():
        digest = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}"
        if is_visible(sibling.rfilename):
            found[sibling.rfilename] = _File(sibling.size or 0, digest)
    return tuple(sorted(found.items()))


def _read_range(url: str, start: int, view: memoryview) -> int:
    """Fill `view` from byte `start` of `url`; the number of bytes there were."""
    done, attempt = 0, 0
    while done < len(view):
        headers = build_hf_headers() | {
            "Range": f"bytes={start + done}-{start + len(view) - 1}",
            "Accept-Encoding": "identity",
        }
        request = get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True)
        try:
            with request as response:
                if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return done
                hf_raise_for_status(response)
                if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                    raise SourceError(f"{url}: this server ignores ranges; copy the model to S3")
                for chunk in response.iter_raw():
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
                return done
        except httpx2.TransportError:
            attempt += 1
            if attempt == _ATTEMPTS:
                raise
            time.sleep(0.5 * 2**attempt)
    return done


@contextmanager
def _explained(uri: str, name: str = "") -> Generator[None]:
    """Raise the Hub's errors as SourceError, one line with the address and the fix."""
    try:
        yield
    except (
        HfHubHTTPError,
        EntryNotFoundError,
        FileMetadataError,
        OfflineModeIsEnabled,
        httpx2.HTTPError,
    ) as error:
        raise SourceError(f"{uri}: {_explain(error, name)}") from error


def _explain(error: Exception, name: str) -> str:
    if isinstance(error, GatedRepoError):
        return "gated repository; accept its terms on the Hub, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one; correct the name, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such commit; check it on the Hub"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or copy the model to a folder or S3"
    # LocalEntryNotFoundError comes first: a download raises it when the Hub cannot be reached.
    if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, (HfHubHTTPError, EntryNotFoundError)):
        text = " ".join(str(error.__cause__ or error).split())
        return f"the Hub cannot be reached ({text}); check HF_ENDPOINT and the network"
    if isinstance(error, EntryNotFoundError):
        return f"no such file: {name}"
    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if status in (401, 403):
        return f"access denied ({status}); set HF_TOKEN to a token that may read this repository"
    return f"the Hub answered {status}: {error.server_message or error.response.reason_phrase}"
