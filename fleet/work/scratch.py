"""Memory that a worker keeps between tensors and units."""

from __future__ import annotations

from typing import TypeAlias

import torch

READ_AHEAD = 4
"""Blocks of each base model that are read while earlier ones are used."""


class Memory:
    """Memory that is kept from one use to the next: fresh pages cost as much as a subtraction."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8, uninitialised; the last one's memory."""
        if self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes]


Slot: TypeAlias = tuple[Memory, Memory]
"""Where a block of the aligned model is read to, and one of the unaligned."""


def ring() -> list[Slot]:
    """Slots for the blocks that are read ahead, and for the one in use."""
    return [(Memory(), Memory()) for _ in range(READ_AHEAD + 1)]


class Scratch:
    """What one worker keeps between tensors."""

    def __init__(self) -> None:
        self.ring = ring()
        self.v = Memory()
        """V of a tensor, or of a block of one that is not kept whole."""
