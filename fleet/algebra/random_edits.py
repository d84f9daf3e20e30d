"""Random stand-ins for an edit, and the generators they are drawn from."""

from __future__ import annotations

import hashlib

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import product


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator seeded by (seed, name): the same draws for a module at any number of workers or shards."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def gaussian_like(delta: Delta, generator: torch.Generator) -> Delta:
    """Noise of ΔW's own kind, float32: a product of standard normal factors of its rank (at least 1), or dense."""
    if isinstance(delta, Dense):
        return Dense(torch.randn(delta.shape, generator=generator))
    rank = max(delta.rank, 1)
    b = torch.randn(delta.shape[0], rank, generator=generator)
    return LowRank(b, torch.randn(rank, delta.shape[1], generator=generator))


def random_frame(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly random orthonormal frame (rows, columns), float32: QR of a Gaussian, signs fixed by R's diagonal."""
    q, r = linalg.qr(torch.randn(rows, columns, generator=generator))
    return q * torch.sign(torch.diagonal(r))


def turned(delta: Delta, generator: torch.Generator) -> Delta:
    """ΔW with its column space turned to a random one: Q ΔW, Q uniformly random orthogonal.

    Norm, singular values and input directions stay; only the directions in the output space change. For a LoRA, Q is
    never built: with B = Q_B R_B, Q B has the distribution of F R_B for a random frame F.
    """
    if isinstance(delta, LowRank):
        r = linalg.qr(delta.b).r
        return LowRank(product(random_frame(delta.b.shape[0], delta.rank, generator), r), delta.a)
    frame = random_frame(delta.shape[0], delta.shape[0], generator)
    return Dense(product(frame, delta.value))
