"""lm-eval's evaluator on our replicas, and our own prompt suites: what a candidate says, sample by sample.

Imports lm_eval (and with it torch) but not vllm: a session is handed in. Nothing here reads a cache that outlives
the process: the data of a file suite are read from its files, and a task object is kept under its suite's digest.
"""

# lm-eval ships no type stubs, and types few of its members.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env as task_templates
from lm_eval.utils import (
    handle_non_serializable,  # pyright: ignore[reportUnknownVariableType]
)

from evals.engine import Completion
from evals.lm import FleetLM
from evals.logs import EvalLog, Sample, sample_ids
from evals.rates import Rate
from evals.suites import Suite, TaskPart, read_prompts, read_requests
from evals.suites.limit import within
from evals.turn import Turn
from fleet.core.errors import EvalError, SuiteError

if TYPE_CHECKING:
    from evals.session import Session

_plain = cast(Callable[[object], object], handle_non_serializable)

logger = logging.getLogger(__name__)

# What lm-eval itself seeds its few-shot samplers with.
_FEWSHOT_SEED = 1234

# lm-eval compiles a task's templates for every document anew, which took a third of its evaluator's time.
task_templates.from_string = lru_cache(maxsize=1024)(task_templates.from_string)  # type: ignore[method-assign]

_idle_tasks: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
"""Suite digest -> lm-eval's task dictionaries that nobody is using; a task keeps the requests of whoever does."""


def complete(session: Session, suite: Suite, indices: Sequence[int] | None = None) -> list[Sample]:
    """What a candidate says to the prompts of a harmfulness or over-refusal suite; nobody has judged it yet.

    Args:
        session: Serves the candidate.
        suite: A prompt suite.
        indices: Which prompts, in which order; None takes all.

    Raises:
        SuiteError: The suite is a task.
        EvalError: A completion is missing.
    """
    if suite.kind == "task" or suite.max_tokens is None:
        raise SuiteError(f"suite {suite.name} is a task of lm-eval; run_task runs it")
    all_prompts, requests = read_prompts(suite), read_requests(suite)
    ids = sample_ids(all_prompts)
    chosen = range(len(ids)) if indices is None else indices
    prompts = [all_prompts[i] for i in chosen]
    inputs = [session.chat_prompt(requests[i]) if suite.chat else requests[i] for i in chosen]
    completions = session.generate(inputs, suite.max_tokens, templated=suite.chat)
    return [
        Sample(
            id=ids[i],
            prompt=prompt,
            input=text,
            completion=completion.text,
            target="",
            score=None,
            label="unscored",
            reason="not judged",
            num_prompt_tokens=completion.num_prompt_tokens,
            num_tokens=completion.num_tokens,
            finish_reason=completion.finish_reason,
        )
        for i, prompt, text, completion in zip(chosen, prompts, inputs, completions, strict=True)
    ]


