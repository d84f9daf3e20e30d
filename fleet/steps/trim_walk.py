"""TIES' trim of whole models: one rank among all entries of a task vector, found by many workers.

Each worker draws a sample of its tensors' entries; that says where the value lies, closely. Each then counts its
entries in that window of bit patterns, and the sum of the counts says which entry has the rank: exactly, whatever the
shards. If the sample was wrong, another round of counts follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fleet.algebra.ranks import RankSearch, WindowCounts
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards
from fleet.core.identity import Json
from fleet.steps.builder import TrimStep
from fleet.steps.record import UnitRecord
from fleet.steps.walk import NextUnit
from fleet.work.tensors import CountUnit, SampleUnit, unpacked

SAMPLED_ENTRIES = 1 << 18
"""Of one task vector, by all workers together: a megabyte, and the window it leaves has a bin for each pattern."""


class TrimWalk:
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
        self.finished: dict[int, UnitRecord] = {}
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

    def result(self) -> dict[str, Json]:
        assert not math.isnan(self._threshold)
        return {"threshold": self._threshold}

    def _indices(self, number: int) -> range:
        """Of a round's units."""
        return range(number * len(self._shards), (number + 1) * len(self._shards))

    def _unit(self, index: int, window: WindowCounts | None) -> NextUnit:
        aligned, model = self._uris
        tensors = tuple(self._shards[index % len(self._shards)])
        if window is None:
            return NextUnit(index, "sample", SampleUnit(aligned, model, tensors, self._share), 0.0)
        work = self._step.read_bytes / len(self._shards)
        return NextUnit(index, "count", CountUnit(aligned, model, tensors, window.low, window.high), work)

    def _windows(self) -> Iterator[WindowCounts | None]:
        """What each round counts in; the first draws a sample. To be asked for the next, a round has to be done."""
        yield None
        found: list[Any] = [self.finished[index].result for index in self._indices(0)]
        size, rank = sum(result["size"] for result in found), self._step.rank
        if rank > size:  # among the zeros of tensors that a realigned adapter has no longer
            self._threshold = 0.0
            return
        search = RankSearch(rank, size, torch.cat([unpacked(result["sample"], torch.float32) for result in found]))
        number = 1
        while True:
            yield search.window
            for index in self._indices(number):
                counted: Any = self.finished[index].result["counts"]
                search.window.counts += unpacked(counted, torch.int64)
            if search.finish_pass():
                self._threshold = search.value
                return
            number += 1
