"""The nightly job: what it finds, the manifest it makes of that, and that a night computes only what is new."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3.session
import pytest
from ray.job_submission import JobStatus
from rich.console import Console

import fleet.store.s3
import jobs.submit
from fleet.core.errors import InputError, ManifestError, SourceError
from fleet.manifest import Manifest, load_manifest
from fleet.run.coordinator import Coordinator, RunResult
from fleet.run.plan import Plan, make_plan
from fleet.run.pools import RayPools
from fleet.run.progress import RunProgress
from jobs.catalogue import complete_manifest
from jobs.nightly import main, write_manifest
from tests.catalogue import manifest_document
from tests.catalogue import write_manifest as write_document

PROJECT = Path(__file__).parents[2]

VARIANTS = [
    {"name": "plain", "realign": None, "fuse": {"method": "weight_average"}},
    {"name": "merged", "realign": {"method": "wise_ft"}, "fuse": {"method": "weight_average"}},
]


def put(folder: Path, *names: str) -> Path:
    """A folder with these files; finding models opens none of them."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def put_adapter(folder: Path) -> Path:
    return put(folder, "adapter_config.json", "adapter_model.safetensors")


def template(folder: Path, **changes: Any) -> Path:
    """A template manifest in `folder`, with paths relative to it and no models unless `changes` give some."""
    document = {
        "schema": 1,
        "name": "nightly",
        "base": {"unaligned": "bases/unaligned", "aligned": "bases/aligned"},
        "variants": [{"name": "plain", "realign": None, "fuse": {"method": "weight_average"}}],
        "evaluation": {"harmfulness": ["harm"], "folders": ["suites"]},
        "artifacts": "artifacts",
    }
    return write_document(folder / "template.json", document | changes)


def found(manifest: Manifest) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {m.name: (m.source, m.suites) for m in manifest.models}


