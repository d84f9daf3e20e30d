"""Loops over entries, compiled by numba for CPUs. torch passes over memory once per operator, each of these loops once.

A loop gives the same bits as an expression of torch's operators, most of them in `fleet.algebra.sparsify`; that one is
used on a GPU, and where gradients are wanted. Loading numba takes a second, so import this module only where a loop
runs. Compiled code is kept on disk, beside this file or in the user's cache.
"""

# pyright: reportUntypedFunctionDecorator=false, reportMissingTypeStubs=false, reportUnknownVariableType=false

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_TILE = 1024
_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(nogil=True, cache=True)
def count_window(bits: NDArray[np.int32], low: int, high: int, shift: int, counts: NDArray[np.int64]) -> None:
    """Add up how many magnitudes have a bit pattern in each bin of [low, high), and last how many lie above.

    Args:
        bits: (n,), the bit patterns of float32 numbers; the sign bit is ignored.
        shift: a bin is 2^shift patterns wide.
        counts: (bins + 1,), added to.
    """
    above = 0
    inside = np.empty(_TILE, np.int32)
    lowest, beyond = np.int32(low), np.int32(min(high - 1, _MAGNITUDE))
    for start in range(0, bits.size, _TILE):
        stop = min(start + _TILE, bits.size)
        reach_high, reach_low = np.int32(0), np.int32(0)
        for i in range(start, stop):  # without a branch, so that it vectorises
            pattern = bits[i] & _MAGNITUDE
            reach_high += np.int32(pattern > beyond)
            reach_low += np.int32(pattern >= lowest)
        above += reach_high
        if lowest == beyond:  # a window of one pattern: common with weights in bfloat16, which have few values
            counts[0] += reach_low - reach_high
        elif reach_low > reach_high:
            count = 0
            for i in range(start, stop):  # without a branch, too
                pattern = bits[i] & _MAGNITUDE
                inside[count] = pattern - lowest
                count += (pattern >= lowest) & (pattern <= beyond)
            for i in range(count):
                counts[inside[i] >> shift] += 1
    counts[counts.size - 1] += above


@njit(nogil=True, cache=True)
def count_differences(
    value: NDArray[np.uint16], base: NDArray[np.uint16], low: int, high: int, shift: int, counts: NDArray[np.int64]
) -> None:
    """`count_window` of value − base, float32; both (n,), bit patterns of bfloat16 numbers."""
    words = np.empty((3, _TILE), np.uint32)
    numbers, differences = words.view(np.float32), words[2].view(np.int32)
    for start in range(0, value.size, _TILE):
        stop = min(start + _TILE, value.size)
        _widen(base[start:stop], words[0])
        _widen(value[start:stop], words[1])
        _subtract(numbers[1], numbers[0], numbers[2])
        count_window(differences[: stop - start], low, high, shift, counts)


@njit(nogil=True, cache=True)
def _widen(row: NDArray[np.uint16], words: NDArray[np.uint32]) -> None:
    """bfloat16 (n,) to float32 (n or more,), both as bit patterns."""
    for j in range(row.size):
        words[j] = np.uint32(row[j]) << np.uint32(16)


