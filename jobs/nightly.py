"""The nightly job: `python -m jobs.nightly --catalogue s3://bucket/adapters --manifest template.json`.

    catalogue ─▶ the models there are tonight ┐
    template  ─▶ everything else              ┴▶ manifest ─▶ fleet.realign, here or as a Ray job

It keeps no state of its own. A step that has a record is done, so a night computes only what is new since the last.
Exit codes are those of `fleet.realign`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fleet.manifest import Manifest


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; heavy imports come after it, so that `--help` is at once."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.nightly",
        description="Run fleet.realign on every model of a catalogue; only what is new is computed.",
    )
    parser.add_argument("--catalogue", required=True, help="where the models are: a folder or s3://bucket/prefix")
    parser.add_argument(
        "--manifest", type=Path, required=True, help="template: a manifest whose models are replaced by the catalogue's"
    )
    parser.add_argument("--output", type=Path, help="keep the complete manifest here")
    parser.add_argument("--address", help="submit it as a job to the Ray cluster with this dashboard: http://HEAD:8265")
    parser.add_argument("--dry-run", action="store_true", help="print every step, its key and its bytes, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("jobs").setLevel(logging.INFO)
    from fleet import realign
    from fleet.core.errors import FleetError, report_error
    from jobs.catalogue import complete_manifest

    try:
        manifest = complete_manifest(arguments.catalogue, arguments.manifest)
        if arguments.output is not None:
            write_manifest(manifest, arguments.output)
        if arguments.address is not None and not arguments.dry_run:
            from jobs.submit import submit

            return submit(manifest, arguments.address)
        with tempfile.TemporaryDirectory(prefix="fleet-nightly-") as scratch:
            path = arguments.output or write_manifest(manifest, Path(scratch, "models.json"))
            return realign.main(["--manifest", str(path), *(["--dry-run"] if arguments.dry_run else [])])
    except FleetError as e:
        return report_error(e)


def write_manifest(manifest: Manifest, path: Path) -> Path:
    """Write a manifest, and return its path.

    Raises:
        InputError: the file can't be written.
    """
    from fleet.core.errors import InputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(manifest.model_dump_json(by_alias=True, indent=1) + "\n")
    except OSError as e:
        raise InputError(f"--output {path}: can't be written ({e.strerror})") from e
    return path


if __name__ == "__main__":
    sys.exit(main())