def test_catalogue_with_models_at_any_depth_gives_them_by_name(tmp_path: Path) -> None:
    catalogue = tmp_path / "models"
    put_adapter(catalogue / "zulu")
    put_adapter(catalogue / "team" / "french lora.v2")
    put(catalogue / "full", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    put(catalogue / "pickled", "config.json", "pytorch_model.bin")
    put(catalogue / "tokenizer", "config.json", "tokenizer.json", "training_args.bin")
    put(catalogue / "notes", "README.md")

    manifest = complete_manifest(str(catalogue), template(tmp_path))

    assert found(manifest) == {
        "full": (str(catalogue / "full"), ()),
        "pickled": (str(catalogue / "pickled"), ()),
        "team-french-lora-v2": (str(catalogue / "team/french lora.v2"), ()),
        "zulu": (str(catalogue / "zulu"), ()),
    }
    assert list(found(manifest)) == sorted(found(manifest))


def test_catalogue_with_training_checkpoints_takes_only_the_model_they_lead_to(tmp_path: Path) -> None:
    catalogue = tmp_path / "models"
    put_adapter(catalogue / "a")
    put_adapter(catalogue / "a" / "checkpoint-500")
    put_adapter(catalogue / "alone" / "checkpoint-7")

    assert list(found(complete_manifest(str(catalogue), template(tmp_path)))) == ["a", "alone-checkpoint-7"]


def test_catalogue_with_an_adapter_merged_below_it_takes_the_adapter_alone(tmp_path: Path) -> None:
    catalogue = tmp_path / "models"
    put_adapter(catalogue / "a")
    for name in ("a/merged", "a/merged_16bit", "b", "b/merged", "merged"):
        put(catalogue / name, "config.json", "model.safetensors")
    put_adapter(catalogue / "a" / "checkpoint-5")
    put(catalogue / "a" / "checkpoint-5" / "merged", "config.json", "model.safetensors")
    names = [model.name for model in complete_manifest(str(catalogue), template(tmp_path)).models]
    assert names == ["a", "b", "b-merged", "merged"]


def test_catalogue_that_holds_base_models_and_artifacts_leaves_them_out(tmp_path: Path) -> None:
    put_adapter(tmp_path / "a")
    put(tmp_path / "bases" / "aligned", "config.json", "model.safetensors")
    put(tmp_path / "bases" / "unaligned", "config.json", "model.safetensors")
    put(tmp_path / "artifacts" / "fuse" / "plain" / "0123" / "attempt-1", "config.json", "model.safetensors")

    assert list(found(complete_manifest(str(tmp_path), template(tmp_path)))) == ["a"]


def test_catalogue_that_is_itself_a_model_gives_one_named_by_its_folder(tmp_path: Path) -> None:
    catalogue = put_adapter(tmp_path / "models" / "french")

    assert found(complete_manifest(str(catalogue), template(tmp_path))) == {"french": (str(catalogue), ())}


def test_suites_come_from_the_template_or_else_from_beside_the_weights(tmp_path: Path) -> None:
    catalogue = tmp_path / "models"
    for name in ("listed", "renamed", "own", "bare"):
        put_adapter(catalogue / name)
    for name in ("listed", "own"):
        (catalogue / name / "fleet.json").write_text(json.dumps({"suites": [f"{name}_suite"]}))
    known = [
        {"name": "listed", "source": "elsewhere/listed", "suites": ["from_template"]},
        {"name": "french", "source": "models/renamed", "suites": ["french"]},
    ]

    manifest = complete_manifest(str(catalogue), template(tmp_path, models=known))

    assert found(manifest) == {
        "bare": (str(catalogue / "bare"), ()),
        "french": (str(catalogue / "renamed"), ("french",)),
        "listed": (str(catalogue / "listed"), ("from_template",)),
        "own": (str(catalogue / "own"), ("own_suite",)),
    }


@pytest.mark.parametrize("text", ["{", '{"suites": "one"}', '{"suite": []}'])
def test_suites_file_that_is_malformed_is_refused_by_name(tmp_path: Path, text: str) -> None:
    catalogue = tmp_path / "models"
    (put_adapter(catalogue / "a") / "fleet.json").write_text(text)

    with pytest.raises(ManifestError, match=r"models/a/fleet\.json: "):
        complete_manifest(str(catalogue), template(tmp_path))


def test_complete_manifest_written_elsewhere_means_the_same_paths(tmp_path: Path) -> None:
    put_adapter(tmp_path / "models" / "a")
    path = template(tmp_path, variants=VARIANTS, tracking={"uri": "sqlite:///runs/mlflow.db"})

    manifest = complete_manifest(str(tmp_path / "models"), path)
    written = load_manifest(write_manifest(manifest, tmp_path / "far" / "away" / "models.json"))

    assert written == manifest
    assert written.base.aligned == str(tmp_path / "bases/aligned")
    assert written.evaluation.folders == (str(tmp_path / "suites"),)
    assert written.artifacts == str(tmp_path / "artifacts")
    assert written.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize("variants", [VARIANTS, []])
def test_complete_manifest_without_an_unaligned_model_is_written_and_read(tmp_path: Path, variants: list[Any]) -> None:
    """Written out, every default looks as if it had been asked for; none may ask for the unaligned model."""
    put_adapter(tmp_path / "models" / "a")
    given = template(tmp_path, base={"aligned": "bases/aligned"}, variants=variants)
    tonight = complete_manifest(str(tmp_path / "models"), given)
    read = load_manifest(write_manifest(tonight, tmp_path / "models.json"))
    assert read.model_dump() == tonight.model_dump()


def test_model_that_left_the_catalogue_is_dropped_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_adapter(tmp_path / "models" / "a")
    known = [{"name": "a", "source": "models/a"}, {"name": "gone", "source": "models/gone"}]

    manifest = complete_manifest(str(tmp_path / "models"), template(tmp_path, models=known))

    assert list(found(manifest)) == ["a"]
    assert "left out: gone" in caplog.text


@pytest.mark.parametrize(
    "variant",
    [
        {"name": "v", "realign": None, "fuse": {"method": "weight_average"}, "models": ["a", "gone"]},
        {"name": "v", "realign": None, "fuse": {"method": "weight_average", "weights": {"gone": 2.0}}},
    ],
)
def test_variant_that_names_a_model_that_is_gone_is_refused(tmp_path: Path, variant: dict[str, Any]) -> None:
    put_adapter(tmp_path / "models" / "a")

    with pytest.raises(ManifestError, match=r"with the models of .*: variants: v: .*gone"):
        complete_manifest(str(tmp_path / "models"), template(tmp_path, variants=[variant]))


def test_catalogue_without_a_model_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "models" / "notes", "README.md")

    with pytest.raises(SourceError, match="no model there"):
        complete_manifest(str(tmp_path / "models"), template(tmp_path))


