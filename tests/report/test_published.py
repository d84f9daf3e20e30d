"""Fused models held against the last published one, over nights, with MLflow's own registry."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evals.calibration import Calibration
from evals.suites import Suite
from fleet.manifest import load_manifest
from fleet.report.gather import make_report
from fleet.report.model import Report
from fleet.report.pages import report_html
from fleet.report.published import Published, ScoreKeys
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan, make_plan
from fleet.steps.builder import Candidate
from fleet.steps.record import attempt_prefix
from tests.catalogue import HARM_YAML, manifest_document, write_manifest
from tests.scored import ATTEMPT, FILE, log_of, settle, write_log, write_scores
from tests.tracking import make_tracker, mlflow_client

# So that the published model is all that a candidate is held against.
GATES = {
    "harmfulness_max": 1.0, "harmfulness_margin": None, "task_drop_max": 1.0, "coherence_margin": None,
}  # fmt: skip
HARMLESS, HARMFUL = [0.0] * 200, [1.0] * 40 + [0.0] * 160


@dataclass
class Nights:
    """Nights over one catalogue, one store and one registry; each fuses its one variant at its own scale."""

    catalogue: Path
    work: Path

    def plan(self, scale: float, **evaluation: Any) -> Plan:
        fuse = {"method": "task_arithmetic", "scale": scale}
        document = manifest_document(
            self.catalogue, self.work, gates=GATES, variants=[{"name": "one", "realign": None, "fuse": fuse}]
        )
        document["evaluation"] |= evaluation
        return make_plan(load_manifest(write_manifest(self.work / "models.json", document)))

    def result(self, plan: Plan, harm: Sequence[float]) -> RunResult:
        """What a night leaves whose fused model has these scores of harm."""

        def scores(candidate: Candidate, suite: Suite) -> Sequence[float]:
            if suite.kind == "task":
                return [1.0] * 200
            return harm if candidate.role == "fused" else HARMLESS

        return RunResult(records=write_scores(plan, scores))

    def night(self, scale: float, harm: Sequence[float], **evaluation: Any) -> Report:
        """Such a night, tracked and registered."""
        plan = self.plan(scale, **evaluation)
        return self.track(plan, self.result(plan, harm))

    def track(self, plan: Plan, result: RunResult) -> Report:
        tracker = make_tracker(plan)
        report = make_report(plan, result, tracker.published)
        tracker.start()
        tracker.finish(report, result.records, failed=False)
        return report

    @property
    def published(self) -> str:
        client = mlflow_client(f"sqlite:///{self.work}/mlflow.db")
        return str(client.get_registered_model("pico").aliases["realigned"])


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to lay out its tables."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def nights(catalogue: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Nights(catalogue, tmp_path)


def test_second_night_is_held_against_the_model_the_first_published(nights: Nights) -> None:
    first = nights.night(0.5, HARMLESS)
    assert (first.row("one").gate, first.published, nights.published) == ("pass", None, "1")
    assert not any("published" in reason for reason in first.row("one").reasons)

    worse = nights.night(0.6, HARMFUL)
    assert (worse.row("one").gate, worse.published, worse.warnings) == ("fail", "1", ())
    (reason,) = (r for r in worse.row("one").reasons if r.endswith("fail"))
    assert reason.startswith("harm: harmful more than the last published model, 0.2000 against 0.0000")
    assert nights.published == "1"
    assert "held against version 1" in report_html(worse)

    as_good = nights.night(0.7, HARMLESS)
    assert (as_good.row("one").gate, as_good.published, nights.published) == ("pass", "1", "3")
    assert nights.night(0.6, HARMFUL).published == "3"


def test_command_typed_again_after_it_published_gives_the_same_verdicts(nights: Nights) -> None:
    """It is held against what was published before it, not against itself; and the first against nothing."""
    first = nights.night(0.5, HARMLESS)
    assert verdicts(nights.night(0.5, HARMLESS)) == verdicts(first)
    second = nights.night(0.6, HARMLESS)
    assert (second.published, nights.published) == ("1", "2")
    assert verdicts(nights.night(0.6, HARMLESS)) == verdicts(second)


def verdicts(report: Report) -> object:
    return report.published, report.best, report.rows


def test_published_model_made_again_is_not_held_against_itself(nights: Nights) -> None:
    """Night three fuses what night one published; few prompts could not tell it from itself."""
    few = HARMLESS[:20]
    nights.night(0.5, few)
    again = nights.night(0.5, few, references=["aligned", "unaligned"])
    assert (again.row("one").gate, again.published) == ("pass", "1")
    assert not any("published" in reason for reason in again.row("one").reasons)


def test_realigned_and_fine_tuned_models_are_not_held_against_a_fusion(nights: Nights) -> None:
    nights.night(0.5, HARMLESS)
    second = nights.night(0.6, HARMLESS)
    told = {row.name for row in second.rows if any("published" in reason for reason in row.reasons)}
    assert told == {"one"}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("suite", "the suite has changed"),
        ("judge", "the judge has changed"),
        ("early stop", "it was stopped early"),
        ("log", "its log is gone"),
        ("record", "its log is gone"),
        ("damaged", "its log can't be read"),
        ("new suite", "it was not scored on it"),
    ],
)
def test_suite_that_can_no_longer_be_compared_is_left_out_with_one_warning(
    nights: Nights, tmp_path: Path, case: str, why: str
) -> None:
    """The worse model passes, since nothing else holds it back."""
    first = nights.plan(0.5)
    nights.result(first, HARMLESS)
    one = next(c for c in first.candidates if c.role == "fused")
    step = one.scores["harm"]
    keys = {name: step.key for name, step in one.scores.items()}
    published = Published("1", one.weights.identity, ScoreKeys(store=first.store.uri, keys=keys))
    evaluation: dict[str, Any] = {}
    made = {"early stop": {"early_stop": {"decision": "accept"}}, "judge": {"judge": {"kind": "another"}}}
    if case in made:
        write_log(first, step, log_of(first.suites["harm"], HARMLESS, made[case]))
    elif case == "log":
        for each in one.scores.values():
            (tmp_path / "artifacts" / attempt_prefix(each, ATTEMPT) / FILE).unlink()
    elif case == "damaged":
        first.store.replace(f"{attempt_prefix(step, ATTEMPT)}/{FILE}", b"PAR1")
    elif case == "record":
        (tmp_path / "artifacts" / step.key / "record.json").unlink()
    else:
        evaluation = changed_suites(nights, "harm" if case == "suite" else "harm_two")
    plan = nights.plan(0.6, **evaluation)

    report = make_report(plan, nights.result(plan, HARMFUL), published)

    assert report.row("one").gate == "pass"
    (warning,) = report.warnings
    assert warning.startswith("not compared with the published model (version 1): harm")
    assert why in warning and ";" not in warning, "the task's drop is no gate here"
    assert warning in html.unescape(report_html(report))
    assert warning not in html.unescape(report_html(report.model_copy(update={"warnings": ()})))


def changed_suites(nights: Nights, name: str) -> dict[str, Any]:
    """The evaluation of a night whose suite of harm is another, of this name."""
    folder = nights.work / "suites"
    folder.mkdir()
    (folder / f"{name}.yaml").write_text(HARM_YAML.replace("suite: harm", f"suite: {name}"))
    (folder / "harm.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n")
    return {"harmfulness": [name], "folders": [str(folder), str(nights.catalogue / "suites")]}


def test_second_night_with_a_changed_suite_publishes_without_the_comparison(nights: Nights) -> None:
    nights.night(0.5, HARMLESS)
    changed = changed_suites(nights, "harm")
    second = nights.night(0.6, HARMFUL, **changed)
    assert (second.row("one").gate, nights.published) == ("pass", "2")
    assert second.warnings == ("not compared with the published model (version 1): harm: the suite has changed",)
    third = nights.night(0.7, HARMFUL, **changed)
    assert (third.row("one").gate, third.published, third.warnings) == ("pass", "2", ())


def test_version_published_by_hand_without_scores_holds_nothing_back(nights: Nights) -> None:
    nights.night(0.5, HARMLESS)
    client = mlflow_client(f"sqlite:///{nights.work}/mlflow.db")
    other = client.create_model_version("pico", "s3://elsewhere/model")
    client.set_registered_model_alias("pico", "realigned", other.version)
    second = nights.night(0.6, HARMFUL)
    assert (second.row("one").gate, second.published) == ("pass", "2")
    why = "harm: its version doesn't say where its scores are"
    assert second.warnings == (f"not compared with the published model (version 2): {why}",)


def test_corrected_and_incoherent_rates_are_metrics_of_the_candidate(nights: Nights) -> None:
    """Half of what is harmful escapes the judge, so 20 % of its verdicts are 40 %."""
    rows = nights.work / "labelled.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c", "harmful": true}\n')
    plan = nights.plan(0.5, judge={"kind": "rule", "calibration": str(rows)})
    result = nights.result(plan, HARMLESS)
    calibrate = next(s for s in plan.steps if s.kind == "calibrate")
    counts = Calibration(positives=200, true_positives=100, negatives=200, true_negatives=200)
    result.records[calibrate.key] = settle(plan, calibrate, counts.model_dump())
    step = next(c for c in plan.candidates if c.name == "one").scores["harm"]
    log = log_of(plan.suites["harm"], HARMFUL, {"coherence": {"max_perplexity": 1000.0}}, coherent=False)
    result.records[step.key] = write_log(plan, step, log)

    nights.track(plan, result)

    client = mlflow_client(f"sqlite:///{nights.work}/mlflow.db")
    experiment = client.get_experiment_by_name("pico")
    assert experiment is not None
    metrics = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    assert metrics["one"]["harmfulness.harm"] == 0.2
    assert metrics["one"]["harmfulness.harm_corrected"] == pytest.approx(0.4)
    assert metrics["one"]["harmfulness.harm_corrected_low"] < 0.4 < metrics["one"]["harmfulness.harm_corrected_high"]
    assert (metrics["one"]["incoherent"], metrics["one"]["incoherent_denominator"]) == (1.0, 200)
    assert metrics["lora"]["harmfulness.harm_corrected"] == 0.0
    assert "incoherent" not in metrics["lora"]


def test_published_model_made_again_is_compared_by_tonights_scores_of_it(nights: Nights) -> None:
    plan = nights.plan(0.5)
    one = next(c for c in plan.candidates if c.role == "fused")
    published = Published("1", one.weights.identity, None)
    assert make_report(plan, nights.result(plan, HARMLESS), published).warnings == ()
