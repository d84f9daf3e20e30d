"""What a step is. A kind of step is a subclass in a file of its own; `fleet.steps` lists them.

A step knows all of its own life: what identifies it, which workers it needs, which units it asks of them and in which
order, and what its record says. The coordinator asks for units, hands them to workers and keeps what comes back; it
knows no kind.

    make ──▶ walk ──▶ next: units ──▶ workers ──▶ finished ──▶ next: none left ──▶ result ──▶ record
                          ▲                          │
                          └──────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from fleet.core.identity import KEY_DIGITS, Json, fingerprint
from fleet.steps.record import Result
from fleet.steps.view import RunView

if TYPE_CHECKING:
    from fleet.work.unit import Found, PoolName, Unit, UnitRecord

Counted: TypeAlias = Literal["bytes", "prompts", "updates"]
"""What progress counts of a kind's work."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a plan. `kind`, `version`, `spec`, `inputs` and `deps` are its identity; the rest says where things
    are."""

    kind: ClassVar[str]
    version: ClassVar[int]
    """Bumped by hand when the same spec and inputs would give other bytes."""
    counts: ClassVar[Counted] = "bytes"
    joint: ClassVar[str | None] = None
    """Name of the pass that does all steps of some kinds together; None for a kind whose steps are done one by one."""

    name: str
    spec: dict[str, Json]
    """The literals that decide what is made."""
    inputs: dict[str, str]
    """Label -> content identity of each source."""
    deps: tuple[Step, ...] = ()
    """The steps it reads."""
    after: tuple[Step, ...] = ()
    """Ordering only: these steps check its inputs. Not part of the fingerprint."""
    read_bytes: int = 0
    write_bytes: int = 0
    """An upper bound: a realigned adapter's size depends on how many modules are edited."""
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        deps = [d.fingerprint for d in self.deps]
        value = fingerprint(self.kind, self.version, self.spec, self.inputs, deps)
        object.__setattr__(self, "fingerprint", value)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{self.fingerprint[:KEY_DIGITS]}"

    def early_pools(self, run: RunView) -> frozenset[PoolName]:
        """Pools to start before the step is ready: it is sure to need them, and they take long to come up."""
        return frozenset()

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        """The step's way through its units.

        Args:
            run: what the step may ask of its run.
            attempt: whose folder the files go to.
            finished: unit number -> record, of what an interrupted attempt had done.
        """
        raise NotImplementedError

    @classmethod
    def walk_together(cls, steps: Sequence[Step], run: RunView, attempt: str) -> Walk:
        """One walk for all waiting steps of a `joint` pass; each of its units brings a record per step key."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightsStep(Step):
    """A step whose files are a model: what can be scored, fused with others, and published."""

    tensors: tuple[str, ...]
    """The base tensors it may have a task vector in."""
    as_lora: bool
    """Whether it is written, and served, as a LoRA."""
    max_rank: int
    """Upper bound of a LoRA's rank: how many modules are merged is decided by drift. 0 for a full model."""

    @property
    def identity(self) -> str:
        return self.fingerprint


@dataclass(frozen=True)
class NextUnit:
    """A unit to do now."""

    index: int
    """The number its record is kept under."""
    unit: Unit
    work: float
    """Bytes it reads, or prompts it asks: what progress counts."""
    group: str | None = None
    """Identity of the weights an engine must hold; an actor does one group at a time."""
    keeps_record: bool = False
    """Whether its record goes to the store, so that an interrupted step goes on from there."""


class Walk:
    """One step's way through its units, or one pass' through those of all its steps.

    What is next follows from what has been found, and from the store it may look into, so whoever continues an
    interrupted run asks for what is missing and for nothing else.
    """

    def __init__(self, finished: dict[int, Found]) -> None:
        self.finished = finished
        """Unit number -> what it brought; grown by the coordinator."""

    def next(self) -> Sequence[NextUnit]:
        """The units to do now, asked again once they are done; empty if the walk is through."""
        raise NotImplementedError

    def records(self, step: Step) -> list[UnitRecord]:
        """A step's unit records, in the units' order."""
        return [found[step.key] if isinstance(found, Mapping) else found for _, found in sorted(self.finished.items())]

    def result(self, step: Step) -> Result:
        """What the step's record says; of a walk that is through.

        Raises:
            FleetError: the step has failed, for what was found; others of the pass have not.
        """
        raise NotImplementedError


class UnitList(Walk):
    """The walk of a step whose units are known from the start, and whose result is the sum of theirs."""

    def __init__(self, units: Sequence[NextUnit], finished: dict[int, Found], result: type[Result]) -> None:
        super().__init__(finished)
        self._units = units
        self._result = result

    def next(self) -> Sequence[NextUnit]:
        return [unit for unit in self._units if unit.index not in self.finished]

    def result(self, step: Step) -> Result:
        merged: dict[str, Json] = {}
        for record in self.records(step):
            merged |= record.result
        return self._result.model_validate(merged)


def unit_per_shard(units: Sequence[Unit], read_bytes: int) -> list[NextUnit]:
    """Units that share a step's bytes evenly; one alone is the step, and keeps no record of its own."""
    several = len(units) > 1
    return [NextUnit(i, unit, read_bytes / len(units), keeps_record=several) for i, unit in enumerate(units)]


KINDS: dict[str, type[Step]] = {}
"""Every kind of step by its name, in the order in which people see them."""


def register(kind: type[Step]) -> type[Step]:
    """Make a kind of step known; returns it.

    Raises:
        ValueError: another one has its name.
    """
    if KINDS.setdefault(kind.kind, kind) is not kind:
        raise ValueError(f"step kind {kind.kind}: {KINDS[kind.kind].__qualname__} has this name already")
    return kind
