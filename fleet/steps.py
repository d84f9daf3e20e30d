"""The kinds of steps, what each one's identity is made of, and which steps a manifest asks for.

Free of torch: everything here follows from the manifest and the headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel

from evals.suites import Suite
from fleet.checkpoint.models import Adapter, FullModel, Model, require_full_model
from fleet.errors import ManifestError
from fleet.fusion import AnyFusionMethod
from fleet.identity import Json, digest
from fleet.manifest import Manifest, Variant
from fleet.methods import AnyRealignMethod
from fleet.record import Step

Role = Literal["reference", "finetuned", "realigned", "fused"]

MAX_SERVED_RANK = 512
"""The largest LoRA rank vLLM serves."""

LORA_VALUE_BYTES = 4
"""Adapters we write are float32: a sum of products is then exact to rounding, and they are small."""


@dataclass(frozen=True)
class Source:
    """One model of the manifest, opened: its headers and its content identity."""

    uri: str
    model: Model
    identity: str

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.model, Adapter)

    @property
    def max_rank(self) -> int:
        return self.model.max_rank if isinstance(self.model, Adapter) else 0


@dataclass(frozen=True)
class Bases:
    """The base models of a run."""

    aligned: Source
    unaligned: Source
    safety: Source | None

    @property
    def aligned_model(self) -> FullModel:
        return require_full_model(self.aligned.model, "base.aligned")


@dataclass(frozen=True, kw_only=True)
class SurveyStep(Step):
    """Measure one model's task vector; the coordinator does all pending ones in one pass over V."""

    model: Source


@dataclass(frozen=True, kw_only=True)
class RealignStep(Step):
    """Realign one model with one method."""

    model: Source
    survey: SurveyStep
    method: AnyRealignMethod
    safety: Source | None
    max_rank: int
    """At most, if the model is an adapter: it is the drift that decides what is concatenated."""

    @property
    def is_adapter(self) -> bool:
        return self.model.is_adapter


@dataclass(frozen=True, kw_only=True)
class FuseStep(Step):
    """Fuse one variant's models into one."""

    members: Mapping[str, Source | RealignStep]
    method: AnyFusionMethod
    is_adapter: bool
    max_rank: int


Weights: TypeAlias = Source | RealignStep | FuseStep
"""Where a candidate's weights are: a source of the manifest, or the step that makes them."""


