"""Manifest -> steps and candidates: which steps a manifest asks for. The same step asked for twice is one step.

Free of torch: everything here follows from the manifest and the headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evals.engine import MAX_SERVED_RANK
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.core.errors import ManifestError
from fleet.core.identity import Json, digest
from fleet.fusion import WeightAverage
from fleet.manifest import Manifest, Variant
from fleet.steps.base import Step
from fleet.steps.calibrate import CalibrateStep
from fleet.steps.context import PlanContext, literals
from fleet.steps.fuse import FuseStep, largest_rank
from fleet.steps.prompting import check_prompting, prompting_like
from fleet.steps.realign import RealignStep
from fleet.steps.score import ScoreStep
from fleet.steps.sources import Source, Weights
from fleet.steps.survey import SurveyStep

Role = Literal["reference", "finetuned", "realigned", "fused"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to be scored, a row of the table: a base model, a fine-tuned, realigned or fused one."""

    name: str
    role: Role
    models: tuple[str, ...]
    """The models of the catalogue it is made of."""
    weights: Weights
    parameters: dict[str, Json]
    """What it was made with: the realign and fuse specs."""
    scores: dict[str, ScoreStep]
    """Suite name -> the step that scores it."""


def build(context: PlanContext) -> tuple[Candidate, ...]:
    """Add every step that the manifest asks for to `context`.

    Returns:
        Every candidate, in the order of the table: references, fine-tuned, realigned, fused.

    Raises:
        InputError: methods, models and bases that don't go together.
    """
    manifest, bases = context.manifest, context.bases
    if context.judging.rows is not None:
        CalibrateStep.make(context, context.judging.rows)
    _warn_of_full_adapters(context)
    references = {"aligned": bases.aligned}
    references |= {"unaligned": bases.unaligned} if bases.unaligned is not None else {}
    named = {name: references[name] for name in manifest.evaluation.references}
    check_prompting(context, named | {**context.models})
    surveys = {name: SurveyStep.of_models(context, [name]) for name in context.models}
    realigned, members = _realigned(context)
    fused = [_fused(context, v, members[v.name]) for v in manifest.variants if v.fuse is not None]
    return (
        *(
            _candidate(context, name, "reference", tuple(context.models), source, source, {})
            for name, source in named.items()
        ),
        *(
            _candidate(context, name, "finetuned", (name,), _served(context, name), source, {}, surveys[name])
            for name, source in context.models.items()
        ),
        *realigned,
        *fused,
    )


def _warn_of_full_adapters(context: PlanContext) -> None:
    """One architecture is one cause: said once, for all adapters and what is made of them."""
    adapters = [name for name, source in context.models.items() if isinstance(source.model, Adapter)]
    if adapters and (reason := context.bases.aligned.architecture.why_no_lora):
        context.warn(
            f"the engine {reason}: {', '.join(adapters)}, and what is made of {'it' if len(adapters) == 1 else 'them'},"
            " are written and scored as full models"
        )


def _realigned(context: PlanContext) -> tuple[list[Candidate], dict[str, dict[str, Weights]]]:
    """The realigned models, each once; and the members of every variant."""
    manifest = context.manifest
    labels = _realign_labels(manifest)
    found: dict[str, Candidate] = {}
    members: dict[str, dict[str, Weights]] = {variant.name: {} for variant in manifest.variants}
    for variant in manifest.variants:
        for model in manifest.members(variant):
            weights: Weights = context.models[model.name]
            if variant.realign is not None:
                weights = RealignStep.make(context, model.name, variant.realign, variant)
                name = f"{model.name}.{labels[_realign_key(manifest, variant)]}"
                if name not in found:
                    parameters: dict[str, Json] = {"realign": literals(variant.realign)}
                    source = context.models[model.name]
                    found[name] = _candidate(context, name, "realigned", (model.name,), weights, source, parameters)
            members[variant.name][model.name] = weights
    return [*found.values()], members


def _fused(context: PlanContext, variant: Variant, members: Mapping[str, Weights]) -> Candidate:
    assert variant.fuse is not None
    step = FuseStep.make(context, variant.name, variant.fuse, members, _fuses_to_lora(variant, members))
    parameters: dict[str, Json] = {
        "realign": literals(variant.realign) if variant.realign else None,
        "fuse": literals(variant.fuse),
    }
    return _candidate(context, variant.name, "fused", tuple(members), step, context.bases.aligned, parameters)


