"""What a fusion method is: the task vectors of several models, in one tensor, become one.

A method makes up to three passes over a tensor's entries, and says which of them it needs:

    thresholds: for each of its `scores`, the values of given `ranks` among all entries
    sums:       its `terms`, added up over all entries, such as the inner products of the task vectors
    combine:    entry by entry, the fused task vector from the models', the thresholds and the sums

So a tensor need not be in memory: `fleet.fusion.streaming` makes the passes over runs of entries, `fuse` over a tensor
in memory. A method that needs whole matrices overrides `fuse`, and its `is_entrywise` is false.

Like the realign methods, fusion methods import no torch until they work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet.core.errors import ManifestError
from fleet.core.identity import Json
from fleet.fusion.place import Place, Schedule, at

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece
    from fleet.checkpoint.curvature import CurvatureKind


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of one tensor, for every model that has a task vector there."""

    values: Mapping[str, torch.Tensor]
    """Model -> its task vector, (n,) float32, in the manifest's order."""
    place: Place
    start: int
    """Index of the first entry in the flattened tensor."""
    columns: int
    """Length of the tensor's last axis; a run holds whole rows."""
    curvature: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    """Every model of the variant -> the Fisher of these entries, (n,) float32; empty if the method needs none."""
    models: Sequence[str] = ()
    """All models of the variant, in the manifest's order, including those that leave the tensor alone."""
    aligned: torch.Tensor | None = None
    """The aligned model's weights, (n,) float32; None where only task vectors are at hand."""


CompiledMerge: TypeAlias = "Callable[[torch.Tensor, int], None]"
"""Takes rows (M + 2, n) bfloat16, which are the aligned model, the M others and one for the result, and the first
entry's index in the flattened tensor; writes the fused weights to the last row."""

Coefficient: TypeAlias = "float | torch.Tensor"
"""A factor on a task vector: a number, or a scalar that is to be differentiated."""

Thresholds = Mapping[str, Sequence[float]]
"""Score -> the values of its ranks, in their order."""


