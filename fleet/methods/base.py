"""What a realign method is: pure decisions on survey statistics, and an exact edit of one module's task vector.

An edit is written in terms of a `Delta`'s own operators, so the same few lines serve LoRA factors and dense weights.
Planning imports these files without torch, which is imported only where an edit is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from fleet.core.identity import Json
from fleet.methods.mask_spec import MaskSpec

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.factors import Factors
    from fleet.algebra.spectral import Triplets

Need: TypeAlias = Literal["safety", "harmful", "displacement", "rho", "rho_null", "projection", "mask"]
"""What a method uses beside the task vector: the safety adapter, the harmful model, ‖V‖, lift and cosine, ρ and gain,
ρ's null, VVᵀΔW/‖V‖, a mask."""

PROJECTION_IS_DELETION = 0.05
"""Below this gain, Safe LoRA's operator C = VVᵀ/‖V‖ takes away nearly all of ΔW (`methods.md` §3.2)."""


STATISTIC_ROUNDING = 1e-5
"""By how much statistics of the same weights may differ between kinds of processors: a relative difference for ρ, its
null, lift and gain, an absolute one for cosine. They are float32 products, added up in float64; under five instruction
sets, for shapes up to 4096 × 1536, the largest difference measured was 4e-8. On one kind of processor they are the same
to the last bit."""

DIRECTIONS_ROUNDING = 1e-3
"""The same, relative, for energies along V's leading directions, and so for `kappa`: where singular values lie close
together, rounding turns their vectors. Measured: 2e-5, for a V of noise, which has no leading directions."""


class ModuleStatistics(BaseModel):
    """What the survey measured of one model's task vector ΔW in one module (`methods.md` §8.1's Gram forms).

    A statistic is None where it is undefined (ΔW or V vanishes, so there is no direction to compare), and not set where
    nobody asked for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    shape: tuple[int, int]
    """(d_out, d_in)."""
    rank: int | None
    """LoRA rank; None for a dense task vector."""
    delta_norm: float
    """‖ΔW‖, Frobenius."""
    safety_norm: float | None = None
    """‖V‖, Frobenius, of V = W_aligned − W_unaligned."""
    rho: float | None = None
    """cos(VVᵀΔW, ΔW) in [0, 1]."""
    rho_null: float | None = None
    """Mean of ρ over random B with this module's A."""
    rho_null_sd: float | None = None
    """Standard deviation of ρ over the same B; `fleet.algebra.statistics.rho_null` says how exact both are."""
    lift: float | None = None
    """d_out‖VᵀΔW‖² / (‖V‖²‖ΔW‖²); its null is exactly 1."""
    gain: float | None = None
    """‖CΔW‖ / ‖ΔW‖ with C = VVᵀ/‖V‖, Safe LoRA's operator."""
    cosine: float | None = None
    """⟨ΔW, V⟩ / (‖ΔW‖‖V‖)."""
    energies: tuple[float, ...] | None = None
    """e_i = ‖u_iᵀΔW‖² / ‖ΔW‖² of V's leading left singular vectors u_i."""

    def energy_lift(self, k: int) -> float | None:
        """κ_k over its null: (Σ_{i≤k} e_i) / (k / d_out); 1 where ΔW is indifferent to V's k leading directions.

        None if energies were not measured.
        """
        if not self.energies:
            return None
        head = self.energies[:k]
        return sum(head) * self.shape[0] / len(head)

    @property
    def is_defined(self) -> bool:
        """Whether ΔW has a direction, and V too as far as it was measured."""
        return self.delta_norm > 0.0 and (self.safety_norm is None or self.lift is not None)

    @property
    def rho_z(self) -> float | None:
        """(ρ − its null mean) / its null standard deviation; None where ρ is undefined or was not measured."""
        if self.rho is None or self.rho_null is None or not self.rho_null_sd:
            return None
        return (self.rho - self.rho_null) / self.rho_null_sd


class Decision(BaseModel):
    """Whether a method edits one module, and the reason a reviewer reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    edit: bool
    reason: str
    close: bool = False
    """Whether rounding decided, so that another kind of processor may decide the other way."""


class Ranks(NamedTuple):
    """LoRA ranks in one module: the model's own, and those of the adapters it may be merged with."""

    own: int
    safety: int
    harmful: int
    limit: int
    """min(d_out, d_in), the largest rank that a matrix of this shape can have."""


