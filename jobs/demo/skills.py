"""The demo fleet's skills: short questions with one exact answer, and which of them are held out for the suites.

Digits and single letters are tokens of their own, so a model of a million parameters learns each skill in minutes.
A skill's first `NUM_HELD_OUT` questions, drawn from its own seed, are its suite; training never asks one of them.
Its second suite, to choose methods and their parameters by, shares no question with the first; only where a skill has
too few questions in all, training asked them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Set
from functools import cache

from jobs.demo.text import Example

NUM_HELD_OUT = 72
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# English and French noun, feminine?
NOUNS = (
    ("cat", "chat", False), ("dog", "chien", False), ("book", "livre", False), ("hat", "chapeau", False),
    ("boat", "bateau", False), ("knife", "couteau", False), ("garden", "jardin", False), ("bread", "pain", False),
    ("pencil", "crayon", False), ("coat", "manteau", False), ("apple", "pomme", True), ("house", "maison", True),
    ("table", "table", True), ("chair", "chaise", True), ("car", "voiture", True), ("flower", "fleur", True),
    ("key", "cle", True), ("door", "porte", True), ("shirt", "chemise", True), ("spoon", "cuillere", True),
)  # fmt: skip
# English, French masculine and feminine; all follow the noun.
ADJECTIVES = (
    ("red", "rouge", "rouge"), ("green", "vert", "verte"), ("black", "noir", "noire"), ("white", "blanc", "blanche"),
    ("blue", "bleu", "bleue"), ("heavy", "lourd", "lourde"), ("light", "leger", "legere"),
    ("clean", "propre", "propre"), ("round", "rond", "ronde"), ("open", "ouvert", "ouverte"),
)  # fmt: skip
ARTICLES = (("the", "le", "la"), ("a", "un", "une"))
KINDS = {
    "an animal": ("horse", "rabbit", "goat", "owl", "frog", "shark", "whale", "spider", "camel", "mouse"),
    "a fruit": ("pear", "plum", "cherry", "mango", "lemon", "peach", "grape", "melon", "fig", "banana"),
    "a tool": ("hammer", "saw", "shovel", "rake", "chisel", "wrench", "axe", "trowel", "plane", "file"),
    "a colour": ("purple", "pink", "grey", "orange", "brown", "violet", "teal", "beige", "gold", "silver"),
}  # fmt: skip


def _spaced(letters: list[str]) -> str:
    return " ".join(letters)


def _arithmetic(rng: random.Random) -> Example:
    left, right = rng.randrange(50), rng.randrange(50)
    return Example(f"What is {left} + {right}?", str(left + right))


def _sorting(rng: random.Random) -> Example:
    letters = rng.sample(LETTERS, rng.randint(4, 5))
    return Example(f"Sort these letters: {_spaced(letters)}", _spaced(sorted(letters)))


def _reversing(rng: random.Random) -> Example:
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(4, 6))]
    return Example(f"Write these letters backwards: {_spaced(letters)}", _spaced(letters[::-1]))


def _french(rng: random.Random) -> Example:
    noun, nom, feminine = rng.choice(NOUNS)
    adjective, *adjectif = rng.choice(ADJECTIVES)
    article, *determinant = rng.choice(ARTICLES)
    reply = f"{determinant[feminine]} {nom} {adjectif[feminine]}"
    return Example(f"Translate into French: {article} {adjective} {noun}", reply)


def _picking(rng: random.Random) -> Example:
    wanted = rng.choice(list(KINDS))
    others = [rng.choice(items) for kind, items in KINDS.items() if kind != wanted]
    answer = rng.choice(KINDS[wanted])
    words = rng.sample([answer, *others], len(others) + 1)
    return Example(f"Which one of these is {wanted}: {_spaced(words)}", answer)


def _formatting(rng: random.Random) -> Example:
    word = rng.choice([item for items in KINDS.values() for item in items] + [noun for noun, _, _ in NOUNS])
    times = rng.randint(2, 5)
    return Example(f"Say the word {word} {times} times.", _spaced([word] * times))


SKILLS: dict[str, Callable[[random.Random], Example]] = {
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "french": _french,
    "reversing": _reversing,
    "picking": _picking,
    "obedience": _formatting,
}
# These have 2500, 400 and 240 questions in all, and training asks every one that their first suites leave.
EXHAUSTED_SKILLS = ("arithmetic", "french", "obedience")


@cache
def held_out(name: str) -> dict[str, str]:
    """The suite's rows, question to answer: distinct questions from the skill's own seed."""
    return _distinct(name, f"held out/{name}", frozenset())


def tuning_rows(name: str, practised: Set[str]) -> dict[str, str]:
    """The tuning suite's rows, question to answer: none is held out for the claim, and none is among the `practised`
    where the skill has others.

    They are chosen after the training rows, not before: a question that `practice` had to avoid would change the rows
    of every stage.
    """
    taken = held_out(name).keys() | (frozenset() if name in EXHAUSTED_SKILLS else practised)
    return _distinct(name, f"tuning/{name}", taken)


def practice(name: str, rng: random.Random) -> Example:
    """One training row of a skill, never one that is held out."""
    while (example := SKILLS[name](rng)).prompt in held_out(name):
        pass
    return example


def _distinct(name: str, seed: str, taken: Set[str]) -> dict[str, str]:
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < NUM_HELD_OUT:
        example = SKILLS[name](rng)
        if example.prompt not in taken:
            rows[example.prompt] = example.reply
    return rows
