"""Prompts and replies as tensors: prompts padded on the left, replies on the right, so that replies stand together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fleet.core.errors import CheckpointError

IGNORED = -100
"""Label of a position that is no reply."""


class Text(NamedTuple):
    """One prompt and one reply, in token ids."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


class Batch(NamedTuple):
    """n texts; P and C are the longest prompt and reply."""

    input_ids: torch.Tensor
    """(n, P + C)."""
    attention_mask: torch.Tensor
    """(n, P + C)."""
    position_ids: torch.Tensor
    """(n, P + C)."""
    labels: torch.Tensor
    """(n, C): the reply's ids, `IGNORED` after its end."""


def encode(tokenizer: Any, prompt: str, reply: str, max_tokens: int) -> Text:
    """A user's turn in the tokenizer's chat template, if it has one, and the reply with the end-of-sequence token.

    A prompt keeps at least half of `max_tokens`, its last ones; the reply is cut at its end to what is left.

    Raises:
        CheckpointError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise CheckpointError("base.aligned: its tokenizer names no eos_token, so a reply has no end; set one")
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt)["input_ids"]
    replied = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept = max(max_tokens // 2, max_tokens - len(replied))
    ids = ids[-kept:]
    return Text(tuple(ids), tuple(replied[: max_tokens - len(ids)]))


def collate(texts: Sequence[Text], device: torch.device) -> Batch:
    """Pad to one rectangle; padding is masked, and its token is 0, which every vocabulary has."""
    prompt_length, reply_length = max(len(t.prompt) for t in texts), max(len(t.reply) for t in texts)
    ids = torch.zeros(len(texts), prompt_length + reply_length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(texts), reply_length), IGNORED)
    for row, text in enumerate(texts):
        start, stop = prompt_length - len(text.prompt), prompt_length + len(text.reply)
        ids[row, start:stop] = torch.tensor(text.prompt + text.reply)
        mask[row, start:stop] = 1
        labels[row, : len(text.reply)] = torch.tensor(text.reply)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return Batch(*(t.to(device) for t in (ids, mask, positions, labels)))
