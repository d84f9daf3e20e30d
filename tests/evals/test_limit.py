from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evals.config import Evaluation
from evals.suites import Suite, load_suite, read_prompts
from evals.suites.limit import num_within, within
from evals.suites.split import is_tuning
from fleet.core.errors import SuiteError
from tests.evals.test_tasks import travelled, write_task

PROMPTS = [f"How do I hide sock {i}?" for i in range(40)]


def write_prompts(folder: Path, prompts: list[str] = PROMPTS, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    suite = {"suite": "p", "kind": "harmfulness", "data": "p.jsonl", "max_tokens": 6} | fields
    (folder / "p.yaml").write_text(json.dumps(suite))
    return folder / "p.yaml"


def asked(suite: Suite) -> set[str]:
    return set(read_prompts(suite))


def test_num_within_smallest_limit_counts_and_one_is_always_asked() -> None:
    assert [num_within(limits, 40) for limits in ((), (7,), (50,), (0.25, 12), (0.25, 7), (0.001,))] == [
        40, 7, 40, 10, 7, 1,
    ]  # fmt: skip


def test_within_is_by_content_so_order_changes_nothing_and_new_rows_little() -> None:
    chosen = {PROMPTS[i] for i in within((10,), PROMPTS)}
    back = PROMPTS[::-1]
    assert {back[i] for i in within((10,), back)} == chosen and len(chosen) == 10
    more = [*PROMPTS, "new 1", "new 2"]
    assert len(chosen - {more[i] for i in within((10,), more)}) <= 2
    assert within((3,), ["a", "a", "a", "a"]) == sorted(within((3,), ["a", "a", "a", "a"]))


def test_limited_prompts_are_another_suite_that_knows_its_whole_and_travels(tmp_path: Path) -> None:
    whole = load_suite(write_prompts(tmp_path))
    suite = whole.limited(10)
    assert (suite.num_samples, suite.num_whole, len(asked(suite))) == (10, 40, 10)
    assert suite.digest != whole.digest and asked(suite) < asked(whole)
    assert whole.limited(None) == whole and whole.limited(40).digest == whole.digest
    assert travelled(suite, tmp_path / "node").digest == suite.digest


def test_limit_of_a_suite_and_of_the_manifest_the_smaller_counts(tmp_path: Path) -> None:
    whole, own = load_suite(write_prompts(tmp_path)), load_suite(write_prompts(tmp_path, limit=0.5))
    assert own.digest == whole.digest  # as long as nobody asks
    assert [own.limited(limit).num_samples for limit in (None, 10, 30)] == [20, 10, 20]
    assert own.limited(30).digest == whole.limited(20).digest


def test_limit_comes_after_the_side(tmp_path: Path) -> None:
    side = load_suite(write_prompts(tmp_path)).side("tuning", 0.5)
    suite = side.limited(5)
    assert suite.tunes and len(asked(suite)) == 5 and suite.num_whole == side.num_samples
    assert all(is_tuning(prompt, 0.5) for prompt in asked(suite))


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "10", 0.0])
def test_limit_that_is_none_is_refused_with_the_field(tmp_path: Path, limit: Any) -> None:
    message = "must be a whole number of at least 1, or a share between 0 and 1"
    with pytest.raises(SuiteError, match=rf"p\.yaml: limit is .*{message}"):
        load_suite(write_prompts(tmp_path, limit=limit))
    with pytest.raises(SuiteError, match=rf"own\.yaml: limit is .*{message}"):
        load_suite(write_task(tmp_path, limit=limit))
    with pytest.raises(ValidationError, match=message):
        Evaluation.model_validate({"harmfulness": ["p"], "limit": limit})


def test_limited_task_has_another_digest_only_where_the_limit_binds(tmp_path: Path) -> None:
    whole, own = load_suite(write_task(tmp_path)), load_suite(write_task(tmp_path, limit=2))
    assert whole.limited(None).digest == whole.digest != whole.limited(2).digest
    assert own.digest not in {whole.digest, whole.limited(2).digest}  # its YAML is another
    assert own.limited(None).digest == own.limited(3).digest == own.digest != own.limited(1).digest
    assert own.limited(1).limits == (2, 1)
    assert travelled(own.limited(0.5), tmp_path / "node").limits == (2, 0.5)
    assert load_suite("gsm8k").limited(5).digest != load_suite("gsm8k").digest
