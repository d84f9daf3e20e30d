"""Report -> MLflow: one parent run per run, one child run per candidate. Only this and `mlflow_store` import mlflow.

The store's records come first, and MLflow only shows them. Whether it answers is tried before any work begins; if it
fails at the end, the command says so, and the same command typed again writes what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import cast

from mlflow.entities import Metric, Param, Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

from evals.suites.names import tracked_name
from fleet.core.errors import InputError, TrackingError
from fleet.core.identity import Json
from fleet.report.files import report_files
from fleet.report.mlflow_store import explained, opened
from fleet.report.model import CandidateRow, Report
from fleet.report.published import Published, ScoreKeys
from fleet.report.results import own_steps
from fleet.run.plan import Plan
from fleet.steps.base import Step
from fleet.steps.record import Record, to_bytes

logger = logging.getLogger(__name__)

_KEY_TAG = "fleet.key"
"""A run's tag that says what the run shows, unique in an experiment; a command typed again finds its runs by it."""

_IDENTITY_TAG = "fleet.identity"
"""Tag of runs and registered versions: the digest of the weights, or of the step that makes them."""

_GATE_TAG = "fleet.gate"
"""Tag of runs and registered versions: the gates' verdict; empty for base models."""

_SCORES_TAG = "fleet.scores"
"""Tag of a registered version: its `ScoreKeys` as JSON."""

_PUBLISHED_BY_TAG = "fleet.published_by"
"""Tag of a registered version: id of the run that published it last."""

_PUBLISHED_AFTER_TAG = "fleet.published_after"
"""Tag of a registered version: the version that was published before it, which it was compared with; or empty."""

_ALIAS = "realigned"
"""The registry's alias of the version that is published."""

