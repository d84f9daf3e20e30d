from __future__ import annotations

import platform
import subprocess
import sys

import torch

from fleet.core.processor import described, processor

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 fma avx avx2 avx512f
processor\t: 1
vendor_id\t: another
"""
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"


def test_processor_is_described_by_what_kernels_are_chosen_by() -> None:
    assert described(EPYC.splitlines()) == ["AuthenticAMD", "25", "17", "sse4_2", "avx", "avx2", "fma", "avx512f"]
    assert described(GRAVITON.splitlines()) == ["0x41", "8", "0xd40", "asimd", "sve"]
    assert described([]) == []


def test_processor_names_torchs_instructions_and_the_modes_that_are_set() -> None:
    plain = processor({})
    assert plain.startswith(platform.machine()) and len(plain) < 200
    assert plain.endswith(f"; torch {torch.backends.cpu.get_cpu_capability()}")
    assert processor({"MKL_CBWR": "COMPATIBLE", "HOME": "/root"}) == f"{plain}; MKL_CBWR=COMPATIBLE"


def test_processor_loads_no_torch() -> None:
    code = (
        "import sys; from fleet.core.processor import processor; found = processor();"
        "print('torch' in sys.modules, 'torch' in found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
