"""What a unit of work is: a small frozen value that names everything by URI, so that it travels as a message.

Any worker can do a unit again and write the same bytes. Weights are read and written where it runs; what goes back to
the coordinator is a record of kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from pydantic import Field

from fleet.core.frozen import Frozen
from fleet.core.identity import Json
from fleet.core.processor import processor
from fleet.store.entry import FileEntry

PoolName: TypeAlias = Literal["tensor", "trainer", "replica", "judge"]
"""The kinds of workers: tensor algebra, mask trainings, vLLM engines, and judges of what these said."""


class UnitRecord(Frozen):
    """What one unit of a step left behind."""

    files: dict[str, FileEntry] = Field(default_factory=dict)
    """Name -> size and digest, of every file it wrote in its step's folder."""
    result: dict[str, Json] = Field(default_factory=dict)
    """What the step's result is made of."""
    processor: str | None = None
    """What computed it; see `fleet.core.processor`."""


Found: TypeAlias = UnitRecord | Mapping[str, UnitRecord]
"""What a unit brings back: a record; or of a pass that does several steps at once, a record per step key."""


class Unit(Protocol):
    """One piece of a step."""

    pool: ClassVar[PoolName]
    """The workers that can do it."""

    def run(self, host: Any) -> Found:
        """Do it, from the store to the store.

        Args:
            host: the worker it runs on, which holds what is kept from unit to unit: memory, an engine.
        """
        ...


class Worker:
    """A plain class that `fleet.run.pools` makes a Ray actor of; a subclass per pool holds what its units share."""

    def ready(self) -> bool:
        """True once the worker is up: a constructor may take a while."""
        return True

    def run(self, unit: Unit) -> Found:
        """Do one unit, and note which processor did."""
        found = unit.run(self)
        if isinstance(found, UnitRecord):
            return _signed(found)
        return {key: _signed(record) for key, record in found.items()}


def _signed(record: UnitRecord) -> UnitRecord:
    return record.model_copy(update={"processor": processor()})


def short(value: float) -> float:
    """Six digits: more says nothing in a table, and takes room in every record."""
    return float(f"{value:.6g}")
