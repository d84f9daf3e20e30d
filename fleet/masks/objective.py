"""What a mask's training minimises: DPO's loss, and the divergence from the fine-tuned model.

Source: Rafailov et al., "Direct preference optimization", arXiv 2305.18290, eq. 7, with the sigmoid loss:

    L = −log σ(β [(log π(y⁺) − log π_ref(y⁺)) − (log π(y⁻) − log π_ref(y⁻))]).

π is the masked model. The reference is the aligned model, which never changes, so its terms are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it

from fleet.masks.batches import IGNORED, Batch

TEACHER_TOKENS = 64
"""How many of a teacher's most probable tokens are kept; all others are one more outcome, the rest."""


class Teacher(NamedTuple):
    """What a model predicts for each token of n replies, as k tokens and a rest; C is the longest reply's length."""

    tokens: torch.Tensor
    """(n, C, k) token ids, the most probable first."""
    log_probs: torch.Tensor
    """(n, C, k + 1), float32: of these tokens, and last of the rest."""


def reply_logits(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """The logits that predict each token of the replies: (n, C, vocabulary), float32.

    Args:
        model: a causal language model of transformers, or a function that is called like one.
    """
    length, end = batch.labels.shape[1], batch.input_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        # Indices, not a count: that makes a slice, which isn't contiguous, and torch would copy the head for each text.
        logits_to_keep=torch.arange(end - length - 1, end - 1, device=batch.labels.device),
    )
    return output.logits.float()


def reply_log_probs(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """log π(reply | prompt) of each text: (n,), float32."""
    logits = reply_logits(model, batch)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view_as(batch.labels).sum(dim=1)


def margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much more the policy prefers y⁺ over y⁻ than the reference does: (pairs,).

    Args:
        policy: the masked model's log-probabilities, (2, pairs): of the chosen replies, and of the rejected.
        reference: the aligned model's.
    """
    return (policy[0] - reference[0]) - (policy[1] - reference[1])


def dpo_losses(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β margin) of each pair."""
    return -F.logsigmoid(beta * margin)


def coarse(logits: torch.Tensor) -> Teacher:
    """A teacher from its logits, (n, C, vocabulary)."""
    log_probs = logits.log_softmax(dim=-1)
    top = log_probs.topk(min(TEACHER_TOKENS, log_probs.shape[-1]), dim=-1)
    return Teacher(top.indices, _with_rest(top.values))


def divergence(teacher: Teacher, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats per token, the mean over each text's reply: (n,).

    The rest counts as one outcome. So this is at most the divergence over the whole vocabulary, and equal to it if the
    vocabulary has no rest.

    Args:
        logits: the student's, (n, C, vocabulary).
        labels: as in `Batch`.
    """
    student = _with_rest(logits.log_softmax(dim=-1).gather(-1, teacher.tokens))
    per_token = (teacher.log_probs.exp() * (teacher.log_probs - student)).sum(dim=-1)
    replied = labels != IGNORED
    return (per_token * replied).sum(dim=1) / replied.sum(dim=1)


def _with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Append the rest's log-probability, of what the others leave of 1; finite even where they leave nothing."""
    rest = (1.0 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(torch.finfo(log_probs.dtype).eps)
    return torch.cat((log_probs, rest.log()), dim=-1)
