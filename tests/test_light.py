"""The tests' own helpers load nothing heavy, so that `make fast` spends its time on tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_helpers_of_tests_import_nothing_heavy() -> None:
    code = (
        "import sys, tests.conftest, tests.catalogue, tests.pico, tests.scored\n"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'transformers', 'peft', 'boto3', 'datasets', 'lm_eval', 'numba'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
