"""MLflow for tests, loaded where a test uses it: a test file that needs it for some of its tests alone stays light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleet.run.plan import Plan

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from fleet.report.tracking import Tracker


def mlflow_client(uri: str) -> MlflowClient:
    """Of the runs and the registry under one address."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def make_tracker(plan: Plan) -> Tracker:
    from fleet.report.tracking import Tracker

    return Tracker(plan)
