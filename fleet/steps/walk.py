"""What a step asks of the workers, and in which order: a walk says what is next, given what has been found.

Pure but for the store it may look into, so whoever continues an interrupted run asks for what is missing and for
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fleet.core.identity import Json
from fleet.steps.record import UnitRecord


@dataclass(frozen=True)
class NextUnit:
    """A unit to do now."""

    index: int
    """The number its record is kept under."""
    method: str
    """Of the worker."""
    unit: Any
    work: float
    """Bytes it reads, or prompts it asks: what progress counts."""
    group: str | None = None
    """Identity of the weights an engine must hold for it."""
    keeps_record: bool = False
    """Whether its record goes to the store, so that an interrupted step goes on from there."""


class Walk(Protocol):
    """One step's way through its units."""

    finished: dict[int, UnitRecord]
    """Unit number -> record, of what is done; grown by the caller."""

    def next(self) -> Sequence[NextUnit]:
        """The units to do now, asked again once they are done; empty if the step is through."""
        ...

    def result(self) -> dict[str, Json]:
        """What the step's record says; of a step that is through."""
        ...


class UnitList:
    """The walk of a step whose units are known from the start, and whose record says all that theirs say."""

    def __init__(self, units: Sequence[NextUnit], finished: dict[int, UnitRecord]) -> None:
        self.finished = finished
        self._units = units

    def next(self) -> Sequence[NextUnit]:
        return [unit for unit in self._units if unit.index not in self.finished]

    def result(self) -> dict[str, Json]:
        merged: dict[str, Json] = {}
        for index in sorted(self.finished):
            merged |= self.finished[index].result
        return merged
