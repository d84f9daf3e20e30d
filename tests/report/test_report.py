from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evals.calibration import Calibration
from evals.evidence import CorrectedRate, RateEvidence
from evals.rates import Rate
from evals.suites import Suite, SuiteKind
from fleet.core.errors import SuiteError
from fleet.manifest import load_manifest
from fleet.report.gather import make_report, method_summaries
from fleet.report.model import CandidateRow, Report, Score
from fleet.report.pages import report_html
from fleet.report.table import print_report
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan, make_plan
from fleet.steps.builder import Candidate, Role
from tests.catalogue import manifest_document, preference_rows, write_manifest, write_rows
from tests.scored import log_of, settle, write_log, write_scores


def test_gate_compares_a_model_with_itself_when_two_share_a_suite(catalogue: Path, tmp_path: Path) -> None:
    """`lora` is perfect and `full` is not: each is held against its own log, and the fusion against the better."""
    plan = make_plan(load_manifest(write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))))

    def scores(candidate: Candidate, suite: Suite) -> list[float]:
        good = candidate.name != "full" and candidate.role != "fused"
        return [0.0] * 200 if suite.kind == "harmfulness" else [1.0 if good else 0.0] * 200

    records = write_scores(plan, scores)
    gates = {row.name: row.gate for row in make_report(plan, RunResult(records=records)).rows}
    assert gates["lora"] == "pass"
    assert gates["full"] == "pass"
    assert gates["plain"] == "fail"


def test_suite_whose_file_calls_it_otherwise_refused(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text((catalogue / "suites" / "harm.yaml").read_text())
    (tmp_path / "harm.jsonl").write_text('{"prompt": "x"}\n')
    document = manifest_document(catalogue, tmp_path)
    document["evaluation"] |= {"harmfulness": ["other"], "folders": [str(tmp_path), str(catalogue / "suites")]}
    with pytest.raises(SuiteError, match="other: its file calls it harm"):
        make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))


def row_of(
    name: str, role: Role, scores: dict[SuiteKind, list[float | None]], edit_norm: float | None = None
) -> CandidateRow:
    return CandidateRow(
        name=name, role=role, models=(name.split(".")[0],), parameters={}, weights=None, identity="", gate=None,
        reasons=(), edit_norm=edit_norm,
        scores=tuple(Score(suite=k, kind=k, rate=Rate.of(v), samples="") for k, v in scores.items()),
    )  # fmt: skip


def test_method_summaries_are_means_over_models_with_the_counts_behind_them() -> None:
    """Each model counts once, however many of its samples were scored."""
    rows = [
        row_of("a", "finetuned", {"harmfulness": [1.0, 1.0], "task": [1.0]}),
        row_of("b", "finetuned", {"harmfulness": [0.0, 0.0, 0.0, 1.0]}),
        row_of("a.wise_ft", "realigned", {"harmfulness": [0.0, None]}, edit_norm=1.0),
        row_of("b.wise_ft", "realigned", {"harmfulness": [1.0, 0.0]}, edit_norm=3.0),
        row_of("fused", "fused", {"harmfulness": [1.0]}),
    ]
    before, after = method_summaries(rows)
    assert (before.name, before.num_models, before.edit_norm) == ("finetuned", 2, None)
    assert (before.harmfulness.value, before.harmfulness.denominator) == (0.625, 6)
    assert (before.task_accuracy.value, before.task_accuracy.denominator) == (1.0, 1)
    assert before.over_refusal.value is None
    assert (after.name, after.harmfulness.value, after.edit_norm) == ("wise_ft", 0.25, 2.0)
    assert (after.harmfulness.denominator, after.harmfulness.unscored) == (3, 1)


def small_plan(catalogue: Path, tmp_path: Path, **evaluation: Any) -> Plan:
    document = manifest_document(catalogue, tmp_path)
    document["evaluation"] |= evaluation
    return make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))


def printed(report: Report, said: Sequence[str] = ()) -> str:
    console = Console(file=io.StringIO(), width=300)
    print_report(report, console, said)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("aligned", "unaligned", "told"), [(0.3, 0.1, True), (0.1, 0.1, False), (0.1, 0.9, False)])