def _candidate(
    context: PlanContext,
    name: str,
    role: Role,
    models: tuple[str, ...],
    weights: Weights,
    like: Source,
    parameters: dict[str, Json],
    after: tuple[Step, ...] = (),
) -> Candidate:
    """
    Args:
        like: whose chat template it is prompted with.
    """
    evaluation = context.manifest.evaluation
    tasks = [suite for m in context.manifest.models if m.name in models for suite in m.suites]
    suites = dict.fromkeys((*evaluation.harmfulness, *evaluation.over_refusal, *tasks))
    prompting = prompting_like(context, like)
    scores = {s: ScoreStep.make(context, name, weights, context.suites[s], prompting, after) for s in suites}
    return Candidate(name=name, role=role, models=models, weights=weights, parameters=parameters, scores=scores)


def _served(context: PlanContext, name: str) -> Weights:
    """A fine-tuned model as it can be served: written in full, if it is an adapter no engine takes, or fp8."""
    source = context.models[name]
    if source.as_lora or (isinstance(source.model, FullModel) and not source.is_quantised):
        return source
    whole = WeightAverage(method="weight_average", output="model")
    return FuseStep.make(context, name, whole, {name: source}, False)


def _fuses_to_lora(variant: Variant, members: Mapping[str, Weights]) -> bool:
    """Whether a fused model is written as a LoRA: where it is one, and where the manifest leaves it the choice.

    Raises:
        ManifestError: it can't be, but the manifest asks for it.
    """
    assert variant.fuse is not None
    reason = _why_no_lora(variant, members)
    if reason is not None and (variant.fuse.output == "adapter" or variant.fuse.max_rank is not None):
        asked = 'fuse.output is "adapter"' if variant.fuse.output == "adapter" else "fuse.max_rank is given"
        raise ManifestError(
            f"variants: {variant.name}: {asked}, but {reason}; leave models out of the variant, set fuse.max_rank "
            f'to at most {MAX_SERVED_RANK}, or let fuse.output be "auto" without one'
        )
    return variant.fuse.output != "model" and reason is None


def _why_no_lora(variant: Variant, members: Mapping[str, Weights]) -> str | None:
    assert variant.fuse is not None
    if full := [f"{name} {_why_full(member)}" for name, member in members.items() if not member.as_lora]:
        return ", ".join(full)
    if not variant.fuse.keeps_lora and variant.fuse.max_rank is None:
        return f"{variant.fuse.method} makes no product of LoRA factors"
    if (rank := largest_rank(variant.fuse, members)) > MAX_SERVED_RANK:
        return f"the fused adapter could reach rank {rank}, and vLLM serves at most {MAX_SERVED_RANK}"
    return None


def _why_full(weights: Weights) -> str:
    return weights.why_no_lora if isinstance(weights, Source) else "is realigned into a full model"


def _realign_key(manifest: Manifest, variant: Variant) -> str:
    """What makes two variants' realigned models the same: the realign spec, and what else their masks depend on."""
    assert variant.realign is not None
    parts: list[Json] = [literals(variant.realign)]
    if variant.realign.uses_fusion and variant.fuse is not None:
        members: list[Json] = [m.name for m in manifest.members(variant)]
        parts += [literals(variant.fuse), members]
    return digest(parts)


def _realign_labels(manifest: Manifest) -> dict[str, str]:
    """Realign key -> what its models are called in the table: the method's name, or that of the first variant that has
    the key where several share a method. Steps are not named by it."""
    first: dict[str, tuple[str, str]] = {}
    for variant in manifest.variants:
        if variant.realign is not None:
            first.setdefault(_realign_key(manifest, variant), (variant.realign.method, variant.name))
    methods = [method for method, _ in first.values()]
    labels = {key: method if methods.count(method) == 1 else name for key, (method, name) in first.items()}
    if len(set(labels.values())) < len(labels):  # a variant is named like another variant's method
        return {key: name for key, (_, name) in first.items()}
    return labels
