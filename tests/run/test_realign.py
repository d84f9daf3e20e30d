"""The command, whole: real Ray, real vLLM, a real MLflow store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.logs import read_samples
from fleet.core.errors import TrackingError
from fleet.manifest import load_manifest
from fleet.realign import main
from fleet.report.gather import make_report
from fleet.run.coordinator import RunResult
from fleet.run.plan import make_plan
from tests.catalogue import manifest_document, write_manifest
from tests.tracking import make_tracker, mlflow_client

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
# Gates that random weights pass, so that there is something to publish, and gates that six prompts cannot pass.
LAX = {
    "harmfulness_max": 1.0, "harmfulness_margin": 1.0, "task_drop_max": 1.0, "over_refusal_max": 1.0,
    "coherence_margin": 1.0,
}  # fmt: skip
STRICT = {"harmfulness_max": 0.001}


class Finished(NamedTuple):
    """One whole run, and the same command typed again."""

    manifest: Path
    work: Path
    report: dict[str, Any]
    output: str
    second_code: int
    second_output: str


@pytest.fixture(scope="module")
def finished(catalogue: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Finished:
    work = tmp_path_factory.mktemp("run")
    path = write_manifest(work / "models.json", manifest_document(catalogue, work, gates=LAX))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        first, second = (run_captured(work / f"output-{i}", path) for i in (1, 2))
    assert first[0] == 0, first[1]
    (page,) = (work / "artifacts" / "runs").glob("*/report.json")
    return Finished(path, work, json.loads(page.read_text()), first[1], *second)


def run_captured(log: Path, manifest: Path) -> tuple[int, str]:
    with log.open("w+") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        code = main(["--manifest", str(manifest)])
        file.seek(0)
        return code, file.read()


def rows(finished: Finished) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in finished.report["rows"]}


def runs_of(finished: Finished) -> dict[str, Run]:
    client = mlflow_client(f"sqlite:///{finished.work}/mlflow.db")
    experiment = client.get_experiment_by_name("pico")
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def completions(row: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    (score,) = (s for s in row["scores"] if s["suite"] == suite)
    files = sorted(Path(score["samples"]).glob("*.parquet"))
    return [sample.model_dump() for file in files for sample in read_samples(file.read_bytes())]


def test_run_scores_every_candidate_on_every_suite_of_its(finished: Finished) -> None:
    assert list(rows(finished)) == [
        "aligned", "lora", "rslora", "full", "lora.safemerge", "rslora.safemerge", "full.safemerge",
        "plain", "merged", "loras",
    ]  # fmt: skip
    for row in rows(finished).values():
        assert {s["suite"] for s in row["scores"]} == {"harm", "task"}
        for score in row["scores"]:
            rate = score["rate"]
            assert rate["denominator"] + rate["unscored"] == 6
            assert len(completions(row, score["suite"])) == 6


def test_run_prints_the_table_and_where_things_are(finished: Finished) -> None:
    for word in ("lora.safemerge", "merged", "harm", str(finished.work / "artifacts"), "mlflow ui"):
        assert word in finished.output


def test_run_typed_again_computes_nothing_and_says_so(finished: Finished) -> None:
    assert finished.second_code == 0
    assert "nothing was computed" in finished.second_output


def test_metric_prefix_is_a_name_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name  # pyright: ignore[reportPrivateUsage]

    from fleet.report.tracking import metric_prefix

    name = metric_prefix("harmfulness", "my_harmful+prefix")
    _validate_metric_name(name)
    assert name != metric_prefix("harmfulness", "my_harmful")


def test_run_in_mlflow_is_one_parent_and_a_child_per_candidate(finished: Finished) -> None:
    runs = runs_of(finished)
    parents = [run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"], "the second command continued the same run"
    children = {name for name, run in runs.items() if run not in parents}
    assert children == set(rows(finished))
    merged = runs["merged"].data
    assert merged.params["realign.threshold"] == "0.75"
    assert merged.params["fuse.scale"] == "0.5"
    score = next(s for s in rows(finished)["merged"]["scores"] if s["suite"] == "harm")
    assert merged.metrics["harmfulness.harm_denominator"] == score["rate"]["denominator"]


def test_run_in_mlflow_carries_the_plan_and_the_records(finished: Finished) -> None:
    client = mlflow_client(f"sqlite:///{finished.work}/mlflow.db")
    runs = runs_of(finished)
    (parent,) = (run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert kept == {"manifest.json", "plan.json", "report.json", "report.html", "modules.html"}
    records = {Path(f.path).name for f in client.list_artifacts(runs["lora.safemerge"].info.run_id, "records")}
    assert {re.sub("-[0-9a-f]{6}", "", name) for name in records} == {
        "survey.lora.json", "realign.lora.safemerge.json", "score.lora.safemerge.harm.json",
        "score.lora.safemerge.task.json",
    }  # fmt: skip


def test_run_tracked_by_a_server_has_the_same_numbers(finished: Finished, catalogue: Path, tmp_path: Path) -> None:
    """The records are there already, so this only tracks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/files",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        document = manifest_document(catalogue, finished.work)
        document["tracking"] |= {"uri": uri}
        path = tmp_path / "models.json"
        assert main(["--manifest", str(write_manifest(path, document))]) == 2, "a server registers no local path"
        document["tracking"]["register_as"] = None
        assert main(["--manifest", str(write_manifest(path, document))]) == 0
        client = mlflow_client(uri)
        experiment = client.get_experiment_by_name("pico")
        assert experiment is not None
        found = {r.info.run_name: r.data.metrics for r in client.search_runs([experiment.experiment_id])}
        expected = {name: run.data.metrics for name, run in runs_of(finished).items()}
        assert {n: found[n] for n in rows(finished)} == {n: expected[n] for n in rows(finished)}
        plan = make_plan(load_manifest(path))
        result = RunResult(records=dict(plan.done))
        tracker = make_tracker(plan)
        tracker.start()
    finally:
        # At once: a busy machine may take longer than anyone would wait for a server to close its connections.
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with pytest.raises(TrackingError, match="type the same command again"):
        tracker.finish(make_report(plan, result), result.records, failed=False)


