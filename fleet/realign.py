"""The command: `python -m fleet.realign --manifest models.json`; with `--from-mergekit` it only writes a manifest.

    models.json ─▶ Manifest ─▶ Plan ─▶ survey ─▶ realign ─▶ fuse ─▶ score ─▶ gate ─▶ report, MLflow, registry

Exit code 0: every step is done. 1: something failed; independent work was finished and kept. 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from fleet.manifest.mergekit import Conversion
    from fleet.run.plan import Plan


LOG_COLUMNS = 200
"""How wide the table may be where the output is no terminal."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; heavy imports come after it, so that `--help` is at once."""
    parser = argparse.ArgumentParser(
        prog="python -m fleet.realign",
        description="Realign, fuse, score and publish a catalogue of models fine-tuned from one aligned base.",
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--manifest", type=Path, help="the catalogue and what to do with it (models.json)")
    task.add_argument(
        "--from-mergekit", type=Path, metavar="CONFIG", help="print a mergekit configuration as a manifest"
    )
    parser.add_argument(
        "--unaligned", metavar="MODEL", help="with --from-mergekit: what its base model was aligned from"
    )
    parser.add_argument("--dry-run", action="store_true", help="print every step, its key and its bytes, and stop")
    parser.add_argument("--address", help="a Ray cluster; by default the one this job runs on, else a local Ray")
    parser.add_argument("--verbose", action="store_true", help="log every unit")
    arguments = parser.parse_args(argv)
    if arguments.unaligned is not None and arguments.from_mergekit is None:
        parser.error("argument --unaligned: goes with --from-mergekit; a manifest has base.unaligned")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    logging.getLogger("fleet").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    from rich.console import Console

    from fleet.core.errors import FleetError, report_error
    from fleet.manifest import load_manifest
    from fleet.manifest.mergekit import from_mergekit
    from fleet.run.plan import make_plan

    # A job's log has no width of its own; rich would take 80 columns and squeeze the table.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS)
    try:
        if arguments.from_mergekit is not None:
            print_conversion(from_mergekit(arguments.from_mergekit, arguments.unaligned))
            return 0
        plan = make_plan(load_manifest(arguments.manifest))
        if arguments.dry_run:
            print_plan(plan, console)
        else:
            realign(plan, arguments.address, console)
    except FleetError as e:
        return report_error(e)
    return 0


def realign(plan: Plan, address: str | None, console: Console) -> None:
    """Run a plan and show what came out.

    Raises:
        InputError: the cluster or the tracking server isn't there, or a step failed for what the user gave.
        StepFailedError: a step failed; everything that doesn't depend on it is done, reported and tracked.
        TrackingError: MLflow went away at the end.
    """
    if address is None and "RAY_ADDRESS" not in os.environ:
        lock_local_ray()
    from fleet.report.files import write_report
    from fleet.report.gather import make_report
    from fleet.report.table import print_report
    from fleet.report.tracking import Tracker
    from fleet.run.cluster import start_ray
    from fleet.run.coordinator import Coordinator, RunResult
    from fleet.run.pools import RayPools
    from fleet.run.progress import RunProgress

    tracker = Tracker(plan)
    if plan.pending:
        start_ray(address, plan.manifest.placement)
    tracker.start()
    console.print(f"run {plan.run_id}: {len(plan.steps)} steps, {len(plan.done)} done already")
    print_warnings(plan, console)
    if plan.pending:
        with RunProgress(plan.steps, set(plan.done), console) as progress:
            result = Coordinator(plan, progress, RayPools(plan), tracker.training).run()
    else:
        result = RunResult(records=dict(plan.done))
    report = make_report(plan, result, tracker.published)
    page = write_report(plan, report, result.records)
    print_report(report, console, said=plan.warnings)
    if not plan.pending:
        console.print("nothing was computed: every step was done already")
    else:
        console.print(f"{report.computed} steps computed, {report.cached} done already, in {report.seconds:.0f} s")
    for row in report.rows:
        if row.role == "fused":
            console.print(f"{row.name}: {row.weights}", soft_wrap=True)
    console.print(f"records: {plan.store.uri}", f"report:  {page}", sep="\n", soft_wrap=True)
    try:
        tracker.finish(report, result.records, failed=bool(result.failures))
        console.print(f"tracked: {tracker.location}", soft_wrap=True)
    finally:
        result.raise_failures()  # what failed in the work matters more than what failed in telling of it


def lock_local_ray() -> None:
    """Give the Ray that this process will start a token of its own, unless the user has set otherwise.

    The token is in memory only: nobody else on the machine can use this Ray, and nothing is left in `~/.ray`, where Ray
    would write one that changes what a later `ray start` asks for. Ray reads the mode when it is imported, so a process
    that has imported it already keeps what it had.
    """
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def print_conversion(conversion: Conversion) -> None:
    """The manifest on stdout; what there is to say about it on stderr."""
    for remark in conversion.remarks:
        print(f"remark: {remark}", file=sys.stderr)
    print(json.dumps(conversion.manifest, indent=2))


def print_plan(plan: Plan, console: Console) -> None:
    """The dry run: each step, its key, its bytes, and whether it is done."""
    from rich.table import Table

    table = Table(title=f"{plan.manifest.name}: run {plan.run_id}")
    table.add_column("step", overflow="fold")
    for title in ("reads", "writes at most", ""):
        table.add_column(title, justify="right")
    for step in plan.steps:
        sizes = [f"{n / 1e6:.1f} MB" if n else "" for n in (step.read_bytes, step.write_bytes)]
        table.add_row(step.key, *sizes, "done" if step.key in plan.done else "")
    console.print(table)
    print_warnings(plan, console)
    placement = plan.manifest.placement
    console.print(
        f"{len(plan.pending)} of {len(plan.steps)} steps to do, on {placement.workers} tensor workers and "
        f"{placement.replicas} replicas with {placement.replica_gpus} GPUs each"
    )


def print_warnings(plan: Plan, console: Console) -> None:
    """What planning found odd: said before any work, and in the report."""
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
