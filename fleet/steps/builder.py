"""The kinds of steps, what each one's identity is made of, and which steps a manifest asks for.

Free of torch: everything here follows from the manifest and the headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel

from evals.judges import AnyJudge
from evals.suites import Suite
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.curvature import Curvature, check_curvature
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, lora_rank, require_full_model, touched_tensors
from fleet.checkpoint.modules import canonical_shape, module_views
from fleet.core.errors import CheckpointError, ManifestError
from fleet.core.identity import Json, digest
from fleet.fusion import AnyFusionMethod, RegMean, WeightAverage
from fleet.fusion.place import Place, places
from fleet.manifest import Manifest, Variant
from fleet.masks.texts import TextSet
from fleet.methods import AnyRealignMethod, Control, Ranks, Somf
from fleet.methods.base import Need, RealignMethod
from fleet.steps.record import ALGORITHM_VERSIONS, Step
from fleet.store.open import VOCABULARY_SCHEME

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
        """Whether it can be served, and written again, as a LoRA."""
        return isinstance(self.model, Adapter) and self.model.is_lora and self.max_rank <= MAX_SERVED_RANK

    @property
    def is_quantised(self) -> bool:
        """Whether its address leads to fp8 files, which an engine of the aligned model can't hold."""
        return isinstance(self.model, FullModel) and self.model.is_view and not self.uri.startswith(VOCABULARY_SCHEME)

    @property
    def max_rank(self) -> int:
        return self.model.max_rank if isinstance(self.model, Adapter) else 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """The base tensors it has a task vector in."""
        return tuple(touched_tensors(self.model))


@dataclass(frozen=True)
class CurvatureSource:
    """What the manifest gives of a model beside its weights, opened."""

    uri: str
    curvature: Curvature
    identity: str


@dataclass(frozen=True)
class Bases:
    """The base models of a run."""

    aligned: Source
    unaligned: Source
    safety: Source | None
    harmful: Source | None

    @property
    def aligned_model(self) -> FullModel:
        return require_full_model(self.aligned.model, "base.aligned")


@dataclass(frozen=True, kw_only=True)
class DisplacementStep(Step):
    """Measure V's own part: what every survey of this pair of base models uses, tonight and later."""

    directions: int


@dataclass(frozen=True, kw_only=True)
class SurveyStep(Step):
    """Measure one model's task vector; the coordinator does all pending ones in one pass over V."""

    model: Source
    displacement: DisplacementStep
    rho: bool
    """Whether ρ and gain are measured, which takes twice the flops."""
    projection: bool
    """Whether the B factors of VVᵀΔW/‖V‖ are kept."""


@dataclass(frozen=True, kw_only=True)
class LogProbsStep(Step):
    """The aligned model's log-probabilities of a preference set: DPO's reference, for every model and night."""

    preferences: TextSet
    max_tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class MaskStep(Step):
    """Learn one mask, on one model or on a fusion of several."""

    members: Mapping[str, Source]
    fusion: AnyFusionMethod | None
    method: Somf
    log_probs: LogProbsStep
    safety: Source | None
    """What a factor mask reverts to."""
    prompts: tuple[TextSet, ...]
    """Of each member, if the method uses them."""


@dataclass(frozen=True)
class MaskSource:
    """A mask learned before, of another night or catalogue."""

    uri: str
    identity: str


@dataclass(frozen=True, kw_only=True)
class RealignStep(Step):
    """Realign one model with one method."""

    model: Source
    survey: SurveyStep
    method: AnyRealignMethod
    safety: Source | None
    harmful: Source | None
    matched: RealignStep | None
    """For a control: the step whose edit norms it matches."""
    mask: MaskStep | MaskSource | None
    tensors: tuple[str, ...]
    """The base tensors it may have a task vector in."""
    is_adapter: bool
    max_rank: int
    """At most, if it is an adapter: it is the drift that decides what is concatenated."""


@dataclass(frozen=True, kw_only=True)
class TrimStep(Step):
    """Find what the largest entries of one model's task vector, over all its tensors, reach."""

    model: Source | RealignStep
    rank: int
    """How many they are."""


