"""What a manifest's addresses lead to, opened: headers and content identities, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias

from evals.architectures import UNKNOWN, Architecture
from evals.engine import unservable
from evals.judges import AnyJudge
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.chat_templates import ChatTemplate
from fleet.checkpoint.curvature import Curvature
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, require_full_model, touched_tensors
from fleet.core.identity import Json
from fleet.steps.record import Keyed


@dataclass(frozen=True)
class Source:
    """One model of the manifest."""

    uri: str
    model: Model
    identity: str
    """Digest of the files that decide what the model does."""
    chat_template: ChatTemplate | None = None
    """The one its folder brings."""
    architecture: Architecture = UNKNOWN
    """What an engine makes of the run's aligned model, which an adapter is served on."""

    @property
    def as_lora(self) -> bool:
        """Whether it can be served, and written again, as a LoRA."""
        return isinstance(self.model, Adapter) and not self.why_no_lora

    @cached_property
    def why_no_lora(self) -> str:
        """Why an adapter isn't served as a LoRA, to be read after its name; empty where it is."""
        if not isinstance(self.model, Adapter):
            return "is no adapter"
        if reason := self.architecture.why_no_lora:
            return f"can't be served as a LoRA: the engine {reason}"
        reason = unservable(self.model, target_modules=self.architecture.lora_modules)
        return f"can't be served as a LoRA: {reason}" if reason else ""

    @property
    def is_quantised(self) -> bool:
        """Whether its files are fp8, which an engine of the aligned model can't hold."""
        return isinstance(self.model, FullModel) and self.model.is_quantised

    @property
    def max_rank(self) -> int:
        return self.model.max_rank if isinstance(self.model, Adapter) else 0

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The base tensors it has a task vector in."""
        return tuple(touched_tensors(self.model))


class MakesWeights(Keyed, Protocol):
    """A step whose files are a model: what can be scored, fused with others, and published."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """Identity of the weights it makes: the step's fingerprint."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """The base tensors it may have a task vector in."""
        ...

    @property
    def as_lora(self) -> bool:
        """Whether it is written, and served, as a LoRA."""
        ...

    @property
    def max_rank(self) -> int:
        """Upper bound of a LoRA's rank; 0 for a full model."""
        ...


Weights: TypeAlias = Source | MakesWeights
"""Where a candidate's weights are: a source of the manifest, or the step that makes them."""


@dataclass(frozen=True)
class CurvatureSource:
    """What the manifest gives of a model beside its weights."""

    uri: str
    curvature: Curvature
    identity: str


@dataclass(frozen=True)
class MaskSource:
    """A mask learned before, of another night or catalogue."""

    uri: str
    identity: str


@dataclass(frozen=True)
class Bases:
    """The base models of a run."""

    aligned: Source
    unaligned: Source | None
    """None where nothing reads V."""
    safety: Source | None
    harmful: Source | None

    @property
    def aligned_model(self) -> FullModel:
        return require_full_model(self.aligned.model, "base.aligned")


@dataclass(frozen=True)
class Judging:
    """What a run judges with."""

    judge: AnyJudge
    model: Source | None = None
    """The judge's own model, if it is a model."""
    rows: str | None = None
    """Key in the store of the labelled rows it is calibrated on."""
    date: str | None = None
    """What its model's chat template writes, if it writes a date."""

    @property
    def settings(self) -> dict[str, Json]:
        """What identifies the judge wherever its model is."""
        settings: dict[str, Json] = self.judge.settings()
        if self.model is not None:
            settings |= {"model": self.model.identity}
        return settings if self.date is None else settings | {"date": self.date}
