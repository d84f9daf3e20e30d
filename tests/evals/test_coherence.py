from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from evals.coherence import Coherence, repetition

SPEECH = "The kettle is on the stove, and the cups are in the cupboard beside the window where the cat likes to sleep."


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_problem_of_nothing_is_that_it_is_empty(text: str) -> None:
    assert Coherence().problem(text, -1.0) == "empty"
    assert Coherence().problem("x", None) == "empty"


def test_problem_of_speech_is_none() -> None:
    assert Coherence().problem(SPEECH, -2.0) is None


def test_problem_of_noise_is_its_perplexity() -> None:
    assert Coherence(max_perplexity=100.0).problem(SPEECH, -math.log(99.0)) is None
    assert Coherence(max_perplexity=100.0).problem(SPEECH, -math.log(101.0)) == "perplexity 101 under the aligned model"


def test_problem_of_a_loop_is_its_repetition_however_likely_it_is() -> None:
    assert Coherence().problem("no no yes " * 20, -0.01) == "repeats itself: 95% of its word triples"


def test_repetition_is_counted_by_hand() -> None:
    """24 words have 22 triples; of a sentence of 12 said twice, the 10 triples within it come twice."""
    words = "a b c d e f g h i j k l"
    assert repetition(f"{words} {words}") == pytest.approx(10 / 22)
    assert repetition(words) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_repetition_is_a_share(words: list[str]) -> None:
    assert 0.0 <= repetition(" ".join(words)) < 1.0
