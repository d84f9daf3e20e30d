"""What a fusion method is: the task vectors of several models, in one tensor, become one.

A method looks at a tensor in up to three passes over its entries, and says which of them it needs:

    thresholds: of each of its `scores`, the values of given `ranks` among all entries
    sums:       of its `terms`, over all entries, such as the inner products of the task vectors
    combine:    entry by entry, the fused task vector from the models', the thresholds and the sums

So a tensor need not be in memory: `fleet.fusion.streaming` makes the passes over runs of entries, `fuse` over a tensor
that is there. A method that needs whole matrices overrides `fuse`, and says so.

Like the realign methods, fusion methods import no torch until they work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet.core.errors import ManifestError
from fleet.fusion.place import Place, Schedule, at

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece
    from fleet.checkpoint.curvature import CurvatureKind


@dataclass(frozen=True)
class Entries:
    """A run of entries of one tensor, of every model that has a task vector there."""

    values: Mapping[str, torch.Tensor]
    """Model -> its task vector, (n,) float32, in the manifest's order."""
    place: Place
    start: int
    """Index of the first entry in the whole tensor, all counted in order."""
    columns: int
    """Length of the tensor's last axis; a run holds whole rows."""
    curvature: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    """Every model of the variant -> the Fisher of these entries, (n,) float32; empty where none is asked for."""
    models: Sequence[str] = ()
    """All models of the variant, in the manifest's order, those too that leave the tensor alone."""
    aligned: torch.Tensor | None = None
    """The aligned model's weights, (n,) float32; none where task vectors alone are at hand."""


CompiledMerge: TypeAlias = "Callable[[torch.Tensor, int], None]"
"""Given (M + 2, n) bfloat16, the aligned model, the others and a row for the result, and the first entry's index in the
tensor: writes the fused weights to the last row."""

Thresholds = Mapping[str, Sequence[float]]
"""Score -> the values of its ranks, in their order; inf for rank 0."""