@njit(nogil=True, cache=True)
def _narrow(words: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    """float32 (n or more,) to bfloat16 (n,), rounded to nearest even; both as bit patterns."""
    for j in range(out.size):
        word = words[j]
        out[j] = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _subtract(values: NDArray[np.float32], base: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    for j in range(out.size):
        out[j] = values[j] - base[j]


@njit(nogil=True, cache=True)
def _add_weighted(values: NDArray[np.float32], weight: np.float32, is_first: bool, total: NDArray[np.float32]) -> None:
    """total += w x; for the first term, total = w x. Both (n,)."""
    if is_first:
        for j in range(total.size):
            total[j] = values[j] * weight
    else:
        for j in range(total.size):
            total[j] += values[j] * weight


@njit(nogil=True, cache=True)
def linear(raw: NDArray[np.uint16], coefficients: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """out = b + Σ_t c_t (x_t − b) of numbers in bfloat16, computed in float32 and rounded once, to nearest even.

    Args:
        raw: (T + 1, n), bit patterns: b, then every x_t.
        coefficients: (T,).
        out: (n,), bit patterns.
    """
    words = np.empty((4, _TILE), np.uint32)
    numbers = words.view(np.float32)
    base, value, difference, total = numbers[0], numbers[1], numbers[2], numbers[3]
    for start in range(0, out.size, _TILE):
        stop = min(start + _TILE, out.size)
        _widen(raw[0, start:stop], words[0])
        for t in range(coefficients.size):
            _widen(raw[t + 1, start:stop], words[1])
            _subtract(value, base, difference)
            _add_weighted(difference, coefficients[t], t == 0, total)
        for j in range(_TILE):
            total[j] += base[j]
        _narrow(words[3], out[start:stop])


@njit(nogil=True, cache=True)
def keep_at_least(values: NDArray[np.float32], threshold: np.float32, out: NDArray[np.float32]) -> None:
    """out = values where |values| ≥ threshold, else 0; all (n,)."""
    for i in range(values.size):
        out[i] = values[i] if abs(values[i]) >= threshold else np.float32(0.0)


@njit(nogil=True, cache=True, inline="always")
def _noise_bits(counter: np.uint32, second: np.uint32, one: np.uint32, two: np.uint32) -> np.uint32:
    """23 bits of an entry's noise, by the hash of `fleet.algebra.noise`. It casts, because numba widens words' sums."""
    word = np.uint32((counter ^ (counter >> np.uint32(16))) * one)
    word = np.uint32((word ^ (word >> np.uint32(15))) + second)
    word = np.uint32(word * two)
    return np.uint32((word ^ (word >> np.uint32(15))) >> np.uint32(9))


@njit(nogil=True, cache=True)
def fill_uniform(base: int, second: int, factors: tuple[int, int], out: NDArray[np.float32]) -> None:
    """out = uniform noise in (0, 1) of consecutive entries, (n,).

    Args:
        base: counter of the first entry, 32 bits.
        second: the second word of the key.
        factors: `fleet.algebra.noise.FACTORS`.
    """
    one, two, first, offset = np.uint32(factors[0]), np.uint32(factors[1]), np.uint32(base), np.uint32(second)
    for i in range(out.size):
        bits = _noise_bits(np.uint32(first + np.uint32(i)), offset, one, two)
        out[i] = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-23)


@njit(nogil=True, cache=True)
def drop(
    values: NDArray[np.float32], base: int, second: int, limit: int, factors: tuple[int, int], out: NDArray[np.float32]
) -> None:
    """out = values where the entry's 23 bits of noise are at least `limit`, else 0; both (n,). See `fill_uniform`."""
    one, two, first, offset = np.uint32(factors[0]), np.uint32(factors[1]), np.uint32(base), np.uint32(second)
    reached = np.uint32(limit)
    for i in range(values.size):
        bits = _noise_bits(np.uint32(first + np.uint32(i)), offset, one, two)
        out[i] = values[i] if bits >= reached else np.float32(0.0)


@njit(nogil=True, cache=True)
def elect(values: NDArray[np.float32], weights: NDArray[np.float32], mean: bool, out: NDArray[np.float32]) -> None:
    """Sign election: out = the sum of the positive w_t x_t or of the negative ones, whichever is larger in magnitude.

    Args:
        values: (T, n).
        weights: (T,).
        mean: whether the sum is divided by Σ |w_t| over its terms.
        out: (n,).
    """
    zero, one = np.float32(0.0), np.float32(1.0)
    above, below = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    weight_above, weight_below = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for start in range(0, out.size, _TILE):
        count = min(_TILE, out.size - start)
        for j in range(count):
            above[j] = below[j] = weight_above[j] = weight_below[j] = zero
        for t in range(weights.size):
            weight, share = weights[t], abs(weights[t])
            row = values[t, start : start + count]
            for j in range(count):
                entry = weight * row[j]
                above[j] += max(entry, zero)
                below[j] += min(entry, zero)
                if mean:
                    weight_above[j] += share if entry > zero else zero
                    weight_below[j] += share if entry < zero else zero
        tile = out[start : start + count]
        for j in range(count):
            total = above[j] + below[j]
            elected = above[j] if total > zero else (below[j] if total < zero else zero)
            if mean:
                agreeing = weight_above[j] if total > zero else weight_below[j]
                elected /= agreeing if agreeing > zero else one
            tile[j] = elected


CUT = np.dtype(
    [("least", np.float32), ("counter", np.int64), ("second", np.int64), ("limit", np.int64), ("share", np.float32)]
)
"""How a task vector is made sparse: by `keep_at_least` with `least` where `limit` is negative; else by `drop`, after
which what stays is divided by `share`."""


@njit(nogil=True, cache=True)
def merge(
    raw: NDArray[np.uint16],
    cuts: NDArray[np.void],
    weights: NDArray[np.float32],
    elects: bool,
    mean: bool,
    scale: np.float32,
    factors: tuple[int, int],
    out: NDArray[np.uint16],
) -> None:
    """out = b + λ m(τ_1, …, τ_T) of numbers in bfloat16, where τ_t is what its cut leaves of x_t − b.

    Args:
        raw: (T + 1, n), bit patterns: b, then every x_t.
        cuts: (T,), of dtype `CUT`.
        weights: (T,).
        elects: m is `elect` if true, else Σ_t w_t τ_t.
        mean: as in `elect`.
        scale: λ.
        out: (n,), bit patterns; computed in float32 and rounded once, to nearest even.
    """
    words = np.empty((4, _TILE), np.uint32)
    numbers = words.view(np.float32)
    base, value, difference, total = numbers[0], numbers[1], numbers[2], numbers[3]
    values = np.empty((weights.size, _TILE), np.float32)
    for start in range(0, out.size, _TILE):
        stop = min(start + _TILE, out.size)
        _widen(raw[0, start:stop], words[0])
        for t in range(weights.size):
            _widen(raw[t + 1, start:stop], words[1])
            _subtract(value, base, difference)
            cut = cuts[t]
            if cut.limit < 0:
                keep_at_least(difference, cut.least, values[t])
            else:
                drop(difference, cut.counter + start, cut.second, cut.limit, factors, values[t])
                row, share = values[t], cut.share
                for j in range(_TILE):
                    row[j] /= share
            if not elects:
                _add_weighted(values[t], weights[t], t == 0, total)
        if elects:
            elect(values, weights, mean, total)
        for j in range(_TILE):
            total[j] = total[j] * scale + base[j]
        _narrow(words[3], out[start:stop])
