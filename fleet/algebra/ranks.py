"""The magnitude of a given rank among more numbers than fit in memory: exact, without sorting, in few passes.

Positive float32 numbers are ordered like their bit patterns. A pass counts the numbers above a window of patterns, and
makes a histogram of those within. A sample tells where to put the first window, narrow enough to have a bin for each
pattern; then one pass finds the magnitude. If the sample misled, another pass with another window follows.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_BINS = 1 << 19
"""Most bins of a window."""

_PATTERNS = 1 << 31
"""How many bit patterns the numbers have that aren't negative, inf and NaN among them."""

_DEVIATIONS = 3.0
"""How many standard errors of the sample's rank the first window reaches to each side."""


class WindowCounts:
    """How many numbers lie in each bin of a window of bit patterns, [low, high), and above it."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = max(math.ceil(math.log2(max(high - low, 1) / _BINS)), 0)
        """A bin is 2^shift patterns wide."""
        self.counts = torch.zeros(((high - low - 1) >> self.shift) + 2, dtype=torch.int64)
        """(bins + 1,), int64: how many lie in each bin, and last above the window. Workers' counts are added up."""

    def add(self, values: torch.Tensor) -> None:
        """Count more numbers by their magnitudes: any shape, float32."""
        from fleet.algebra.kernels import count_window

        bits = values.reshape(-1).view(torch.int32)
        count_window(bits.numpy(), self.low, self.high, self.shift, self.counts.numpy())

    def add_differences(self, values: torch.Tensor, base: torch.Tensor) -> None:
        """Count the magnitudes of values − base, computed in float32; both (n,), bfloat16."""
        from fleet.algebra.kernels import count_differences

        value_bits, base_bits = (row.view(torch.uint16).numpy() for row in (values, base))
        count_differences(value_bits, base_bits, self.low, self.high, self.shift, self.counts.numpy())


class RankSearch:
    """The search for the magnitude of one rank, counted from the largest.

    Args:
        rank: from 1, the largest, to `size`.
        size: how many numbers there are.
        sample: some of them, spread over all: (m,) float32. Without it, the first window has all patterns, coarsely.
    """

    def __init__(self, rank: int, size: int, sample: torch.Tensor | None = None) -> None:
        self._rank = rank
        self.value = math.nan
        """The magnitude; NaN until it is found."""
        bounds = _around(rank / size, sample) if sample is not None and sample.numel() else (0, _PATTERNS)
        self.window = WindowCounts(*bounds)
        """Takes all numbers in the current pass."""

    def finish_pass(self) -> bool:
        """Whether `value` is known, now that all numbers are counted; if not, `window` is that of the next pass."""
        window = self.window
        above = int(window.counts[-1])
        if self._rank <= above:
            self.window = WindowCounts(window.high, _PATTERNS)
            return False
        from_top = window.counts[:-1].flip(0).cumsum(0)
        if self._rank > above + int(from_top[-1]):
            self.window = WindowCounts(0, window.low)
            return False
        index = window.counts.numel() - 2 - int(torch.searchsorted(from_top, self._rank - above))
        low = window.low + (index << window.shift)
        if window.shift:
            self.window = WindowCounts(low, min(low + (1 << window.shift), window.high))
            return False
        self.value = float(torch.tensor(low, dtype=torch.int32).view(torch.float32))
        return True


def _around(share: float, sample: torch.Tensor) -> tuple[int, int]:
    """Bit patterns [low, high) that hold that of the number which this share reaches, if the sample is a fair one."""
    patterns = sample.reshape(-1).view(torch.int32).numpy() & 0x7FFFFFFF
    count = patterns.size
    error = _DEVIATIONS * math.sqrt(max(share * (1.0 - share) / count, 1.0 / count**2))
    first, last = (count - 1 - int((share + side * error) * count) for side in (1.0, -1.0))
    ordered = np.partition(patterns, sorted({min(max(i, 0), count - 1) for i in (first, last)}))
    low = int(ordered[first]) if first >= 0 else 0
    high = int(ordered[last]) + 1 if last < count else _PATTERNS
    return low, high