_PARAM_CHARS = 6000
"""MLflow's limit of a parameter's value, in characters."""


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
        with opened(tracking.uri) as self._client:
            experiment = self._client.get_experiment_by_name(tracking.experiment)
            self._experiment = (
                experiment.experiment_id if experiment else self._client.create_experiment(tracking.experiment)
            )
            self._registry = _Registry(self._client, tracking.register_as, plan) if tracking.register_as else None
            self.published = self._registry.last_published() if self._registry else None
            """What was published when the run began."""
        if experiment and experiment.lifecycle_stage == "deleted":
            raise InputError(
                f"tracking.experiment: {tracking.experiment} was deleted in MLflow; restore it, or choose another name"
            )
        self.run_id = ""
        """MLflow's id of the parent run; empty until `start`."""
        self._trainings: dict[str, str] = {}
        """Step key -> id of the run with its curves."""

    @property
    def location(self) -> str:
        """Where a person finds the run."""
        tracking = self._plan.manifest.tracking
        if tracking.uri.startswith("http"):
            return f"{tracking.uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {tracking.uri}  (experiment {tracking.experiment}, run {self.run_id})"

    def start(self) -> None:
        """Open the parent run of this plan, or the one that an earlier, interrupted command opened.

        Raises:
            InputError: MLflow doesn't take it.
        """
        plan = self._plan
        steps = [{"key": s.key, "spec": s.spec, "inputs": s.inputs} for s in plan.steps]
        with explained(plan.manifest.tracking.uri):
            run = self._find(plan.run_id) or self._create(
                plan.run_id, f"{plan.manifest.name} {plan.run_id}", {"fleet.name": plan.manifest.name}
            )
            self.run_id = run.info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            self._log_params(run, {"manifest.name": plan.manifest.name, "artifacts": plan.store.uri})
            self._text(self.run_id, "manifest.json", plan.manifest.model_dump_json(indent=1, by_alias=True))
            self._text(self.run_id, "plan.json", json.dumps(steps, indent=1, sort_keys=True))

    def training(self, step: Step, measured: Mapping[str, float]) -> None:
        """Log one update or evaluation of a training, while it goes on, as a child run with a curve per metric.

        If MLflow fails, this only warns, so that training goes on.

        Args:
            step: The step that trains.
            measured: Metric -> value; `step` is the number of the update.
        """
        try:
            run_id = self._trainings.get(step.key) or self._start_training(step)
            now, number = _milliseconds(), int(measured["step"])
            points = [Metric(name, value, now, number) for name, value in measured.items() if name != "step"]
            self._client.log_batch(run_id, metrics=points)
        except MlflowException as e:
            logger.warning("MLflow didn't take update %d of %s: %s", measured["step"], step.name, e.message)

    def finish(self, report: Report, records: Mapping[str, Record], failed: bool) -> None:
        """Log every candidate with its records as a child run, the report, and the registry; end the parent run.

        Raises:
            TrackingError: MLflow failed; what it was given until then stays there.
        """
        try:
            self._finish(report, records, failed)
        except MlflowException as e:
            raise TrackingError(
                f"MLflow at {self._plan.manifest.tracking.uri} failed: {e.message}; "
                "everything is in the store: type the same command again to track it"
            ) from e

    def _finish(self, report: Report, records: Mapping[str, Record], failed: bool) -> None:
        runs: dict[str, str] = {}
        for row, candidate in zip(report.rows, self._plan.candidates, strict=True):
            found = [record for step in own_steps(candidate) if (record := records.get(step.key)) is not None]
            runs[row.name] = self._candidate(row, found)
        for run_id in self._trainings.values():
            self._client.set_terminated(run_id)
        metrics = {
            "num_candidates": len(report.rows),
            "num_passed": sum(row.gate == "pass" for row in report.rows),
            "num_steps_computed": report.computed,
            "num_steps_cached": report.cached,
            "run_seconds": report.seconds,
        }
        self._log_metrics(self.run_id, {name: float(value) for name, value in metrics.items()})
        for name, content in report_files(self._plan, report, records).items():
            self._text(self.run_id, name, content.decode())
        if self._registry is not None:
            self._registry.register(report, runs, self.published)
        self._client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")

    def _start_training(self, step: Step) -> str:
        key = f"{self._plan.run_id}/{step.key}"
        tags = {"mlflow.parentRunId": self.run_id, "fleet.role": step.kind, _IDENTITY_TAG: step.fingerprint}
        run = self._find(key) or self._create(key, f"{step.kind} {step.name}", tags)
        self._log_params(run, _flat(step.spec))
        self._trainings[step.key] = run.info.run_id
        return run.info.run_id

    def _candidate(self, row: CandidateRow, records: list[Record]) -> str:
        """Log one candidate; returns the id of its run."""
        key = f"{self._plan.run_id}/{row.name}"
        tags = {
            "mlflow.parentRunId": self.run_id,
            "fleet.role": row.role,
            _IDENTITY_TAG: row.identity,
            _GATE_TAG: row.gate or "",
            "fleet.weights": row.weights or "",
        }
        run = self._find(key) or self._create(key, row.name, tags)
        run_id: str = run.info.run_id
        self._log_params(run, {"role": row.role, "models": ", ".join(row.models), **_flat(row.parameters)})
        self._log_metrics(run_id, _metrics(row))
        evidence = {"reasons": row.reasons, "samples": {s.suite: s.samples for s in row.scores}}
        self._text(run_id, "evidence.json", json.dumps(evidence, indent=1))
        for record in records:
            name = tracked_name(f"{record.kind}.{record.name}")
            self._text(run_id, f"records/{name}.json", to_bytes(record).decode())
        for name, value in tags.items():  # in a run that was there already, they may be older ones
            self._client.set_tag(run_id, name, value)
        self._client.set_terminated(run_id)
        return run_id

    def _find(self, key: str) -> Run | None:
        runs = self._client.search_runs([self._experiment], filter_string=f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _create(self, key: str, name: str, tags: dict[str, str]) -> Run:
        return self._client.create_run(self._experiment, run_name=name, tags={_KEY_TAG: key, **tags})

    def _log_params(self, run: Run, params: dict[str, str]) -> None:
        """Log those that the run doesn't have: MLflow sets a parameter only once, and a resumed run's are the same."""
        new = [Param(k, v[:_PARAM_CHARS]) for k, v in params.items() if k not in run.data.params]
        self._client.log_batch(run.info.run_id, params=new)

    def _log_metrics(self, run_id: str, metrics: dict[str, float]) -> None:
        now = _milliseconds()
        self._client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in metrics.items()])

    def _text(self, run_id: str, name: str, text: str) -> None:
        self._client.log_text(run_id, text, name)