def mean_logprobs(session: Session, samples: Sequence[Sample], templated: bool) -> list[float | None]:
    """Mean log probability per token, in nats, of each completion after its input; None of an empty completion.

    Under the aligned model this is what tells a broken model's noise from speech: exp(-mean) is the perplexity.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    where: list[int] = []
    for index, sample in enumerate(samples):
        start = len(session.encode(sample.input, templated))
        whole = session.encode(sample.input + sample.completion, templated)[: session.options.max_model_len - 1]
        if len(whole) > start:
            pairs.append((whole[:start], whole[start:]))
            where.append(index)
    means: list[float | None] = [None] * len(samples)
    for index, (_, rest), likelihood in zip(where, pairs, session.loglikelihood(pairs), strict=True):
        means[index] = round(likelihood.logprob / len(rest), 4)
    return means


def run_task(session: Session, suite: Suite, chat: bool | None = None, confidence: float = 0.95) -> EvalLog:
    """lm-eval's evaluator on a task suite; the score is the first metric of each task, under its first filter.

    A group or a tag of lm-eval is scored as all its tasks' samples together.

    Args:
        session: Serves the candidate.
        suite: A task suite.
        chat: Whether to apply the candidate's chat template; None does if it has one.
        confidence: Of the rate's interval.

    Raises:
        SuiteError: lm-eval does not take the task, or its tasks have unlike metrics.
        EvalError: A sample is missing.
    """
    templated = bool(session.tokenizer.chat_template) if chat is None else chat
    # One thread at a time in lm-eval, whose tasks draw from process-wide random numbers; the engine's work is outside.
    turn = Turn(import_folders(suite))
    with turn:
        idle = _idle_tasks[suite.digest]
        tasks = idle.pop() if idle else load_tasks(suite)
        lm = FleetLM(session, templated, turn)
        # A task object is used for candidate after candidate: without this each would get other few-shot examples.
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(_FEWSHOT_SEED)
        _seed()
        results = cast(
            dict[str, Any],
            evaluate(lm, tasks, bootstrap_iters=0, log_samples=True, apply_chat_template=templated),
        )
        log = _task_log(suite, tasks, results, lm, confidence)
        idle.append(tasks)
    return log


def _task_log(
    suite: Suite, loaded: Mapping[str, Any], results: Mapping[str, Any], lm: FleetLM, confidence: float
) -> EvalLog:
    tasks = cast(Mapping[str, Task], loaded["tasks"])
    if lm.num_truncated:
        logger.warning("suite %s: %d prompts lost their beginning", suite.name, lm.num_truncated)
    scored = [_task_samples(task, results["samples"][name], lm.completions) for name, task in sorted(tasks.items())]
    if len({(t.metric, t.higher_is_better, t.is_mean) for t in scored}) != 1:
        metrics = sorted({t.metric for t in scored})
        raise SuiteError(
            f"suite {suite.name}: its tasks have unlike metrics ({', '.join(metrics)}); name them one by one"
        )
    samples = [sample for task in scored for sample in task.samples]
    rate = Rate.of([s.score for s in samples], confidence, scored[0].higher_is_better)
    if not scored[0].is_mean:
        rate = _aggregate_rate(suite, results, scored[0], len(samples), confidence)
    return EvalLog(
        suite=suite.name,
        suite_digest=suite.digest,
        kind="task",
        metric=scored[0].metric,
        rate=rate,
        settings={
            "chat": lm.templated,
            "filter": scored[0].filter,
            "num_truncated": lm.num_truncated,
            **({"num_whole": loaded["num_whole"]} if suite.limits else {}),
        },
        samples=tuple(samples),
    )


def load_tasks(suite: Suite) -> dict[str, Any]:
    """lm-eval's task dictionary for a suite, built anew.

    Raises:
        SuiteError: The suite is no task, or lm-eval does not take it.
    """
    if suite.kind != "task":
        raise SuiteError(f"suite {suite.name} holds prompts; complete runs it")
    _seed()
    try:
        tasks = _load_parts(suite.parts) if suite.parts else cast(dict[str, Any], TaskManager().load([suite.name]))
    except (TypeError, ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        where = suite.path or "lm-eval's own"
        raise SuiteError(f"suite {suite.name} ({where}): lm-eval does not take it: {error}") from error
    _check_runnable(suite, tasks["tasks"])
    return _limited(suite, tasks) if suite.limits else tasks


def import_folders(suite: Suite) -> tuple[Path, ...]:
    """Where the Python of a suite finds modules that lie beside it: the folders of its YAML files."""
    own = set(suite.files)
    return tuple(dict.fromkeys(yaml.parent for part in suite.parts for yaml in reversed(part.files) if yaml in own))


def _check_runnable(suite: Suite, tasks: Mapping[str, Task]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise SuiteError(
                f"suite {suite.name}: {name} runs code that models write, or needs images; neither is supported"
            )


def _load_parts(parts: Sequence[TaskPart]) -> dict[str, Any]:
    tasks = {part.name: _load_part(part) for part in parts}
    return {"tasks": tasks, "groups": {}, "group_map": {}}


def _load_part(part: TaskPart) -> Task:
    config: dict[str, Any] = {}
    for file in part.files:
        config |= load_yaml(file, recursive=False)
    config |= part.overrides
    for key in ("include", "limit", "tag", "task_list"):
        config.pop(key, None)
    config["task"] = part.name
    manager = TaskManager(include_defaults=False)
    if part.data is None:
        return manager.load([config])["tasks"][part.name]
    # datasets keeps what it read under the file's path and time, not its content; so it gets a cache of its own, and
    # holds the rows in memory. It takes a file's name for a pattern or an address, so it gets plain names.
    with tempfile.TemporaryDirectory() as scratch:
        given = cast(dict[str, Any], config.get("dataset_kwargs") or {})
        options = {key: value for key, value in given.items() if key not in ("data_dir", "data_files")}
        files = {
            split: [_plain_link(Path(scratch), f"{split}-{i}", file) for i, file in enumerate(files)]
            for split, files in part.data.splits.items()
        }
        config["dataset_path"] = part.data.format
        config["dataset_kwargs"] = {
            **options, "data_files": files, "cache_dir": f"{scratch}/cache", "keep_in_memory": True
        }  # fmt: skip
        return manager.load([config])["tasks"][part.name]


def _plain_link(folder: Path, stem: str, file: Path) -> str:
    link = folder / f"{re.sub(r'[^0-9A-Za-z-]', '_', stem)}{''.join(file.suffixes[-2:])}"
    link.symlink_to(file.absolute())
    return str(link)


def _limited(suite: Suite, loaded: dict[str, Any]) -> dict[str, Any]:
    """The tasks, of which only the documents within the suite's limits are asked, of all tasks together.

    What is in the prompt of a document is what it would be without the limit: few-shot examples are drawn for one
    document after the other, so requests are built for all, and those beyond the limit are dropped.
    """
    tasks = cast(dict[str, Task], loaded["tasks"])
    documents = [
        (name, i, doc) for name, task in tasks.items() for i, doc in enumerate(cast(Iterable[object], task.eval_docs))
    ]
    chosen: defaultdict[str, set[int]] = defaultdict(set)
    for index in within(suite.limits, [f"{name} {_content(doc)}" for name, _, doc in documents]):
        name, i, _ = documents[index]
        chosen[name].add(i)
    for name, indices in chosen.items():
        _ask_only(tasks[name], indices)
    kept = {name: task for name, task in tasks.items() if name in chosen}
    return {**loaded, "tasks": kept, "groups": {}, "group_map": {}, "num_whole": len(documents)}


def _content(document: object) -> str:
    """A document as the text that lm-eval hashes."""
    text = json.dumps(document, indent=2, default=_plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _ask_only(task: Task, indices: Set[int]) -> None:
    build = cast(Callable[..., None], task.build_all_requests)
    whole = cast(Callable[..., Iterator[tuple[int, Any]]], task.doc_iterator)

    def build_asked(**options: Any) -> None:
        task.doc_iterator = whole  # type: ignore[method-assign]
        build(**options)
        task.doc_iterator = iterate_asked  # type: ignore[method-assign]
        asked = [instance for instance in task.instances if instance.doc_id in indices]
        task._instances = asked  # pyright: ignore[reportPrivateUsage]

    def iterate_asked(**options: Any) -> Iterator[tuple[int, Any]]:
        return ((i, document) for i, document in whole(**options) if i in indices)

    task.build_all_requests = build_asked  # type: ignore[method-assign]
    task.doc_iterator = iterate_asked  # type: ignore[method-assign]


def _seed() -> None:
    """What lm-eval's own entry point seeds: tasks may shuffle documents with either."""
    random.seed(0)
    np.random.seed(_FEWSHOT_SEED)


