from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.checkpoint.chat_templates import prompting
from fleet.core.errors import CheckpointError
from fleet.masks.batches import IGNORED, Batch, Text, collate, encode
from fleet.masks.objective import (
    TEACHER_TOKENS,
    coarse,
    divergence,
    dpo_losses,
    margins,
    reply_log_probs,
    reply_logits,
)
from tests.pico import SPECIAL_TOKENS, VOCAB_SIZE, make_model

SEEDS = st.integers(0, 2**31)
CPU = torch.device("cpu")
EOS = SPECIAL_TOKENS.index("</s>")
TEXTS = [
    Text((1, 30, 31, 32, 33), (40, 41, EOS)),
    Text((1, 50), (60, 61, 62, 63, 64, EOS)),
    Text((1, 20, 21), (EOS,)),
    Text((7,), (8, 9)),
]
"""Of unequal lengths on both sides; the longest prompt is not the longest reply's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("objective"), 0, dtype="float32")


@pytest.fixture(scope="module")
def network(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- DPO -------------------------------------------------------------------------------------------------------------


def test_margins_by_hand() -> None:
    policy = torch.tensor([[-1.0, -5.0], [-4.0, -2.0]])
    reference = torch.tensor([[-2.0, -4.0], [-3.0, -4.0]])
    # (−1 + 2) − (−4 + 3) = 2 and (−5 + 4) − (−2 + 4) = −3.
    assert torch.equal(margins(policy, reference), torch.tensor([2.0, -3.0]))


def test_dpo_losses_by_hand() -> None:
    found = dpo_losses(torch.tensor([0.0, 10.0, -10.0, -1e6]), 0.1)
    expected = [math.log(2.0), math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.0)), 1e5]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_dpo_loss_of_the_reference_itself_is_log_two() -> None:
    same = normal(0, 2, 5)
    torch.testing.assert_close(dpo_losses(margins(same, same), 0.3), torch.full((5,), math.log(2.0)))


# -- log-probabilities of a real model -------------------------------------------------------------------------------


def by_hand(network: Any, text: Text) -> float:
    """log π(reply | prompt) of one text by itself: no padding, no mask, no positions, all logits."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([text.prompt + text.reply])).logits[0].double()
    log_probs = logits.log_softmax(dim=-1)
    return sum(float(log_probs[len(text.prompt) + i - 1, token]) for i, token in enumerate(text.reply))