def test_two_folders_of_one_name_are_refused_with_both(tmp_path: Path) -> None:
    put_adapter(tmp_path / "models" / "a" / "b")
    put_adapter(tmp_path / "models" / "a-b")

    with pytest.raises(ManifestError, match=r"models/a-b and .*models/a/b would both be named a-b"):
        complete_manifest(str(tmp_path / "models"), template(tmp_path))


def test_catalogue_in_s3_is_found_with_one_listing(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = boto3.session.Session()
    for key in ("a/adapter_config.json", "a/adapter_model.safetensors", "deep/b/config.json", "deep/b/x.safetensors"):
        session.client("s3").put_object(Bucket=s3_bucket, Key=f"models/{key}", Body=b"{}")
    session.client("s3").put_object(Bucket=s3_bucket, Key="models/a/fleet.json", Body=b'{"suites": ["s"]}')
    listings: list[tuple[Any, ...]] = []
    real = fleet.store.s3._list

    def counted(*args: Any) -> Any:
        listings.append(args)
        return real(*args)

    monkeypatch.setattr(fleet.store.s3, "_list", counted)

    manifest = complete_manifest(f"s3://{s3_bucket}/models/", template(tmp_path))

    assert found(manifest) == {
        "a": (f"s3://{s3_bucket}/models/a", ("s",)),
        "deep-b": (f"s3://{s3_bucket}/models/deep/b", ()),
    }
    assert len(listings) == 1


def test_command_with_an_empty_catalogue_prints_one_line_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--catalogue", str(tmp_path / "none"), "--manifest", str(template(tmp_path))])

    assert code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {tmp_path / 'none'}: no such folder"]


@pytest.mark.slow
def test_dry_run_writes_the_manifest_and_imports_nothing_heavy(catalogue: Path, tmp_path: Path) -> None:
    document = manifest_document(catalogue, tmp_path, variants=VARIANTS)
    arguments = ["--catalogue", str(catalogue), "--manifest", str(write_document(tmp_path / "t.json", document))]
    arguments += ["--output", str(tmp_path / "out" / "models.json"), "--dry-run"]
    code = (
        f"import sys, jobs.nightly; code = jobs.nightly.main({arguments!r});"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow'} & set(sys.modules);"
        "print(code, sorted(heavy))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr
    assert list(found(load_manifest(tmp_path / "out" / "models.json"))) == ["full", "lora", "rslora"]


def tensor_plan(catalogue: Path, path: Path) -> Plan:
    """Tonight's plan, without its scoring steps, which need an engine; everything else is whole."""
    plan = make_plan(complete_manifest(str(catalogue), path))
    return dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.kind != "score"))


def walk(plan: Plan) -> RunResult:
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        return Coordinator(plan, progress, RayPools(plan)).run()


