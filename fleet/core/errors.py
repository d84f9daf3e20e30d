"""The errors of the project: one small tree, picklable, each message saying what, where and the fix.

`InputError` and its children are the user's to mend: the command prints them as one line and exits with 2.
Every other `FleetError` is a failure of the run and exits with 1.
"""

import reprlib
import sys
from collections.abc import Collection


class FleetError(Exception):
    """Anything `fleet` raises on purpose. The only argument is the message, so it pickles across actors."""


class InputError(FleetError):
    """Something the user gave is wrong: the message names it and the fix."""


class ManifestError(InputError):
    """A field of the manifest is missing, unknown, mistyped or contradicts another."""


class SourceError(InputError):
    """A source or the artifact store cannot be reached, or holds nothing usable."""


class CheckpointError(InputError):
    """A checkpoint's files are damaged, unsupported, or don't fit the base model."""


class SuiteError(InputError):
    """An evaluation suite is unknown or malformed."""


class StoreError(FleetError):
    """The store failed in the middle of a run, or holds something it should not."""


class StepFailedError(FleetError):
    """At least one step of a run failed; the message lists each failure with its cause."""


class TrackingError(FleetError):
    """MLflow went away after the work was done; the records are safe, and the same command typed again tracks them."""


class EvalError(FleetError):
    """An engine, a judge or a suite broke the contract: one completion per sample, no silent loss."""


def report_error(error: FleetError) -> int:
    """Say it on stderr; returns the exit code of the command that it ends."""
    sys.stderr.write(f"error: {error}\n")
    return 2 if isinstance(error, InputError) else 1


def some(names: Collection[str], limit: int = 8) -> str:
    """The first of these names, sorted, and how many more there are: for a message."""
    shown = ", ".join(sorted(names)[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


_brief = reprlib.Repr()
_brief.maxstring = 80
_brief.maxother = 80


def shown(value: object) -> str:
    """A value that someone else wrote, for a message: as Python writes it, on one line, cut where it is long."""
    return _brief.repr(value)
