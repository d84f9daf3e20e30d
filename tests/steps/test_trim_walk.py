"""One rank of a whole task vector, found shard by shard, with units that are done at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fleet.algebra.ranks
import fleet.fusion.streaming
import fleet.steps.trim
import fleet.work.trimming
from fleet.checkpoint.full_model import FullModel
from fleet.steps.base import NextUnit
from fleet.steps.trim import TrimWalk
from fleet.work.tensor_worker import TensorWorker
from fleet.work.trimming import CountUnit, SampleUnit, packed, unpacked
from fleet.work.unit import UnitRecord
from tests.fusion.test_streaming import held, here, normal

ENTRIES = 50 * (40 + 41 + 42)
STEP: Any = SimpleNamespace(key="trim")


def made(dtype: torch.dtype, num_tuned: int = 3) -> tuple[FullModel, FullModel, torch.Tensor]:
    """An aligned model, one in which so many of its three tensors were tuned, and the magnitudes of the task vector."""
    base = {f"layers.{i}.weight": normal(i, 50, 40 + i).to(dtype) for i in range(3)}
    tuned: Mapping[str, torch.Tensor] = {
        n: (t.float() + normal(9, *t.shape) * 0.02 * (i < num_tuned)).to(dtype) for i, (n, t) in enumerate(base.items())
    }
    moved = torch.cat([(tuned[n].float() - t.float()).abs().view(-1) for n, t in base.items()])
    return held(base)[0], held(tuned)[0], moved.sort(descending=True).values


def walk_of(aligned: FullModel, rank: int, shard_bytes: int, finished: dict[int, UnitRecord]) -> TrimWalk:
    step: Any = SimpleNamespace(model=SimpleNamespace(tensors=tuple(aligned.tensors)), rank=rank, read_bytes=600)
    walk = TrimWalk(step, aligned, ("aligned", "model"), shard_bytes)
    walk.finished.update(finished)
    return walk


def walked(walk: TrimWalk, aligned: FullModel, model: FullModel) -> list[list[NextUnit]]:
    """The rounds that were asked for; a worker did them, whose models are these."""
    rounds: list[list[NextUnit]] = []
    worker, models = TensorWorker(), {"aligned": aligned, "model": model}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for opened in ("open_full", "open_model"):
            monkeypatch.setattr(fleet.work.trimming, opened, models.__getitem__)
        while units := [*walk.next()]:
            rounds.append(units)
            walk.finished.update({unit.index: worker.run(unit.unit) for unit in units})
    return rounds


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.bfloat16, torch.float32]), st.booleans(), st.integers(1, 3), st.floats(0.0, 1.0),
    st.sampled_from([1, 9_000, 1 << 20]), st.sampled_from([1, 60, 1 << 18]),
)  # fmt: skip
def test_trim_is_the_sorted_ones_whatever_the_shards_and_the_sample(
    dtype: torch.dtype, local: bool, num_tuned: int, share: float, shard_bytes: int, sampled: int
) -> None:
    aligned, model, magnitudes = made(dtype, num_tuned)
    rank = max(round(share * ENTRIES), 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 300)
        monkeypatch.setattr(fleet.steps.trim, "SAMPLED_ENTRIES", sampled)
        if local:
            here(monkeypatch)
        walk = walk_of(aligned, rank, shard_bytes, {})
        walked(walk, aligned, model)
    assert walk.result(STEP).literals() == {"threshold": float(magnitudes[rank - 1])}


def test_trim_reads_everything_once_after_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.algebra.ranks, "_BINS", 1 << 24)  # a sample of few numbers leaves a wide window
    aligned, model, magnitudes = made(torch.float32)
    walk = walk_of(aligned, 700, 1, {})
    sampling, counting = walked(walk, aligned, model)
    assert [type(u.unit) for u in sampling] == [SampleUnit] * 3
    assert [type(u.unit) for u in counting] == [CountUnit] * 3
    assert [u.unit.tensors for u in sampling] == [u.unit.tensors for u in counting] == [(n,) for n in aligned.tensors]
    assert [u.work for u in sampling + counting] == [0.0] * 3 + [200.0] * 3
    assert walk.result(STEP).literals() == {"threshold": float(magnitudes[699])}


def test_trim_asks_for_what_is_missing_of_a_round_alone() -> None:
    """Workers are done in any order, and one that died leaves a hole."""
    aligned, model, magnitudes = made(torch.bfloat16)
    whole = walk_of(aligned, 700, 1, {})
    rounds = walked(whole, aligned, model)
    assert len(rounds) > 1
    for number, units in enumerate(rounds):
        before = {unit.index for found in rounds[:number] for unit in found}
        for missing in units:
            kept = before | {unit.index for unit in units} - {missing.index}
            walk = walk_of(aligned, 700, 1, {index: whole.finished[index] for index in kept})
            assert walk.next() == [missing]
            walked(walk, aligned, model)
            assert walk.result(STEP).literals() == {"threshold": float(magnitudes[699])}


def test_trim_of_a_misleading_sample_counts_again() -> None:
    aligned, model, magnitudes = made(torch.float32)
    walk = walk_of(
        aligned, 700, 1 << 20, {0: UnitRecord(result={"sample": packed(torch.full((999,), 5.0)), "size": ENTRIES})}
    )
    assert [type(unit.unit) for found in walked(walk, aligned, model) for unit in found] == [CountUnit] * 3
    assert walk.result(STEP).literals() == {"threshold": float(magnitudes[699])}


def test_trim_whose_rank_is_among_removed_tensors_is_zero() -> None:
    """A realigned adapter lacks what its method took out whole: as if it were zeros."""
    aligned, _, _ = made(torch.float32)
    walk = walk_of(aligned, 11, 1 << 20, {0: UnitRecord(result={"sample": packed(torch.ones(10)), "size": 10})})
    assert not walk.next()
    assert walk.result(STEP).literals() == {"threshold": 0.0}


@pytest.mark.parametrize("values", [torch.tensor([0.5, -math.inf]), torch.arange(3), torch.empty(0)])
def test_packed_numbers_come_back(values: torch.Tensor) -> None:
    assert torch.equal(unpacked(packed(values), values.dtype), values)
