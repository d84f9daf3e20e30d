"""Matched controls: what a method's edit has to beat to be more than an edit of its size.

A control edits as much as another method, `of`, by ‖ΔW_after − ΔW_before‖, but replaces that method's choice of modules
or directions by chance, or its whole edit by plain scaling. The literature asks for them (`methods.md` §5): random
noise alone restores some safety, and so does making every task vector smaller. Over the modules of one model, a
control's edit has exactly the norm of the method's.

- `uniform_scaling`: every module scaled by one factor; the whole edit has the method's norm.
- `random_modules`: as many modules as the method edited, drawn at random; each is edited as the method would edit it,
  and takes over the edit norm of one it edited, which may be large for its own ΔW.
- `random_subspace`: the method's own edit of each module, its column space turned to a random one: same norm, same
  spectrum, same input directions.
- `noise`: in each module the method edited, a Gaussian of the model's own rank with the method's edit norm.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from fleet.core.identity import Json
from fleet.methods.base import Decision, Module, ModuleStatistics, Need, Ranks, RealignMethod, decision
from fleet.methods.csulora import CsuLora
from fleet.methods.lox import Lox
from fleet.methods.mask_spec import MaskSpec
from fleet.methods.resta import Resta
from fleet.methods.revert import Revert
from fleet.methods.safe_lora import SafeLora
from fleet.methods.safemerge import SafeMerge
from fleet.methods.somf import Somf
from fleet.methods.splora import SpLora
from fleet.methods.wise_ft import WiseFt

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta

Edit: TypeAlias = Annotated[
    SafeMerge | SafeLora | Resta | WiseFt | Lox | CsuLora | SpLora | Somf | Revert, Field(discriminator="method")
]
"""Every method that edits by a rule of its own, told apart by `method`."""

ROUNDING = 1e-6
"""Up to this share of ‖ΔW‖, ΔW_after − ΔW_before is float32's rounding, and has no direction."""


class Control(RealignMethod):
    """Parameters that all controls have."""

    of: Edit
    """The method it controls for, with the same parameters."""
    seed: int = 0
    """Seed of the control's random draws."""

    @model_validator(mode="after")
    def _keeps_its_norm(self) -> Control:
        if self.max_rank is not None:
            raise ValueError("max_rank would change the norm a control has to match; set it in `of`")
        return self

    @property
    def matched(self) -> RealignMethod:
        return self.of

    @property
    def mask_spec(self) -> MaskSpec | None:
        return self.of.mask_spec

    @property
    def needs(self) -> frozenset[Need]:
        return self.of.needs

    @property
    def reads_displacement(self) -> bool:
        return self.of.reads_displacement

    @property
    def directions(self) -> int:
        return self.of.directions

    @property
    def energies(self) -> int:
        return self.of.energies

    @property
    def adapters_only(self) -> bool:
        return self.of.adapters_only

    @property
    def pairs_factors(self) -> bool:
        return self.of.pairs_factors

    @property
    def uses_fusion(self) -> bool:
        return self.of.uses_fusion

    def identity(self) -> dict[str, Json]:
        return self.model_dump(mode="json", exclude={"of"}) | {"of": self.of.identity()}

    @property
    def edits_untouched(self) -> bool:
        return self.of.edits_untouched

    def targets(self, modules: Sequence[ModuleStatistics], edit_norms: Mapping[str, float]) -> dict[str, float]:
        """Module -> the norm of the edit it gets.

        Args:
            modules: the model's modules.
            edit_norms: module -> ‖ΔW_after − ΔW_before‖ under `of`, for the modules it edited.
        """
        return {name: norm for name, norm in edit_norms.items() if norm}

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        raise AssertionError("a control's modules follow from its targets")

    def choose(
        self, modules: Sequence[ModuleStatistics], matched_norms: Mapping[str, float]
    ) -> tuple[list[Decision], dict[str, float]]:
        targets = self.targets(modules, matched_norms)
        return self.decide_targets(modules, targets), targets

    def decide_targets(self, modules: Sequence[ModuleStatistics], targets: Mapping[str, float]) -> list[Decision]:
        """One decision per module: edited if it has a target."""
        close = frozenset(self.close_modules(modules))
        decisions: list[Decision] = []
        for name in (m.module for m in modules):
            reason = f"an edit of norm {targets[name]:.4g}" if name in targets else "not edited"
            decisions.append(decision(name, name in targets, f"control: {reason}", name in close))
        return decisions

    def close_modules(self, modules: Sequence[ModuleStatistics]) -> list[str]:
        """The close modules of `of`, whose edit norms are copied module by module."""
        return self.of.close_modules(modules)