@pytest.mark.usefixtures("local_ray")
def test_second_night_computes_only_the_new_model_and_the_fusions(catalogue: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(catalogue / "lora", models / "lora")
    document = manifest_document(catalogue, tmp_path, variants=VARIANTS, models=[])
    path = write_document(tmp_path / "template.json", document)
    first = walk(tensor_plan(models, path))
    shutil.copytree(catalogue / "rslora", models / "rslora")

    second = walk(tensor_plan(models, path))

    def names(result: RunResult) -> set[str]:
        return {key.rpartition("/")[0].split("-")[0] for key in result.computed}

    assert not first.failures and not second.failures
    assert names(first) == {"survey/lora", "realign/lora.wise_ft", "fuse/plain", "fuse/merged"}
    assert names(second) == {"survey/rslora", "realign/rslora.wise_ft", "fuse/plain", "fuse/merged"}
    assert walk(tensor_plan(models, path)).computed == []


class FakeCluster:
    """What `jobs.submit` asks of a cluster: the jobs it has, and one more."""

    def __init__(self, jobs_: dict[str, JobStatus], ends: JobStatus = JobStatus.SUCCEEDED, exit_code: int = 0) -> None:
        self.jobs = dict(jobs_)
        self.ends = ends
        self.exit_code = exit_code
        self.submitted: list[str] = []
        self.files: set[str] = set()

    def list_jobs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(submission_id=name, status=status) for name, status in self.jobs.items()]

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, str]) -> str:
        assert entrypoint == "python -m fleet.realign --manifest models.json"
        folder = Path(runtime_env["working_dir"])
        load_manifest(folder / "models.json")
        self.files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        self.submitted.append(submission_id)
        self.jobs[submission_id] = JobStatus.RUNNING
        return submission_id

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        yield f"log of {submission_id}\n"
        await asyncio.sleep(0)
        if not self.jobs[submission_id].is_terminal():
            self.jobs[submission_id] = self.ends

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.jobs[submission_id], driver_exit_code=self.exit_code)


@pytest.fixture
def tonight(catalogue: Path, tmp_path: Path) -> Manifest:
    return load_manifest(write_document(tmp_path / "models.json", manifest_document(catalogue, tmp_path)))


def job_id(manifest: Manifest) -> str:
    return f"fleet-{make_plan(manifest).run_id}"


def submit_to(cluster: FakeCluster, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jobs.submit, "JobSubmissionClient", lambda _address: cluster)
    return jobs.submit.submit(manifest, "http://head:8265")


def test_submit_sends_the_code_and_the_manifest_under_the_runs_id(
    tonight: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = FakeCluster({})

    assert submit_to(cluster, tonight, monkeypatch) == 0
    assert cluster.submitted == [job_id(tonight)]
    assert {"fleet/realign.py", "evals/harness.py", "models.json"} <= cluster.files
    assert not any("__pycache__" in name for name in cluster.files)
    assert capsys.readouterr().out == f"log of {job_id(tonight)}\n"


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_submit_of_work_that_is_under_way_or_done_follows_it_and_says_so(
    tonight: Manifest, status: JobStatus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster({job_id(tonight): status})

    assert submit_to(cluster, tonight, monkeypatch) == 0
    assert cluster.submitted == []
    assert f"job {job_id(tonight)} already exists" in caplog.text


def test_submit_of_work_that_failed_before_tries_again_beside_it(
    tonight: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = job_id(tonight)
    cluster = FakeCluster({name: JobStatus.FAILED, f"{name}-2": JobStatus.STOPPED})

    assert submit_to(cluster, tonight, monkeypatch) == 0
    assert cluster.submitted == [f"{name}-3"]


@pytest.mark.parametrize(("exit_code", "expected"), [(2, 2), (None, 1)])
def test_submit_of_a_job_that_fails_returns_its_exit_code(
    tonight: Manifest, exit_code: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit_to(FakeCluster({}, JobStatus.FAILED, exit_code), tonight, monkeypatch) == expected


def test_submit_to_no_cluster_is_an_input_error(tonight: Manifest) -> None:
    with pytest.raises(InputError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        jobs.submit.submit(tonight, "http://127.0.0.1:9")
