"""What is scored, and on what, as units of work name them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """A candidate, and where its weights are."""

    name: str
    identity: str
    weights: str
    """URI of the full model or adapter."""
    as_lora: bool
    chat_template: str | None = None
    """What it is prompted with; None where there is none."""
    date: str | None = None
    """What the template writes, as 2026-11-25; None if it writes no date."""

    def group(self, aligned: str) -> str:
        """Identity of the weights an engine must hold for it, given the aligned model's."""
        return aligned if self.as_lora else self.identity


@dataclass(frozen=True)
class SuiteFiles:
    """Where a suite is, for a node that may not have the driver's disk."""

    name: str
    """The file in `folder` that the suite is loaded from."""
    folder: str
    """URI of the folder in the store that has the suite's files."""