@dataclass(frozen=True)
class _TaskSamples:
    """One task's samples, and what their scores are."""

    name: str
    metric: str
    filter: str
    higher_is_better: bool
    is_mean: bool
    """Whether the metric is the mean of a number per sample."""
    samples: list[Sample]


def _task_samples(
    task: Task,
    logged: Sequence[Mapping[str, Any]],
    completions: Mapping[tuple[str | None, int | None], Completion],
) -> _TaskSamples:
    name = task.task_name
    # lm-eval's base class declares no return types; every task it can build returns dictionaries here.
    aggregation = cast(dict[str, Any], task.aggregation())
    higher_is_better = cast(dict[str, bool], task.higher_is_better())
    metric = next(iter(aggregation))
    first = logged[0]["filter"]
    kept = [sample for sample in logged if sample["filter"] == first]
    num_documents = sum(1 for _ in task.doc_iterator())
    if len(kept) != num_documents:
        raise EvalError(f"task {name}: {len(kept)} samples for {num_documents} documents")
    values = [sample.get(metric) for sample in kept]
    is_mean = getattr(aggregation[metric], "__name__", "") == "mean" and all(
        value is None or isinstance(value, int | float | np.number) for value in values
    )
    ids = sample_ids([f"{name} {sample['doc_hash']}" for sample in kept])
    return _TaskSamples(
        name,
        metric,
        first,
        bool(higher_is_better.get(metric, True)),
        is_mean,
        [
            _task_sample(task, id_, sample, value, is_mean, completions.get((name, sample["doc_id"])))
            for id_, sample, value in zip(ids, kept, values, strict=True)
        ],
    )


