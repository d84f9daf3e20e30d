"""Elementwise operators on task vectors. They need ΔW's entries, so a LoRA is multiplied out here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fleet.algebra.delta import Delta, Dense
from fleet.algebra.noise import FACTORS, NoiseKey, counters, least_of, limit_of, uniform


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that one worker has, where several share a tensor: consecutive entries."""

    start: int
    """Index of the first entry in the flattened tensor."""
    total: Callable[[torch.Tensor], torch.Tensor]
    """Adds up counts or sums over all pieces."""

    def gathered(self, value: torch.Tensor) -> torch.Tensor:
        """The whole flattened tensor, given this piece's entries, (n,). No gradient flows through it."""
        count = int(self.total(torch.tensor(value.numel(), device=value.device)))
        whole = torch.zeros(count, dtype=value.dtype, device=value.device)
        whole[self.start : self.start + value.numel()] = value.detach()
        return self.total(whole)


WHOLE = Piece(0, lambda counts: counts)
"""A tensor that one worker has all of."""


@dataclass(frozen=True)
class Trim:
    """TIES' trim: the entries of a task vector whose magnitude is below a threshold become zero."""

    threshold: float

    def of(self, value: torch.Tensor, start: int) -> torch.Tensor:
        return at_least(value, self.threshold)

    def compiled(self, start: int) -> tuple[float, ...]:
        """This as a `CUT` of `fleet.algebra.kernels`."""
        return self.threshold, 0, 0, -1, 1.0


@dataclass(frozen=True)
class Drop:
    """DARE: every entry of a task vector becomes zero with probability p, and the others are divided by 1 − p.

    Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, eq. 1 and 2.
    """

    key: NoiseKey
    rate: float
    """p in [0, 1)."""
    rescale: bool = True
    """Whether they are divided by 1 − p; if not, they stay as they are."""

    def of(self, value: torch.Tensor, start: int) -> torch.Tensor:
        """What stays of entries [start, start + n), (n,). Differentiable in it."""
        return kept(value, self.key, start, self.rate) / self._divisor

    def compiled(self, start: int) -> tuple[float, ...]:
        """This as a `CUT` of `fleet.algebra.kernels`, for entries from `start` on."""
        return 0.0, *counters(self.key, start), limit_of(self.rate), self._divisor

    @property
    def _divisor(self) -> float:
        return 1.0 - self.rate if self.rescale else 1.0


def merge_bfloat16(
    rows: torch.Tensor,
    cuts_M: Sequence[Trim | Drop],
    weights_M: Sequence[float],
    consensus: Literal["mean", "sum", "none"],
    scale: float,
    start: int,
) -> None:
    """Merge full models in bfloat16 in one compiled loop, with the bits that `of`, `elected` and `sum_of` give.

    Args:
        rows: (M + 2, n) bfloat16: the aligned model, the M others, and last the row that the result is written to.
        cuts_M: how each model's task vector is made sparse.
        consensus: of the sign election; `none` is the weighted sum without one.
        scale: λ, on the merged task vector.
        start: index of the first entry in the flattened tensor.
    """
    kernels = _kernels()
    bits = rows.view(torch.uint16).numpy()
    cuts = np.array([cut.compiled(start) for cut in cuts_M], kernels.CUT)
    weights, elects = np.array(weights_M, np.float32), consensus != "none"
    kernels.merge(bits[:-1], cuts, weights, elects, consensus == "mean", np.float32(scale), FACTORS, bits[-1])


def dropped(delta: Delta, drop_rate: float, generator: torch.Generator) -> Dense:
    """DARE: every entry of ΔW becomes zero with probability p, and the others are divided by 1 − p, so the mean stays.

    Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, eq. 1 and 2. The mask is on the product: on
    LoRA factors, a rank-one term would survive with probability (1 − p)².

    Args:
        drop_rate: p in [0, 1).
    """
    value = delta.dense()
    keep = torch.rand(value.shape, generator=generator) >= drop_rate
    return Dense(value * keep / (1.0 - drop_rate))


def kept(value: torch.Tensor, key: NoiseKey, start: int, drop_rate: float) -> torch.Tensor:
    """Entries [start, start + n) of a task vector, each set to zero with probability p: (n,). Differentiable.

    Args:
        drop_rate: p in [0, 1).
    """
    if not _is_plain(value):
        return value * (uniform(key, start, value.numel(), value.device) >= least_of(drop_rate))
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    _kernels().drop(_flat(value), *counters(key, start), limit_of(drop_rate), FACTORS, _flat(out))
    return out


def trimmed(delta: Delta, density: float, piece: Piece = WHOLE) -> Dense:
    """TIES' trim: the largest entries of a tensor's ΔW by magnitude stay, at least one; all at the threshold stay.

    Differentiable in what stays.

    Args:
        density: the share that stays, in (0, 1].
    """
    value = delta.dense()
    entries = int(piece.total(torch.tensor(value.numel(), device=value.device)))
    threshold = magnitude_threshold(value.detach(), max(round(density * entries), 1), piece)
    return Dense(at_least(value, threshold))


