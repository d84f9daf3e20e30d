"""The log of one candidate on one suite: every sample, and the rate they add up to.

A log holds no time, no path and no host: the same completions give the same bytes. It is what gates read, what
reports show, and what lets scores be redone without a GPU. Light: no torch, no vllm.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from evals.rates import Rate
from evals.suites import SuiteKind


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Sample(_Part):
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
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None


class EvalLog(_Part):
    """One candidate on one suite."""

    suite: str
    suite_digest: str
    kind: SuiteKind
    metric: str
    """What a score is: harmful, refused, or the name of the task's metric."""
    rate: Rate
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """What else decided the completions: chat template or not, longest completion, judge, versions."""
    samples: tuple[Sample, ...] = Field(repr=False)

    def samples_jsonl(self) -> str:
        """One JSON object per sample and line, in the suite's order."""
        return "".join(_line(sample.model_dump(mode="json")) for sample in self.samples)

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
    def read(cls, summary: Mapping[str, Any], samples_jsonl: str) -> EvalLog:
        """A log from what `summary` and `samples_jsonl` gave.

        Raises:
            pydantic.ValidationError: They are not from a log.
        """
        fields = {k: v for k, v in summary.items() if k not in ("labels", "num_samples")}
        samples = [json.loads(line) for line in samples_jsonl.split("\n") if line]
        return cls.model_validate({**fields, "samples": samples})


def sample_ids(contents: Sequence[str]) -> list[str]:
    """An id for each sample of a suite, from its content; the n-th copy of a content gets an id of its own."""
    seen: Counter[str] = Counter()
    ids: list[str] = []
    for content in contents:
        text = json.dumps([content, seen[content]])
        seen[content] += 1
        ids.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return ids


def _line(value: Mapping[str, Any]) -> str:
    # ASCII on purpose: a line separator inside a completion must not end the line for any reader.
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
