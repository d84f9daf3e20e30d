"""Uniform noise that a worker can draw from any entry on: entry i of a tensor's noise is a hash of (key, i).

A generator's state would tie the draws to an order. Here a worker that holds rows 400 to 600 of a tensor draws the same
noise for them as one that holds all rows, on any device, so nothing random depends on how a tensor is split.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch

MAX_ENTRIES = 1 << 32
"""Most entries of a tensor: the counter has 32 bits."""

_BITS = 23
"""Bits of noise in an entry, one less than float32's precision: a half is added, and with more bits the largest value
would round to 1."""

FACTORS = (0x21F0AAAD, 0xD35A2D97)
"""The hash's two multipliers."""


class NoiseKey(NamedTuple):
    """Names a stream of noise: two 32-bit words, signed."""

    first: int
    second: int


def noise_key(*parts: int | str) -> NoiseKey:
    """The key of the stream that these parts name, such as (seed, step, tensor)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return NoiseKey(_word(digest[:4]), _word(digest[4:8]))


def uniform(key: NoiseKey, start: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """Entries [start, start + count) of a stream: (count,), float32 in (0, 1), never 0 or 1.

    Two rounds of multiply and shift on 32-bit integers, with constants whose avalanche is nearly ideal (Wellons' search
    for integer hash functions, "lowbias32"); the key's second word is added between them. Every device gives the same
    bits.

    Raises:
        ValueError: `start` is negative, or an entry is past `MAX_ENTRIES`.
    """
    if start < 0 or start + count > MAX_ENTRIES:
        raise ValueError(f"noise has entries 0 to {MAX_ENTRIES - 1}, not {start} to {start + count - 1}")
    base, second = counters(key, start)
    if device is None or device.type == "cpu":
        from fleet.algebra.kernels import fill_uniform

        out = torch.empty(count)
        fill_uniform(base, second, FACTORS, out.numpy())
        return out
    return _hashed(base, second, count, device)


def _hashed(base: int, second: int, count: int, device: torch.device) -> torch.Tensor:
    """The same as `fill_uniform`, in torch's operators, for a GPU."""
    dtype = torch.int32 if base + count <= 1 << 31 else torch.int64
    bits = torch.arange(base, base + count, device=device, dtype=dtype).to(torch.int32)
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_signed(FACTORS[0]))
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).add_(_signed(second))
    bits.mul_(_signed(FACTORS[1]))
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
    bits.bitwise_right_shift_(32 - _BITS).bitwise_and_((1 << _BITS) - 1)
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-_BITS)


def counters(key: NoiseKey, start: int) -> tuple[int, int]:
    """The hash's inputs as unsigned words: the counter of entry `start`, and the key's second word."""
    return (start + key.first) % MAX_ENTRIES, key.second % MAX_ENTRIES


def limit_of(share: float) -> int:
    """The least value of the 23 bits of noise whose draw is at least `share`."""
    return math.ceil(share * (1 << _BITS) - 0.5)


def least_of(share: float) -> float:
    """The smallest draw that is at least `share`: a float32, which `share` need not be. A draw may lie between the
    two."""
    return (limit_of(share) + 0.5) * 2.0**-_BITS


def _word(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
