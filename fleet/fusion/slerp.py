"""SLERP: the vector at a share t of the angle between two task vectors.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, as mergekit applies it to whole tensors:
with Ω the angle between τ_1 and τ_2,

    fused = sin((1 − t)Ω)/sin Ω · τ_1 + sin(tΩ)/sin Ω · τ_2.

It is applied to task vectors, not to weights: between two fine-tunes' weights the angle is tiny, and SLERP would be
linear (`methods.md` §6). It is linear where |cos Ω| > 0.9995, as in mergekit, and where a task vector is zero and has
no angle.
Defaults: t = 0.5; t = 0 is the first model in the manifest's order, t = 1 the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from fleet.core.errors import ManifestError
from fleet.fusion.gram import GramFusion, lengths
from fleet.fusion.place import Place, Schedule, at

if TYPE_CHECKING:
    import torch

_STRAIGHT = 0.9995
"""|cos Ω| above which the interpolation is linear."""


class Slerp(GramFusion):
    """Parameters of SLERP."""

    method: Literal["slerp"]
    t: Schedule = 0.5
    """From 0, the first model, to 1, the second."""

    @model_validator(mode="after")
    def _has_no_weights(self) -> Slerp:
        if self.weights:
            raise ValueError("slerp has no weights; t says how much of each model it takes")
        return self

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """1 − t and t.

        Raises:
            ManifestError: there are not two models, or t is not from 0 to 1 here.
        """
        if len(models) != 2:
            raise ManifestError(
                f"slerp fuses two models, not {len(models)} ({', '.join(models)}); "
                "name two in the variant's models, or take multi_slerp"
            )
        t = at(self.t, place)
        if not 0.0 <= t <= 1.0:
            raise ManifestError(f"slerp: t is {t:g} for {place.tensor}; give one from 0 to 1")
        return {models[0]: 1.0 - t, models[1]: t}

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        import torch

        product = lengths(gram).prod()
        if product == 0.0 or (gram[0, 1] / product).abs() > _STRAIGHT:
            return shares
        angle = torch.arccos(gram[0, 1] / product)
        return torch.sin(shares * angle) / torch.sin(angle)
