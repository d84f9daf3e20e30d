"""`python -m jobs.demo`: train the demo fleet from nothing and write its evaluation suites."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def main() -> None:
    """Parse, then run the recipe; torch is imported only then, so that --help stays quick."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the models go (default: demo)")
    parser.add_argument(
        "--suites",
        type=Path,
        default=Path("evals/suites"),
        help="where the suites go (default: evals/suites)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="train these alone, from the others as they are under --output"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    from jobs.demo.recipe import JUDGE, STAGES, run  # noqa: PLC0415

    known = (*STAGES, JUDGE)
    if unknown := set(arguments.only or ()).difference(known):
        parser.error(f"--only: no stage is named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    run(arguments.output, arguments.suites, [stage for stage in known if stage in (arguments.only or known)])


if __name__ == "__main__":
    main()