@dataclass(frozen=True, kw_only=True)
class ScoreStep(Step):
    """Score one candidate on one suite."""

    candidate: str
    weights: Weights
    suite: Suite


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to be scored: a base model, a fine-tuned, realigned or fused one."""

    name: str
    role: Role
    models: tuple[str, ...]
    """The models of the catalogue it is made of."""
    weights: Weights
    parameters: dict[str, Json]
    """What it was made with: the realign and fuse specs."""
    scores: dict[str, ScoreStep]
    """Suite name -> the step that scores it."""


def identity_of(weights: Weights) -> str:
    """Content identity of a source, or the fingerprint of the step that makes the weights."""
    return weights.identity if isinstance(weights, Source) else weights.fingerprint


class StepBuilder:
    """Turns a manifest into steps and candidates; the same step asked for twice is one step."""

    def __init__(
        self, manifest: Manifest, bases: Bases, models: Mapping[str, Source], suites: Mapping[str, Suite]
    ) -> None:
        self.manifest = manifest
        self.bases = bases
        self.models = models
        self.suites = suites
        self.steps: dict[str, Step] = {}
        """By key, each after what it reads."""

    def candidates(self) -> tuple[Candidate, ...]:
        """Every candidate, in the order of the table: references, fine-tuned, realigned, fused."""
        surveys = {name: self._survey(name) for name in self.models}
        labels = _realign_labels(self.manifest)
        realigned: dict[str, Candidate] = {}
        fused: list[Candidate] = []
        members_of: dict[str, dict[str, Source | RealignStep]] = {}
        for variant in self.manifest.variants:
            members: dict[str, Source | RealignStep] = {}
            for model in self.manifest.members(variant):
                members[model.name] = self.models[model.name]
                if variant.realign is not None:
                    step = self._realign(surveys[model.name], variant.realign, labels[_key(variant.realign)])
                    members[model.name] = step
                    if step.name not in realigned:
                        parameters: dict[str, Json] = {"realign": _literals(variant.realign)}
                        realigned[step.name] = self._candidate(step.name, "realigned", (model.name,), step, parameters)
            members_of[variant.name] = members
        for variant in self.manifest.variants:
            if variant.fuse is not None:
                step = self._fuse(variant, members_of[variant.name], surveys)
                parameters = {
                    "realign": _literals(variant.realign) if variant.realign else None,
                    "fuse": _literals(variant.fuse),
                }
                names = tuple(members_of[variant.name])
                fused.append(self._candidate(variant.name, "fused", names, step, parameters))
        references = {"aligned": self.bases.aligned, "unaligned": self.bases.unaligned}
        return (
            *(
                self._candidate(r, "reference", tuple(self.models), references[r], {})
                for r in self.manifest.evaluation.references
            ),
            *(
                self._candidate(name, "finetuned", (name,), source, {}, (surveys[name],))
                for name, source in self.models.items()
            ),
            *realigned.values(),
            *fused,
        )

    def _survey(self, name: str) -> SurveyStep:
        source = self.models[name]
        inputs = {
            "aligned": self.bases.aligned.identity,
            "unaligned": self.bases.unaligned.identity,
            "model": source.identity,
        }
        read = sum(s.model.num_bytes for s in (self.bases.aligned, self.bases.unaligned, source))
        step = SurveyStep(kind="survey", name=name, spec={}, inputs=inputs, read_bytes=read, model=source)
        self.steps.setdefault(step.key, step)
        return step

    def _realign(self, survey: SurveyStep, method: AnyRealignMethod, label: str) -> RealignStep:
        source = survey.model
        safety = self.bases.safety if method.needs_safety_adapter else None
        inputs = {"aligned": self.bases.aligned.identity, "model": source.identity}
        spec: dict[str, Json] = {"method": _literals(method)}
        read = source.model.num_bytes
        rank = 0
        if safety is not None:
            inputs["safety"] = safety.identity
            read += safety.model.num_bytes
        if source.is_adapter:
            rank = source.max_rank + (safety.max_rank if safety is not None else 0)
            write = self._adapter_bytes([source], rank)
        else:
            spec["shard_bytes"] = self.manifest.checkpoint.shard_bytes
            read, write = read + self.bases.aligned.model.num_bytes, self.bases.aligned.model.num_bytes
        step = RealignStep(
            kind="realign", name=f"{survey.name}.{label}", spec=spec, inputs=inputs, deps=(survey,), read_bytes=read,
            write_bytes=write, model=source, survey=survey, method=method, safety=safety, max_rank=rank,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _fuse(
        self,
        variant: Variant,
        members: Mapping[str, Source | RealignStep],
        surveys: Mapping[str, SurveyStep],
    ) -> FuseStep:
        assert variant.fuse is not None
        is_adapter = self._fuses_to_adapter(variant)
        sources = [self.models[name] for name in members]
        inputs = {"aligned": self.bases.aligned.identity}
        inputs |= {name: m.identity for name, m in members.items() if isinstance(m, Source)}
        spec: dict[str, Json] = {"method": _literals(variant.fuse), "models": list(members)}
        read = sum(s.model.num_bytes for s in sources)
        rank = 0
        if is_adapter:
            rank = sum(m.max_rank for m in members.values())
            if rank > MAX_SERVED_RANK:
                raise ManifestError(
                    f"variants: {variant.name}: the fused adapter could reach rank {rank}, and vLLM serves at most "
                    f'{MAX_SERVED_RANK}; set fuse.output to "model"'
                )
            write = self._adapter_bytes(sources, rank)
        else:
            spec["shard_bytes"] = self.manifest.checkpoint.shard_bytes
            read, write = read + self.bases.aligned.model.num_bytes, self.bases.aligned.model.num_bytes
        step = FuseStep(
            kind="fuse", name=variant.name, spec=spec, inputs=inputs,
            deps=tuple(m for m in members.values() if isinstance(m, Step)),
            after=tuple(surveys[name] for name, m in members.items() if isinstance(m, Source)),
            read_bytes=read, write_bytes=write, members=members, method=variant.fuse, is_adapter=is_adapter,
            max_rank=rank,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _fuses_to_adapter(self, variant: Variant) -> bool:
        assert variant.fuse is not None
        full = [m.name for m in self.manifest.members(variant) if not self.models[m.name].is_adapter]
        if variant.fuse.output == "adapter" and full:
            raise ManifestError(
                f'variants: {variant.name}: fuse.output is "adapter", but {", ".join(full)} is no adapter; '
                'leave it out of the variant\'s models, or let fuse.output be "auto"'
            )
        return variant.fuse.output != "model" and not full

    def _candidate(
        self,
        name: str,
        role: Role,
        models: tuple[str, ...],
        weights: Weights,
        parameters: dict[str, Json],
        after: tuple[Step, ...] = (),
    ) -> Candidate:
        evaluation = self.manifest.evaluation
        tasks = [suite for m in self.manifest.models if m.name in models for suite in m.suites]
        scores = {
            suite: self._score(name, weights, self.suites[suite], after)
            for suite in dict.fromkeys((*evaluation.harmfulness, *evaluation.over_refusal, *tasks))
        }
        return Candidate(name=name, role=role, models=models, weights=weights, parameters=parameters, scores=scores)

    def _score(self, candidate: str, weights: Weights, suite: Suite, after: tuple[Step, ...]) -> ScoreStep:
        evaluation = self.manifest.evaluation
        spec: dict[str, Json] = {
            "suite": suite.digest,
            "judge": _literals(evaluation.judge),
            "dtype": evaluation.dtype,
            "max_model_len": evaluation.max_model_len,
        }
        inputs = {"aligned": self.bases.aligned.identity}
        if isinstance(weights, Source):
            inputs["candidate"] = weights.identity
        step = ScoreStep(
            kind="score", name=f"{candidate}.{Path(suite.name).stem}", spec=spec, inputs=inputs,
            deps=() if isinstance(weights, Source) else (weights,), after=after,
            candidate=candidate, weights=weights, suite=suite,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _adapter_bytes(self, sources: Iterable[Source], rank: int) -> int:
        """Bytes of an adapter of this rank in every module that any of these adapters touches."""
        tensors = self.bases.aligned_model.tensors
        modules = {m for s in sources if isinstance(s.model, Adapter) for m in s.model.modules}
        return sum(rank * sum(tensors[f"{m}.weight"].shape) * LORA_VALUE_BYTES for m in modules)


def _literals(spec: BaseModel) -> dict[str, Json]:
    return spec.model_dump(mode="json")


def _key(method: AnyRealignMethod) -> str:
    return digest(_literals(method))


def _realign_labels(manifest: Manifest) -> dict[str, str]:
    """Digest of a realign spec -> the name its models get: the method's, or its first variant's where two differ."""
    first: dict[str, tuple[str, str]] = {}
    for variant in manifest.variants:
        if variant.realign is not None:
            first.setdefault(_key(variant.realign), (variant.realign.method, variant.name))
    methods = [method for method, _ in first.values()]
    return {key: method if methods.count(method) == 1 else name for key, (method, name) in first.items()}
