"""The Concrete distribution of a mask: how it is drawn, hardened and rescaled.

Source: Yi et al., SOMF, arXiv 2405.09055, on Tang et al., Concrete subspace learning. With logits x and u ~ U(0, 1),

    m = σ((x + log u − log(1 − u)) / λ),        δ' = (m ⊙ δ) / mean(m),

where 1 keeps an entry of the task vector and 0 reverts it to the aligned model. The division makes up for the mask's
mean, so a mask says where the task vector is kept, not how much of it: if all logits are equal, whatever their value,
the expected mask leaves the fine-tuned model as it was.

The mean is never taken below 1 / (number of entries), the mean of a mask that keeps one entry. So a mask that keeps
nothing gives zero and not 0/0, and a soft mask whose values add up to less than 1 gives less than a full entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch

from fleet.algebra.noise import NoiseKey, uniform

Hardening: TypeAlias = Literal["threshold", "expected", "sample"]

CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24
"""Entries worked on at once: on a CPU few enough that their temporaries stay in a core's cache."""


def relaxed(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """m in (0, 1): a draw of the Concrete distribution for uniform noise of the logits' shape."""
    return torch.sigmoid((logits + torch.logit(noise)) / temperature)


def hardened(logits: torch.Tensor, rule: Hardening, key: NoiseKey) -> torch.Tensor:
    """The values a learned mask is applied with, before they are rescaled: float32, of the logits' shape.

    `threshold` keeps where σ(x) ≥ ½, `expected` takes σ(x) itself, `sample` draws one Bernoulli(σ(x)) per logit, which
    the published code calls binary.

    Args:
        key: of the noise that `sample` draws with; the others ignore it.
    """
    if rule == "expected":
        return torch.sigmoid(logits)
    if rule == "threshold":
        return (logits >= 0.0).to(torch.float32)
    noise = uniform(key, 0, logits.numel(), logits.device).reshape(logits.shape)
    return (noise < torch.sigmoid(logits)).to(torch.float32)


def floored(mean: torch.Tensor, count: int) -> torch.Tensor:
    """A mean of `count` mask values, never below 1/count."""
    return mean.clamp_min(1.0 / count)


def multipliers(values: torch.Tensor) -> torch.Tensor:
    """m / mean(m): what a task vector is multiplied with; all zero for a mask that keeps nothing."""
    return values / floored(values.mean(), values.numel())


def draw_(
    out: torch.Tensor, logits: torch.Tensor, start: int, key: NoiseKey | None, temperature: float
) -> torch.Tensor:
    """Fill `out` with mask values, chunk by chunk: a draw of the mask, or σ(x) without a key.

    Args:
        out: (n,), float32.
        logits: (n,), float32: entries [start, start + n) of a tensor's logits, flattened.
        key: of the tensor's noise, which is the same however the tensor is cut.
        temperature: λ.

    Returns:
        The values' sum, a float64 scalar.
    """
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for chunk in _chunks(out):
        x, m = logits[chunk], out[chunk]
        if key is None:
            torch.sigmoid(x, out=m)
        else:
            noise = uniform(key, start + chunk.start, m.numel(), x.device)
            torch.sigmoid(noise.logit_().add_(x).mul_(1.0 / temperature), out=m)
        total += m.sum(dtype=torch.float64)
    return total


def masked_weight_(
    out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, values: torch.Tensor, scale: float
) -> None:
    """out = base + scale · values ⊙ delta, summed in float32 and rounded once, to the dtype of `out`; all (n,)."""
    for chunk in _chunks(out):
        product = values[chunk] * delta[chunk]
        out[chunk] = product.mul_(scale).add_(base[chunk])


def weighted_sum(gradient: torch.Tensor, delta: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ_j G_j δ_j m_j, a float64 scalar; all (n,)."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in _chunks(values):
        total += (values[chunk] * delta[chunk]).mul_(gradient[chunk]).sum(dtype=torch.float64)
    return total


def logit_gradient_(
    values: torch.Tensor, gradient: torch.Tensor, delta: torch.Tensor, centre: float, scale: float
) -> None:
    """Turn mask values into ∂L/∂x in place, given G = ∂L/∂θ; all (n,).

    With s = 1/mean(m) and θ = W + s m ⊙ δ: ∂L/∂x_j = (s/λ) m_j (1 − m_j) (G_j δ_j − c). The term c = Σ G δ m / Σ m is
    the rescaling's own derivative: 0 where the mean is at its floor, because s is constant there.

    Args:
        centre: c.
        scale: s/λ.
    """
    for chunk in _chunks(values):
        m = values[chunk]
        slope = (1.0 - m).mul_(m).mul_(scale)
        m.copy_(gradient[chunk]).mul_(delta[chunk]).sub_(centre).mul_(slope)


def _chunks(flat: torch.Tensor) -> Iterator[slice]:
    size = CPU_CHUNK if flat.device.type == "cpu" else GPU_CHUNK
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))
