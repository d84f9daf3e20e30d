"""What a run must go on giving: the golden files beside this one, and how they are made.

`python -m tests.run.golden` writes them anew, from the code as it is. A test only reads them. A step key that changes
takes away every result that users have in their stores, so an intended change bumps a version in `ALGORITHM_VERSIONS`,
and its commit has the new golden files.
"""

from __future__ import annotations

from pathlib import Path

from fleet.manifest import load_manifest
from fleet.run.plan import Plan, make_plan

ROOT = Path(__file__).parents[2]
DEMO = Path(__file__).with_name("golden_demo.txt")
"""Run id and step keys of `models.json`, one a line."""


def plan_lines(plan: Plan) -> list[str]:
    """A plan's run id, and its step keys in alphabetical order."""
    return [f"run {plan.run_id}", *sorted(step.key for step in plan.steps)]


def demo_lines() -> list[str]:
    """Of the manifest that the repository ships; nothing is computed."""
    return plan_lines(make_plan(load_manifest(ROOT / "models.json")))


def main() -> None:
    """Write the golden files anew."""
    DEMO.write_text("\n".join(demo_lines()) + "\n")


if __name__ == "__main__":
    main()