class UniformScaling(Control):
    """ΔW ← (1 − c)ΔW in every module, c = ‖the method's edit‖ / ‖ΔW‖ over the whole model; c > 1 overshoots."""

    method: Literal["uniform_scaling"]

    def close_modules(self, modules: Sequence[ModuleStatistics]) -> list[str]:
        return _all_if_any(modules, super().close_modules(modules))

    def targets(self, modules: Sequence[ModuleStatistics], edit_norms: Mapping[str, float]) -> dict[str, float]:
        whole = sum(m.delta_norm**2 for m in modules) ** 0.5
        share = sum(norm**2 for norm in edit_norms.values()) ** 0.5 / whole if whole else 0.0
        return {m.module: share * m.delta_norm for m in modules if share * m.delta_norm}

    def edit(self, module: Module) -> Delta:
        return module.delta.scaled(1.0 - module.target_norm / module.delta.norm())


class RandomModules(Control):
    """The method's edits, in modules drawn at random."""

    method: Literal["random_modules"]

    def close_modules(self, modules: Sequence[ModuleStatistics]) -> list[str]:
        return _all_if_any(modules, super().close_modules(modules))

    def targets(self, modules: Sequence[ModuleStatistics], edit_norms: Mapping[str, float]) -> dict[str, float]:
        edited = {name: norm for name, norm in edit_norms.items() if norm}

        def drawable(m: ModuleStatistics) -> bool:
            # Only modules in which the method has an edit to make: those it edited, and others where neither ΔW nor V
            # vanishes. A method that edits untouched modules has edited all that it can.
            return m.module in edited or (not self.edits_untouched and m.is_defined)

        names = sorted(m.module for m in modules if drawable(m))
        draw = random.Random(self.seed)
        chosen = draw.sample(names, min(len(edited), len(names)))
        norms = [norm for _, norm in sorted(edited.items())]
        draw.shuffle(norms)
        return dict(zip(chosen, norms, strict=False))

    def rank(self, ranks: Ranks) -> int:
        return min(ranks.own + self.of.rank(ranks), ranks.limit)

    def edit(self, module: Module) -> Delta:
        return _resized(module, _edit_of(self.of, module))


class RandomSubspace(Control):
    """The method's edits, each turned to a random output subspace."""

    method: Literal["random_subspace"]

    def rank(self, ranks: Ranks) -> int:
        return min(2 * ranks.own + self.of.rank(ranks), ranks.limit)

    def edit(self, module: Module) -> Delta:
        from fleet.algebra.random_edits import turned

        return _resized(module, turned(_edit_of(self.of, module), module.generator(self.seed)))


class Noise(Control):
    """Gaussian noise of the same norm in the same modules."""

    method: Literal["noise"]

    def rank(self, ranks: Ranks) -> int:
        return min(ranks.own + max(ranks.own, 1), ranks.limit)

    def edit(self, module: Module) -> Delta:
        from fleet.algebra.random_edits import gaussian_like

        return _resized(module, gaussian_like(module.delta, module.generator(self.seed)))


def _all_if_any(modules: Sequence[ModuleStatistics], close: Sequence[str]) -> list[str]:
    """All modules if any is close: what this control does in a module follows from all of the method's decisions."""
    return [m.module for m in modules] if close else []


def _edit_of(method: RealignMethod, module: Module) -> Delta:
    """ΔW_after − ΔW_before under a method; a LoRA's ΔW_after is cut to the rank that the method writes.

    The cut may take away most of a dense edit, so it comes before the edit is given its norm.
    """
    from fleet.algebra.delta import LowRank
    from fleet.algebra.spectral import truncated

    delta, edited = module.delta, method.edit(module)
    if isinstance(delta, LowRank):
        safety, harmful = (d.rank if isinstance(d, LowRank) else 0 for d in (module.safety, module.harmful))
        ranks = Ranks(delta.rank, safety, harmful, min(delta.shape))
        edited, _ = truncated(edited, method.written_rank(ranks), module.generator(0))
    return edited.minus(delta)


def _resized(module: Module, edit: Delta) -> Delta:
    """ΔW plus the edit, scaled to the target norm; ΔW as it is, if the edit has no direction."""
    norm = edit.norm()
    if norm <= ROUNDING * module.delta.norm():
        return module.delta
    return module.delta.plus(edit.scaled(module.target_norm / norm))
