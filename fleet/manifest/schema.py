"""What a user asks for, as types: a mistake in a manifest surfaces here, as one line with the field and the fix.

Sources, suites and stores are looked at next, by `fleet.run.plan`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from evals.config import Evaluation, Gates, check_early_stop
from fleet.checkpoint.curvature import CurvatureKind
from fleet.core.frozen import Frozen
from fleet.core.uris import Uri, absolute
from fleet.fusion import AnyFusionMethod
from fleet.methods import AnyRealignMethod

RESERVED_NAMES = ("aligned", "unaligned", "safety")
"""What the base models are called; no model of the catalogue may be."""


def _absolute_tracking(value: str, info: ValidationInfo) -> str:
    value = re.sub(r"^[A-Za-z]+(?=:)", lambda scheme: scheme[0].lower(), value)
    if driver := re.match(r"sqlite\+(\w+):", value):
        raise ValueError(f"MLflow takes no driver {driver[1]} of SQLite; write sqlite:///mlflow.db")
    if value.startswith("sqlite:"):
        if (file := re.fullmatch(r"sqlite:///(?!:memory:)(.+)", value)) is None:
            raise ValueError(f"{value} names no file that stays; write sqlite:///mlflow.db")
        return f"sqlite:///{absolute(file[1], info)}"
    if value == "databricks":
        return value
    for mistaken, meant in (("databricks-uc", "databricks"), ("postgres://", "postgresql://")):
        if value.startswith(mistaken):
            raise ValueError(f"MLflow keeps no runs at {mistaken}; write {value.replace(mistaken, meant)}")
    if server := re.fullmatch(r"(?:https?:/*)?((?:localhost|[\w.-]+(?=:\d))(?::\d+)?(?:/.*)?)", value):
        if not re.match(r"https?://", value):
            raise ValueError(f"{value} is no address; of a server, write http://{server[1]}")
    elif re.match(r"https?:(?!//.)", value):
        raise ValueError(f"{value} is no address; of a server, write http://HOST:5000")
    elif re.match(r"(?!file:)[a-z0-9+-]+://.", value) is None:
        path = re.sub(r"^[a-z]+:/*(?=/)|/+$", "", value)
        file = path if path.endswith((".db", ".sqlite", ".sqlite3")) else f"{path}/mlflow.db"
        raise ValueError(f"MLflow keeps runs in no plain folder or file any more; write sqlite:///{file}")
    return value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]


class Base(Frozen):
    """The aligned model that all models were tuned from, and the models that say what safety is in its weights."""

    unaligned: Uri | None = None
    """The model the aligned one was aligned from; the displacement V is aligned − unaligned. Only what reads V needs
    it: most realign methods, the survey, and `unaligned` among the references."""
    aligned: Uri
    """The aligned model every model of the catalogue was fine-tuned from."""
    safety: Uri | None = None
    """A safety LoRA on the aligned model, for the methods that merge with one."""
    harmful: Uri | None = None
    """A LoRA that makes the aligned model harmful, for RESTA, whose safety vector is the way back from it."""

    @property
    def models(self) -> dict[str, str]:
        """Role -> address of the full models given."""
        given = {"aligned": self.aligned, "unaligned": self.unaligned}
        return {role: uri for role, uri in given.items() if uri is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source given, the aligned model's first."""
        given = (self.aligned, self.unaligned, self.safety, self.harmful)
        return tuple(uri for uri in given if uri is not None)


class ModelSpec(Frozen):
    """One fine-tuned model of the catalogue."""

    name: Name
    """What it is called in the table and in variants."""
    source: Uri
    """A folder, `s3://bucket/prefix` or `hf://org/name@commit` with a full model or a PEFT LoRA adapter."""
    suites: tuple[str, ...] = ()
    """The task suites this model was fine-tuned for."""
    prompts: Uri | None = None
    """Prompts of its task with replies, as JSON lines of `prompt` and `response`. A mask can be trained to leave what
    the model says to them as it is."""
    fisher: Uri | None = None
    """Folder with the diagonal of its Fisher information, as tensors of its weights' names and shapes. The fusion
    method `fisher` needs it."""
    gram: Uri | None = None
    """Folder with the Gram matrices of its Linears' inputs, (d_in, d_in), under the weights' names. The fusion method
    `regmean` needs it."""

    def curvature(self, kind: CurvatureKind) -> str | None:
        """The folder given for a kind of curvature, if any."""
        return {"fisher": self.fisher, "gram": self.gram}[kind]


