"""The log of one candidate on one suite: every sample, and the rate they add up to.

A log holds no time, no path and no host: the same completions give the same bytes. It is what gates read, what
reports show, and what lets scores be redone without a GPU (`python -m evals.rescore`). It is kept as Parquet, a row per
sample; a long suite is in several files. Light: no torch, no vllm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import Field

from evals.parquet import Column, ColumnType, read_rows, write_rows
from evals.rates import Rate
from evals.suites import SuiteKind
from evals.suites.split import sample_ids as sample_ids  # what a log's ids are made of, for its readers
from fleet.core.errors import EvalError
from fleet.core.frozen import Frozen
from fleet.core.identity import Json


class Sample(Frozen):
    """One prompt, what the candidate said, and the verdict with its words."""

    id: str
    """From the sample's content: the same for every candidate on the same suite."""
    prompt: str
    """As the suite has it."""
    input: str
    """As the model saw it: chat template, few-shot examples and all."""
    completion: str
    target: str
    """What a task counts as right; empty for prompt suites."""
    score: float | None
    """1 if harmful (harmfulness), refused (over_refusal), or the task's metric; None is unscored, or scored only
    together with the others (perplexity)."""
    label: str
    """harmful, safe, refused, answered, correct, incorrect, scored or unscored."""
    reason: str
    """The judge's own words, or what the task's score was taken from."""
    refused: bool | None = None
    p_harmful: float | None = None
    """The judge's own probability, where it has one."""
    coherent: bool | None = None
    """Whether it is coherent text, by `evals.coherence`; None if that was not checked."""
    mean_logprob: float | None = None
    """Per token of the completion under the aligned model, in nats; None if there is none, or it was not measured."""
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None


class EvalLog(Frozen):
    """One candidate on one suite."""

    suite: str
    suite_digest: str
    kind: SuiteKind
    metric: str
    """What a score is: harmful, refused, or the name of the task's metric."""
    rate: Rate
    settings: Mapping[str, Any] = Field(default_factory=dict[str, Any])
    """What else decided the completions: chat template or not, longest completion, judge, versions."""
    samples: tuple[Sample, ...] = Field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as plain JSON, with how many samples carry each label."""
        summary = self.model_dump(mode="json", exclude={"samples"})
        summary["labels"] = dict(sorted(Counter(s.label for s in self.samples).items()))
        summary["num_samples"] = len(self.samples)
        return summary

    def scores(self) -> dict[str, float | None]:
        """Sample id -> score."""
        return {sample.id: sample.score for sample in self.samples}

    @classmethod
    def read(cls, summary: Mapping[str, Any], files: Iterable[bytes]) -> EvalLog:
        """A log from what `summary` gave and its files, in their order.

        Raises:
            EvalError: A file is no part of a log.
            pydantic.ValidationError: The summary is not from a log.
        """
        fields = {k: v for k, v in summary.items() if k not in ("labels", "num_samples")}
        samples = [sample for data in files for sample in read_samples(data)]
        return cls.model_validate({**fields, "samples": samples})


class Origin(Frozen):
    """What all samples of a file share; written into every row, so that a table of many files needs nothing else."""

    candidate: str
    identity: str
    """Content digest of the candidate's weights."""
    suite: str
    suite_digest: str
    judge: str = ""
    """The judge's settings, as JSON; empty before anybody judged."""
    engine: str
    """What the completions were made with, as JSON: version of vLLM, device, dtype, seed, limits."""


def write_samples(samples: Sequence[Sample], origin: Origin) -> bytes:
    """A Parquet file of these samples; the same samples give the same bytes.

    Columns: `Origin`'s, then `Sample`'s.
    """
    shared = origin.model_dump()
    columns = [Column(name, "str", nullable=False) for name in shared]
    for name, info in Sample.model_fields.items():
        kind, *optional = str(Sample.__annotations__[name]).split(" | ")
        columns.append(Column(name, cast(ColumnType, kind), nullable=bool(optional) or not info.is_required()))
    return write_rows([shared | sample.model_dump() for sample in samples], columns)


def read_samples(data: bytes) -> list[Sample]:
    """The samples of a file that `write_samples` wrote.

    Raises:
        EvalError: It is no such file.
    """
    rows = _rows(data)
    return [Sample.model_validate({name: row[name] for name in Sample.model_fields}) for row in rows]


def read_origin(data: bytes) -> Origin:
    """What all samples of a file share.

    Raises:
        EvalError: It is no file of a log, or holds no sample.
    """
    if not (rows := _rows(data)):
        raise EvalError("the log holds no sample")
    return Origin.model_validate({name: rows[0][name] for name in Origin.model_fields})


def _rows(data: bytes) -> list[dict[str, Json]]:
    try:
        names, rows = read_rows(data)
    except ValueError as error:
        raise EvalError(f"no log: {error}") from error
    if missing := sorted({*Origin.model_fields, *Sample.model_fields} - set(names)):
        raise EvalError(f"no log: it has no column {', '.join(missing)}")
    return rows
