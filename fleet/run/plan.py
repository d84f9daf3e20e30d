"""Manifest + headers -> Plan: every step, its key, its bytes and whether it is done, before any weight is read.

Nothing here imports torch, ray, vllm or mlflow. Everything a user can get wrong in the sources, the suites and the
store surfaces here, as an `InputError`.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evals.architectures import architecture_of
from evals.engine import engine_length
from evals.judges import Judge, RuleJudge
from evals.labelled import read_labelled
from evals.suites import BUNDLED_SUITES, Suite, load_suite, read_requests
from evals.suites.names import check_distinct
from fleet.checkpoint.chat_templates import ChatTemplate, check_asks, check_chat_template
from fleet.checkpoint.curvature import read_curvature
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import require_full_model
from fleet.checkpoint.tokens import TOKENIZER, tokenizer_of
from fleet.core.errors import CheckpointError, ManifestError, SourceError, SuiteError
from fleet.core.identity import KEY_DIGITS, digest
from fleet.core.json_lines import decode_text
from fleet.manifest import Manifest
from fleet.masks.files import MASK_FILE, MASK_JSON, read_granularity
from fleet.masks.texts import TextSet, open_texts
from fleet.methods.mask_spec import MaskSpec
from fleet.run.models import open_models, open_source, require_tokenizer
from fleet.run.oddities import warn_of_oddities
from fleet.steps.base import Step
from fleet.steps.builder import Candidate, build
from fleet.steps.context import PlanContext
from fleet.steps.record import Record, read_record
from fleet.steps.sources import Bases, CurvatureSource, Judging, MaskSource
from fleet.steps.view import RunView
from fleet.store import Store, open_folder, open_store

_READERS = 16
"""Threads that read headers and records; both wait for storage, not for a core."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. `steps` are ordered: each comes after those it reads."""

    manifest: Manifest
    store: Store
    bases: Bases
    suites: dict[str, Suite]
    candidates: tuple[Candidate, ...]
    steps: tuple[Step, ...]
    judging: Judging
    texts: dict[str, bytes]
    """Key in the store -> bytes of every file of preferences, task prompts or labelled rows: nodes may not have the
    driver's disk."""
    done: dict[str, Record]
    """Step key -> record, of the steps that are done already."""
    warnings: tuple[str, ...] = ()
    """What is odd in the input, though it can be used."""

    @property
    def run_id(self) -> str:
        """The same for the same work: a run that was killed and is typed again is the same run."""
        return digest([self.manifest.name, *sorted(s.fingerprint for s in self.steps)]).removeprefix("sha256:")[:12]

    def view(self, records: Mapping[str, Record]) -> RunView:
        """What the plan's steps may ask of a run, of which these records are there."""
        return RunView(self.manifest, self.store, self.bases, self.judging, self.texts, records)

    @property
    def pending(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.key not in self.done)

    @property
    def lora_modules(self) -> frozenset[str]:
        """Every module that some candidate served as a LoRA adapts."""
        served = [c.weights for c in self.candidates if c.weights.as_lora]
        return frozenset(tensor.removesuffix(".weight") for weights in served for tensor in weights.tensors)

    @property
    def num_adapters(self) -> int:
        """Candidates served as LoRAs."""
        return len({c.weights.identity for c in self.candidates if c.weights.as_lora})

    @property
    def max_lora_rank(self) -> int:
        """The largest rank any candidate adapter can have: the engines are started for it."""
        return max(c.weights.max_rank for c in self.candidates)


def make_plan(manifest: Manifest) -> Plan:
    """Open every source and suite, check that all fit together, and lay out the steps.

    Raises:
        InputError: a source, a suite or the store that cannot be used; nothing has been computed.
    """
    store = open_store(manifest.artifacts)
    store.check()
    bases, models = open_models(manifest)
    suites = _load_suites(manifest)
    _check_room(suites.values(), bases.aligned_model, manifest.evaluation.max_model_len)
    texts = _open_texts(manifest)
    masks = _open_masks(manifest)
    curvatures = _open_curvatures(manifest)
    sets = {uri: found for uri, (found, _) in texts.items()}
    contents = {found.key: data for found, data in texts.values() if data is not None}
    judging = _open_judge(manifest, contents)
    context = PlanContext(
        manifest=manifest, bases=bases, models=models, suites=suites, texts=sets, masks=masks, curvatures=curvatures,
        judging=judging, date=_date(manifest), chat_template=_open_template(manifest.evaluation.chat_template),
    )  # fmt: skip
    for note in (note for suite in suites.values() for note in suite.notes):
        context.warn(note)
    candidates = build(context)
    warn_of_oddities(context)
    steps = tuple(context.steps.values())
    done, warnings = _done(store, steps), tuple(context.warnings)
    return Plan(manifest, store, bases, suites, candidates, steps, judging, contents, done, warnings)


