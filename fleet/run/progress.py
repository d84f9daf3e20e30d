"""What a person sees while a run goes on: bars with rates on a terminal, plain lines in a job's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fleet.steps import KINDS, Step

logger = logging.getLogger(__name__)

_LINE_SECONDS = 15.0
"""How often a job's log gets a line, so that a long step is seen to be alive."""


class RunProgress:
    """Counts steps per kind, and what each kind says is to be counted of its work."""

    def __init__(self, steps: tuple[Step, ...], done: set[str], console: Console) -> None:
        self._console = console
        present = {step.kind: step.counts for step in steps}
        self._counts = {kind: present[kind] for kind in (*KINDS, *present) if kind in present}
        """Kind -> what is counted of it, of those that the run has."""
        self._total = {kind: sum(s.kind == kind for s in steps) for kind in self._counts}
        self._done = {kind: sum(s.kind == kind and s.key in done for s in steps) for kind in self._counts}
        self._work: dict[str, float] = dict.fromkeys(self._counts, 0.0)
        self._busy: dict[str, float] = dict.fromkeys(self._counts, 0.0)
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._measured: dict[str, float] = {}
        self._measured_text = ""
        self._live: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"), console=self._console,
            )  # fmt: skip
            for kind, total in self._total.items():
                self._bars[kind] = self._live.add_task(kind, total=total, completed=self._done[kind], rate="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, step: Step) -> None:
        self._first.setdefault(step.kind, time.monotonic())
        logger.debug("start %s", step.key)

    def worked(self, step: Step, amount: float, seconds: float) -> None:
        """A unit is done: `amount` of what its kind counts, in so many seconds of one worker."""
        kind = step.kind
        self._work[kind] += amount
        self._busy[kind] += seconds
        self._latest[kind] = time.monotonic()
        self._show(kind)

    def measured(self, step: Step, measured: Mapping[str, float]) -> None:
        """A unit under way, a training, has told what an update or an evaluation came to."""
        names = ("loss", "accuracy", "margin", "density", "held_out.loss", "held_out.accuracy")
        self._measured |= {n: measured[n] for n in names if n in measured}
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self._measured.items())
        self._measured_text = f" {step.name} update {measured['step']:.0f}: {numbers}"
        self._show(step.kind)

    def finished(self, step: Step, seconds: float) -> None:
        self._done[step.kind] += 1
        self._show(step.kind)
        if self._live is None:
            logger.info(
                "done %s in %.1f s (%d of %d)", step.key, seconds, self._done[step.kind], self._total[step.kind]
            )

    def tick(self, running: int) -> None:
        """Called often; says now and then that the run is alive."""
        if self._live is None and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            counts = ", ".join(f"{k} {self._done[k]}/{self._total[k]}{self._rate(k)}" for k in self._counts)
            logger.info("%s; %d units running", counts, running)

    def _show(self, kind: str) -> None:
        if self._live is not None and kind in self._bars:
            self._live.update(self._bars[kind], completed=self._done[kind], rate=self._rate(kind))

    def _rate(self, kind: str) -> str:
        if self._counts[kind] == "updates":
            return self._measured_text
        if not self._work[kind]:
            return ""
        per_second = self._work[kind] / max(self._latest[kind] - self._first[kind], 1e-3)
        if self._counts[kind] == "prompts":
            return f" {per_second:.1f} prompts/s"
        alone = self._work[kind] / max(self._busy[kind], 1e-3)
        return f" {per_second / 1e6:.1f} MB/s, {alone / 1e6:.1f} MB/s a worker"
