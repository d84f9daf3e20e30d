"""Mask steps: the aligned model's log-probabilities of a preference set, and a mask learned against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fleet.core.errors import ManifestError
from fleet.core.identity import Json
from fleet.fusion import AnyFusionMethod
from fleet.fusion.member import Member
from fleet.manifest import Variant
from fleet.masks.tasks import Compute, LogProbsTask, MaskTask
from fleet.masks.texts import TextSet
from fleet.methods import AnyRealignMethod
from fleet.methods.mask_spec import MaskSpec
from fleet.steps.base import Counted, NextUnit, Step, UnitList, Walk
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.sources import MaskSource, Source
from fleet.steps.survey import SurveyStep
from fleet.steps.view import RunView
from fleet.work.unit import Found


class LogProbsResult(Result):
    """Log-probabilities say nothing beside their file."""


class MaskResult(Result):
    """How a training went: its evaluations, what was kept, and how dense the mask is."""


@dataclass(frozen=True, kw_only=True)
class LogProbsStep(Step):
    """The aligned model's log-probabilities of a preference set: DPO's reference, for every model and night."""

    kind: ClassVar[str] = "logprobs"
    version: ClassVar[int] = 1

    preferences: TextSet
    max_tokens: int
    dtype: str
    date: str | None
    """What the aligned model's chat template writes, if it writes a date."""

    @classmethod
    def make(cls, context: PlanContext, method: MaskSpec) -> LogProbsStep:
        """Of the preferences that a method learns from."""
        assert method.preferences is not None
        training, preferences, aligned = method.training, context.texts[method.preferences], context.bases.aligned
        date = context.date if aligned.chat_template is not None and aligned.chat_template.writes_date else None
        dated: dict[str, Json] = {} if date is None else {"date": date}
        return context.add(
            cls(
                name="aligned",
                spec={"max_tokens": training.max_tokens, "dtype": training.dtype, **dated},
                inputs={"aligned": aligned.identity, "preferences": preferences.identity},
                read_bytes=aligned.model.num_bytes,
                preferences=preferences,
                max_tokens=training.max_tokens,
                dtype=training.dtype,
                date=date,
            )
        )

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        task = LogProbsTask(
            run.bases.aligned.uri, run.text_set(self.preferences), self.max_tokens, self.dtype, _compute(run),
            run.output(self, attempt), self.date,
        )  # fmt: skip
        return _one_training(task, finished, LogProbsResult)


@dataclass(frozen=True, kw_only=True)
class MaskStep(Step):
    """Learn one mask, on one model or on a fusion of several."""

    kind: ClassVar[str] = "mask"
    version: ClassVar[int] = 1
    counts: ClassVar[Counted] = "updates"

    members: Mapping[str, Source]
    fusion: AnyFusionMethod | None
    method: MaskSpec
    log_probs: LogProbsStep
    safety: Source | None
    """What a factor mask reverts to."""
    prompts: tuple[TextSet, ...]
    """Of each member, if the method uses them."""

    @classmethod
    def of_method(
        cls, context: PlanContext, name: str, method: AnyRealignMethod, variant: Variant
    ) -> MaskStep | MaskSource | None:
        """The mask that a method applies to one model of the catalogue; None for a method without."""
        spec = method.mask_spec
        if spec is None:
            return None
        if spec.reuse is not None:
            return context.masks[spec.reuse]
        if spec.learn_on == "fusion":
            assert variant.fuse is not None
            members = {m.name: context.models[m.name] for m in context.manifest.members(variant)}
            return cls.make(context, f"{variant.fuse.method}-of-{len(members)}", spec, members, variant.fuse)
        learned_on = spec.learned_on or name
        return cls.make(context, learned_on, spec, {learned_on: context.models[learned_on]}, None)

    @classmethod
    def make(
        cls,
        context: PlanContext,
        name: str,
        method: MaskSpec,
        members: Mapping[str, Source],
        fusion: AnyFusionMethod | None,
    ) -> MaskStep:
        """A mask of its own for these members.

        Raises:
            ManifestError: a factor mask, and a member that is no LoRA.
        """
        if full := [m for m, source in members.items() if method.adapters_only and not source.as_lora]:
            raise ManifestError(
                f"variants: a {method.mask} mask works on LoRA factors, but {', '.join(full)} is no LoRA that can be "
                'served as one; set mask to "dense" or "rows_and_columns", or leave it out of the variant\'s models'
            )
        log_probs, aligned = LogProbsStep.make(context, method), context.bases.aligned
        given = {m.name: m.prompts for m in context.manifest.models if m.name in members and m.prompts is not None}
        prompts = {m: context.texts[uri] for m, uri in given.items()} if method.training.uses_prompts else {}
        safety = context.bases.safety if method.reverts_to_safety else None
        spec = method.mask_identity()
        spec["models"] = [*members]
        if fusion is not None:
            spec["fusion"] = fusion.learning_identity()
            spec["shared"] = method.shared
        inputs = {"aligned": aligned.identity} | {f"model.{m}": s.identity for m, s in members.items()}
        inputs |= {f"prompts.{m}": texts.identity for m, texts in prompts.items()}
        inputs |= {"safety": safety.identity} if safety is not None else {}
        return context.add(
            cls(
                name=name,
                spec=spec,
                inputs=inputs,
                deps=(log_probs,),
                after=SurveyStep.of_models(context, members),
                read_bytes=aligned.model.num_bytes + sum(s.model.num_bytes for s in members.values()),
                members=members,
                fusion=fusion,
                method=method,
                log_probs=log_probs,
                safety=safety,
                prompts=tuple(prompts.values()),
            )
        )

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        task = MaskTask(
            step=self.key,
            aligned=run.bases.aligned.uri,
            members=tuple(Member(name, source.uri) for name, source in self.members.items()),
            fusion=self.fusion,
            method=self.method,
            safety=self.safety.uri if self.safety else None,
            preferences=run.text_set(self.log_probs.preferences),
            log_probs=run.folder(self.log_probs),
            prompts=tuple(run.text_set(texts) for texts in self.prompts),
            compute=_compute(run),
            output=run.output(self, attempt),
            date=self.log_probs.date,
        )
        return _one_training(task, finished, MaskResult)


def _compute(run: RunView) -> Compute:
    placement = run.manifest.placement
    return Compute(placement.micro_batch, placement.activation_checkpointing, placement.checkpoint_every)


def _one_training(task: LogProbsTask | MaskTask, finished: dict[int, Found], result: type[Result]) -> Walk:
    from fleet.work.training import TrainingUnit

    return UnitList([NextUnit(0, TrainingUnit(task), 0.0)], finished, result)
