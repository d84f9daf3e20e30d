"""Trim steps: TIES' trim of whole models, one rank among all entries of a task vector, found by many workers.

Each worker draws a sample of its tensors' entries; that says where the value lies, closely. Each then counts its
entries in that window of bit patterns, and the sum of the counts says which entry has the rank: exactly, whatever the
shards. If the sample was wrong, another round of counts follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards
from fleet.fusion import AnyFusionMethod
from fleet.fusion.place import Place
from fleet.steps.base import NextUnit, Step, Walk
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.sources import Source, Weights
from fleet.steps.survey import SurveyStep
from fleet.steps.view import UNIT_BYTES, RunView
from fleet.work.unit import Found

if TYPE_CHECKING:
    from fleet.algebra.ranks import WindowCounts

SAMPLED_ENTRIES = 1 << 18
"""Of one task vector, by all workers together: a megabyte, and the window it leaves has a bin for each pattern."""


class TrimResult(Result):
    """What a trim found."""

    threshold: float
    """The magnitude of the entry with the step's rank."""


@dataclass(frozen=True, kw_only=True)
class TrimStep(Step):
    """Find what the largest entries of one model's task vector, over all its tensors, reach."""

    kind: ClassVar[str] = "trim"
    version: ClassVar[int] = 1

    model: Weights
    rank: int
    """How many they are."""

    @classmethod
    def make(cls, context: PlanContext, name: str, member: Weights, method: AnyFusionMethod) -> TrimStep:
        """Of one member of a fusion, realigned or not."""
        aligned = context.bases.aligned_model
        size = sum(math.prod(aligned.tensors[tensor].shape) for tensor in member.tensors)
        ((rank,),) = method.ranks([name], Place(name, 0.0), size).values()
        inputs = {"aligned": context.bases.aligned.identity}
        return context.add(
            cls(
                name=name,
                spec={"rank": rank},
                inputs=inputs | ({"model": member.identity} if isinstance(member, Source) else {}),
                deps=(member,) if isinstance(member, Step) else (),
                after=SurveyStep.of_models(context, [name]),
                read_bytes=context.models[name].model.num_bytes + aligned.num_bytes,
                model=member,
                rank=rank,
            )
        )

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        return TrimWalk(self, run.aligned, (run.bases.aligned.uri, run.uri(self.model)), UNIT_BYTES)


class TrimWalk(Walk):
    """The trim of one model.

    Its units keep no records: what they say depends on how tensors are shared out and on the windows, which are in no
    identity. All of it is one read of the model, which a run that is interrupted does again.

    Args:
        step: what is trimmed.
        aligned: the aligned model's headers.
        uris: of the aligned model and of the step's.
        shard_bytes: the aligned model's weights in a unit's tensors.
    """

    def __init__(self, step: TrimStep, aligned: FullModel, uris: tuple[str, str], shard_bytes: int) -> None:
        super().__init__({})
        self._step = step
        self._uris = uris
        self._shards = plan_shards((aligned.tensors[name] for name in step.model.tensors), shard_bytes)
        self._share = SAMPLED_ENTRIES / max(sum(math.prod(aligned.tensors[t].shape) for t in step.model.tensors), 1)
        self._threshold = math.nan

    def next(self) -> Sequence[NextUnit]:
        """The units of the first round that lacks some."""
        for number, window in enumerate(self._windows()):
            missing = [index for index in self._indices(number) if index not in self.finished]
            if missing:
                return [self._unit(index, window) for index in missing]
        return ()

    def result(self, step: Step) -> TrimResult:
        assert not math.isnan(self._threshold)
        return TrimResult(threshold=self._threshold)

    def _indices(self, number: int) -> range:
        """Of a round's units."""
        return range(number * len(self._shards), (number + 1) * len(self._shards))

    def _unit(self, index: int, window: WindowCounts | None) -> NextUnit:
        from fleet.work.trimming import CountUnit, SampleUnit

        aligned, model = self._uris
        tensors = tuple(self._shards[index % len(self._shards)])
        if window is None:
            return NextUnit(index, SampleUnit(aligned, model, tensors, self._share), 0.0)
        work = self._step.read_bytes / len(self._shards)
        return NextUnit(index, CountUnit(aligned, model, tensors, window.low, window.high), work)

    def _windows(self) -> Iterator[WindowCounts | None]:
        """What each round counts in; the first draws a sample. To be asked for the next, a round has to be done."""
        import torch

        from fleet.algebra.ranks import RankSearch
        from fleet.work.trimming import unpacked

        yield None
        found = [self._found(index) for index in self._indices(0)]
        size, rank = sum(result["size"] for result in found), self._step.rank
        if rank > size:  # among the zeros of tensors that a realigned adapter has no longer
            self._threshold = 0.0
            return
        search = RankSearch(rank, size, torch.cat([unpacked(result["sample"], torch.float32) for result in found]))
        number = 1
        while True:
            yield search.window
            for index in self._indices(number):
                search.window.counts += unpacked(self._found(index)["counts"], torch.int64)
            if search.finish_pass():
                self._threshold = search.value
                return
            number += 1

    def _found(self, index: int) -> dict[str, Any]:
        found: Any = self.finished[index]
        return found.result