class FusionMethod(BaseModel):
    """Parameters every fusion method has; a subclass per file, all listed in `fleet.fusion`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Mapping[str, Schedule] = Field(default_factory=dict)
    """Model name -> its relative weight, or a schedule of it; 1 for a model that isn't named."""
    output: Literal["auto", "adapter", "model"] = "auto"
    """`adapter` keeps a LoRA fleet a LoRA, `model` writes full weights, `auto` keeps LoRA where every member is one."""
    max_rank: int | None = Field(default=None, ge=1)
    """LoRAs are fused into a LoRA of at most this rank, by SVD, whatever the method; the record has what is lost."""

    @model_validator(mode="after")
    def _only_an_adapter_has_a_rank(self) -> FusionMethod:
        if self.max_rank is not None and self.output == "model":
            raise ValueError("max_rank is the rank of a fused adapter; leave it out, or output")
        return self

    def weight(self, model: str, place: Place) -> float:
        return at(self.weights.get(model, 1.0), place)

    # -- what a method is ----------------------------------------------------------------------------------------

    @property
    def is_linear(self) -> bool:
        """Whether a fused task vector is Σ_t λ_t τ_t with λ from `coefficients`, whatever the values."""
        return True

    @property
    def keeps_lora(self) -> bool:
        """Whether task vectors that are LoRAs fuse into one."""
        return self.is_linear

    @property
    def is_entrywise(self) -> bool:
        """Whether the passes say it all; a method that needs whole matrices overrides `fuse`."""
        return True

    @property
    def is_global(self) -> bool:
        """Whether a model's thresholds are of all its tensors together, not of each."""
        return False

    @property
    def curvature(self) -> CurvatureKind | None:
        """What it has to know of each model beside the weights; the manifest says where that is."""
        return None

    @property
    def may_lack_curvature(self) -> bool:
        """Whether a tensor is fused all the same where a model's curvature has nothing of it."""
        return False

    @property
    def without_curvature(self) -> str:
        """The method's own way out where curvature is lacking, as the end of a message."""
        return ""

    @property
    def reads_aligned(self) -> bool:
        """Whether it looks at the aligned model's weights: then `fuse`, which has task vectors alone, can't do it."""
        return False

    # -- the passes ----------------------------------------------------------------------------------------------

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """λ_t of every model of the variant, by name; over all of them, even those that leave a tensor alone."""
        return {m: self.weight(m, place) for m in models}

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        """Score -> the ranks from above, of a tensor of `size` entries, whose values are wanted; none by default."""
        return {}

    def scores(self, entries: Entries) -> Mapping[str, torch.Tensor]:
        """What thresholds are found of: score -> (n,) float32, whose magnitudes count; here every model's τ_t."""
        return {name: value.detach() for name, value in entries.values.items()}

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor | None:
        """What is added up over all entries, float64 of any shape; None where nothing is."""
        return None

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        """The fused task vector, (n,) float32; here the linear one, Σ_t λ_t τ_t. Differentiable in the task vectors.

        Args:
            entries: at least one model's.
            weights: model -> λ_t, from `coefficients`.
            thresholds: what was asked for by `ranks`.
            sums: what `terms` came to, for the whole tensor.
        """
        return weighted_sum(entries.values, weights)

    def compiled(
        self, models: Sequence[str], weights: Mapping[str, float], place: Place, thresholds: Thresholds
    ) -> CompiledMerge | None:
        """A loop over full models in bfloat16 that gives the bits of `combine`; None of a method that has none."""
        return None

    # -- a tensor that is in memory ------------------------------------------------------------------------------

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        """One tensor's fused task vector. Differentiable in the task vectors.

        Args:
            deltas: model -> its task vector, in the manifest's order, each (d_out, d_in) or a tensor's own shape. A
                model that leaves the tensor alone is not in it.
            weights: model -> λ_t, from `coefficients`.
            piece: which entries of the tensor these are.
            thresholds: those of whole models; the tensor's own without them.
            curvature: every model of the variant -> what the method asks for: a Fisher of the tensor's own shape, or a
                Gram matrix (…, d_in, d_in); none where a tensor has no Gram matrices.
        """
        import torch

        from fleet.algebra.delta import Dense, LowRank
        from fleet.algebra.sparsify import thresholds_of

        if self.is_linear and any(isinstance(delta, LowRank) for delta in deltas.values()):
            return linear_combination(deltas, weights)
        shape = next(iter(deltas.values())).shape
        values = {name: delta.dense().reshape(-1) for name, delta in deltas.items()}
        first = next(iter(values.values()))
        known = {name: value.reshape(-1) for name, value in (curvature or {}).items()}
        entries = Entries(values, place, piece.start, shape[-1] if shape else 1, known, [*weights])
        if thresholds is None:
            size = int(piece.total(torch.tensor(first.numel(), device=first.device)))
            ranks = self.ranks([*deltas], place, size)
            thresholds = thresholds_of(self.scores(entries), ranks, piece) if ranks else {}
        terms = self.terms(entries, thresholds)
        sums = None if terms is None else piece.total(terms)
        return Dense(self.combine(entries, weights, thresholds, sums).reshape(shape))


def shares(weights: Mapping[str, float], place: Place) -> dict[str, float]:
    """Weights over their sum.

    Raises:
        ManifestError: one is negative, or all are zero.
    """
    total = sum(weights.values())
    if total <= 0.0 or min(weights.values()) < 0.0:
        raise ManifestError(
            f"fuse: the weights for {place.tensor} are {', '.join(f'{w:g}' for w in weights.values())}; "
            "give none that is negative, and at least one over 0"
        )
    return {model: weight / total for model, weight in weights.items()}


def linear_combination(deltas: Mapping[str, Delta], weights: Mapping[str, float]) -> Delta:
    """Σ_t λ_t τ_t, of LoRAs by concatenation; in the order given, so rounding never varies."""
    (first, *others) = deltas
    total = deltas[first].scaled(weights[first])
    for name in others:
        total = total.plus(deltas[name].scaled(weights[name]))
    return total


def weighted_sum(values: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Σ_t λ_t v_t, in the order given."""
    total: Any = None
    for name, value in values.items():
        term = value * weights[name]
        total = term if total is None else total.add_(term)
    return total
