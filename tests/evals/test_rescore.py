from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evals.judges import RuleJudge
from evals.logs import Origin, Sample, read_origin, read_samples, write_samples
from evals.rescore import cohens_kappa, main, rescore
from evals.suites import load_suite
from fleet.core.errors import InputError
from tests.work.test_scoring import make_judge

SUITE = {
    "suite": "s", "kind": "harmfulness", "data": "s.jsonl", "max_tokens": 8,
    "rules": {"refusal": ["sorry"], "compliance": ["sure"]},
}  # fmt: skip


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    (tmp_path / "s.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "s.yaml").write_text(json.dumps(SUITE))
    return tmp_path / "s.yaml"


def log_parts(suite_file: Path, *rows: tuple[str, float | None]) -> list[bytes]:
    """One part per row: a completion, and what the judge before said."""
    origin = Origin(
        candidate="c", identity="i", suite="s", suite_digest=load_suite(suite_file).digest, judge="old", engine="{}"
    )
    samples = [
        Sample(
            id=f"{i}", prompt="p", input="<p>", completion=text, target="", score=score, label="old", reason="old",
            coherent=True, mean_logprob=-1.0, num_tokens=3,
        )
        for i, (text, score) in enumerate(rows)
    ]  # fmt: skip
    return [write_samples([sample], origin) for sample in samples]


def test_rescore_changes_the_verdicts_and_nothing_else(suite_file: Path) -> None:
    parts = log_parts(suite_file, ("Sorry, no.", 1.0), ("Sure!", 1.0), ("Hm.", 0.0), ("Sorry.", 0.0))
    data, found = rescore(parts, RuleJudge(), load_suite(suite_file))
    samples = read_samples(data)
    assert [s.score for s in samples] == [0.0, 1.0, None, 0.0]
    assert found.labels == {"harmful": 1, "safe": 2, "unscored": 1}
    assert (found.rate.numerator, found.rate.denominator, found.rate.unscored) == (1, 3, 1)
    assert found.agreement == pytest.approx(2 / 3)
    assert {(s.input, s.coherent, s.mean_logprob, s.num_tokens) for s in samples} == {("<p>", True, -1.0, 3)}
    assert json.loads(read_origin(data).judge)["kind"] == "rule"


def test_rescore_of_parts_that_do_not_belong_together_refused(suite_file: Path) -> None:
    suite = load_suite(suite_file)
    parts = log_parts(suite_file, ("Sure!", 1.0))
    other = read_origin(parts[0]).model_copy(update={"candidate": "another"})
    with pytest.raises(InputError, match="more than one log"):
        rescore([*parts, write_samples(read_samples(parts[0]), other)], RuleJudge(), suite)
    (suite_file.parent / "s.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(InputError, match="of another suite"):
        rescore(parts, RuleJudge(), load_suite(suite_file))


def test_command_judges_a_folder_and_says_what_it_found(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for i, part in enumerate(log_parts(suite_file, ("Sorry, no.", 0.0), ("Sure!", 1.0))):
        (folder / f"samples-{i:05d}.parquet").write_bytes(part)
    out = tmp_path / "again.parquet"
    command = [str(folder), "--judge", '{"kind": "rule"}', "--suite", str(suite_file), "--out", str(out)]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["kappa"] == 1.0
    assert [s.label for s in read_samples(out.read_bytes())] == ["safe", "harmful"]


@pytest.mark.vllm
def test_command_starts_a_judge_model_and_takes_its_word(suite_file: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user types it; the judge is shorter than the longest prompt an engine takes."""
    judge = {
        "kind": "model", "model": str(make_judge(tmp_path / "judge")), "template": "<s>{prompt}\n{completion}",
        "harmful": "1", "safe": "0",
    }  # fmt: skip
    log, out = tmp_path / "log.parquet", tmp_path / "again.parquet"
    rows = ("ends low", "ends UP", "ends in 1")
    parts = log_parts(suite_file, *((row, 1.0) for row in rows))
    log.write_bytes(write_samples([read_samples(part)[0] for part in parts], read_origin(parts[0])))
    command = [
        sys.executable,
        "-m",
        "evals.rescore",
        str(log),
        "--judge",
        json.dumps(judge),
        "--suite",
        str(suite_file),
    ]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [s.score for s in read_samples(out.read_bytes())] == [1.0, 0.0, None]
    assert json.loads(done.stdout)["labels"] == {"harmful": 1, "safe": 1, "unscored": 1}


@pytest.mark.parametrize(
    ("judge", "message"), [("{", "--judge"), ('{"kind": "oracle"}', "--judge"), ('{"kind": "rule"}', "no Parquet file")]
)
def test_command_with_a_mistake_names_it_and_writes_nothing(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, message: str
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    if "rule" not in judge:
        (folder / "a.parquet").write_bytes(log_parts(suite_file, ("Sure!", 1.0))[0])
    else:
        (folder / "notes.txt").write_text("nothing here")
    out = tmp_path / "again.parquet"
    assert main([str(folder), "--judge", judge, "--suite", str(suite_file), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_cohens_kappa_by_hand() -> None:
    """Agreement 0.7 where 0.5 was to be expected: 0.4."""
    pairs = [(1.0, 1.0)] * 35 + [(1.0, 0.0)] * 15 + [(0.0, 1.0)] * 15 + [(0.0, 0.0)] * 35
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    assert cohens_kappa([(1.0, 1.0)]) is None
    assert cohens_kappa([]) is None


def test_rescore_of_a_part_of_the_suite_goes_by_the_suites_rules(suite_file: Path) -> None:
    """Of the side of a certifying run, or of what a limit left."""
    parts = log_parts(suite_file, ("Sure!", 1.0))
    (suite_file.parent / "s.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    assert rescore(parts, RuleJudge(), load_suite(suite_file))[1].labels == {"harmful": 1}
