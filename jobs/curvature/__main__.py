"""Measure Fishers and Gram matrices: `python -m jobs.curvature --manifest models.json --output curvature`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; heavy imports come after it, so that `--help` is at once."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.curvature",
        description="Measure Fishers and Gram matrices of a manifest's models, for the fusion methods that need them.",
    )
    parser.add_argument("--manifest", type=Path, required=True, help="its models need prompts")
    parser.add_argument("--output", required=True, help="a folder or s3://bucket/prefix")
    parser.add_argument("--kinds", nargs="+", choices=["fisher", "gram"], default=["fisher", "gram"])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all of the manifest's")
    parser.add_argument("--examples", type=int, default=256, help="at most so many prompts of each model (default 256)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a prompt and its response (default 1024)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, as `fleet.realign`'s."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("jobs").setLevel(logging.INFO)
    from fleet.core.errors import FleetError, report_error
    from fleet.manifest import load_manifest
    from jobs.curvature.measure import measure, open_subjects

    try:
        manifest = load_manifest(arguments.manifest)
        aligned, subjects = open_subjects(manifest, arguments.models, arguments.examples)
        for subject in subjects:
            measure(aligned, subject, arguments.kinds, arguments.output, arguments.max_tokens)
    except FleetError as e:
        return report_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
