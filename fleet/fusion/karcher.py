"""Karcher mean: the mean direction of the task vectors on the sphere, with the mean of their lengths.

Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977; the iteration on the sphere is Buss and
Fillmore, "Spherical averages", 2001, alg. A1. With u_t = τ_t/‖τ_t‖ and m the normalised Σ w_t u_t to begin with,

    v = Σ_t w_t log_m(u_t),   log_m(u) = θ/sin θ · (u − cos θ · m),  cos θ = ⟨u, m⟩
    m ← cos‖v‖ · m + sin‖v‖ · v/‖v‖,

until ‖v‖ is at most `tol`; fused = Σ_t w_t ‖τ_t‖ · m. The weights add up to 1. A task vector that is zero has no
direction, and counts only in the mean of lengths. If the directions cancel, Σ w_t u_t = 0, their mean is not unique,
and the fused task vector is Σ w_t τ_t. Defaults are mergekit's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.gram import GramFusion, cosines, lengths

if TYPE_CHECKING:
    import torch

_CANCELLED = 1e-6
"""Up to this length, Σ w_t u_t is rounding, not a direction."""

_FLAT = 1e-6
"""Up to this sine, θ/sin θ is 1 within float64, or the vectors are opposite and log_m is undefined; 1 is taken."""


class Karcher(GramFusion):
    """Parameters of the Karcher mean."""

    method: Literal["karcher"]
    max_iter: int = Field(default=10, ge=1)
    """The most steps."""
    tol: float = Field(default=1e-5, gt=0.0)
    """The iteration ends at a step of at most this length, in radians."""

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return spherical_mean(gram, shares, self.max_iter, self.tol)


def spherical_mean(gram: torch.Tensor, shares: torch.Tensor, max_steps: int, tolerance: float) -> torch.Tensor:
    """The coefficients of the mean direction with the mean length: (T,) float64.

    Vectors are given by their coefficients over the directions u_t; their lengths follow from the u_t's cosines.

    Args:
        gram: ⟨τ_s, τ_t⟩, (T, T) float64.
        shares: w_t, not negative, not all zero: (T,) float64. The length is Σ w_t ‖τ_t‖.
    """
    import torch

    from fleet.algebra.products import dot, product

    norms = lengths(gram)
    used = (norms > 0.0) & (shares > 0.0)
    if not used.any():
        return shares
    between = cosines(gram, used)[used][:, used]
    parts = shares[used] / shares[used].sum()

    def length(vector: torch.Tensor) -> torch.Tensor:
        return dot(product(between, vector), vector).clamp(min=0.0).sqrt()

    if length(parts) <= _CANCELLED:
        return shares
    mean = parts / length(parts)
    for _ in range(max_steps):
        dots = product(between, mean).clamp(-1.0, 1.0)
        # Where an angle is flat its pull is 1, a constant, and a derivative of arccos there wouldn't be finite.
        bent = torch.sin(torch.arccos(dots)) > _FLAT
        angles = torch.arccos(torch.where(bent, dots, 0.0))
        pulls = parts * torch.where(bent, angles / torch.sin(angles), 1.0)
        tangent = pulls - dot(pulls, dots) * mean
        step = length(tangent)
        if step <= tolerance:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * tangent
        mean = mean / length(mean)
    coefficients = torch.zeros_like(shares)
    coefficients[used] = dot(shares, norms) * mean / norms[used]
    return coefficients