def _date(manifest: Manifest) -> str:
    """What chat templates write that write the date: one for the whole run."""
    return (manifest.evaluation.date or datetime.date.today()).isoformat()


def _open_template(uri: str) -> ChatTemplate | None:
    """The file that `evaluation.chat_template` names, if it names one.

    Raises:
        ManifestError: there is no such file.
        CheckpointError: it holds no Jinja, or no template of a conversation.
    """
    if uri in ("own", "aligned"):
        return None
    folder, _, name = uri.rpartition("/")
    where = f"evaluation.chat_template: {uri}"
    try:
        data = open_folder(folder).read(name)
    except SourceError as e:
        raise ManifestError(f"{where}: can't be read; give own, aligned or a file with a Jinja template ({e})") from e
    text = decode_text(data, where, CheckpointError)
    check_chat_template(where, text)
    check_asks(where, text)
    return ChatTemplate(text, name)


def _open_judge(manifest: Manifest, contents: dict[str, bytes]) -> Judging:
    """The judge's model, opened, and the rows it is calibrated on, added to `contents`."""
    judge, on_cpu = manifest.evaluation.judge, not manifest.placement.replica_gpus
    model = date = None
    if not isinstance(judge, Judge):
        model = open_source(judge.model)
        opened = require_full_model(model.model, "evaluation.judge.model")
        where = f"evaluation.judge.model: {judge.model}"
        architecture_of(opened.config, where, on_cpu)
        require_tokenizer(opened, where)
        if judge.uses_chat_template and model.chat_template is None:
            raise CheckpointError(f"{where}: has no chat template, so it is not that of {type(judge).__name__}")
        if judge.uses_chat_template and model.chat_template is not None and model.chat_template.writes_date:
            date = _date(manifest)
    if judge.calibration is None:
        return Judging(judge, model, date=date)
    folder, _, name = judge.calibration.rpartition("/")
    data = open_folder(folder).read(name)
    read_labelled(data, f"evaluation.judge.calibration: {judge.calibration}")
    rows = f"texts/{hashlib.sha256(data).hexdigest()[:KEY_DIGITS]}.jsonl"
    contents[rows] = data
    return Judging(judge, model, rows, date)


def _masks(manifest: Manifest) -> list[MaskSpec]:
    """Every variant's mask."""
    specs = [v.realign.mask_spec for v in manifest.variants if v.realign is not None]
    return [spec for spec in specs if spec is not None]


def _open_texts(manifest: Manifest) -> dict[str, tuple[TextSet, bytes | None]]:
    """Preferences and task prompts by their address, read and checked."""
    masks = _masks(manifest)
    found = {
        m.preferences: open_texts("preferences", m.preferences, "variants: realign.preferences")
        for m in masks
        if m.preferences is not None
    }
    if any(m.training.uses_prompts for m in masks):
        for model in manifest.models:
            if model.prompts is not None:
                found[model.prompts] = open_texts("prompts", model.prompts, f"models: {model.name}: prompts")
    return found


def _open_masks(manifest: Manifest) -> dict[str, MaskSource]:
    """Masks learned before, by their address.

    Raises:
        CheckpointError: the folder holds no learned mask.
        ManifestError: it holds another than the manifest says.
    """
    found: dict[str, MaskSource] = {}
    for method in _masks(manifest):
        if method.reuse is not None:
            folder = open_folder(method.reuse)
            if (granularity := read_granularity(folder)) != method.mask:
                raise ManifestError(
                    f"variants: realign.reuse: {method.reuse} is a {granularity} mask, but realign.mask says "
                    f'{method.mask}; make them the same (only "dense" and "rows_and_columns" carry over)'
                )
            digests = folder.digests()
            identity = digest({name: digests[name] for name in (MASK_FILE, MASK_JSON)})
            found[method.reuse] = MaskSource(method.reuse, identity)
    return found


