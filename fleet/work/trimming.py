"""Trimming: what one worker adds to the search for one rank among all entries of a task vector."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import torch

from fleet.algebra.ranks import WindowCounts
from fleet.checkpoint.opened import open_full, open_model
from fleet.fusion.streaming import count_task_vector, sample_task_vector
from fleet.work.unit import PoolName, UnitRecord, Worker


@dataclass(frozen=True)
class SampleUnit:
    """Draw entries of one model's task vector, spread over some tensors."""

    aligned: str
    model: str
    tensors: tuple[str, ...]
    share: float

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: Worker) -> UnitRecord:
        """The record holds the sample, packed, and the number of entries it was drawn from."""
        aligned, model = open_full(self.aligned), open_model(self.model)
        with ThreadPoolExecutor(1) as reader:
            sample, size = sample_task_vector(aligned, model, self.tensors, self.share, reader)
        return UnitRecord(result={"sample": packed(sample), "size": size})


@dataclass(frozen=True)
class CountUnit:
    """Count the entries of one model's task vector, in some tensors, whose bit patterns are in [low, high)."""

    aligned: str
    model: str
    tensors: tuple[str, ...]
    low: int
    high: int

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: Worker) -> UnitRecord:
        """The record holds the counts, packed; see `WindowCounts`."""
        counts = WindowCounts(self.low, self.high)
        with ThreadPoolExecutor(1) as reader:
            count_task_vector(open_full(self.aligned), open_model(self.model), self.tensors, counts, reader)
        return UnitRecord(result={"counts": packed(counts.counts)})


def packed(values: torch.Tensor) -> str:
    """(n,) numbers as text, for a record; a window's counts are small numbers, and take some 100 kB."""
    return b64encode(zlib.compress(values.numpy().tobytes(), level=1)).decode()


def unpacked(text: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that `packed` made text of: (n,), of this dtype."""
    data = zlib.decompress(b64decode(text))
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
