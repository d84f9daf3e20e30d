"""The files a report consists of, and where they lie: beside the artifacts, under `runs/{run id}/`."""

from __future__ import annotations

from collections.abc import Mapping

from fleet.report.model import Report
from fleet.report.pages import MODULES_HTML, modules_html, report_html
from fleet.report.results import module_tables
from fleet.run.plan import Plan
from fleet.steps.record import Record, to_bytes

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def report_files(plan: Plan, report: Report, records: Mapping[str, Record]) -> dict[str, bytes]:
    """Name -> content. The page that a person opens comes last, so that what it links to is written before it."""
    tables = module_tables(plan.candidates, records)
    return {
        MODULES_HTML: modules_html(f"{report.name} {report.run_id}", tables).encode(),
        REPORT_JSON: to_bytes(report),
        REPORT_HTML: report_html(report).encode(),
    }


def write_report(plan: Plan, report: Report, records: Mapping[str, Record]) -> str:
    """Put the report beside the artifacts; returns the URI of its page.

    Raises:
        StoreError: the store can't be written.
    """
    prefix = f"runs/{report.run_id}"
    for name, content in report_files(plan, report, records).items():
        plan.store.replace(f"{prefix}/{name}", content)
    return f"{plan.store.uri}/{prefix}/{REPORT_HTML}"
