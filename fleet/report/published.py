"""The scores of the model that was published last, read back from the store they were written to.

The registry's version with the alias `realigned` carries a tag that says where they are: the store, and the key of each
suite's score step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from evals.logs import EvalLog
from evals.suites import Suite
from fleet.core.errors import EvalError, SourceError, StoreError
from fleet.core.frozen import Frozen
from fleet.report.results import read_log
from fleet.steps.record import read_record_at
from fleet.store import open_store


class ScoreKeys(Frozen):
    """Where the scores of a registered version are; a tag of that version holds this as JSON."""

    store: str
    """URI."""
    keys: dict[str, str]
    """Suite name -> key of the step that scored it."""


@dataclass(frozen=True)
class Published:
    """A version of the registry that this run's fused models are compared with."""

    version: str
    identity: str
    """The fingerprint of the step that made it; empty if the version doesn't say."""
    scores: ScoreKeys | None
    """None if the version doesn't say where they are."""


def read_published(
    published: Published, suites: Iterable[Suite], aligned: Mapping[str, EvalLog]
) -> tuple[dict[str, EvalLog], str | None]:
    """Suite -> the published model's log, where this run's can be compared with it; and one line that says on which
    suites they can't be compared, and why, or None.

    Args:
        published: What was published last.
        suites: The suites to compare on, as they are in this run.
        aligned: Suite name -> this run's log of the aligned model, which says what judges in this run.
    """
    logs: dict[str, EvalLog] = {}
    reasons: dict[str, str] = {}
    for suite in suites:
        found = _comparable(published.scores, suite, aligned.get(suite.name))
        if isinstance(found, EvalLog):
            logs[suite.name] = found
        else:
            reasons[suite.name] = found
    if not reasons:
        return logs, None
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return logs, f"not compared with the published model (version {published.version}): {why}"


def _comparable(scores: ScoreKeys | None, suite: Suite, aligned: EvalLog | None) -> EvalLog | str:
    """The published model's log on a suite, or why this run's logs cannot be compared with it."""
    if scores is None:
        return "its version doesn't say where its scores are"
    if suite.name not in scores.keys:
        return "it was not scored on it"
    try:
        store = open_store(scores.store)
        record = read_record_at(store, scores.keys[suite.name])
        log = None if record is None else read_log(store, record)
    except (StoreError, SourceError, EvalError, ValidationError) as e:
        return f"its log can't be read ({str(e).splitlines()[0]})"
    if log is None:
        return "its log is gone"
    if log.suite_digest != suite.digest:
        return "the suite has changed"
    if "early_stop" in log.settings:
        return "it was stopped early"
    if aligned is not None and log.settings.get("judge") != aligned.settings.get("judge"):
        return "the judge has changed"
    return log