def test_aligned_model_more_harmful_than_the_unaligned_one_is_a_warning(
    catalogue: Path, tmp_path: Path, aligned: float, unaligned: float, told: bool
) -> None:
    plan = small_plan(catalogue, tmp_path, references=["aligned", "unaligned"])
    harm = {"aligned": aligned, "unaligned": unaligned}

    def scores(candidate: Candidate, suite: Suite) -> list[float]:
        return [1.0 if i < 10 * harm.get(candidate.name, 0.0) else 0.0 for i in range(10)]

    report = make_report(plan, RunResult(records=write_scores(plan, scores)))
    found = [warning for warning in report.warnings if "swapped" in warning]
    assert [text.split(":")[1] for text in found] == [
        " the aligned model was measured more harmful (30.0 %) than the unaligned one (10.0 %)"
    ] * told


def test_warnings_of_the_steps_that_made_a_candidate_are_marked_in_the_table_and_said_below(
    catalogue: Path, tmp_path: Path
) -> None:
    ties = {"method": "ties", "trim": "model"}
    mask = {"method": "somf", "preferences": str(write_rows(tmp_path / "p.jsonl", preference_rows(4)))}
    document = manifest_document(catalogue, tmp_path, variants=[{"name": "v", "realign": mask, "fuse": ties}])
    plan = make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))
    records = write_scores(plan, half_harmful)
    for step in plan.steps:
        if step.kind in ("realign", "mask", "trim", "fuse"):
            said = f"{step.kind} of {step.name}" if step.kind != "realign" else "edits nothing"
            records[step.key] = settle(plan, step, {"warning": said})
    report = make_report(plan, RunResult(records=records))
    assert report.row("lora.somf").warning == "mask of lora; edits nothing"
    assert report.row("v").warning == "trim of lora; trim of rslora; trim of full; fuse of v"
    assert report.row("lora").warning is None
    shown = printed(report)
    assert "lora.somf !" in shown and "v !" in shown and "lora !" not in shown
    assert shown.count("warning: lora.somf: mask of lora; edits nothing") == 1
    assert 'lora.somf <b title="mask of lora; edits nothing">!</b>' in report_html(report)
    same = report.model_copy(
        update={"rows": tuple(row.model_copy(update={"warning": row.warning and "odd"}) for row in report.rows)}
    )
    assert "warning: lora.somf, rslora.somf, full.somf, v: odd" in printed(same)


def half_harmful(candidate: Candidate, suite: Suite) -> list[float | None]:
    """45 of 100 harmful, and one that nobody could tell."""
    return [1.0] * 45 + [0.0] * 55 + [None] if suite.kind == "harmfulness" else [0.0] * 100


@pytest.mark.slow
def test_harm_of_a_calibrated_judge_is_shown_corrected_beside_what_it_said(catalogue: Path, tmp_path: Path) -> None:
    """It finds 9 of 10 harmful rows and takes no harmless one for harmful, so 45 % of its verdicts are 50 %."""
    rows = tmp_path / "labelled.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c", "harmful": true}\n')
    plan = small_plan(catalogue, tmp_path, judge={"kind": "rule", "calibration": str(rows)})
    counts = Calibration(positives=10, true_positives=9, negatives=40, true_negatives=40)
    records = write_scores(plan, half_harmful)
    step = next(s for s in plan.steps if s.kind == "calibrate")
    records[step.key] = settle(plan, step, counts.model_dump())

    report = make_report(plan, RunResult(records=records))

    harm, task = report.row("plain").scores
    assert harm.rate.value == 0.45 and harm.corrected is not None
    assert harm.corrected.value == pytest.approx(0.5)
    expected = CorrectedRate(RateEvidence(45, 101, 1), counts).bounds(0.975)
    assert (harm.corrected.low, harm.corrected.high) == expected
    assert task.corrected is None
    shown = f"corrected 50.0 % [{100 * expected.low:.0f}–{100 * expected.high:.0f}]"
    assert shown in printed(report) and f"<br><small>{shown}</small>" in report_html(report)
    assert "errors the judge made" in printed(report)
    metrics = harm.metrics("h")
    assert metrics["h"] == 0.45 and metrics["h_corrected"] == harm.corrected.value
    assert (metrics["h_corrected_low"], metrics["h_corrected_high"]) == expected


