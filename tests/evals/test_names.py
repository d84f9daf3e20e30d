from __future__ import annotations

from pathlib import Path

import pytest

from evals.suites.names import check_distinct, shortened, tracked_name
from fleet.core.errors import SuiteError

NAMES = [
    "harm (de)",
    "harm [de]",
    "harm@v2",
    "harm_x40_v2",
    "harm/../de",
    "a/b",
    "schädlich_有害",
    "100 %?",
    "a" * 300,
    "a" * 299 + "b",
    "ü" * 300,
    "tmmluplus_education_(profession_level)",
]


@pytest.mark.slow
def test_tracked_name_every_metric_of_a_suite_is_taken_by_mlflow() -> None:
    from mlflow.utils.validation import _validate_metric, _validate_metric_name

    from fleet.report.tracking import metric_prefix

    for name in NAMES:
        metric = metric_prefix("over_refusal", name) + "_corrected_high"
        _validate_metric_name(metric)
        _validate_metric(metric, 0.0, 0, 0)


def test_tracked_name_no_two_suites_have_one() -> None:
    assert len({tracked_name(name) for name in NAMES}) == len(NAMES)
    assert tracked_name("harm (de)") == "harm _x28_de_x29_"
    assert tracked_name("demo_harmful") == "demo_harmful"
    assert tracked_name("harm+prefix") == "harm.prefix"


def test_check_distinct_suites_with_one_name_of_metrics_are_refused() -> None:
    check_distinct(["harm+prefix", "harm+prefix", "harm"])
    with pytest.raises(SuiteError, match=r"suites harm\+prefix and harm\.prefix: MLflow would call both harm\.prefix"):
        check_distinct(["harm+prefix", "harm.prefix"])


def test_shortened_long_name_keeps_to_its_bytes_and_differs() -> None:
    assert shortened("short") == "short"
    assert len(shortened("ü" * 300).encode()) <= 200
    assert shortened("a" * 300) != shortened("a" * 301)


@pytest.mark.slow
def test_tracked_name_a_real_store_takes_metrics_and_artifacts(tmp_path: Path) -> None:
    from mlflow.entities import Metric

    from tests.tracking import mlflow_client

    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("names", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    client.log_batch(run, [Metric(f"task.{tracked_name(name)}_denominator", 1.0, 0, 0) for name in NAMES])
    for name in NAMES:
        client.log_text(run, "{}", f"records/{tracked_name(shortened(f'score.french.{name}'))}.json")
    assert len(client.get_run(run).data.metrics) == len(NAMES)
    assert len(client.list_artifacts(run, "records")) == len(NAMES)
