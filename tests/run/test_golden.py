"""Golden: run ids, step keys and bytes stay what they are when only the code's structure changes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tests.run.golden import DEMO, demo_lines

INTENDED = (
    "is this intended? A key that changes makes every stored result of its step worthless: bump the kind's version in "
    "ALGORITHM_VERSIONS, write the golden files anew with `python -m tests.run.golden`, and commit both together"
)


def changes(expected: Sequence[str], found: Sequence[str]) -> str:
    """The lines that are gone (-) and the ones that are new (+), and what to do."""
    lines = difflib.unified_diff(expected, found, "golden", "now", n=0, lineterm="")
    return "\n".join([INTENDED, *lines])


def test_shipped_manifest_has_the_run_id_and_step_keys_it_had() -> None:
    expected = DEMO.read_text().splitlines()
    found = demo_lines()
    assert len(expected) == 1 + 241
    assert found == expected, changes(expected, found)
