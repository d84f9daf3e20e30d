"""Which processor computes here, and by which of its features: bytes are the same on processors of one kind."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

_KIND = (("vendor_id", "CPU implementer"), ("cpu family", "CPU architecture"), ("model", "CPU part"))
"""What the kernel calls a processor's vendor, family and model, on x86 and on ARM."""

_FEATURES = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
"""By which libraries choose their kernels."""

_MODES = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA",
    "NUMBA_CPU_NAME",
)  # fmt: skip
"""Variables of the environment by which libraries choose other kernels than they would."""


def processor(environment: Mapping[str, str] = os.environ) -> str:
    """One line, the same on processors of one kind: architecture, vendor, family, model and features.

    Then the vector instructions that torch takes, if torch is loaded, which it isn't for this; and the variables of the
    environment that choose others, if any is set.
    """
    parts = [_hardware()]
    if (torch := sys.modules.get("torch")) is not None:
        parts.append(f"torch {torch.backends.cpu.get_cpu_capability()}")
    parts += [f"{name}={environment[name]}" for name in _MODES if name in environment]
    return "; ".join(parts)


@cache
def _hardware() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    return " ".join([platform.machine(), *described(lines)])


def described(lines: Iterable[str]) -> list[str]:
    """Vendor, family, model and features of the first processor in `/proc/cpuinfo`; what isn't there is left out."""
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    kind = [facts[key] for keys in _KIND for key in keys if key in facts]
    flags = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return [*kind, *(feature for feature in _FEATURES if feature in flags)]