def test_harm_of_a_judge_that_was_not_calibrated_is_not_corrected(catalogue: Path, tmp_path: Path) -> None:
    plan = small_plan(catalogue, tmp_path)
    report = make_report(plan, RunResult(records=write_scores(plan, half_harmful)))
    assert all(score.corrected is None for row in report.rows for score in row.scores)
    assert "corrected" not in printed(report) + "".join(report.row("plain").scores[0].metrics("h"))


def test_suite_that_was_stopped_early_says_how_many_prompts_were_asked(catalogue: Path, tmp_path: Path) -> None:
    plan = small_plan(catalogue, tmp_path, early_stop={"block": 2})
    records = write_scores(plan, lambda *_: [0.0] * 6)
    step = next(c for c in plan.candidates if c.name == "plain").scores["harm"]
    stop = {"decision": "accept", "limit": 0.05, "confidence": 0.95}
    records[step.key] = write_log(plan, step, log_of(plan.suites["harm"], [0.0, 0.0, None, 0.0], {"early_stop": stop}))

    report = make_report(plan, RunResult(records=records))

    assert [score.prompts for score in report.row("plain").scores] == [6, None]
    assert printed(report).count("4 of 6 asked") == report_html(report).count("4 of 6 asked") == 1


def test_suites_within_a_limit_say_how_much_was_asked(catalogue: Path, tmp_path: Path) -> None:
    plan = small_plan(catalogue, tmp_path, limit=2)
    records = write_scores(plan, lambda *_: [0.0] * 2)
    step = next(c for c in plan.candidates if c.name == "plain").scores["task"]
    records[step.key] = write_log(plan, step, log_of(plan.suites["task"], [1.0, 0.0], {"num_whole": 9}))

    report = make_report(plan, RunResult(records=records))

    assert [score.prompts for score in report.row("plain").scores] == [6, 9]
    assert "2 of 6 asked" in printed(report) and "2 of 9 asked" in report_html(report)


def test_incoherent_completions_are_counted_over_the_suites_where_anybody_looked(
    catalogue: Path, tmp_path: Path
) -> None:
    """3 of 4 in one suite, none of the one that could be told in another; on the task nobody looked."""
    (tmp_path / "two.yaml").write_text(
        (catalogue / "suites" / "harm.yaml").read_text().replace("suite: harm", "suite: two")
    )
    shutil.copy(catalogue / "suites" / "harm.jsonl", tmp_path)
    plan = small_plan(
        catalogue, tmp_path, harmfulness=["harm", "two"], folders=[str(tmp_path), str(catalogue / "suites")]
    )
    records = write_scores(plan, lambda *_: [0.0] * 6)
    steps = next(c for c in plan.candidates if c.name == "plain").scores
    looked = {"coherence": {"max_perplexity": 1000.0}}
    broken, fine = (log_of(plan.suites["harm"], [0.0] * n, looked, c) for n, c in ((3, False), (1, True)))
    mixed = broken.model_copy(update={"samples": (*broken.samples, *fine.samples)})
    records[steps["harm"].key] = write_log(plan, steps["harm"], mixed)
    untold = log_of(plan.suites["two"], [0.0], looked)
    told = log_of(plan.suites["two"], [0.0], looked, True)
    both = told.model_copy(update={"samples": (*told.samples, *untold.samples)})
    records[steps["two"].key] = write_log(plan, steps["two"], both)

    report = make_report(plan, RunResult(records=records))

    found = report.row("plain").incoherent
    assert found is not None
    assert (found.numerator, found.denominator, found.unscored) == (3, 5, 1)
    assert report.row("merged").incoherent is None
    assert "incoherent completions: 60.0 % [15–95] (1 unscored) of 5" in report_html(report)
    assert report_html(report).count("incoherent completions") == 1


def test_warning_said_before_the_work_is_not_printed_again_below_the_table() -> None:
    rows = (row_of("a", "finetuned", {"harmfulness": [1.0]}),)
    report = Report(
        run_id="r", name="n", rows=rows, methods=(), computed=0, cached=0, failures={}, seconds=0.0, artifacts="a",
        best=None, warnings=("said before", "found since"),
    )  # fmt: skip
    text = printed(report, said=("said before",))
    assert ("said before" in text, "warning: found since" in text) == (False, True)
