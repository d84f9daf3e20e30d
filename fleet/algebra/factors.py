"""LoRA factors as a file holds them, and the operator that averages factors instead of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fleet.algebra.delta import LowRank


class Factors(NamedTuple):
    """ΔW = scale · b @ a with b (d_out, r) and a (r, d_in), float32."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float


def factor_average(factors_M: Sequence[Factors], weights_M: Sequence[float]) -> LowRank:
    """PEFT's `add_weighted_adapter(combination_type="linear")`, bit for bit: factors averaged with √-weights.

    A = Σ √(w_i s_i) A_i and B = Σ √(w_i s_i) B_i, so BA = Σ w_i s_i B_iA_i + Σ_{i≠j} √(w_i s_i w_j s_j) B_iA_j. The
    second sum is in no paper's equation (`methods.md` §2.3).

    Args:
        factors_M: of one shape and rank; the result has that rank.
        weights_M: w_i.

    Raises:
        ValueError: the ranks differ, or a weight is negative.
    """
    if len({f.a.shape[0] for f in factors_M}) > 1:
        raise ValueError(f"factors of different ranks: {[f.a.shape[0] for f in factors_M]}")
    if any(w < 0 for w in weights_M):
        raise ValueError(f"negative weights: {list(weights_M)}")
    roots = torch.tensor([math.sqrt(w * f.scale) for f, w in zip(factors_M, weights_M, strict=True)])
    a, b = (
        (torch.stack(tensors) * roots.view(-1, 1, 1)).sum(dim=0)
        for tensors in ([f.a for f in factors_M], [f.b for f in factors_M])
    )
    return LowRank(b, a)
