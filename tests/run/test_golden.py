"""Golden: run ids, step keys and bytes stay what they are when only the code's structure changes."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.run.golden import DEMO, SCORES, TENSORS, demo_lines, run_scores, run_tensors
from tests.run.golden_catalogue import make_exact_catalogue

INTENDED = (
    "is this intended? A key that changes makes every stored result of its step worthless, and bytes that change under "
    "the same key mix old and new in one store: bump the kind's version in ALGORITHM_VERSIONS, write the golden files "
    "anew with `python -m tests.run.golden`, and commit both together"
)
TOLERANCE = 1e-4
"""Relative, of what a processor may round otherwise; absolute for what is near 0, of numbers around 1."""
BFLOAT16_TOLERANCE = 1e-3
"""Of a tensor's norm: a last bit of float32 may decide which way some entries are rounded, by 2⁻⁸ of them each."""

_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def changed_lines(expected: Sequence[str], found: Sequence[str]) -> str:
    """The lines that are gone (-) and the ones that are new (+), and what to do."""
    lines = difflib.unified_diff(expected, found, "golden", "now", n=0, lineterm="")
    return "\n".join([INTENDED, *lines])


def differences(expected: Any, found: Any, where: str, tolerance: float = TOLERANCE) -> Iterator[str]:
    """What two JSON documents don't have in common; numbers may differ in their last digits, in sentences too."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in found:
                yield f"{where}/{key}: is gone"
            elif key not in expected:
                yield f"{where}/{key}: is new"
            else:
                yield from differences(expected[key], found[key], f"{where}/{key}", tolerance)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        tolerance = BFLOAT16_TOLERANCE if expected[:1] == ["torch.bfloat16"] else tolerance
        for i, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
            yield from differences(theirs, ours, f"{where}[{i}]", tolerance)
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{where}: {found}, was {expected}"
    elif isinstance(expected, str) and isinstance(found, str) and _NUMBER.search(expected):
        if _NUMBER.sub("#", expected) != _NUMBER.sub("#", found):
            yield f"{where}: {found!r}, was {expected!r}"
        theirs, ours = ([float(number) for number in _NUMBER.findall(text)] for text in (expected, found))
        yield from differences(theirs, ours, where, tolerance)
    elif expected != found or type(expected) is not type(found):
        yield f"{where}: {found!r}, was {expected!r}"


def test_shipped_manifest_has_the_run_id_and_step_keys_it_had() -> None:
    expected = DEMO.read_text().splitlines()
    found = demo_lines()
    assert len(expected) == 1 + 241
    assert found == expected, changed_lines(expected, found)


@pytest.fixture(scope="module")
def exact_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exact_catalogue(tmp_path_factory.mktemp("golden") / "catalogue")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("run", "golden"),
    [
        pytest.param(run_tensors, TENSORS, id="tensors"),
        pytest.param(run_scores, SCORES, id="scores", marks=[pytest.mark.vllm, pytest.mark.slow]),
    ],
)
def test_run_over_the_exact_catalogue_leaves_the_keys_files_and_numbers_it_left(
    exact_catalogue: Path, tmp_path: Path, run: Callable[[Path, Path], dict[str, Any]], golden: Path
) -> None:
    found = run(exact_catalogue, tmp_path)
    problems = list(differences(json.loads(golden.read_text()), found, ""))
    assert not problems, "\n".join([INTENDED, *problems])
