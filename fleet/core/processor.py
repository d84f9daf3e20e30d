"""Which processor computes here: bytes are the same on processors of one kind."""

from __future__ import annotations

import platform
from functools import cache


@cache
def processor() -> str:
    """The architecture and the vector instructions that torch uses of it, as a record says them."""
    import torch  # noqa: PLC0415 - planning reads records, and imports no torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