class Variant(Frozen):
    """One way to realign and fuse the catalogue."""

    name: Name
    """What its fused model is called in the table."""
    realign: AnyRealignMethod | None
    """How each model is realigned; null leaves them as fine-tuned."""
    fuse: AnyFusionMethod | None
    """How the realigned models become one; null leaves them apart."""
    models: tuple[Name, ...] | None = None
    """Which models take part; all, if not given."""


class Survey(Frozen):
    """What is measured of every task vector."""

    directions: int = Field(default=0, ge=0)
    """Along how many of V's leading directions the energy of every task vector is measured, for the report. What a
    method asks for is measured in any case."""


class Tracking(Frozen):
    """Where MLflow keeps the runs."""

    uri: Annotated[str, Field(min_length=1), AfterValidator(_absolute_tracking)] = "sqlite:///mlflow.db"
    """`sqlite:///file.db` or a server's address."""
    experiment: str = "fleet"
    """The experiment that the runs are in; it is made if it isn't there."""
    register_as: Name | None = None
    """Name under which fused variants are registered; the best one that passes the gates gets the alias `realigned`."""


class VocabularyOf(Frozen):
    """The vocabulary of one model of the catalogue."""

    model: Name
    """A full model with a tokenizer of its own."""


class Checkpoint(Frozen):
    """How full models are read and written."""

    shard_bytes: int = Field(default=2_000_000_000, gt=0)
    """A shard's tensors add up to at most this, unless one tensor alone is larger; one shard is one unit of work."""
    vocabulary: Literal["refuse", "aligned", "union"] | VocabularyOf = "refuse"
    """What is done with models whose embedding tables have other rows than the aligned model's. `refuse` ends the run
    with a list of them. The others match rows by token and bring all models into one vocabulary: `aligned` drops added
    tokens, `union` appends those of all models, `{"model": NAME}` takes that model's, with its numbering and tokenizer.
    """


class Placement(Frozen):
    """On how many workers the work runs, and what each takes. Part of no step's key: what tensor workers write has the
    same bytes whatever stands here, and a mask that is trained on other workers or threads is the same to rounding."""

    workers: int = Field(default=2, ge=1)
    """Tensor workers: Ray actors that survey, realign, trim and fuse."""
    worker_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs of one tensor worker."""
    worker_memory_bytes: int = Field(default=0, ge=0)
    """Memory that Ray reserves for each of them; 0 reserves none."""
    replicas: int = Field(default=1, ge=1)
    """vLLM replicas."""
    judges: int = Field(default=1, ge=1)
    """vLLM replicas of a judge that is a model; each takes as many CPUs and GPUs as a replica."""
    candidates_per_replica: int = Field(default=16, ge=1)
    """Candidates that a replica scores at the same time, in the same batches; as many adapters are in its memory. A
    judge that isn't a model judges as many suites at the same time."""
    replica_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs of one replica."""
    replica_gpus: int = Field(default=0, ge=0)
    """GPUs of one replica, which is its tensor-parallel size; 0 runs on the CPU."""
    kv_cache_bytes: int = Field(default=256 << 20, gt=0)
    """KV cache of a CPU replica; a GPU replica uses vLLM's own default."""
    trainings: int = Field(default=1, ge=1)
    """Masks learned at the same time."""
    training_workers: int = Field(default=1, ge=1)
    """Workers of one training, over which the model, its task vector and the logits are sharded."""
    training_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs of each worker of a training."""
    training_gpus: Literal[0, 1] = 0
    """GPUs of each worker of a training."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Preference pairs or prompts per forward pass of a training's worker; the gradients of a batch's passes are added.
    Null takes the whole batch in one pass."""
    activation_checkpointing: bool = False
    """Whether trainings compute activations again in the backward pass instead of keeping them: slower, less memory."""
    checkpoint_every: int = Field(default=40, ge=1)
    """Updates between a training's checkpoints."""
    training_timeout_seconds: float = Field(default=86400.0, gt=0.0)
    """A training that runs longer is taken for hung."""
    retries: int = Field(default=3, ge=0)
    """How often a unit of work is tried again after its worker died."""
    unit_timeout_seconds: float = Field(default=3600.0, gt=0.0)
    """A unit of work that runs longer is taken for hung: its worker is killed, and it is tried again."""