def at_least(value: torch.Tensor, threshold: float) -> torch.Tensor:
    """The entries whose magnitude, in float32 as thresholds are, reaches a threshold; the others become zero."""
    if not _is_plain(value):
        return torch.where(value.detach().float().abs() >= threshold, value, 0.0)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    _kernels().keep_at_least(_flat(value), np.float32(threshold), _flat(out))
    return out


def between(value: torch.Tensor, lowest: float, largest: float) -> torch.Tensor:
    """The entries whose magnitude is from `lowest` to `largest`, both included; the others become zero."""
    return torch.where(value.detach().float().abs() <= largest, at_least(value, lowest), 0.0)


def thresholds_of(
    scores: Mapping[str, torch.Tensor], ranks: Mapping[str, Sequence[int]], piece: Piece = WHOLE
) -> dict[str, tuple[float, ...]]:
    """Score -> the magnitudes of its ranks, counted from the largest; exact, over all pieces.

    Args:
        scores: name -> values of this piece, any shape; their magnitudes count.
        ranks: name -> ranks from 1, the largest.
    """
    return {
        name: tuple(magnitude_threshold(scores[name], rank, piece) for rank in wanted) for name, wanted in ranks.items()
    }


def magnitude_threshold(magnitude: torch.Tensor, count: int, piece: Piece = WHOLE) -> float:
    """The `count`-th largest magnitude over all pieces, exactly, without sorting or sending values.

    Positive float32 numbers are ordered like their bit patterns, so two histograms find it: one of the upper 16 bits,
    one of the lower 16 bits of the numbers in the bin found. Pieces share counts alone.

    Args:
        magnitude: any shape; signs don't count.
    """
    bits = magnitude.float().contiguous().view(torch.int32).flatten() & 0x7FFFFFFF
    upper, count = _bin_from_above(piece.total(torch.bincount(bits >> 16, minlength=1 << 15)), count)
    inside = bits[(bits >> 16) == upper] & 0xFFFF
    lower, _ = _bin_from_above(piece.total(torch.bincount(inside, minlength=1 << 16)), count)
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def _bin_from_above(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest value, and that value's rank within the bin."""
    above = counts.flip(0).cumsum(0)
    from_top = int(torch.searchsorted(above, rank))
    before = int(above[from_top - 1]) if from_top else 0
    return counts.numel() - 1 - from_top, rank - before


def elected(
    values_M: Sequence[torch.Tensor], weights_M: Sequence[float], combine: Literal["mean", "sum"]
) -> torch.Tensor:
    """TIES' election: each entry's sign is that of its weighted sum; the models' entries with that sign are combined.

    The mean is weighted, Σ w_t x_t / Σ |w_t| over agreeing entries; the sum is Σ w_t x_t. An entry whose weighted sum
    over all models is zero has no sign, and becomes zero. Differentiable.

    Args:
        values_M: x_t, floating, of one shape.
    """
    if all(_is_plain(value) for value in values_M):
        out = torch.empty_like(values_M[0], memory_format=torch.contiguous_format)
        stack = torch.stack([v.reshape(-1) for v in values_M])
        _kernels().elect(stack.numpy(), np.array(weights_M, np.float32), combine == "mean", _flat(out))
        return out
    weighted_M = [v * w for v, w in zip(values_M, weights_M, strict=True)]
    above, below = (sum_of([part(v) for v in weighted_M]) for part in (_positive, _negative))
    total = (above + below).detach()
    elected = torch.where(total > 0.0, above, torch.where(total < 0.0, below, 0.0))
    if combine == "sum":
        return elected
    shares = [abs(w) for w in weights_M]
    weight_above, weight_below = (
        sum_of([(sign * v.detach() > 0.0) * share for v, share in zip(weighted_M, shares, strict=True)])
        for sign in (1.0, -1.0)
    )
    agreeing = torch.where(total > 0.0, weight_above, weight_below)
    return elected / torch.where(agreeing > 0.0, agreeing, 1.0)


def _positive(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(min=0.0)


def _negative(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(max=0.0)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether the compiled loops can take it: on a CPU, float32, and without a gradient."""
    return value.device.type == "cpu" and value.dtype == torch.float32 and not value.requires_grad


def _flat(value: torch.Tensor) -> NDArray[np.float32]:
    """Its entries in order, (n,). They share the tensor's memory if it is contiguous; to write to them, it must be."""
    return value.reshape(-1).numpy()


def _kernels() -> ModuleType:
    from fleet.algebra import kernels

    return kernels


def sum_of(values_M: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, added up in the order given, in memory of its own."""
    total = values_M[0].clone()
    for value in values_M[1:]:
        total.add_(value)
    return total


def ties(
    deltas_M: Sequence[Delta],
    weights_M: Sequence[float],
    density: float,
    combine: Literal["mean", "sum"] = "mean",
    piece: Piece = WHOLE,
) -> Dense:
    """TIES: trim, elect a sign per entry by the weighted sum, combine the entries that agree with it.

    Source: Yadav et al., "TIES-merging", arXiv 2306.01708, alg. 1.

    Args:
        deltas_M: of one shape.
        density: the share of each that stays, in (0, 1].
    """
    return Dense(elected([trimmed(d, density, piece).value for d in deltas_M], weights_M, combine))
