"""Elementwise operators on task vectors. They see ΔW's entries, so a LoRA becomes dense here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fleet.algebra.delta import Delta, Dense


def dropped(delta: Delta, drop_rate: float, generator: torch.Generator) -> Dense:
    """DARE: every entry of ΔW is zeroed with probability p, and the rest divided by 1 − p, so the mean stays.

    Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, eq. 1 and 2. The mask is on the product: on
    LoRA factors, a rank-one term would survive with probability (1 − p)².

    Args:
        drop_rate: p in [0, 1).
    """
    value = delta.dense()
    keep = torch.rand(value.shape, generator=generator) >= drop_rate
    return Dense(value * keep / (1.0 - drop_rate))


def trimmed(delta: Delta, density: float) -> Dense:
    """TIES' trim: the largest entries of ΔW by magnitude stay, at least one; ties at the threshold all stay.

    Args:
        density: the share that stays, in (0, 1].
    """
    value = delta.dense()
    count = max(round(density * value.numel()), 1)
    threshold = value.abs().flatten().kthvalue(value.numel() - count + 1).values
    return Dense(torch.where(value.abs() >= threshold, value, torch.zeros_like(value)))


def ties(deltas_M: Sequence[Delta], weights_M: Sequence[float], density: float) -> Dense:
    """TIES: trim, elect a sign per entry by the weighted sum, average the entries that agree with it.

    Source: Yadav et al., "TIES-merging", arXiv 2306.01708, alg. 1, with the mean over agreeing entries weighted:
    Σ w_t x_t / Σ w_t. An entry where the sum is zero has no sign, and becomes zero.
    """
    values_M = [trimmed(d, density).value for d in deltas_M]
    sign = torch.sign(sum((w * v for w, v in zip(weights_M, values_M, strict=True)), torch.zeros_like(values_M[0])))
    total, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, value in zip(weights_M, values_M, strict=True):
        agrees = torch.sign(value) == sign
        total += torch.where(agrees, w * value, torch.zeros_like(value))
        weight += torch.where(agrees, torch.full_like(value, w), torch.zeros_like(value))
    return Dense(torch.where(weight > 0, total / weight.clamp_min(torch.finfo(weight.dtype).tiny), total))
