"""Which prompts tune and which certify: by the hash of their content, so that the two never mix.

A gate's bounds hold for prompts that had no part in choosing the candidate. The side of a prompt follows from its own
text alone: it is the same in every suite and on every night, and adding prompts moves no other.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence


def is_tuning(prompt: str, tuning_share: float) -> bool:
    """Whether a prompt tunes; else it certifies.

    Args:
        prompt: The whole prompt, as a suite has it, with its context and without a template.
        tuning_share: The expected share of different prompts that tune. A larger share keeps all that a smaller has.
    """
    return hash_fraction(prompt) < tuning_share


def hash_fraction(prompt: str) -> float:
    """A number in [0, 1) from the prompt's content; case, Unicode's forms and white space make no difference."""
    content = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    digest = hashlib.sha256(f"split:{content}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def sample_ids(contents: Sequence[str]) -> list[str]:
    """An id for each sample of a suite, from its content; the n-th copy of a content gets an id of its own."""
    seen: Counter[str] = Counter()
    ids: list[str] = []
    for content in contents:
        text = json.dumps([content, seen[content]])
        seen[content] += 1
        ids.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return ids