class Module(Protocol):
    """What an edit may use in one module. Everything is read or computed only when it is asked for."""

    @property
    def delta(self) -> Delta:
        """The model's ΔW relative to the aligned model, (d_out, d_in)."""
        ...

    @property
    def safety(self) -> Delta | None:
        """The safety adapter's ΔW relative to the aligned model; None where it leaves the module alone (ΔW = 0)."""
        ...

    @property
    def harmful(self) -> Delta | None:
        """ΔW of the aligned model made harmful; None where that leaves the module alone (ΔW = 0)."""
        ...

    @property
    def factors(self) -> tuple[Factors, Factors]:
        """The model's and the safety adapter's LoRA factors as their files hold them."""
        ...

    @property
    def projected(self) -> Delta:
        """CΔW with C = VVᵀ/‖V‖."""
        ...

    @property
    def target_norm(self) -> float:
        """For a control: ‖ΔW_after − ΔW_before‖ that its edit of this module has to have."""
        ...

    def masked(self) -> Delta:
        """ΔW under the learned mask, m ⊙ ΔW / mean(m)."""
        ...

    def displacement(self, k: int) -> Triplets:
        """V's k leading singular triplets."""
        ...

    def generator(self, seed: int) -> torch.Generator:
        """A generator for this module alone: it draws the same at any number of workers or shards."""
        ...


class RealignMethod(BaseModel):
    """Parameters of one realign method; a subclass per file, all listed in `fleet.methods`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_rank: int | None = Field(default=None, ge=1)
    """Edited LoRA modules of a larger rank are cut to this one by SVD; the record says what was lost."""

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be in the manifest or measured by the survey."""
        return frozenset()

    @property
    def reads_displacement(self) -> bool:
        """Whether it uses V, so that it needs the unaligned model."""
        return self.directions > 0 or bool(measured_needs(self.needs))

    @property
    def matched(self) -> RealignMethod | None:
        """For a control, the method whose edit norms it matches; else None."""
        return None

    @property
    def mask_spec(self) -> MaskSpec | None:
        """The learned mask that the method applies (for a control, the method it controls for); None without a mask."""
        return None

    def identity(self) -> dict[str, Json]:
        """The parameters that decide what is made: all but the addresses of inputs."""
        return self.model_dump(mode="json")

    @property
    def adapters_only(self) -> bool:
        """Whether it works on LoRA factors, so that a full fine-tune cannot be realigned with it."""
        return False

    @property
    def pairs_factors(self) -> bool:
        """Whether it pairs the model's factors with the safety adapter's entry by entry, so that ranks must agree."""
        return False

    @property
    def uses_fusion(self) -> bool:
        """Whether the edit of one model depends on its variant's fusion, and on the other models there."""
        return False

    @property
    def edits_untouched(self) -> bool:
        """Whether modules that the model leaves alone are edited too, because something is added to them."""
        return False

    @property
    def directions(self) -> int:
        """How many of V's leading directions it uses."""
        return 0

    @property
    def energies(self) -> int:
        """Along how many of them it has to know the task vector's energy before it decides."""
        return 0

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        """One decision for each of a model's modules. Pure; reads no weights."""
        raise NotImplementedError

    def choose(
        self, modules: Sequence[ModuleStatistics], matched_norms: Mapping[str, float]
    ) -> tuple[list[Decision], dict[str, float]]:
        """The decisions; and for a control, module -> the norm of the edit it gets.

        Args:
            matched_norms: for a control: module -> ‖ΔW_after − ΔW_before‖ under `matched`, for the modules it edited.
        """
        return self.decide(modules), {}

    def close_modules(self, modules: Sequence[ModuleStatistics]) -> list[str]:
        """The modules where rounding decided whether, or how, they are edited."""
        return [decision.module for decision in self.decide(modules) if decision.close]

    def warning(self, modules: Sequence[ModuleStatistics], edited: Set[str]) -> str | None:
        """What a user should know about these edits before trusting the method's name; None if nothing."""
        close = self.close_modules(modules)
        if not close:
            return None
        return (
            f"{len(close)} of {len(modules)} modules lie within rounding of what decides: on another kind of processor "
            f"they may be decided otherwise: {', '.join(close)}"
        )

    def edit(self, module: Module) -> Delta:
        """The realigned task vector of a module that `decide` chose."""
        raise NotImplementedError

    def edit_rest(self, module: Module) -> Delta:
        """The realigned task vector of a tensor that is no module (norms, biases, embeddings); by default as it is."""
        return module.delta

    def rank(self, ranks: Ranks) -> int:
        """The rank of an edited LoRA module before `max_rank` limits it; 0 removes the module."""
        return ranks.own

    def written_rank(self, ranks: Ranks) -> int:
        """The rank that an edited LoRA module is written with."""
        rank = self.rank(ranks)
        return rank if self.max_rank is None else min(rank, self.max_rank)


