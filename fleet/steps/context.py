"""What steps are made from: a manifest and everything it names, opened. Headers only; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from pydantic import BaseModel

from evals.suites import Suite
from fleet.checkpoint.chat_templates import ChatTemplate
from fleet.core.identity import Json
from fleet.manifest import Manifest
from fleet.masks.texts import TextSet
from fleet.steps.base import Step
from fleet.steps.sources import Bases, CurvatureSource, Judging, MaskSource, Source

_Kind = TypeVar("_Kind", bound=Step)


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """A manifest, what it names, and the steps made so far."""

    manifest: Manifest
    bases: Bases
    models: Mapping[str, Source]
    """The models of the catalogue, by name."""
    suites: Mapping[str, Suite]
    texts: Mapping[str, TextSet]
    """Preferences and task prompts, by address."""
    masks: Mapping[str, MaskSource]
    """Masks learned before, by address."""
    curvatures: Mapping[str, CurvatureSource]
    """Fishers and Gram matrices, by address."""
    judging: Judging
    date: str
    """Of the run, for chat templates that write it, as 2026-11-25."""
    chat_template: ChatTemplate | None = None
    """The file that `evaluation.chat_template` names."""
    steps: dict[str, Step] = field(default_factory=dict[str, Step])
    """By key, each after what it reads."""
    warnings: dict[str, None] = field(default_factory=dict[str, None])
    """What is odd in the input, though it can be used: each said once, in the order found."""

    def add(self, step: _Kind) -> _Kind:
        """A step of the plan: the one with this key, if there is one already."""
        return cast(_Kind, self.steps.setdefault(step.key, step))

    def warn(self, warning: str) -> None:
        """Say something a person should see: it is printed once, by the dry run or before the work, and reported."""
        self.warnings[warning] = None


def literals(spec: BaseModel) -> dict[str, Json]:
    """A method's parameters, as a step's spec holds them."""
    return spec.model_dump(mode="json")
