"""What is asked next on a suite's way through scoring, with units that are done by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evals.judging import fault
from evals.logs import Origin, Sample, write_samples
from fleet.manifest import load_manifest
from fleet.run.plan import Plan, make_plan
from fleet.steps.base import NextUnit
from fleet.steps.record import attempt_prefix
from fleet.steps.score import ScoreStep, SuiteWalk
from fleet.store.entry import FileEntry
from fleet.work.judging import JudgeUnit
from fleet.work.scoring import CohereUnit, CompleteUnit
from fleet.work.served import Served
from fleet.work.unit import Found, UnitRecord
from tests.catalogue import manifest_document, write_manifest

NUM_PROMPTS = 100
ORIGIN = Origin(candidate="c", identity="i", suite="many", suite_digest="d", engine="{}")


@pytest.fixture
def suites(tmp_path: Path) -> Path:
    folder = tmp_path / "suites"
    folder.mkdir()
    config = {
        "suite": "many", "kind": "harmfulness", "data": "many.jsonl", "max_tokens": 4,
        "rules": {"refusal": ["no"], "compliance": ["yes"]},
    }  # fmt: skip
    (folder / "many.yaml").write_text(json.dumps(config))
    (folder / "many.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(NUM_PROMPTS)))
    return folder


def plan_with(catalogue: Path, tmp_path: Path, suites: Path, **evaluation: Any) -> Plan:
    document = manifest_document(catalogue, tmp_path)
    document["evaluation"] |= {"harmfulness": ["many"], "folders": [str(suites), str(catalogue / "suites")]}
    document["evaluation"] |= evaluation
    return make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))


PHASE_OF: dict[type, str] = {CompleteUnit: "complete", CohereUnit: "cohere", JudgeUnit: "judge"}


class Night:
    """A walk whose units are done at once, each with the score given for all its prompts."""

    def __init__(self, plan: Plan, score: float, coherent: bool = True) -> None:
        self.plan = plan
        self.coherent = coherent
        self.score = score
        step = plan.candidates[0].scores["many"]
        assert isinstance(step, ScoreStep)
        self.step = step
        self.finished: dict[int, Found] = {}
        self.asked: list[NextUnit] = []

    def walk(self, finished: dict[int, Found] | None = None, attempt: str = "a") -> SuiteWalk:
        self.finished = {} if finished is None else finished
        return SuiteWalk(self.step, Served("c", "i", "w", False), self.plan.view({}), attempt, self.finished)

    def go(self, walk: SuiteWalk, most: int = 1000) -> list[str]:
        """The phases that were asked for, until there is nothing left or `most` were."""
        phases: list[str] = []
        while len(phases) < most and (units := walk.next()):
            (coming,) = units
            self.asked.append(coming)
            walk.finished[coming.index] = self.done(coming)
            phases.append(PHASE_OF[type(coming.unit)])
        return phases

    def done(self, coming: NextUnit) -> UnitRecord:
        match coming.unit:
            case CompleteUnit(indices=indices, completions=key):
                samples = [
                    Sample(
                        id=str(i), prompt=f"p{i}", input="", completion="", target="", score=None, label="", reason=""
                    )
                    for i in indices
                ]
                self.plan.store.create(key, write_samples(samples, ORIGIN))
                return UnitRecord()
            case CohereUnit(mean_logprobs=key):
                self.plan.store.create(key, b"[-1.0]")
                return UnitRecord()
            case JudgeUnit(completions=key, file=file):
                data = self.plan.store.read(key)
                assert data is not None
                from evals.logs import read_samples

                judged = [
                    s.model_copy(update={"score": self.score, "coherent": self.coherent}) for s in read_samples(data)
                ]
                data = write_samples(judged, ORIGIN)
                self.plan.store.replace(f"{attempt_prefix(self.step, 'a')}/{file}", data)
                return UnitRecord(files={file: FileEntry.of(data)}, result={"faults": [fault(s) for s in judged]})


def test_walk_without_early_stop_asks_every_prompt_in_one_block(catalogue: Path, tmp_path: Path, suites: Path) -> None:
    night = Night(plan_with(catalogue, tmp_path, suites), 0.0)
    walk = night.walk()
    assert night.go(walk) == ["complete", "cohere", "judge"]
    assert [coming.keeps_record for coming in night.asked] == [False, False, True]  # the store has what others made
    first, second, last = (coming.unit for coming in night.asked)
    assert isinstance(first, CompleteUnit) and first.indices == tuple(range(NUM_PROMPTS))
    assert isinstance(second, CohereUnit) and isinstance(last, JudgeUnit)
    assert (second.completions, second.mean_logprobs) == (last.completions, last.mean_logprobs)
    log = walk.log()
    assert (len(log.samples), log.rate.numerator) == (NUM_PROMPTS, 0.0)
    assert [*walk.finished[night.asked[-1].index].files] == ["samples-00000.parquet"]


def test_walk_without_coherence_does_not_ask_for_it(catalogue: Path, tmp_path: Path, suites: Path) -> None:
    night = Night(plan_with(catalogue, tmp_path, suites, coherence=None), 0.0)
    assert night.go(night.walk()) == ["complete", "judge"]
    last = night.asked[-1].unit
    assert isinstance(last, JudgeUnit) and last.mean_logprobs is None


def test_walk_interrupted_anywhere_asks_for_the_rest_alone(catalogue: Path, tmp_path: Path, suites: Path) -> None:
    plan = plan_with(catalogue, tmp_path, suites, early_stop={"block": 40})
    whole = Night(plan, 0.0)
    whole.go(whole.walk())
    for stop in range(len(whole.asked)):
        shutil.rmtree(Path(plan.store.uri, "completions"))
        night = Night(plan, 0.0)
        before = night.go(night.walk(), most=stop)
        after = night.go(night.walk(night.finished))
        assert [u.index for u in night.asked] == [u.index for u in whole.asked], (before, after)


def test_walk_of_another_judge_asks_the_judge_alone(catalogue: Path, tmp_path: Path, suites: Path) -> None:
    night = Night(plan_with(catalogue, tmp_path, suites), 0.0)
    night.go(night.walk())
    assert night.go(night.walk(attempt="b")) == ["judge"]


def test_walk_whose_completions_were_swept_asks_for_them_again(catalogue: Path, tmp_path: Path, suites: Path) -> None:
    """A unit's record is no proof of an object that is no longer there."""
    for most in (1, 2):
        night = Night(plan_with(catalogue, tmp_path, suites), 0.0)
        night.go(night.walk(), most=most)
        shutil.rmtree(Path(night.plan.store.uri, "completions"))
        assert night.go(night.walk(night.finished)) == ["complete", "cohere", "judge"]
        shutil.rmtree(Path(night.plan.store.uri, "completions"))


@pytest.mark.parametrize(
    ("score", "coherent", "decision"), [(0.0, True, "accept"), (1.0, True, "reject"), (0.0, False, "reject")]
)
def test_walk_with_early_stop_ends_once_the_cap_is_decided(
    catalogue: Path, tmp_path: Path, suites: Path, score: float, coherent: bool, decision: str
) -> None:
    night = Night(plan_with(catalogue, tmp_path, suites, early_stop={"block": 20}), score, coherent)
    walk = night.walk()
    night.go(walk)
    log = walk.log()
    blocks = [u.unit.indices for u in night.asked if isinstance(u.unit, CompleteUnit)]
    asked = [i for block in blocks for i in block]
    assert log.settings["early_stop"]["decision"] == decision
    assert len(set(asked)) == len(asked) == len(log.samples) < NUM_PROMPTS
    assert asked != sorted(asked)
    assert {len(block) for block in blocks} == {20}
