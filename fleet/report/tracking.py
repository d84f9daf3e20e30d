"""Report -> MLflow: one parent run per run, one child per candidate. The only place that imports mlflow.

The store's records come first; MLflow is a view of them. It is asked before any work whether it is there, and an outage
at the end is reported and mended by typing the same command again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow.entities import Metric, Param, Run
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

from fleet.core.errors import InputError, TrackingError
from fleet.core.identity import Json
from fleet.report.files import report_files
from fleet.report.model import CandidateRow, Report
from fleet.report.published import Published, ScoreKeys
from fleet.report.results import own_steps
from fleet.run.plan import Plan
from fleet.steps.record import Record, Step, to_bytes

logger = logging.getLogger(__name__)

_KEY_TAG = "fleet.key"
"""Tag with what a run is of; a run killed and typed again finds its own by it."""

_ALIAS = "realigned"
"""Of the registered version that is published."""

_SCORES_TAG = "fleet.scores"
"""Of a registered version: its `ScoreKeys`."""

_PUBLISHED_BY_TAG = "fleet.published_by"
"""Of a registered version: the run that published it last."""

_PUBLISHED_AFTER_TAG = "fleet.published_after"
"""Of a registered version: the version that was published before it, and that it was held against."""

_PARAM_CHARS = 6000
"""MLflow's own limit of a parameter's value."""


class Tracker:
    """The MLflow side of one run.

    Raises:
        InputError: the tracking server cannot be reached, or could not register what is in this store.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        tracking = plan.manifest.tracking
        is_server, is_local_store = tracking.uri.startswith("http"), "://" not in plan.store.uri
        if is_server and is_local_store and tracking.register_as is not None:
            raise InputError(
                "tracking.register_as: an MLflow server registers no path of this machine; "
                "set artifacts to s3://…, or leave register_as out"
            )
        try:
            self._client = MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)
            experiment = self._client.get_experiment_by_name(tracking.experiment)
            self._experiment = (
                experiment.experiment_id if experiment else self._client.create_experiment(tracking.experiment)
            )
            self.published = self._last_published()
            """What was published when the run began."""
        except MlflowException as e:
            raise InputError(f"tracking.uri: {tracking.uri} doesn't answer as an MLflow store: {e.message}") from e
        if experiment and experiment.lifecycle_stage == "deleted":
            raise InputError(
                f"tracking.experiment: {tracking.experiment} was deleted in MLflow; restore it, or choose another name"
            )
        self.run_id = ""
        self._trainings: dict[str, str] = {}
        """Mask step -> the run of its training."""

    @property
    def location(self) -> str:
        """Where a person finds the run."""
        tracking = self._plan.manifest.tracking
        if tracking.uri.startswith("http"):
            return f"{tracking.uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {tracking.uri}  (experiment {tracking.experiment}, run {self.run_id})"

    def start(self) -> None:
        """Open the parent run of this plan, or the one an earlier, interrupted command opened."""
        plan = self._plan
        run = self._find(plan.run_id) or self._create(
            plan.run_id, f"{plan.manifest.name} {plan.run_id}", {"fleet.name": plan.manifest.name}
        )
        self.run_id = run.info.run_id
        self._client.update_run(self.run_id, status="RUNNING")
        self._log_params(run, {"manifest.name": plan.manifest.name, "artifacts": plan.store.uri})
        self._text(self.run_id, "manifest.json", plan.manifest.model_dump_json(indent=1, by_alias=True))
        steps = [{"key": s.key, "spec": s.spec, "inputs": s.inputs} for s in plan.steps]
        self._text(self.run_id, "plan.json", json.dumps(steps, indent=1, sort_keys=True))

    def training(self, step: Step, measured: Mapping[str, float]) -> None:
        """Log one update or evaluation of a training, while it goes on, as a child run with a curve per metric.

        Tracking is not what a training waits for: where MLflow fails, a warning is all.
        """
        try:
            run_id = self._trainings.get(step.key) or self._start_training(step)
            now, number = time.time_ns() // 1_000_000, int(measured["step"])
            points = [Metric(name, value, now, number) for name, value in measured.items() if name != "step"]
            self._client.log_batch(run_id, metrics=points)
        except MlflowException as e:
            logger.warning("MLflow didn't take update %d of %s: %s", measured["step"], step.name, e.message)

    def _start_training(self, step: Step) -> str:
        key = f"{self._plan.run_id}/{step.key}"
        tags = {"mlflow.parentRunId": self.run_id, "fleet.role": "mask", "fleet.identity": step.fingerprint}
        run = self._find(key) or self._create(key, f"mask {step.name}", tags)
        self._log_params(run, _flat(step.spec))
        self._trainings[step.key] = run.info.run_id
        return run.info.run_id

    def finish(self, report: Report, records: Mapping[str, Record], failed: bool) -> None:
        """Log every candidate with its records as a child run, the report, and the registry; end the parent run.

        Raises:
            TrackingError: MLflow failed; what it has until then stays.
        """
        try:
            self._finish(report, records, failed)
        except MlflowException as e:
            raise TrackingError(
                f"MLflow at {self._plan.manifest.tracking.uri} failed: {e.message}; "
                "everything is in the store: type the same command again to track it"
            ) from e

    def _finish(self, report: Report, records: Mapping[str, Record], failed: bool) -> None:
        for row, candidate in zip(report.rows, self._plan.candidates, strict=True):
            self._candidate(row, [r for s in own_steps(candidate) if (r := records.get(s.key))])
        for run_id in self._trainings.values():
            self._client.set_terminated(run_id)
        metrics = {
            "num_candidates": len(report.rows),
            "num_passed": sum(r.gate == "pass" for r in report.rows),
            "num_steps_computed": report.computed,
            "num_steps_cached": report.cached,
            "run_seconds": report.seconds,
        }
        self._log_metrics(self.run_id, {name: float(value) for name, value in metrics.items()})
        for name, content in report_files(self._plan, report, records).items():
            self._text(self.run_id, name, content.decode())
        if self._plan.manifest.tracking.register_as is not None:
            self._register(self._plan.manifest.tracking.register_as, report)
        self._client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")

    def _candidate(self, row: CandidateRow, records: list[Record]) -> None:
        key = f"{self._plan.run_id}/{row.name}"
        tags = {
            "mlflow.parentRunId": self.run_id,
            "fleet.role": row.role,
            "fleet.identity": row.identity,
            "fleet.gate": row.gate or "",
            "fleet.weights": row.weights or "",
        }
        run = self._find(key) or self._create(key, row.name, tags)
        self._log_params(run, {"role": row.role, "models": ", ".join(row.models), **_flat(row.parameters)})
        metrics: dict[str, float] = {}
        for score in row.scores:
            metrics |= score.metrics(metric_prefix(score.kind, score.suite))
        if row.incoherent is not None:
            metrics |= row.incoherent.metrics("incoherent")
        if row.edit_norm is not None:
            metrics["edit_norm"] = row.edit_norm
        if (accuracy := row.mean("task")) is not None:
            metrics["task_accuracy_mean"] = accuracy
        if (harm := row.mean("harmfulness")) is not None:
            metrics["harmfulness_mean"] = harm
        self._log_metrics(run.info.run_id, metrics)
        evidence = {"reasons": row.reasons, "samples": {s.suite: s.samples for s in row.scores}}
        self._text(run.info.run_id, "evidence.json", json.dumps(evidence, indent=1))
        for record in records:
            self._text(run.info.run_id, f"records/{record.kind}.{record.name}.json", to_bytes(record).decode())
        for name, value in tags.items():
            self._client.set_tag(run.info.run_id, name, value)
        self._client.set_terminated(run.info.run_id)

    def _register(self, name: str, report: Report) -> None:
        """A version per fused variant; the alias `realigned` on the best that passed, or on none."""
        if self._registered(name) is None:
            self._client.create_registered_model(name, description=f"Realigned and fused models of {report.name}")
        known = {
            v.tags.get("fleet.identity", ""): v.version for v in self._client.search_model_versions(f"name = '{name}'")
        }
        for row, candidate in zip(report.rows, self._plan.candidates, strict=True):
            if row.role != "fused" or row.weights is None:
                continue
            if row.identity not in known:
                run = self._find(f"{self._plan.run_id}/{row.name}")
                version = self._client.create_model_version(
                    name,
                    row.weights,
                    run_id=run.info.run_id if run else None,
                    tags={"fleet.identity": row.identity},
                )
                known[row.identity] = version.version
            keys = {score.suite: candidate.scores[score.suite].key for score in row.scores}
            scores = ScoreKeys(store=self._plan.store.uri, keys=keys)
            tags = {
                "fleet.variant": row.name,
                "fleet.gate": row.gate or "",
                _SCORES_TAG: scores.model_dump_json(),
            }
            for tag, value in tags.items():
                self._client.set_model_version_tag(name, known[row.identity], tag, value)
        self._withdraw_alias(name, known, report)
        if report.best is not None:
            version = known[report.row(report.best).identity]
            before = self.published.version if self.published is not None else ""
            self._client.set_model_version_tag(name, version, _PUBLISHED_AFTER_TAG, before)
            self._client.set_model_version_tag(name, version, _PUBLISHED_BY_TAG, self._plan.run_id)
            self._client.set_registered_model_alias(name, _ALIAS, version)

    def _registered(self, name: str) -> RegisteredModel | None:
        try:
            return self._client.get_registered_model(name)
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _last_published(self) -> Published | None:
        """The version with the alias. If this run gave it, typed before, then the one that it was held against: the
        same command gives the same verdicts."""
        name = self._plan.manifest.tracking.register_as
        if name is None or (model := self._registered(name)) is None or _ALIAS not in model.aliases:
            return None
        versions = {str(v.version): v for v in self._client.search_model_versions(f"name = '{name}'")}
        version = versions.get(str(model.aliases[_ALIAS]))
        if version is not None and version.tags.get(_PUBLISHED_BY_TAG) == self._plan.run_id:
            version = versions.get(version.tags.get(_PUBLISHED_AFTER_TAG, ""))
        if version is None:
            return None
        try:
            scores = ScoreKeys.model_validate_json(version.tags.get(_SCORES_TAG, ""))
        except ValidationError:
            scores = None
        return Published(str(version.version), version.tags.get("fleet.identity", ""), scores)

    def _withdraw_alias(self, name: str, known: dict[str, str], report: Report) -> None:
        """Take the alias from a version of this run that no longer passes."""
        failed = {str(known[r.identity]) for r in report.rows if r.identity in known and r.gate != "pass"}
        if str(self._client.get_registered_model(name).aliases.get(_ALIAS)) in failed:
            self._client.delete_registered_model_alias(name, _ALIAS)

    def _find(self, key: str) -> Run | None:
        runs = self._client.search_runs([self._experiment], filter_string=f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _create(self, key: str, name: str, tags: dict[str, str]) -> Run:
        return self._client.create_run(self._experiment, run_name=name, tags={_KEY_TAG: key, **tags})

    def _log_params(self, run: Run, params: dict[str, str]) -> None:
        """A parameter can be set once; on a resumed run what is there already is the same."""
        new = [Param(k, v[:_PARAM_CHARS]) for k, v in params.items() if k not in run.data.params]
        self._client.log_batch(run.info.run_id, params=new)

    def _log_metrics(self, run_id: str, metrics: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self._client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in metrics.items()])

    def _text(self, run_id: str, name: str, text: str) -> None:
        self._client.log_text(run_id, text, name)


def metric_prefix(kind: str, suite: str) -> str:
    """What the names of a suite's metrics begin with; MLflow takes no `+`, which stands before a template's name."""
    return f"{kind}.{suite.replace('+', '.')}"


def _flat(value: dict[str, Json], prefix: str = "") -> dict[str, str]:
    """{"fuse": {"scale": 0.3}} -> {"fuse.scale": "0.3"}, so that MLflow's compare view has a column for each."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            found |= _flat(dict(item), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item)
    return found