class FusionMethod(BaseModel):
    """Parameters every fusion method has; a subclass per file, all listed in `fleet.fusion`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    revision: ClassVar[int] = 1
    """Raised when a method comes to fuse the same models into other bytes: what it made before is then made anew."""
    gradient_revision: ClassVar[int] = 1
    """Raised when only its gradient changes: masks that were learned through it are then learned anew."""

    weights: Mapping[str, Schedule] = Field(default_factory=dict)
    """Model name -> its relative weight, or a schedule of it; 1 for a model that isn't named."""
    output: Literal["auto", "adapter", "model"] = "auto"
    """`adapter` writes a LoRA, `model` full weights, `auto` a LoRA if every member is one and the method allows it."""
    max_rank: int | None = Field(default=None, ge=1)
    """LoRAs are fused into a LoRA of at most this rank, by SVD, whatever the method; the record says what was lost."""

    @model_validator(mode="after")
    def _only_an_adapter_has_a_rank(self) -> FusionMethod:
        if self.max_rank is not None and self.output == "model":
            raise ValueError("max_rank is the rank of a fused adapter; leave it out, or output")
        return self

    def weight(self, model: str, place: Place) -> float:
        return at(self.weights.get(model, 1.0), place)

    def identity(self) -> dict[str, Json]:
        """What decides the fused bytes. The first revision isn't told, so that keys from before there were any stay."""
        told: dict[str, Json] = {"revision": self.revision} if self.revision > 1 else {}
        return self.model_dump(mode="json") | told

    def learning_identity(self) -> dict[str, Json]:
        """What decides a mask that is learned through this fusion; not what it is written as."""
        told: dict[str, Json] = {"gradient": self.gradient_revision} if self.gradient_revision > 1 else {}
        return {name: value for name, value in self.identity().items() if name != "output"} | told

    # -- what a method is ----------------------------------------------------------------------------------------

    @property
    def is_linear(self) -> bool:
        """Whether a fused task vector is Σ_t λ_t τ_t with λ from `coefficients`, whatever the task vectors."""
        return True

    @property
    def divides_by_weights(self) -> bool:
        """Whether the sum of the models' weights is a divisor, so that it has to be over 0."""
        return True

    @property
    def keeps_lora(self) -> bool:
        """Whether task vectors that are LoRAs fuse into a LoRA."""
        return self.is_linear

    @property
    def is_entrywise(self) -> bool:
        """Whether the three passes are enough; False for a method that needs whole matrices and overrides `fuse`."""
        return True

    @property
    def is_global(self) -> bool:
        """Whether a model's thresholds are over all its tensors together, instead of over each."""
        return False

    @property
    def curvature(self) -> CurvatureKind | None:
        """The curvature that the method needs of each model; the manifest says where it is. None if it needs none."""
        return None

    @property
    def may_lack_curvature(self) -> bool:
        """Whether a tensor is fused even if a model's curvature doesn't cover it."""
        return False

    @property
    def without_curvature(self) -> str:
        """What the method offers where curvature is lacking: the end of the error message, empty by default."""
        return ""

    @property
    def reads_aligned(self) -> bool:
        """Whether the method reads the aligned model's weights, which `fuse` doesn't have, given task vectors alone."""
        return False

    # -- the passes ----------------------------------------------------------------------------------------------

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """Model -> λ_t, for all models of the variant, including those that leave the tensor alone."""
        return {m: self.weight(m, place) for m in models}

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        """Score -> the ranks, counted from the largest of `size` entries, of its thresholds; by default none."""
        return {}

    def scores(self, entries: Entries) -> Mapping[str, torch.Tensor]:
        """Score -> (n,) float32, whose magnitudes are ranked for thresholds; by default every model's τ_t."""
        return {name: value.detach() for name, value in entries.values.items()}

    @property
    def has_sums(self) -> bool:
        """Whether the method needs `terms` added up; by default if it has any."""
        return type(self).terms is not FusionMethod.terms

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor | None:
        """These entries' part of the sums, float64 of any shape; None if the method needs no sums.

        Differentiable in the task vectors, where `combine` is in the sums.
        """
        return None

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        """The fused task vector, (n,) float32; by default Σ_t λ_t τ_t. Differentiable in the task vectors and the sums.

        Which entries are selected, by a rank, a sign or a count, is locally constant: it is taken from detached values,
        and has no gradient of its own.

        Args:
            entries: with at least one model's task vector.
            weights: model -> λ_t, from `coefficients`.
            thresholds: the values of `ranks`.
            sums: `terms`, added up over the whole tensor.
        """
        return weighted_sum(entries.values, weights)

    def compiled(
        self, models: Sequence[str], weights: Mapping[str, float], place: Place, thresholds: Thresholds
    ) -> CompiledMerge | None:
        """A compiled loop over full models in bfloat16, with the bits of `combine`; None if the method has none."""
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
        """One tensor's fused task vector. Differentiable in the task vectors, if `piece` sums differentiably.

        Args:
            deltas: model -> its task vector, in the manifest's order, each (d_out, d_in) or a tensor's own shape. A
                model that leaves the tensor alone is not in it.
            weights: model -> λ_t, from `coefficients`.
            piece: which entries of the tensor these are.
            thresholds: those over whole models; None for the tensor's own.
            curvature: every model of the variant -> its Fisher, of the tensor's own shape, or its Gram matrix
                (…, d_in, d_in); empty or None where a tensor has no Gram matrices.
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


def pair(entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """The task vectors of two models, the aligned model being the first of a variant of one; zero where one has none.

    For the methods that put one model, θ_2, into another, θ_1.
    """
    import torch

    nothing = torch.zeros_like(next(iter(entries.values.values())))
    *first, second = (entries.values.get(name, nothing) for name in entries.models)
    return (first[0] if first else nothing), second


def refuse_more_than_two(method: str, models: Sequence[str]) -> None:
    """
    Raises:
        ManifestError: there are more than two models.
    """
    if len(models) > 2:
        raise ManifestError(
            f"{method} puts one model into another, not {len(models)} together ({', '.join(models)}); name one "
            "or two in the variant's models"
        )


def shares(weights: Mapping[str, float], place: Place) -> dict[str, float]:
    """Model -> its weight, divided by the sum of the weights.

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


def linear_combination(deltas: Mapping[str, Delta], weights: Mapping[str, Coefficient]) -> Delta:
    """Σ_t λ_t τ_t, for LoRAs by concatenation. Added up in the order given, so rounding never varies."""
    (first, *others) = deltas
    total = deltas[first].scaled(weights[first])
    for name in others:
        total = total.plus(deltas[name].scaled(weights[name]))
    return total


def weighted_sum(values: Mapping[str, torch.Tensor], weights: Mapping[str, Coefficient]) -> torch.Tensor:
    """Σ_t λ_t v_t, in the order given."""
    total: Any = None
    for name, value in values.items():
        term = value * weights[name]
        total = term if total is None else total.add_(term)
    return total