@dataclass(frozen=True, kw_only=True)
class FuseStep(Step):
    """Fuse one variant's models into one."""

    members: Mapping[str, Source | RealignStep]
    trims: Mapping[str, TrimStep]
    """Of each member, if the method's thresholds are of whole models."""
    curvature: Mapping[str, CurvatureSource]
    """Of each member, if the method asks for it: a realigned one's is that of its fine-tuned model."""
    method: AnyFusionMethod
    tensors: tuple[str, ...]
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
class CalibrateStep(Step):
    """Count how often the judge is wrong, on labelled rows."""

    rows: str
    """Key of the rows in the store."""
    suite: Suite
    """Whose rules a rule judge goes by."""


@dataclass(frozen=True)
class Judging:
    """What a run judges with, its sources opened."""

    judge: AnyJudge
    model: Source | None = None
    """Of a judge that is a model."""
    rows: str | None = None
    """Key in the store of the labelled rows it is calibrated on."""

    @property
    def settings(self) -> dict[str, Json]:
        """What identifies the judge wherever its model is."""
        settings: dict[str, Json] = self.judge.settings()
        return settings if self.model is None else settings | {"model": self.model.identity}


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
        self,
        manifest: Manifest,
        bases: Bases,
        models: Mapping[str, Source],
        suites: Mapping[str, Suite],
        texts: Mapping[str, TextSet],
        masks: Mapping[str, MaskSource],
        curvatures: Mapping[str, CurvatureSource],
        judging: Judging,
    ) -> None:
        self.manifest = manifest
        self.bases = bases
        self.models = models
        self.suites = suites
        self.texts = texts
        self.masks = masks
        self.curvatures = curvatures
        self.judging = judging
        self.steps: dict[str, Step] = {}
        """By key, each after what it reads."""

    def candidates(self) -> tuple[Candidate, ...]:
        """Every candidate, in the order of the table: references, fine-tuned, realigned, fused."""
        if self.judging.rows is not None:
            self._calibrate(self.judging.rows)
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
                    step = self._realign(surveys[model.name], variant.realign, variant)
                    members[model.name] = step
                    name = f"{model.name}.{labels[_realign_key(self.manifest, variant)]}"
                    if name not in realigned:
                        parameters: dict[str, Json] = {"realign": _literals(variant.realign)}
                        realigned[name] = self._candidate(name, "realigned", (model.name,), step, parameters)
            members_of[variant.name] = members
        for variant in self.manifest.variants:
            if variant.fuse is not None:
                members = members_of[variant.name]
                step = self._fuse(variant.name, variant.fuse, members, self._fuses_to_adapter(variant, members))
                parameters = {
                    "realign": _literals(variant.realign) if variant.realign else None,
                    "fuse": _literals(variant.fuse),
                }
                names = tuple(members)
                fused.append(self._candidate(variant.name, "fused", names, step, parameters))
        references = {"aligned": self.bases.aligned, "unaligned": self.bases.unaligned}
        return (
            *(
                self._candidate(r, "reference", tuple(self.models), references[r], {})
                for r in self.manifest.evaluation.references
            ),
            *(
                self._candidate(name, "finetuned", (name,), self._served(name), {}, (surveys[name],))
                for name in self.models
            ),
            *realigned.values(),
            *fused,
        )

    def _calibrate(self, rows: str) -> None:
        evaluation = self.manifest.evaluation
        suite = self.suites[evaluation.harmfulness[0]]
        spec: dict[str, Json] = {"judge": self.judging.settings, "rows": rows, "dtype": evaluation.dtype}
        if evaluation.judge.kind == "rule":
            spec["suite"] = suite.digest
        step = CalibrateStep(kind="calibrate", name="judge", spec=spec, inputs={}, rows=rows, suite=suite)
        self.steps.setdefault(step.key, step)

    def _served(self, name: str) -> Weights:
        """A fine-tuned model as it can be served: written in full, if it is an adapter no engine takes, or fp8."""
        source = self.models[name]
        if source.is_adapter or (isinstance(source.model, FullModel) and not source.is_quantised):
            return source
        return self._fuse(name, WeightAverage(method="weight_average", output="model"), {name: source}, False)

    @cached_property
    def _methods(self) -> tuple[AnyRealignMethod, ...]:
        return tuple(v.realign for v in self.manifest.variants if v.realign is not None)

    @cached_property
    def _needs(self) -> frozenset[Need]:
        return frozenset(need for method in self._methods for need in method.needs)

    @cached_property
    def _displacement(self) -> DisplacementStep:
        """V's own part, with all that any variant uses."""
        directions = max((m.directions for m in self._methods), default=0)
        directions = max(directions, self.manifest.survey.directions)
        spec: dict[str, Json] = {"directions": directions}
        bases = {"aligned": self.bases.aligned, "unaligned": self.bases.unaligned}
        step = DisplacementStep(
            kind="displacement", name="base", spec=spec, inputs={name: s.identity for name, s in bases.items()},
            read_bytes=sum(s.model.num_bytes for s in bases.values()), directions=directions,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _survey(self, name: str) -> SurveyStep:
        source, displacement = self.models[name], self._displacement
        rho, projection = "rho" in self._needs, "projection" in self._needs and isinstance(source.model, Adapter)
        inputs = {
            "aligned": self.bases.aligned.identity,
            "unaligned": self.bases.unaligned.identity,
            "model": source.identity,
        }
        read = sum(s.model.num_bytes for s in (self.bases.aligned, self.bases.unaligned, source))
        step = SurveyStep(
            kind="survey", name=name, spec={"rho": rho, "projection": projection}, inputs=inputs,
            deps=(displacement,), read_bytes=read, model=source, displacement=displacement, rho=rho,
            projection=projection,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _realign(self, survey: SurveyStep, method: AnyRealignMethod, variant: Variant) -> RealignStep:
        source = survey.model
        if method.adapters_only and not source.is_adapter:
            raise ManifestError(
                f"variants: {method.method} with these parameters works on LoRA factors, but {survey.name} is no LoRA "
                "that can be served as one; leave it out of the variant's models"
            )
        if method.pairs_factors:
            self._require_equal_ranks(survey.name, source)
        matched = self._realign(survey, method.of, variant) if isinstance(method, Control) else None
        mask = self._mask_of(survey, method.controlled, variant)
        offered = {"safety": self.bases.safety, "harmful": self.bases.harmful}
        merged = {name: source for name, source in offered.items() if name in method.needs}
        # What a method decides follows from the three models; the survey only measured it. So the survey comes before,
        # and another variant's wishes for the survey don't change what this one makes.
        bases = {"aligned": self.bases.aligned, "unaligned": self.bases.unaligned}
        inputs = {name: s.identity for name, s in (bases | merged | {"model": source}).items() if s is not None}
        if isinstance(mask, MaskSource):
            inputs["mask"] = mask.identity
        spec: dict[str, Json] = {"method": method.identity(), "survey": ALGORITHM_VERSIONS["survey"]}
        displacement = survey.displacement
        read = source.model.num_bytes + sum(s.model.num_bytes for s in merged.values() if s is not None)
        tensors = self._touched(source, method)
        rank = self._realigned_rank(source, method, tensors) if source.is_adapter else 0
        is_adapter = source.is_adapter and rank <= MAX_SERVED_RANK
        if is_adapter:
            write = self._adapter_bytes(tensors, rank)
        else:
            spec["shard_bytes"] = self.manifest.checkpoint.shard_bytes
            read, write = read + self.bases.aligned.model.num_bytes, self.bases.aligned.model.num_bytes
        step = RealignStep(
            kind="realign", name=f"{survey.name}.{method.method}-{digest(spec).removeprefix('sha256:')[:6]}", spec=spec,
            inputs=inputs, deps=(
                *((displacement,) if method.directions else ()), *((matched,) if matched else ()),
                *((mask,) if isinstance(mask, MaskStep) else ()),
            ),
            after=(survey, displacement), read_bytes=read, write_bytes=write,
            model=source, survey=survey, method=method, safety=merged.get("safety"), harmful=merged.get("harmful"),
            matched=matched, mask=mask, tensors=tensors, is_adapter=is_adapter, max_rank=rank if is_adapter else 0,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _mask_of(self, survey: SurveyStep, method: RealignMethod, variant: Variant) -> MaskStep | MaskSource | None:
        """The mask that a method applies to one model."""
        if not isinstance(method, Somf):
            return None
        if method.reuse is not None:
            return self.masks[method.reuse]
        if method.learn_on == "fusion":
            assert variant.fuse is not None
            members = {m.name: self.models[m.name] for m in self.manifest.members(variant)}
            return self._mask(f"{variant.fuse.method}-of-{len(members)}", method, members, variant.fuse)
        name = method.learned_on or survey.name
        return self._mask(name, method, {name: self.models[name]}, None)

    def _mask(self, name: str, method: Somf, members: Mapping[str, Source], fusion: AnyFusionMethod | None) -> MaskStep:
        assert method.preferences is not None
        if full := [m for m, source in members.items() if method.adapters_only and not source.is_adapter]:
            raise ManifestError(
                f"variants: a {method.mask} mask works on LoRA factors, but {', '.join(full)} is no LoRA that can be "
                'served as one; set mask to "dense" or "rows_and_columns", or leave it out of the variant\'s models'
            )
        training, preferences = method.training, self.texts[method.preferences]
        aligned = self.bases.aligned
        log_probs = LogProbsStep(
            kind="logprobs", name="aligned", spec={"max_tokens": training.max_tokens, "dtype": training.dtype},
            inputs={"aligned": aligned.identity, "preferences": preferences.identity},
            read_bytes=aligned.model.num_bytes, preferences=preferences, max_tokens=training.max_tokens,
            dtype=training.dtype,
        )  # fmt: skip
        self.steps.setdefault(log_probs.key, log_probs)
        prompts = {m.name: m.prompts for m in self.manifest.models if m.name in members and m.prompts is not None}
        used = {m: self.texts[uri] for m, uri in prompts.items()} if training.uses_prompts else {}
        safety = self.bases.safety if method.reverts_to_safety else None
        spec = method.mask_identity()
        spec["models"] = [*members]
        if fusion is not None:
            spec["fusion"] = fusion.model_dump(mode="json", exclude={"output"})
            spec["shared"] = method.shared
        inputs = {"aligned": aligned.identity} | {f"model.{m}": s.identity for m, s in members.items()}
        inputs |= {f"prompts.{m}": texts.identity for m, texts in used.items()}
        inputs |= {"safety": safety.identity} if safety is not None else {}
        step = MaskStep(
            kind="mask", name=name, spec=spec, inputs=inputs, deps=(log_probs,),
            after=tuple(self._survey(m) for m in members),
            read_bytes=aligned.model.num_bytes + sum(s.model.num_bytes for s in members.values()),
            members=members, fusion=fusion, method=method, log_probs=log_probs, safety=safety,
            prompts=tuple(used.values()),
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _require_equal_ranks(self, name: str, source: Source) -> None:
        """Averaging factors needs as many of them on both sides."""
        safety = self.bases.safety.model if self.bases.safety else None
        for adapter in (source.model, safety):
            if isinstance(adapter, Adapter) and any(m.scale < 0 for m in adapter.modules.values()):
                raise ManifestError(
                    f"variants: {adapter.folder.uri}: lora_alpha is negative, and averaging LoRA factors takes its "
                    'root; use "merge": "exact"'
                )
        ranks = {m: (lora_rank(source.model, m), lora_rank(safety, m)) for m in _modules(source.tensors)}
        if unequal := [f"{m} ({own} and {theirs})" for m, (own, theirs) in ranks.items() if theirs not in (0, own)]:
            raise ManifestError(
                f"variants: LoRA factors are taken entry by entry, but the ranks of {name} and base.safety differ: "
                f'{", ".join(unequal[:4])}; use "merge": "exact", or a mask in product space'
            )

    def _touched(self, source: Source, method: AnyRealignMethod) -> tuple[str, ...]:
        """The base tensors a realigned model may have a task vector in."""
        if not method.edits_untouched:
            return source.tensors
        aligned = self.bases.aligned_model
        views = [view for tensor in aligned.tensors for view in module_views(aligned, tensor)]
        # A LoRA has no factors for one expert of a stacked tensor: there nothing is added.
        added = {view.tensor for view in views if view.index is None or not source.is_adapter}
        if "harmful" in method.needs and self.bases.harmful is not None:
            added &= set(self.bases.harmful.tensors)
        return tuple(sorted({*source.tensors, *added}))

    def _realigned_rank(self, source: Source, method: AnyRealignMethod, tensors: Iterable[str]) -> int:
        """The largest rank an edited module can have."""
        models = [s.model if s else None for s in (source, self.bases.safety, self.bases.harmful)]
        ranks = source.max_rank
        for tensor in tensors:
            own, safety, harmful = (lora_rank(m, tensor.removesuffix(".weight")) for m in models)
            limit = min(canonical_shape(self.bases.aligned_model, tensor))
            ranks = max(ranks, method.written_rank(Ranks(own, safety, harmful, limit)))
        return ranks

    def _fuse(
        self, name: str, method: AnyFusionMethod, members: Mapping[str, Source | RealignStep], is_adapter: bool
    ) -> FuseStep:
        for place in places(self.bases.aligned_model.tensors).values():
            try:
                method.coefficients([*members], place)
            except ManifestError as e:
                raise ManifestError(f"variants: {name}: {e}") from e
        inputs = {"aligned": self.bases.aligned.identity}
        inputs |= {name: m.identity for name, m in members.items() if isinstance(m, Source)}
        spec: dict[str, Json] = {"method": _literals(method), "models": list(members)}
        tensors = tuple(sorted({tensor for m in members.values() for tensor in m.tensors}))
        curvature = self._curvature(name, method, members, tensors)
        inputs |= {f"{method.curvature}.{name}": found.identity for name, found in curvature.items()}
        read = sum(self.models[name].model.num_bytes for name in members)
        read += sum(found.curvature.num_bytes for found in curvature.values())
        rank = 0
        if is_adapter:
            rank = _fused_rank(members, method)
            write = self._adapter_bytes(tensors, rank)
        else:
            spec["shard_bytes"] = self.manifest.checkpoint.shard_bytes
            read, write = read + self.bases.aligned.model.num_bytes, self.bases.aligned.model.num_bytes
        trims = {n: self._trim(n, member, method) for n, member in members.items()} if method.is_global else {}
        step = FuseStep(
            kind="fuse", name=name, spec=spec, inputs=inputs,
            deps=(*(m for m in members.values() if isinstance(m, Step)), *trims.values()),
            after=tuple(self._survey(name) for name, m in members.items() if isinstance(m, Source)),
            read_bytes=read, write_bytes=write, members=members, trims=trims, curvature=curvature, method=method,
            tensors=tensors, is_adapter=is_adapter, max_rank=rank,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _curvature(
        self, name: str, method: AnyFusionMethod, members: Iterable[str], tensors: Iterable[str]
    ) -> dict[str, CurvatureSource]:
        """Of each member, checked against the tensors that any of them changes; nothing where none is asked for."""
        if method.curvature is None:
            return {}
        uris = {m.name: m.curvature(method.curvature) for m in self.manifest.models if m.name in members}
        found = {model: self.curvatures[uri] for model, uri in uris.items() if uri is not None}
        curvatures = {model: source.curvature for model, source in found.items()}
        may_lack = isinstance(method, RegMean) and method.without_gram == "mean"
        problems = check_curvature(method.curvature, curvatures, self.bases.aligned_model, tensors, may_lack)
        if problems:
            way_out = '; or set fuse.without_gram to "mean"' if isinstance(method, RegMean) else ""
            raise CheckpointError(f"variants: {name}: {'; '.join(problems)}{way_out}")
        return found

    def _trim(self, name: str, member: Source | RealignStep, method: AnyFusionMethod) -> TrimStep:
        aligned = self.bases.aligned_model
        size = sum(math.prod(aligned.tensors[tensor].shape) for tensor in member.tensors)
        ((rank,),) = method.ranks([name], Place(name, 0.0), size).values()
        step = TrimStep(
            kind="trim", name=name, spec={"rank": rank},
            inputs={"aligned": self.bases.aligned.identity}
            | ({"model": member.identity} if isinstance(member, Source) else {}),
            deps=(member,) if isinstance(member, Step) else (),
            after=(self._survey(name),), read_bytes=self.models[name].model.num_bytes + aligned.num_bytes,
            model=member, rank=rank,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _fuses_to_adapter(self, variant: Variant, members: Mapping[str, Source | RealignStep]) -> bool:
        """Whether a fused model is written as a LoRA: where it is one, and where the manifest leaves it the choice."""
        assert variant.fuse is not None
        full = [name for name, member in members.items() if not member.is_adapter]
        reason = None
        if full:
            reason = f"{', '.join(full)} is no adapter, or of a rank over {MAX_SERVED_RANK}"
        elif not variant.fuse.keeps_lora and variant.fuse.max_rank is None:
            reason = f"{variant.fuse.method} makes no product of LoRA factors"
        elif (rank := _fused_rank(members, variant.fuse)) > MAX_SERVED_RANK:
            reason = f"the fused adapter could reach rank {rank}, and vLLM serves at most {MAX_SERVED_RANK}"
        if reason is not None and (variant.fuse.output == "adapter" or variant.fuse.max_rank is not None):
            asked = 'fuse.output is "adapter"' if variant.fuse.output == "adapter" else "fuse.max_rank is given"
            raise ManifestError(
                f"variants: {variant.name}: {asked}, but {reason}; leave models out of the variant, set fuse.max_rank "
                f'to at most {MAX_SERVED_RANK}, or let fuse.output be "auto" without one'
            )
        return variant.fuse.output != "model" and reason is None

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
            "suite": suite.digest, "dtype": evaluation.dtype, "max_model_len": evaluation.max_model_len
        }  # fmt: skip
        if suite.kind != "task":
            spec |= {
                "judge": self.judging.settings,
                "coherence": _literals(evaluation.coherence) if evaluation.coherence else None,
            }
            if evaluation.early_stop is not None:
                gates = self.manifest.gates
                spec["early_stop"] = [evaluation.early_stop.block, gates.cap(suite.kind), gates.confidence]
        inputs = {"aligned": self.bases.aligned.identity}
        if isinstance(weights, Source):
            inputs["candidate"] = weights.identity
        scored = candidate if isinstance(weights, Source) else weights.name
        step = ScoreStep(
            kind="score", name=f"{scored}.{Path(suite.name).stem}", spec=spec, inputs=inputs,
            deps=() if isinstance(weights, Source) else (weights,), after=after,
            candidate=candidate, weights=weights, suite=suite,
        )  # fmt: skip
        self.steps.setdefault(step.key, step)
        return step

    def _adapter_bytes(self, tensors: Iterable[str], rank: int) -> int:
        """Bytes of an adapter of this rank in every one of these modules."""
        shapes = [self.bases.aligned_model.tensors[tensor].shape for tensor in tensors]
        return sum(rank * sum(shape) * LORA_VALUE_BYTES for shape in shapes)


def _fused_rank(members: Mapping[str, Source | RealignStep], method: AnyFusionMethod) -> int:
    """Of a fused LoRA, at most."""
    rank = sum(m.max_rank for m in members.values())
    return rank if method.max_rank is None else min(rank, method.max_rank)


def _modules(tensors: Iterable[str]) -> list[str]:
    return [tensor.removesuffix(".weight") for tensor in tensors]


def _literals(spec: BaseModel) -> dict[str, Json]:
    return spec.model_dump(mode="json")


def _realign_key(manifest: Manifest, variant: Variant) -> str:
    """What makes two variants' realigned models the same: the realign spec, and what else their masks depend on."""
    assert variant.realign is not None
    literals: list[Json] = [_literals(variant.realign)]
    if variant.realign.uses_fusion and variant.fuse is not None:
        literals += [_literals(variant.fuse), [m.name for m in manifest.members(variant)]]
    return digest(literals)


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
