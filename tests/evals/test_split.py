from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.config import Gates
from evals.gates import gate
from evals.suites import BUNDLED_SUITES, Suite, load_suite
from evals.suites.prompts import Prompt
from evals.suites.split import hash_fraction, is_tuning
from fleet.core.errors import SuiteError
from fleet.manifest import load_manifest
from fleet.run.plan import make_plan
from tests.catalogue import manifest_document, write_manifest
from tests.scored import log_of

prompts = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30)
shares = st.floats(0.01, 0.99)


def suite_of(texts: list[str]) -> Suite:
    rows = tuple(Prompt(text) for text in texts)
    return Suite(name="s", kind="harmfulness", digest="", path=None, max_tokens=4, prompts=rows)


def requests(suite: Suite) -> list[str]:
    return [prompt.request for prompt in suite.prompts]


@given(prompts, shares)
def test_sides_of_a_suite_have_every_prompt_once_and_mix_none(given_prompts: list[str], share: float) -> None:
    suite = suite_of(given_prompts)
    tuning, certifying = ([p for p in given_prompts if is_tuning(p, share) == side] for side in (True, False))
    for side, expected in (("tuning", tuning), ("certifying", certifying)):
        if expected:
            assert requests(suite.side(side, share)) == expected
        else:
            with pytest.raises(SuiteError, match=f"none is {side}"):
                suite.side(side, share)


@given(st.text(), shares, shares)
def test_tuning_prompts_of_a_share_tune_at_every_larger_one(prompt: str, a: float, b: float) -> None:
    assert is_tuning(prompt, max(a, b)) or not is_tuning(prompt, min(a, b))


def test_tuning_share_is_about_the_share_of_the_prompts() -> None:
    count = sum(is_tuning(f"prompt {i}", 0.3) for i in range(10_000))
    assert count == pytest.approx(3_000, abs=3 * (10_000 * 0.3 * 0.7) ** 0.5)


def test_sides_of_a_suite_differ_in_digest_and_keep_it_where_they_travel(tmp_path: Path) -> None:
    suite = load_suite("demo_harmful+prefix", [BUNDLED_SUITES])
    tuning, certifying = suite.side("tuning", 0.5), suite.side("certifying", 0.5)
    assert len({suite.digest, tuning.digest, certifying.digest}) == 3
    for file, data in tuning.contents().items():
        (tmp_path / file).write_bytes(data)
    assert load_suite(tmp_path / str(tuning.entry)).digest == tuning.digest


def test_side_of_a_task_is_the_whole_task() -> None:
    task = load_suite("demo_sorting", [BUNDLED_SUITES])
    assert task.side("tuning", 0.5) is task


def test_gate_passes_on_certifying_prompts_and_fails_but_never_passes_on_tuning_ones() -> None:
    gates = Gates(harmfulness_margin=None, coherence_margin=None)
    for side, outcome in (("certifying", "pass"), ("tuning", "not enough evidence")):
        suite = replace(suite_of([f"prompt {i}" for i in range(9)]).side(side, 0.5), name="s")
        assert gate({"s": log_of(suite, [0.0] * 100)}, {}, [suite], gates).outcome == outcome
        assert gate({"s": log_of(suite, [1.0] * 100)}, {}, [suite], gates).outcome == "fail"
    (reason,) = gate({"s": log_of(suite, [0.0] * 100)}, {}, [suite], gates).reasons
    assert "on prompts that tune; certify on the others" in reason


def test_plan_of_certifying_prompts_asks_none_that_tune(catalogue: Path, tmp_path: Path) -> None:
    asked: dict[str, set[str]] = {}
    for side in ("tuning", "certifying", "all"):
        document = manifest_document(catalogue, tmp_path)
        document["evaluation"] |= {"prompts": side}
        asked[side] = set(
            requests(make_plan(load_manifest(write_manifest(tmp_path / "m.json", document))).suites["harm"])
        )
    assert not asked["tuning"] & asked["certifying"]
    assert asked["tuning"] | asked["certifying"] == asked["all"]


def test_split_copies_that_differ_in_form_alone_are_on_one_side() -> None:
    assert hash_fraction("How  do I\nBake bread?") == hash_fraction(" how do i bake BREAD? ")
    assert hash_fraction("ﬁne") == hash_fraction("fine")
    assert hash_fraction("bake bread") != hash_fraction("bake breads")
    # Pinned: another hash would move prompts from one night to the next.
    assert hash_fraction("bake bread") == pytest.approx(0.1294257254972, abs=1e-12)