def _task_sample(
    task: Task,
    id_: str,
    logged: Mapping[str, Any],
    value: Any,
    is_mean: bool,
    completion: Completion | None,
) -> Sample:
    # A sample's part in a metric over all samples (perplexity) is no score of its own.
    score = float(value) if is_mean and value is not None else None
    label = "unscored" if value is None else {None: "scored", 1.0: "correct", 0.0: "incorrect"}.get(score, "scored")
    arguments, target = logged["arguments"], logged["target"]
    if isinstance(task, ConfigurableTask) and task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(logged["doc"])
        logprobs = [float(response[0][0]) for response in logged["resps"]][: len(choices)]
        text = str(choices[int(np.argmax(logprobs))])
        target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
        reason = "log likelihoods: " + ", ".join(
            f"{choice!r} {logprob:.4f}" for choice, logprob in zip(choices, logprobs, strict=False)
        )
    else:
        text = _text(logged["resps"][0][0])
        reason = f"taken from {_text(logged['filtered_resps'][0])!r}"
    return Sample(
        id=id_,
        prompt=str(cast(object, task.doc_to_text(logged["doc"]))),
        input=str(arguments[0][0]),
        completion=text,
        target=str(target),
        score=score,
        label=label,
        reason=reason,
        num_prompt_tokens=completion.num_prompt_tokens if completion else None,
        num_tokens=completion.num_tokens if completion else None,
        finish_reason=completion.finish_reason if completion else None,
    )


def _aggregate_rate(
    suite: Suite,
    results: Mapping[str, Any],
    task: _TaskSamples,
    num_samples: int,
    confidence: float,
) -> Rate:
    """A metric over all samples at once, such as perplexity: lm-eval's value, without bounds."""
    if len(results["results"]) != 1:
        raise SuiteError(
            f"suite {suite.name}: {task.metric} is no mean over samples, so its tasks cannot be pooled; name one"
        )
    value = float(results["results"][task.name][f"{task.metric},{task.filter}"])
    return Rate(
        numerator=value * num_samples,
        denominator=num_samples,
        unscored=0,
        value=value,
        low=None,
        high=None,
        confidence=confidence,
        binary=False,
        higher_is_better=task.higher_is_better,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