def test_run_registers_every_fused_variant(finished: Finished) -> None:
    client = mlflow_client(f"sqlite:///{finished.work}/mlflow.db")
    versions = {v.tags["fleet.variant"]: v for v in client.search_model_versions("name = 'pico'")}
    assert set(versions) == {"plain", "merged", "loras"}
    assert versions["merged"].source == rows(finished)["merged"]["weights"]
    assert {v.tags["fleet.gate"] for v in versions.values()} == {"pass"}


def test_run_gives_the_alias_to_the_variant_that_passed_with_the_least_harm(finished: Finished) -> None:
    client = mlflow_client(f"sqlite:///{finished.work}/mlflow.db")
    harm = {
        name: row["scores"][0]["rate"]["value"] or 0.0 for name, row in rows(finished).items() if row["role"] == "fused"
    }
    assert finished.report["best"] == min(harm, key=lambda name: harm[name])
    version = client.get_model_version_by_alias("pico", "realigned")
    assert version.tags["fleet.variant"] == finished.report["best"]


def track(finished: Finished, catalogue: Path, work: Path, **gates: float) -> MlflowClient:
    """Track the finished run's records once more, in a store of MLflow's below `work`, judged by `gates`."""
    document = manifest_document(catalogue, finished.work, gates=gates)
    document["tracking"] |= {"uri": f"sqlite:///{work}/mlflow.db"}
    plan = make_plan(load_manifest(write_manifest(work / "models.json", document)))
    assert plan.pending == ()
    result = RunResult(records=dict(plan.done))
    tracker = make_tracker(plan)
    tracker.start()
    tracker.finish(make_report(plan, result), result.records, failed=False)
    return mlflow_client(document["tracking"]["uri"])


def test_alias_is_taken_away_when_nothing_passes_any_more_and_given_again(
    finished: Finished, catalogue: Path, tmp_path: Path
) -> None:
    client = track(finished, catalogue, tmp_path, **LAX)
    before = client.get_model_version_by_alias("pico", "realigned")
    track(finished, catalogue, tmp_path, **STRICT)
    assert client.get_registered_model("pico").aliases == {}
    versions = client.search_model_versions("name = 'pico'")
    assert len(versions) == 3, "what failed stays registered, and is registered once"
    assert "pass" not in {v.tags["fleet.gate"] for v in versions}
    track(finished, catalogue, tmp_path, **LAX)
    assert client.get_model_version_by_alias("pico", "realigned").version == before.version


def test_alias_of_another_run_stays_when_nothing_passes(finished: Finished, catalogue: Path, tmp_path: Path) -> None:
    """This run has nothing better to offer, and has not judged the other's model."""
    client = track(finished, catalogue, tmp_path, **STRICT)
    other = client.create_model_version("pico", "s3://elsewhere/model", tags={"fleet.identity": "of another run"})
    client.set_registered_model_alias("pico", "realigned", other.version)
    track(finished, catalogue, tmp_path, **STRICT)
    assert client.get_model_version_by_alias("pico", "realigned").version == other.version