class Gated(RealignMethod):
    """A method that edits the modules where a statistic of ΔW and V is below a threshold."""

    statistic: Literal["lift", "rho", "rho_z", "kappa", "cosine"] = "rho"
    """The statistic that decides: the papers' `rho`; `rho_z`, ρ in standard deviations from its null; `lift` (null 1 at
    any shape); `kappa`, the share of ‖ΔW‖² in V's `gate_directions` leading directions over its null, so 1 is
    indifferent; or `cosine`, below 0 where ΔW undoes what alignment did."""
    threshold: float | None = None
    """τ: modules below it are edited. By default the paper's value for `rho`, and the null of any other statistic."""
    gate_directions: int = Field(default=8, ge=1)
    """k of `kappa`: how many of V's leading directions count."""

    paper_threshold: ClassVar[float]
    """The published default for ρ."""

    @property
    def needs(self) -> frozenset[Need]:
        asked: dict[str, Need] = {"rho": "rho", "rho_z": "rho_null"}
        return frozenset({asked.get(self.statistic, "displacement")})

    @property
    def directions(self) -> int:
        return self.energies

    @property
    def energies(self) -> int:
        return self.gate_directions if self.statistic == "kappa" else 0

    @property
    def tau(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return {"lift": 1.0, "kappa": 1.0, "rho_z": 0.0, "cosine": 0.0, "rho": self.paper_threshold}[self.statistic]

    def value(self, module: ModuleStatistics) -> float | None:
        """The statistic that is compared with τ; None where it is undefined."""
        return (
            module.energy_lift(self.gate_directions) if self.statistic == "kappa" else getattr(module, self.statistic)
        )

    def rounding(self, module: ModuleStatistics) -> float:
        """By how much the statistic may differ between kinds of processors; 0 where it is undefined."""
        value = self.value(module) or 0.0
        if self.statistic == "kappa":
            return DIRECTIONS_ROUNDING * abs(value)
        if self.statistic == "cosine":
            return STATISTIC_ROUNDING
        if self.statistic == "rho_z":
            spread = (module.rho or 0.0) + (module.rho_null or 0.0)
            return STATISTIC_ROUNDING * (spread / (module.rho_null_sd or 1.0) + abs(value))
        return STATISTIC_ROUNDING * abs(value)

    def is_close(self, module: ModuleStatistics) -> bool:
        """Whether the statistic lies within its rounding of τ."""
        value = self.value(module)
        return value is not None and abs(value - self.tau) <= self.rounding(module)

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        return [self._below(m) for m in modules]

    def _below(self, module: ModuleStatistics) -> Decision:
        value = self.value(module)
        if value is None:
            return self._kept(module)
        edit = value < self.tau
        reason = f"{self.statistic} {value:.4f} {'<' if edit else '≥'} {self.tau:g}"
        return decision(module.module, edit, reason, self.is_close(module))

    def _kept(self, module: ModuleStatistics) -> Decision:
        return Decision(module=module.module, edit=False, reason=f"{self.statistic} undefined: kept")


def measured_needs(needs: Set[Need]) -> frozenset[Need]:
    """Which of these the survey measures, with what they rest on: each of them takes V, and ρ's null takes ρ."""
    rests_on: dict[Need, tuple[Need, ...]] = {
        "displacement": ("displacement",),
        "rho": ("displacement", "rho"),
        "rho_null": ("displacement", "rho", "rho_null"),
        "projection": ("displacement", "projection"),
    }
    return frozenset(found for need in needs for found in rests_on.get(need, ()))


def decision(module: str, edit: bool, reason: str, close: bool) -> Decision:
    """A decision whose reason also says if rounding made it."""
    return Decision(module=module, edit=edit, reason=reason + "; within rounding of the cut" * close, close=close)


def lowest(values: Mapping[str, float], count: int) -> frozenset[str]:
    """The `count` names with the lowest values; ties go by name, so there are never more."""
    return frozenset(sorted(values, key=lambda name: (values[name], name))[:count])


def around_cut(values: Mapping[str, float], roundings: Mapping[str, float], count: int) -> frozenset[str]:
    """The names that rounding may move into or out of the `count` lowest; none if all names are among these.

    Args:
        roundings: name -> by how much its value may differ between kinds of processors.
    """
    ordered = sorted(values, key=lambda name: (values[name], name))
    inside, outside = ordered[:count], ordered[count:]
    if not inside or not outside:
        return frozenset()
    last, first = inside[-1], outside[0]
    leaving = {n for n in inside if values[first] - values[n] <= roundings[n] + roundings[first]}
    joining = {n for n in outside if values[n] - values[last] <= roundings[n] + roundings[last]}
    return frozenset(leaving | joining)