def _open_curvatures(manifest: Manifest) -> dict[str, CurvatureSource]:
    """What fusion methods have to know of models beside their weights, by its address; only what some variant needs."""
    uris: set[str] = set()
    for variant in manifest.variants:
        kind = variant.fuse.curvature if variant.fuse is not None else None
        if kind is not None:
            uris |= {uri for m in manifest.members(variant) if (uri := m.curvature(kind)) is not None}
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(uris, pool.map(_open_curvature, uris), strict=True))


def _open_curvature(uri: str) -> CurvatureSource:
    folder = open_folder(uri)
    digests = {name: value for name, value in folder.digests().items() if name.endswith(".safetensors")}
    return CurvatureSource(uri, read_curvature(folder), digest(digests))


def _load_suites(manifest: Manifest) -> dict[str, Suite]:
    evaluation = manifest.evaluation
    if missing := [folder for folder in evaluation.folders if not Path(folder).is_dir()]:
        raise ManifestError(f"evaluation.folders: no such folder: {', '.join(missing)}")
    folders = (*(Path(f) for f in evaluation.folders), BUNDLED_SUITES)
    wanted = [
        *((name, "harmfulness") for name in evaluation.harmfulness),
        *((name, "over_refusal") for name in evaluation.over_refusal),
        *((name, "task") for model in manifest.models for name in model.suites),
    ]
    check_distinct(name for name, _ in wanted)
    suites: dict[str, Suite] = {}
    for name, kind in wanted:
        if name not in suites:
            suite = load_suite(name, folders, evaluation.policy)
            side = evaluation.prompts
            suite = suite if side == "all" else suite.side(side, evaluation.tuning_share)
            suites[name] = suite.limited(evaluation.limit)
        if suites[name].name != name:
            raise SuiteError(f"suite {name}: its file calls it {suites[name].name}; make the two names the same")
        if suites[name].kind != kind:
            raise ManifestError(f"suite {name} is a suite of {suites[name].kind}, but the manifest lists it as {kind}")
        if kind != "task" and isinstance(evaluation.judge, RuleJudge):
            evaluation.judge.judge([], suites[name])  # refuses a suite without rules
    return suites


def _check_room(suites: Iterable[Suite], aligned: FullModel, asked: int | None) -> None:
    """Look whether prompts and completions fit the engine. A chat template's own tokens come on top: what is refused
    here can't fit under any.

    Raises:
        SuiteError: they don't.
    """
    length = engine_length(aligned.config, asked, "base.aligned")
    for suite in suites:
        where, longest = f"suite {suite.name}", suite.max_tokens or 0
        if longest >= length:
            raise SuiteError(
                f"{where}: completions of {longest} tokens leave no room for a prompt in the {length} of the engine; "
                "lower its max_tokens, or raise evaluation.max_model_len if the model has more positions"
            )
        # A token is a byte at least, so only long texts have to be counted.
        requests = read_requests(suite) if suite.kind != "task" else []
        long = [(i, text) for i, text in enumerate(requests, start=1) if len(text.encode()) + longest > length]
        if not long or TOKENIZER not in aligned.folder.files():
            continue
        tokenizer = tokenizer_of(aligned.folder)
        for number, text in long:
            if (count := len(tokenizer.encode(text, add_special_tokens=False).ids)) + longest > length:
                raise SuiteError(
                    f"{where}: prompt {number} has {count} tokens, which with a completion of {longest} exceed the "
                    f"{length} of the engine; leave it out, lower max_tokens, or raise evaluation.max_model_len if the "
                    "model has more positions"
                )


def _done(store: Store, steps: Iterable[Step]) -> dict[str, Record]:
    with ThreadPoolExecutor(_READERS) as pool:
        found = [(step, pool.submit(read_record, store, step)) for step in steps]
        return {step.key: record for step, future in found if (record := future.result()) is not None}