def test_reply_log_probs_of_a_batch_equal_each_text_by_itself(network: Any) -> None:
    with torch.no_grad():
        found = reply_log_probs(network, collate(TEXTS, CPU))
    assert found.dtype == torch.float32
    expected = torch.tensor([by_hand(network, text) for text in TEXTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_reply_log_probs_know_which_reply_is_whose(network: Any) -> None:
    """A label, a position or a mask that is off by one would pass between texts that are alike."""
    alone = torch.tensor([by_hand(network, text) for text in TEXTS])
    assert float((alone[:, None] - alone[None, :]).abs().add(torch.eye(4)).min()) > 0.1
    with torch.no_grad():
        turned = reply_log_probs(network, collate(TEXTS[::-1], CPU))
    torch.testing.assert_close(turned.flip(0), alone, rtol=1e-4, atol=1e-4)


def test_reply_logits_predict_each_reply_token_from_the_one_before(network: Any) -> None:
    text = TEXTS[1]
    with torch.no_grad():
        whole = network(input_ids=torch.tensor([text.prompt + text.reply])).logits[0]
        found = reply_logits(network, collate([text], CPU))
    assert found.shape == (1, len(text.reply), VOCAB_SIZE)
    torch.testing.assert_close(found[0], whole[len(text.prompt) - 1 : -1], rtol=1e-4, atol=1e-4)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_collate_by_hand() -> None:
    batch = collate([Text((5, 6), (7,)), Text((8,), (9, 10, 11))], CPU)
    expected = Batch(
        torch.tensor([[5, 6, 7, 0, 0], [0, 8, 9, 10, 11]]),
        torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
        torch.tensor([[0, 1, 2, 2, 2], [0, 0, 1, 2, 3]]),
        torch.tensor([[7, IGNORED, IGNORED], [9, 10, 11]]),
    )
    for found, wanted in zip(batch, expected, strict=True):
        assert torch.equal(found, wanted)


def test_encode_writes_a_users_turn_in_the_chat_template(tokenizer: Any) -> None:
    text = encode(tokenizer, "Hi?", "No.", 64)
    assert tokenizer.decode(text.prompt) == "<s><|user|>Hi?<|assistant|>"
    assert tokenizer.decode(text.reply) == "No.</s>"
    assert text.reply[-1] == EOS


def test_encode_writes_the_date_that_the_tokenizer_is_given(tokenizer: Any) -> None:
    tokenizer.chat_template = '{{ strftime_now("%d %b") }}{{ messages[0]["content"] }}'
    text = encode(prompting(tokenizer, None, "2031-02-03"), "Hi?", "No.", 64)
    assert tokenizer.decode(text.prompt).endswith("03 FebHi?")


def test_encode_without_a_chat_template_is_the_prompt_as_the_tokenizer_begins_texts(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    text = encode(tokenizer, "Hi?", "No.", 64)
    assert tokenizer.decode(text.prompt) == "<s>Hi?"
    assert tokenizer.decode(text.reply) == "No.</s>"


@pytest.mark.parametrize(
    ("prompt", "reply", "limit", "expected"),
    [
        ("abc", "de", 6, ("abc", "de$")),
        ("abcdefgh", "uv", 8, ("defgh", "uv$")),  # the reply is short, so the prompt keeps more than half
        ("abcdefgh", "tuvwxyz", 8, ("efgh", "tuvw")),  # both are long: half each, and the reply loses its end
        ("ab", "tuvwxyz", 8, ("ab", "tuvwxy")),  # the prompt is short, so the reply keeps more than half
        ("abcdefgh", "uvw", 8, ("efgh", "uvw$")),
        ("abcdefgh", "tuvwxyz", 9, ("efgh", "tuvwx")),
    ],
)
def test_encode_keeps_half_for_the_prompts_end_and_cuts_the_replys_end(
    prompt: str, reply: str, limit: int, expected: tuple[str, str]
) -> None:
    text = encode(Letters(), prompt, reply, limit)
    assert (Letters.text(text.prompt), Letters.text(text.reply)) == expected
    assert len(text.prompt) + len(text.reply) <= limit


class Letters:
    """A tokenizer of one token per letter that adds nothing, so that lengths can be counted; $ ends a text."""

    eos_token_id = ord("$")
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    @staticmethod
    def text(ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def test_encode_without_an_end_of_sequence_token_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match=r"base\.aligned: its tokenizer names no eos_token"):
        encode(tokenizer, "Hi?", "No.", 64)


# -- the divergence --------------------------------------------------------------------------------------------------


def full_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) over the whole vocabulary, per token, float64."""
    p, q = teacher.double().log_softmax(dim=-1), student.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def labels_of(n: int, length: int) -> torch.Tensor:
    return torch.zeros(n, length, dtype=torch.long)


@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 300])
def test_divergence_of_a_model_from_itself_is_zero(vocabulary: int) -> None:
    logits = 3.0 * normal(0, 2, 5, vocabulary)
    found = divergence(coarse(logits), logits, labels_of(2, 5))
    torch.testing.assert_close(found, torch.zeros(2), rtol=0.0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, TEACHER_TOKENS), st.floats(0.1, 4.0), SEEDS)
def test_divergence_over_a_small_vocabulary_is_the_whole_one(vocabulary: int, scale: float, seed: int) -> None:
    teacher, student = scale * normal(seed, 3, 4, vocabulary), scale * normal(seed + 1, 3, 4, vocabulary)
    found = divergence(coarse(teacher), student, labels_of(3, 4))
    expected = full_divergence(teacher, student).mean(dim=1).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(TEACHER_TOKENS + 1, 400), st.floats(0.1, 4.0), SEEDS)
def test_divergence_over_a_large_vocabulary_is_at_most_the_whole_one(vocabulary: int, scale: float, seed: int) -> None:
    teacher, student = scale * normal(seed, 3, 4, vocabulary), scale * normal(seed + 1, 3, 4, vocabulary)
    found = divergence(coarse(teacher), student, labels_of(3, 4))
    whole = full_divergence(teacher, student).mean(dim=1).float()
    assert bool((found <= whole + 1e-4).all()) and bool((found >= -1e-5).all())


def test_divergence_over_a_large_vocabulary_by_hand_takes_the_rest_as_one_token() -> None:
    """64 tokens share ¾ evenly and 64 more ¼; the student has it the other way round."""
    large, small = math.log(0.75 / 64), math.log(0.25 / 64)
    teacher = torch.tensor([large] * 64 + [small] * 64).view(1, 1, 128)
    found = divergence(coarse(teacher), teacher.flip(-1), labels_of(1, 1))
    assert float(found) == pytest.approx(0.75 * math.log(3.0) + 0.25 * math.log(1 / 3), rel=1e-4)


def test_divergence_is_from_the_teacher_by_hand() -> None:
    """KL(p ‖ q) = ¾ ln 3/2 + ¼ ln ½, which KL(q ‖ p) is not."""
    p, q = torch.tensor([[[0.75, 0.25]]]), torch.tensor([[[0.5, 0.5]]])
    found = float(divergence(coarse(p.log()), q.log(), labels_of(1, 1)))
    assert found == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-4)
    assert found != pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0), rel=1e-2)


def test_divergence_is_each_texts_own_mean_and_ignores_padding() -> None:
    teacher, student = normal(0, 2, 4, 20), normal(1, 2, 4, 20)
    labels = torch.tensor([[1, 2, IGNORED, IGNORED], [3, 4, 5, 6]])
    per_token = full_divergence(teacher, student).float()
    expected = torch.stack((per_token[0, :2].mean(), per_token[1].mean()))
    found = divergence(coarse(teacher), student, labels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    student[0, 2:] = 50.0 * normal(2, 2, 20)
    torch.testing.assert_close(divergence(coarse(teacher), student, labels), found)


def test_divergence_gradient_is_the_students() -> None:
    """∂KL/∂z = q − p over a vocabulary that the teacher holds whole."""
    teacher, student = normal(0, 1, 1, 12), normal(1, 1, 1, 12).requires_grad_()
    divergence(coarse(teacher), student, labels_of(1, 1)).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-3, atol=1e-5)


def test_coarse_keeps_the_most_probable_first_and_the_others_as_one() -> None:
    logits = normal(0, 2, 3, 200)
    teacher = coarse(logits)
    probabilities = logits.double().softmax(dim=-1)
    assert teacher.tokens.shape == (2, 3, TEACHER_TOKENS) and teacher.log_probs.shape == (2, 3, TEACHER_TOKENS + 1)
    order = probabilities.argsort(dim=-1, descending=True)[..., :TEACHER_TOKENS]
    assert torch.equal(teacher.tokens, order)
    kept = probabilities.gather(-1, order)
    torch.testing.assert_close(teacher.log_probs[..., :-1].exp().double(), kept, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(teacher.log_probs[..., -1].exp().double(), 1 - kept.sum(-1), rtol=1e-4, atol=1e-6)


def test_coarse_of_a_certain_model_is_finite() -> None:
    logits = torch.zeros(1, 1, 100)
    logits[..., 3] = 1e4
    teacher = coarse(logits)
    assert int(teacher.tokens[0, 0, 0]) == 3
    assert bool(divergence(teacher, torch.zeros(1, 1, 100), labels_of(1, 1)).isfinite().all())
