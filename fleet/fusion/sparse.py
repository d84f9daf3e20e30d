"""The base of TIES, DARE, DELLA and breadcrumbs: every task vector is made sparse, then they are added up.

Either all entries are added up, or, after TIES' election of a sign for each entry, those with that sign. How much of a
task vector stays may be given once for all models, or by model; then a model that isn't named keeps everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar, cast

from pydantic import AfterValidator, Discriminator, Field, Tag

from fleet.core.errors import ManifestError
from fleet.fusion.base import CompiledMerge, Entries, FusionMethod, Thresholds
from fleet.fusion.place import Gradient, Place, Rule, Schedule, at

if TYPE_CHECKING:
    import torch

    from fleet.algebra.sparsify import Drop, Trim


def values_of(schedule: Schedule) -> list[float | Gradient]:
    """The numbers and gradients a schedule is made of."""
    if isinstance(schedule, int | float):
        return [schedule]
    rules = [part for part in schedule if isinstance(part, Rule)]
    return [rule.value for rule in rules] or [tuple(part for part in schedule if not isinstance(part, Rule))]


def numbers_of(values: Iterable[float | Gradient]) -> list[float]:
    return [n for value in values for n in (value if isinstance(value, tuple) else (value,))]


def _all_shares(schedule: Schedule) -> Schedule:
    if wrong := [n for n in numbers_of(values_of(schedule)) if not 0.0 < n <= 1.0]:
        raise ValueError(f"{wrong[0]:g} is no share of a task vector's entries: over 0, at most 1")
    return schedule


def _all_rates(schedule: Schedule) -> Schedule:
    if wrong := [n for n in numbers_of(values_of(schedule)) if not 0.0 <= n < 1.0]:
        raise ValueError(f"{wrong[0]:g} is no drop rate: 0 or more, under 1")
    return schedule


def _is_by_model(value: object) -> str:
    return "by_model" if isinstance(value, Mapping) else "for_all"


_T = TypeVar("_T")

Share = Annotated[Schedule, AfterValidator(_all_shares)]
"""A share of a task vector's entries, in (0, 1], or a schedule of it."""
DropRate = Annotated[Schedule, AfterValidator(_all_rates)]
"""A share of entries that are dropped, in [0, 1), or a schedule of it."""
PerModel: TypeAlias = Annotated[
    Annotated[_T, Tag("for_all")] | Annotated[Mapping[str, _T], Tag("by_model")], Discriminator(_is_by_model)
]
"""One for all models, or model name -> its own."""


def at_model(given: Schedule | Mapping[str, Schedule], model: str, place: Place, unnamed: float) -> float:
    """A model's value for one tensor; `unnamed` is that of a model a mapping doesn't name."""
    return at(given.get(model, unnamed) if isinstance(given, Mapping) else given, place)


class SparseFusion(FusionMethod):
    """Parameters of the methods that make task vectors sparse first."""

    consensus: Literal["sum", "mean", "none"] = "none"
    """`sum` and `mean` elect a sign for each entry, and take the sum of the entries that agree, or their mean weighted
    with the models' weights; `none` adds all entries up."""
    scale: float = Field(default=1.0, gt=0.0)
    """λ, the factor on the result."""

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def divides_by_weights(self) -> bool:
        return False  # a mean divides by the magnitudes of those that agree

    @property
    def keeps_norm(self) -> bool:
        """Whether what stays of a task vector in a tensor is scaled to the L1 norm that the task vector had there."""
        return False

    @property
    def has_sums(self) -> bool:
        return self.keeps_norm

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor | None:
        """If the L1 norm is kept, that of each task vector and of what stays of it: (T, 2) float64."""
        import torch

        if not self.keeps_norm:
            return None
        pairs = zip(entries.values.values(), self.sparse(entries, thresholds), strict=True)
        norms = [torch.stack([v.abs().sum(dtype=torch.float64) for v in before_after]) for before_after in pairs]
        return torch.stack(norms)

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """The models' weights.

        Raises:
            ManifestError: a parameter is given for a model that is not among them.
        """
        for name, given in self:
            named: Mapping[str, object] = cast("Mapping[str, object]", given) if isinstance(given, Mapping) else {}
            if unknown := sorted(set(named) - set(models)):
                raise ManifestError(
                    f"fuse.{name} names {', '.join(unknown)}, not among the variant's models: {', '.join(models)}"
                )
        return super().coefficients(models, place)

    def cuts(self, models: Sequence[str], place: Place, thresholds: Thresholds) -> Sequence[Trim | Drop] | None:
        """How each model's task vector is made sparse; None for a method that overrides `sparse` instead."""
        return None

    def compiled(
        self, models: Sequence[str], weights: Mapping[str, float], place: Place, thresholds: Thresholds
    ) -> CompiledMerge | None:
        from fleet.algebra.sparsify import merge_bfloat16

        cuts_M = self.cuts(models, place, thresholds)
        if cuts_M is None or self.keeps_norm:
            return None
        weights_M = [weights[name] for name in models]

        def merge(rows: torch.Tensor, start: int) -> None:
            merge_bfloat16(rows, cuts_M, weights_M, self.consensus, self.scale, start)

        return merge

    def sparse(self, entries: Entries, thresholds: Thresholds) -> list[torch.Tensor]:
        """The models' sparse task vectors, each (n,), in order. Differentiable in the entries that stay."""
        cuts = self.cuts([*entries.values], entries.place, thresholds) or ()
        return [cut.of(value, entries.start) for cut, value in zip(cuts, entries.values.values(), strict=True)]

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        from fleet.algebra.sparsify import elected, sum_of

        values_M = self.sparse(entries, thresholds)
        if sums is not None:
            values_M = [value * factor for value, factor in zip(values_M, _factors(sums), strict=True)]
        weights_M = [weights[name] for name in entries.values]
        if self.consensus == "none":
            fused = sum_of([v * w for v, w in zip(values_M, weights_M, strict=True)])
        else:
            fused = elected(values_M, weights_M, self.consensus)
        return fused if self.scale == 1.0 else fused * self.scale


def _factors(norms: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """By what each sparse task vector is multiplied to have the norm it had; 1 where nothing is left of it.

    Args:
        norms: before and after, (T, 2).
    """
    import torch

    before, after = norms.unbind(dim=1)
    return torch.where(after > 0.0, before / torch.where(after > 0.0, after, 1.0), 1.0).unbind()