class _Registry:
    """One registered model: a version per fused variant, and the alias `realigned` on the one that is published."""

    def __init__(self, client: MlflowClient, name: str, plan: Plan) -> None:
        self._client = client
        self._name = name
        self._plan = plan

    def last_published(self) -> Published | None:
        """The version with the alias; None if there is none.

        If this very run published it, because its command was typed again, it is the version that was published before:
        so the same command gives the same verdicts.
        """
        model = self._model()
        if model is None or (alias := _published_version(model)) is None:
            return None
        versions = {str(v.version): v for v in self._versions()}
        version = versions.get(alias)
        if version is not None and version.tags.get(_PUBLISHED_BY_TAG) == self._plan.run_id:
            version = versions.get(version.tags.get(_PUBLISHED_AFTER_TAG, ""))
        if version is None:
            return None
        try:
            scores = ScoreKeys.model_validate_json(version.tags.get(_SCORES_TAG, ""))
        except ValidationError:
            scores = None
        return Published(str(version.version), version.tags.get(_IDENTITY_TAG, ""), scores)

    def register(self, report: Report, runs: Mapping[str, str], before: Published | None) -> None:
        """Register a version of every fused variant, and set the alias on the best that passed.

        If none passed, the alias stays where it was, unless that version is of this run and no longer passes.

        Args:
            report: The run's.
            runs: Candidate -> id of its MLflow run.
            before: What was published when the run began.
        """
        if self._model() is None:
            self._client.create_registered_model(self._name, description=f"Realigned and fused models of {report.name}")
        known = {v.tags.get(_IDENTITY_TAG, ""): str(v.version) for v in self._versions()}
        for row, candidate in zip(report.rows, self._plan.candidates, strict=True):
            if row.role != "fused" or row.weights is None:
                continue
            if row.identity not in known:
                known[row.identity] = self._create_version(row.weights, runs[row.name], row.identity)
            keys = {score.suite: candidate.scores[score.suite].key for score in row.scores}
            scores = ScoreKeys(store=self._plan.store.uri, keys=keys)
            tags = {"fleet.variant": row.name, _GATE_TAG: row.gate or "", _SCORES_TAG: scores.model_dump_json()}
            self._tag(known[row.identity], tags)
        self._withdraw({known[r.identity] for r in report.rows if r.identity in known and r.gate != "pass"})
        if report.best is not None:
            version = known[report.row(report.best).identity]
            after = before.version if before is not None else ""
            self._tag(version, {_PUBLISHED_AFTER_TAG: after, _PUBLISHED_BY_TAG: self._plan.run_id})
            self._client.set_registered_model_alias(self._name, _ALIAS, version)

    def _withdraw(self, failed: set[str]) -> None:
        """Take the alias away from a version of this run that no longer passes."""
        if _published_version(self._client.get_registered_model(self._name)) in failed:
            self._client.delete_registered_model_alias(self._name, _ALIAS)

    def _model(self) -> RegisteredModel | None:
        try:
            return self._client.get_registered_model(self._name)
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _versions(self) -> list[ModelVersion]:
        return self._client.search_model_versions(f"name = '{self._name}'")

    def _create_version(self, weights: str, run_id: str, identity: str) -> str:
        version = self._client.create_model_version(self._name, weights, run_id=run_id, tags={_IDENTITY_TAG: identity})
        return str(version.version)

    def _tag(self, version: str, tags: Mapping[str, str]) -> None:
        for tag, value in tags.items():
            self._client.set_model_version_tag(self._name, version, tag, value)


def metric_prefix(kind: str, suite: str) -> str:
    """What the names of a suite's metrics begin with: its name, as far as MLflow takes it (`evals.suites.names`)."""
    return f"{kind}.{tracked_name(suite)}"


def _metrics(row: CandidateRow) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for score in row.scores:
        metrics |= score.metrics(metric_prefix(score.kind, score.suite))
    if row.incoherent is not None:
        metrics |= row.incoherent.metrics("incoherent")
    means = {
        "edit_norm": row.edit_norm,
        "task_accuracy_mean": row.mean("task"),
        "harmfulness_mean": row.mean("harmfulness"),
    }
    return metrics | {name: value for name, value in means.items() if value is not None}


def _published_version(model: RegisteredModel) -> str | None:
    """The version that has the alias; None if none has."""
    # mlflow types them only as a dict.
    aliases = cast("dict[str, object]", model.aliases)  # pyright: ignore[reportUnknownMemberType]
    return str(aliases[_ALIAS]) if _ALIAS in aliases else None


def _milliseconds() -> int:
    """Since 1970, as MLflow stamps metrics."""
    return time.time_ns() // 1_000_000


def _flat(value: dict[str, Json], prefix: str = "") -> dict[str, str]:
    """{"fuse": {"scale": 0.3}} -> {"fuse.scale": "0.3"}, so that MLflow's compare view has a column for each."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            found |= _flat(dict(item), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item)
    return found
