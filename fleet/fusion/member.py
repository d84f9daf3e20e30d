"""Who takes part in a fusion, and the rank of what comes out where all are LoRAs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fleet.fusion.base import FusionMethod


@dataclass(frozen=True)
class Member:
    """One model in a fusion, as a unit of work names it."""

    name: str
    uri: str
    curvature: str | None = None
    """Folder of what the method has to know of it beside the weights."""


def fused_rank(method: FusionMethod, ranks_M: Iterable[int], shape: tuple[int, ...] = ()) -> int:
    """The rank that a fused LoRA is written with: of one module from its members' ranks there, or of all, at most.

    Args:
        shape: the module's, which bounds the rank of what is recompressed; without it the bound is the method's alone.
    """
    rank = sum(ranks_M)
    return rank if method.max_rank is None else min(rank, method.max_rank, *shape)
