"""What is asked of a tokenizer, typed: transformers' own annotations leave most of it open. Light: no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


def moved_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[str]:
    """The tokens that two vocabularies number differently. One may have tokens that the other lacks: they are new names
    of rows that pad a table, or have no row, and change no other token."""
    return sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])


class SpecialToken(Protocol):
    """A token beside the vocabulary's own; its text is `str` of it."""

    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """The part of transformers' `PreTrainedTokenizerBase` that scoring uses."""

    chat_template: str | Mapping[str, str] | None
    """A Jinja template, or several by name; None for a model that isn't chatted with."""

    @property
    def bos_token(self) -> str | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, SpecialToken]: ...

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, **options: object
    ) -> str:
        """The text of a conversation; `tokenize` must be False."""
        ...
