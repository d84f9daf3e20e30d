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

from fleet.steps.record import Kind, Step

logger = logging.getLogger(__name__)

_KINDS: tuple[Kind, ...] = (
    "displacement",
    "survey",
    "logprobs",
    "mask",
    "realign",
    "trim",
    "fuse",
    "calibrate",
    "score",
)
_LINE_SECONDS = 15.0
"""How often a job's log gets a line, so that a long step is seen to be alive."""


class RunProgress:
    """Counts steps and work per kind. The work of tensor steps is bytes read, that of scoring is prompts."""

    def __init__(self, steps: tuple[Step, ...], done: set[str], console: Console) -> None:
        self._console = console
        self._total = {kind: sum(s.kind == kind for s in steps) for kind in _KINDS}
        self._done = {kind: sum(s.kind == kind and s.key in done for s in steps) for kind in _KINDS}
        self._work: dict[Kind, float] = dict.fromkeys(_KINDS, 0.0)
        self._busy: dict[Kind, float] = dict.fromkeys(_KINDS, 0.0)
        self._first: dict[Kind, float] = {}
        self._latest: dict[Kind, float] = {}
        self._training: dict[str, float] = {}
        self._training_text = ""
        self._live: Progress | None = None
        self._bars: dict[Kind, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"), console=self._console,
            )  # fmt: skip
            for kind in _KINDS:
                if self._total[kind]:
                    self._bars[kind] = self._live.add_task(
                        kind, total=self._total[kind], completed=self._done[kind], rate=""
                    )
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

    def worked(self, kind: Kind, amount: float, seconds: float) -> None:
        """A unit is done: `amount` bytes read, or prompts scored, in so many seconds of one worker."""
        self._work[kind] += amount
        self._busy[kind] += seconds
        self._latest[kind] = time.monotonic()
        self._show(kind)

    def trained(self, step: Step, measured: Mapping[str, float]) -> None:
        """A training has made an update, or has evaluated its mask."""
        names = ("loss", "accuracy", "margin", "density", "held_out.loss", "held_out.accuracy")
        self._training |= {n: measured[n] for n in names if n in measured}
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self._training.items())
        self._training_text = f" {step.name} update {measured['step']:.0f}: {numbers}"
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
            counts = ", ".join(f"{k} {self._done[k]}/{self._total[k]}{self._rate(k)}" for k in _KINDS if self._total[k])
            logger.info("%s; %d units running", counts, running)

    def _show(self, kind: Kind) -> None:
        if self._live is not None and kind in self._bars:
            self._live.update(self._bars[kind], completed=self._done[kind], rate=self._rate(kind))

    def _rate(self, kind: Kind) -> str:
        if kind == "mask":
            return self._training_text
        if not self._work[kind]:
            return ""
        per_second = self._work[kind] / max(self._latest[kind] - self._first[kind], 1e-3)
        if kind == "score":
            return f" {per_second:.1f} prompts/s"
        alone = self._work[kind] / max(self._busy[kind], 1e-3)
        return f" {per_second / 1e6:.1f} MB/s, {alone / 1e6:.1f} MB/s a worker"