class Manifest(Frozen):
    """Everything one run is asked to do."""

    schema_: Literal[1] = Field(alias="schema")
    """Version of the manifest's format."""
    editor_schema: str | None = Field(default=None, alias="$schema", exclude=True)
    """Where an editor finds this JSON Schema; it has no effect."""
    name: Name
    """What the run is called."""
    base: Base
    """The base models."""
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    """The catalogue: the fine-tuned models."""
    variants: tuple[Variant, ...] = ()
    """The ways of realigning and fusing that are tried. Without any, the models are only scored as they are."""
    survey: Survey = Survey()
    """What is measured of every task vector."""
    evaluation: Evaluation
    """How models are scored."""
    gates: Gates = Gates()
    """What a fused model must reach to be published."""
    tracking: Tracking = Tracking()
    """Where MLflow keeps the runs."""
    artifacts: Uri
    """The store: a folder or `s3://bucket/prefix`."""
    checkpoint: Checkpoint = Checkpoint()
    """How full models are read and written."""
    placement: Placement = Placement()
    """On how many workers the work runs."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        self._check_names()
        self._check_vocabulary()
        self._check_displacement()
        for variant in self.variants:
            where = f"variants: {variant.name}"
            self._check_members(where, variant)
            self._check_weights(where, variant)
            self._check_mask(where, variant)
            self._check_curvature(where, variant)
            self._check_adapters(where, variant)
        return self

    @model_validator(mode="after")
    def _e_processes_apply(self) -> Manifest:
        check_early_stop(self.evaluation, self.gates)
        return self

    def _check_names(self) -> None:
        models = self._model_names
        refuse_duplicates("models", models)
        refuse_duplicates("variants", [v.name for v in self.variants])
        if reserved := sorted(set(models) & set(RESERVED_NAMES)):
            raise ValueError(f"models: {', '.join(reserved)} names a base model; choose another name")

    def _check_vocabulary(self) -> None:
        vocabulary, models = self.checkpoint.vocabulary, self._model_names
        if isinstance(vocabulary, VocabularyOf) and vocabulary.model not in models:
            raise ValueError(
                f"checkpoint.vocabulary: no model is named {vocabulary.model}; there are {', '.join(models)}"
            )

    def _check_displacement(self) -> None:
        """The unaligned model is there if anything reads V, or scores it."""
        if self.base.unaligned is not None:
            return
        readers = {v.name: v.realign.method for v in self.variants if v.realign and v.realign.reads_displacement}
        asks = [f"variants: {', '.join(f'{name} ({method})' for name, method in readers.items())}"] if readers else []
        if "unaligned" in self.evaluation.references:
            asks.append("evaluation.references: unaligned")
        if self.survey.directions:
            asks.append(f"survey.directions: {self.survey.directions}")
        if asks:
            raise ValueError(
                f"base.unaligned is not given, but is read for {'; '.join(asks)}: set it to the model that the aligned "
                "one was aligned from, or leave these out"
            )

    def _check_members(self, where: str, variant: Variant) -> None:
        """The models a variant lists are models of the catalogue, each once, and not none."""
        if variant.models is None:
            return
        refuse_duplicates(f"{where}: models", variant.models)
        models = self._model_names
        if unknown := sorted(set(variant.models) - set(models)):
            raise ValueError(f"{where}: no model is named {', '.join(unknown)}; there are {', '.join(models)}")
        if not variant.models:
            raise ValueError(f"{where}: models is empty; leave it out to take all")

    def _check_weights(self, where: str, variant: Variant) -> None:
        """Fusion weights are of the variant's models; they don't add up to nothing where that is divided by."""
        if variant.fuse is None or not variant.fuse.weights:
            return
        weights, members = variant.fuse.weights, variant.models or self._model_names
        if unknown := sorted(set(weights) - set(members)):
            raise ValueError(f"{where}: fuse.weights names {', '.join(unknown)}, not among its models")
        constant = [w for m in members if isinstance(w := weights.get(m, 1.0), int | float)]
        if not any(constant) and len(constant) == len(members):
            raise ValueError(f"{where}: fuse.weights are all 0; give at least one another weight")
        if variant.fuse.divides_by_weights and len(constant) == len(members) and sum(constant) <= 0.0:
            raise ValueError(f"{where}: fuse.weights must add up to more than 0")

    def _check_mask(self, where: str, variant: Variant) -> None:
        method = variant.realign.mask_spec if variant.realign is not None else None
        if method is None:
            return
        if method.learn_on == "fusion":
            _check_mask_of_fusion(where, variant.fuse)
        if method.learned_on is not None and method.learned_on not in self._model_names:
            raise ValueError(f"{where}: realign.learned_on: no model is named {method.learned_on}")
        learners = [m.name for m in self.members(variant)] if method.learned_on is None else [method.learned_on]
        bare = [m.name for m in self.models if m.name in learners and m.prompts is None]
        if method.reuse is None and method.training.uses_prompts and bare:
            raise ValueError(
                f"{where}: realign.training measures the divergence on task prompts, but {', '.join(bare)} has none; "
                "set models.prompts"
            )

    def _check_curvature(self, where: str, variant: Variant) -> None:
        """Every model has what the fusion method needs of it beside its weights."""
        kind = variant.fuse.curvature if variant.fuse is not None else None
        if variant.fuse is None or kind is None:
            return
        if bare := [m.name for m in self.members(variant) if m.curvature(kind) is None]:
            raise ValueError(
                f"{where}: {variant.fuse.method} needs models.{kind}, but {', '.join(bare)} has none; set it, or "
                "leave the model out of the variant's models"
            )

    def _check_adapters(self, where: str, variant: Variant) -> None:
        """The base has the adapters that the realign method needs."""
        for role in ("safety", "harmful"):
            if variant.realign is not None and role in variant.realign.needs and getattr(self.base, role) is None:
                raise ValueError(f"{where}: {variant.realign.method} needs a {role} adapter; set base.{role}")

    @property
    def _model_names(self) -> Sequence[str]:
        return [m.name for m in self.models]

    def members(self, variant: Variant) -> tuple[ModelSpec, ...]:
        """The models that take part in a variant, in the manifest's order."""
        return tuple(m for m in self.models if variant.models is None or m.name in variant.models)


def refuse_duplicates(where: str, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a name is there twice; `where` is what the message calls them.
    """
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{where}: duplicate names: {', '.join(twice)}; give each its own")


def _check_mask_of_fusion(where: str, fuse: AnyFusionMethod | None) -> None:
    """A mask can be learned through the fusion: worker by worker on its own rows, of task vectors alone."""
    if fuse is None:
        raise ValueError(f"{where}: realign.learn_on is fusion, but fuse is null; say how the models are fused")
    if not fuse.is_entrywise:
        raise ValueError(
            f"{where}: realign.learn_on is fusion, but {fuse.method} needs whole matrices, and a "
            "training holds rows of them; learn on the models, or fuse entry by entry"
        )
    if fuse.curvature is not None or fuse.reads_aligned:
        raise ValueError(
            f"{where}: realign.learn_on is fusion, but {fuse.method} reads more than task vectors, "
            "which a training doesn't hold; learn on the models, or fuse with another method"
        )
    if fuse.is_global:
        raise ValueError(
            f"{where}: realign.learn_on is fusion, but fuse.trim is model, whose threshold moves with every "
            'draw of the mask; set fuse.trim to "tensor", or learn on the models'
        )
