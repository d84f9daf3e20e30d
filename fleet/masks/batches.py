"""Prompts and replies as tensors: prompts padded on the left, replies on the right, so all replies start together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from fleet.core.errors import CheckpointError

IGNORED = -100
"""Label of a position that is no reply."""


class Tokenizer(Protocol):
    """The part of transformers' `PreTrainedTokenizerBase` that training uses."""

    chat_template: str | Mapping[str, str] | None
    """A Jinja template, or several by name; None for a model that isn't chatted with."""

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """The token ids of a text are its `input_ids`."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> list[int]:
        """Token ids of a conversation; `return_dict` must be False."""
        ...


class Text(NamedTuple):
    """One prompt and one reply, in token ids."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


class Batch(NamedTuple):
    """n texts; P and C are the lengths of the longest prompt and of the longest reply, in tokens."""

    input_ids: torch.Tensor
    """(n, P + C), int64 like all of them."""
    attention_mask: torch.Tensor
    """(n, P + C): 1 for a token, 0 for padding."""
    position_ids: torch.Tensor
    """(n, P + C): each token's place in its text, padding not counted."""
    labels: torch.Tensor
    """(n, C): the reply's ids, `IGNORED` after its end."""


def encode(tokenizer: Tokenizer, prompt: str, reply: str, max_tokens: int) -> Text:
    """The prompt as a user's turn of the tokenizer's chat template, if it has one, and the reply with its end token.

    A text longer than `max_tokens` is cut: a long prompt at its start, to what the reply leaves of `max_tokens` but to
    no less than half of it; then the reply at its end, to what the prompt leaves.

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
    """Texts as one batch. Padding is masked out; its token is 0, because every vocabulary has one."""
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