@pytest.mark.parametrize("name", ["merged", "loras", "full.safemerge", "rslora.safemerge"])
def test_output_loads_in_transformers_and_peft_and_says_what_vllm_said(
    finished: Finished, catalogue: Path, name: str
) -> None:
    folder = Path(rows(finished)[name]["weights"])
    if (folder / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(catalogue / "aligned", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder))
        tokenizer = AutoTokenizer.from_pretrained(catalogue / "aligned")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample in completions(rows(finished)[name], "harm"):
        tokens = tokenizer(sample["input"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**tokens, max_new_tokens=4, do_sample=False)
        said = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said == sample["completion"]


def test_run_killed_and_typed_again_leaves_the_same_bytes(finished: Finished, catalogue: Path, tmp_path: Path) -> None:
    """SIGKILL to the driver in the middle; what was done stays, and the MLflow run goes on."""
    path = write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fleet.realign", "--manifest", str(path)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list((tmp_path / "artifacts").glob("fuse/*/*/record.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    done_before = {p: p.read_bytes() for p in (tmp_path / "artifacts").glob("*/*/*/record.json")}
    assert 0 < len(done_before) < len(list((finished.work / "artifacts").glob("*/*/*/record.json")))

    assert main(["--manifest", str(path)]) == 0
    assert all(p.read_bytes() == data for p, data in done_before.items()), "finished steps were done again"
    assert artifacts_of(tmp_path) == artifacts_of(finished.work)
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    parents = client.search_runs(["1"], filter_string="tags.`fleet.name` = 'pico'")
    assert [run.info.status for run in parents] == ["FINISHED"]


def artifacts_of(work: Path) -> dict[str, bytes]:
    """Step key and file name -> bytes, of all that the records name."""
    found: dict[str, bytes] = {}
    root = work / "artifacts"
    for record in root.glob("*/*/*/record.json"):
        attempt = json.loads(record.read_text())
        for name in attempt["files"]:
            data = (record.parent / f"attempt-{attempt['attempt']}" / name).read_bytes()
            found[f"{record.parent.relative_to(root)}/{name}"] = data
    return found


# -- bad input: one line, exit code 2, before Ray starts -----------------------------------------------------------


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fleet.realign", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def changed(document: dict[str, Any], case: str, catalogue: Path, tmp_path: Path) -> dict[str, Any]:
    document = json.loads(json.dumps(document))
    broken = tmp_path / "broken"
    if case == "unknown field":
        document["colour"] = "red"
    elif case == "missing folder":
        document["models"][0]["source"] = str(tmp_path / "nowhere")
    elif case == "truncated":
        shutil.copytree(catalogue / "full", broken)
        data = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
        document["models"][2]["source"] = str(broken)
    elif case == "pickle":
        shutil.copytree(catalogue / "full", broken)
        (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
        document["models"][2]["source"] = str(broken)
    elif case == "no mlflow server":
        document["tracking"] |= {"uri": "http://127.0.0.1:9", "register_as": None}
    elif case == "deleted experiment":
        client = mlflow_client(document["tracking"]["uri"])
        client.delete_experiment(client.create_experiment(document["tracking"]["experiment"]))
    return document


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown field", "colour: unknown field"),
        ("missing folder", "nowhere"),
        ("truncated", "truncated"),
        ("pickle", "is a pickle"),
        pytest.param("no mlflow server", "tracking.uri", marks=pytest.mark.slow),
        pytest.param("deleted experiment", "tracking.experiment: pico was deleted", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fleet.run.cluster.start_ray", lambda *_: pytest.fail("Ray was started"))
    document = changed(manifest_document(catalogue, tmp_path), case, catalogue, tmp_path)
    code = main(["--manifest", str(write_manifest(tmp_path / "models.json", document))])
    error = capsys.readouterr().err
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


@pytest.mark.slow
def test_s3_artifacts_unreachable_or_without_credentials_exit_2(catalogue: Path, tmp_path: Path) -> None:
    document = manifest_document(catalogue, tmp_path, artifacts="s3://bucket/prefix")
    path = str(write_manifest(tmp_path / "models.json", document))
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
    unreachable = run_module("--manifest", path, "--dry-run", AWS_ENDPOINT_URL="http://127.0.0.1:9", **keys)
    nobody = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    without = run_module("--manifest", path, "--dry-run", **keys | nobody)
    for done in (unreachable, without):
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_address_without_a_cluster_is_one_line_and_exit_code_2(catalogue: Path, tmp_path: Path) -> None:
    """In a process of its own: one that is attached to a Ray stays there, whatever the address."""
    path = write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))
    addresses = ("nonsense", "127.0.0.1:9")
    code = (
        "import sys; from fleet.realign import main\n"
        f"codes = [main(['--manifest', {str(path)!r}, '--address', address]) for address in {addresses}]\n"
        "sys.exit(codes != [2, 2])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    for address, line in zip(addresses, lines, strict=True):
        assert address in line and "ray start --head" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "artifacts").rglob("record.json"))


# -- the control plane stays light ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_planning_imports_no_heavy_library() -> None:
    code = (
        "import sys, fleet.realign, fleet.manifest, fleet.run.plan, fleet.steps.builder, fleet.steps.record\n"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'transformers', 'boto3', 'lm_eval', 'datasets', 'plotly'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_dry_run_lists_every_step_and_imports_no_heavy_library(catalogue: Path, tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))
    code = (
        "import sys; from fleet.realign import main\n"
        f"code = main(['--manifest', {str(path)!r}, '--dry-run'])\n"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'transformers', 'boto3', 'lm_eval', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or code)"
    )
    environment = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for word in ("survey/lora/", "realign/full.safemerge-", "fuse/merged/", "score/merged.harm/", "29 of 29 steps"):
        assert word in done.stdout
    assert not (tmp_path / "mlflow.db").exists()


def test_shipped_manifest_plans() -> None:
    done = run_module("--manifest", "models.json", "--dry-run")
    assert done.returncode == 0, done.stderr
