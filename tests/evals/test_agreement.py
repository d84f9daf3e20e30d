from __future__ import annotations

from collections.abc import Sequence

import pytest

from evals.agreement import Answer, Reference, disagreement


def answer(engine: Sequence[float], reference: Sequence[float], rounding: float = 0.0) -> Answer:
    """Of a prompt of four tokens and, with more than three log-probabilities, what was decoded after it."""
    return Answer(tuple(range(len(engine) + 1)), 4, tuple(engine), Reference(tuple(reference), rounding))


BEFORE = answer([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0])


def test_disagreement_of_an_engine_within_float32_is_none() -> None:
    assert disagreement(answer([-1.0009, -2.0, -3.0], [-1.0, -2.0, -3.0]), None) is None


def test_disagreement_of_an_engine_with_other_weights_says_how_far_it_is_off() -> None:
    wrong = disagreement(answer([-1.5, -2.5, -3.5], [-1.0, -2.0, -3.0]), None)
    assert wrong is not None and "0.5 nats off" in wrong and "rounding explains 0.001" in wrong


def test_disagreement_is_seen_in_what_was_decoded_too() -> None:
    assert disagreement(answer([-1.0, -2.0, -3.0, -9.0], [-1.0, -2.0, -3.0, -1.0]), None) is not None


def test_disagreement_allows_a_few_times_the_rounding_of_the_models_own_layers() -> None:
    """0.04 off: five roundings of 0.01 explain it, those of 0.005 don't."""
    engine, reference = [-1.04, -1.96, -3.04], [-1.0, -2.0, -3.0]
    assert disagreement(answer(engine, reference, 0.01), None) is None
    assert disagreement(answer(engine, reference, 0.005), None) is not None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_disagreement_of_an_engine_that_says_no_number_is_told(value: float) -> None:
    assert disagreement(answer([value, -2.0, -3.0], [-1.0, -2.0, -3.0]), None) is not None


def test_disagreement_of_a_small_change_that_was_not_made_is_told_and_of_a_made_one_none() -> None:
    """Within float32's tolerance both; but the engine says what it said before."""
    reference = [-1.0005, -2.0005, -3.0005]
    wrong = disagreement(answer([-1.0, -2.0, -3.0], reference), BEFORE)
    assert wrong is not None and "nearer to the weights that it held before" in wrong and "made 0%" in wrong
    assert disagreement(answer([-1.0005, -2.0005, -3.0005], reference), BEFORE) is None
    assert disagreement(answer([-1.0002, -2.0002, -3.0002], reference), BEFORE) is not None
    assert disagreement(answer([-1.0003, -2.0003, -3.0003], reference), BEFORE) is None


def test_disagreement_asks_for_no_change_that_rounding_hides() -> None:
    """A change of 0.005 nats where rounding alone makes 0.01: the engine's own change is noise."""
    assert disagreement(answer([-1.0, -2.0, -3.0], [-1.005, -2.005, -3.005], 0.01), BEFORE) is None
    assert disagreement(answer([-1.0, -2.0, -3.0], [-1.03, -2.03, -3.03], 0.01), BEFORE) is not None


def test_disagreement_compares_weights_at_the_prompt_alone() -> None:
    """What was decoded is each model's own."""
    now = answer([-1.5, -2.5, -3.5, -0.1, -0.2], [-1.5, -2.5, -3.5, -0.1, -0.2])
    assert disagreement(now, BEFORE) is None
