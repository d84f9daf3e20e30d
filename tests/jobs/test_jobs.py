"""What runs on a cluster: a real Ray head with a token, the command as a job, and the cluster files we ship."""

from __future__ import annotations

import copy
import importlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import yaml
from jsonschema import ValidationError as SchemaError
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from fleet.manifest import load_manifest
from fleet.run.plan import Plan, make_plan
from tests.catalogue import manifest_document, write_manifest

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# -- a real head -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A Ray head of this session's own: where its dashboard is, and the environment that may use it."""

    address: str
    env: dict[str, str]

    def request(self, path: str, token: str | None, body: bytes | None = None) -> int:
        """HTTP status of a GET, or of a POST with a body, with or without a token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, body, headers), timeout=30
            ) as reply:
                return reply.status
        except urllib.error.HTTPError as e:
            return e.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Generator[Head]:
    """`ray start --head`, as the README says it: in the clone, its environment active, with a token."""
    # Short, because the sockets in it have long names and a limit; a home of its own, because `~/.ray` is the user's.
    folder = Path(tempfile.mkdtemp(prefix="fleet-ray-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "HOME": str(folder)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=3", "--disable-usage-stats", f"--temp-dir={folder}",
        f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--min-worker-port=0",
        "--max-worker-port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={(dashboard := free_port())}",
        # Its default is one fixed port, which the session's own Ray holds; without an agent no job ever starts.
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=log, stderr=log, start_new_session=True)
    made = Head(f"http://127.0.0.1:{dashboard}", env)
    try:
        _wait_until_up(made, process, folder / "head.log")
        yield made
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            # The dashboard answers before the agent that runs jobs is there, so a job is the proof.
            if head.request("/api/jobs/", head.env["RAY_AUTH_TOKEN"], b'{"entrypoint": "true"}') == 200:
                return
        except OSError:
            pass  # nobody listens yet
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"ray start did not come up: {log.read_text()[-2000:]}")
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End this head and what it started, by id: there may be other Rays on this machine."""
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    family += [child for parent in family for child in parent.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue  # it went when its parent did
    process.wait(timeout=30)
    psutil.wait_procs(family, timeout=30)


def run(head: Head, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command typed in the clone."""
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=PROJECT, env=head.env | env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def submit(head: Head, *entrypoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(head, "ray", "job", "submit", f"--address={head.address}", "--", *entrypoint, **env)


def plan_of(manifest: Path) -> Plan:
    return make_plan(load_manifest(manifest))


def test_head_without_the_token_refuses_with_401(head: Head) -> None:
    assert head.request("/api/jobs/", None) == 401
    assert head.request("/api/jobs/", "0" * 64) in (401, 403)

    refused = submit(head, "true", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")

    assert refused.returncode != 0
    assert "Unauthorized: Missing authentication token" in refused.stderr


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_job_submitted_in_the_clone_leaves_records_weights_and_runs(
    head: Head, catalogue: Path, tmp_path: Path
) -> None:
    shutil.copytree(catalogue / "lora", tmp_path / "models" / "lora")
    document = manifest_document(
        catalogue,
        tmp_path,
        models=[{"name": "lora", "source": str(tmp_path / "models" / "lora")}],
        variants=[{"name": "plain", "realign": None, "fuse": {"method": "weight_average"}}],
        placement={"workers": 1, "kv_cache_bytes": 16 << 20},
    )
    document["evaluation"]["max_model_len"] = 64
    manifest = write_manifest(tmp_path / "models.json", document)

    job = submit(head, "python", "-m", "fleet.realign", "--manifest", str(manifest))

    assert job.returncode == 0, job.stdout + job.stderr
    plan = plan_of(manifest)
    assert not plan.pending
    assert {s.kind for s in plan.steps} == {"survey", "fuse", "score"}
    fused = next(r for key, r in plan.done.items() if key.startswith("fuse/"))
    weights = next((tmp_path / "artifacts" / "fuse" / "plain").glob(f"*/attempt-{fused.attempt}"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in weights.iterdir()}
    client = MlflowClient(document["tracking"]["uri"])
    experiment = client.get_experiment_by_name("pico")
    assert experiment is not None
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {f"pico {plan.run_id}", "aligned", "lora", "plain"}
    assert runs[f"pico {plan.run_id}"].info.status == "FINISHED"
    assert runs[f"pico {plan.run_id}"].data.metrics["num_steps_computed"] == len(plan.steps)

    # The same night again, by the nightly job: one more job, which finds everything done; typed twice, it stays one.
    nightly = ["python", "-m", "jobs.nightly", "--catalogue", str(tmp_path / "models"), "--manifest", str(manifest)]
    first, second = (run(head, *nightly, "--address", head.address) for _ in range(2))

    assert first.returncode == 0, first.stdout + first.stderr
    assert "nothing was computed: every step was done already" in first.stdout
    assert "already exists" not in first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"job fleet-{plan.run_id} already exists (SUCCEEDED)" in second.stderr


def test_nightly_without_the_token_is_refused_in_one_line(head: Head, catalogue: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))
    nightly = ["python", "-m", "jobs.nightly", "--catalogue", str(catalogue), "--manifest", str(manifest)]

    refused = run(head, *nightly, "--address", head.address, RAY_AUTH_TOKEN="0" * 64)

    assert refused.returncode == 2
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "Invalid authentication token" in line and "RAY_AUTH_TOKEN" in line


LOCAL_RAY = """
import os
from fleet.realign import lock_local_ray
lock_local_ray()
from fleet.run.cluster import start_ray
from fleet.manifest import Placement
start_ray(None, Placement(workers=1))
print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
"""


@pytest.mark.usefixtures("head")
def test_local_ray_beside_a_cluster_is_its_own_quiet_and_locked_and_leaves_no_file(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", LOCAL_RAY], cwd=PROJECT, env=env, capture_output=True, text=True, timeout=120
    )

    assert done.stdout.split() == ["token", "64"], done.stderr
    assert done.stderr == ""
    assert not (tmp_path / ".ray").exists()


# -- cluster.yaml ------------------------------------------------------------------------------------------------------


def cluster_config() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "cluster.yaml").read_text())


def test_cluster_file_passes_rays_own_validation() -> None:
    config = prepare_config(cluster_config())

    validate_config(config)

    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(t["resources"].get("GPU") and t["max_workers"] > 0 for t in types.values())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("path", [("max_wokers",), ("available_node_types", "head", "resource"), ("auth", "ssh_usr")])
def test_cluster_file_with_a_typo_is_refused(path: tuple[str, ...]) -> None:
    config = copy.deepcopy(cluster_config())
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = 3

    with pytest.raises(SchemaError, match=path[-1]):
        validate_config(prepare_config(config))


# -- Kubernetes --------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    """The subset of KubeRay's and Kubernetes' types that our files use; anything else is a typo."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Named(_Part):
    name: str


class SecretEnv(_Part):
    secretRef: Named


class Mount(_Part):
    name: str
    mountPath: str
    readOnly: bool = False


class ConfigMapVolume(_Part):
    name: str
    configMap: Named


class Resources(_Part):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]


class Container(_Part):
    name: str
    image: str
    envFrom: list[SecretEnv]
    resources: Resources
    volumeMounts: list[Mount] = []


class Toleration(_Part):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(_Part):
    containers: list[Container] = Field(min_length=1)
    volumes: list[ConfigMapVolume] = []
    tolerations: list[Toleration] = []


class Pod(_Part):
    spec: PodSpec


class HeadGroup(_Part):
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class AuthOptions(_Part):
    mode: Literal["token"]


class RayClusterSpec(_Part):
    rayVersion: str
    enableInTreeAutoscaling: bool
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(_Part):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int
    backoffLimit: int
    rayClusterSpec: RayClusterSpec


class RayCronJobSpec(_Part):
    schedule: str = Field(pattern=r"^(\S+ ){4}\S+$")
    timeZone: str
    jobTemplate: RayJobSpec


class RayJob(_Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: RayJobSpec


class RayCronJob(_Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Named
    spec: RayCronJobSpec


def ray_job() -> RayJob:
    return RayJob.model_validate(yaml.safe_load((PROJECT / "jobs/rayjob.yaml").read_text()))


def nightly_ray_job() -> RayCronJob:
    return RayCronJob.model_validate(yaml.safe_load((PROJECT / "jobs/nightly-rayjob.yaml").read_text()))


def test_kubernetes_files_hold_only_fields_that_exist() -> None:
    nightly = yaml.safe_load((PROJECT / "jobs/nightly-rayjob.yaml").read_text())
    assert ray_job().spec.rayClusterSpec == nightly_ray_job().spec.jobTemplate.rayClusterSpec

    nightly["spec"]["jobTemplate"] = {"spec": nightly["spec"]["jobTemplate"]}  # as in a batch/v1 CronJob

    with pytest.raises(ValidationError, match=r"jobTemplate\.spec"):
        RayCronJob.model_validate(nightly)


def test_kubernetes_files_run_what_is_installed_on_pods_that_reach_it() -> None:
    cluster = ray_job().spec.rayClusterSpec
    pins = (PROJECT / "locks/cpu.txt").read_text().split()
    assert f"ray=={cluster.rayVersion}" in {p.replace("[default]", "") for p in pins}
    [mount] = cluster.headGroupSpec.template.spec.containers[0].volumeMounts
    assert [v.name for v in cluster.headGroupSpec.template.spec.volumes] == [mount.name]
    assert mount.mountPath == "/etc/fleet"
    gpus = [g for g in cluster.workerGroupSpecs if "nvidia.com/gpu" in g.template.spec.containers[0].resources.limits]
    assert [g.groupName for g in gpus] == ["gpu"]


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        (lambda: ray_job().spec.entrypoint, "fleet.realign"),
        (lambda: nightly_ray_job().spec.jobTemplate.entrypoint, "jobs.nightly"),
    ],
)
def test_kubernetes_entrypoint_parses_as_the_real_command_does(entrypoint: Any, expected: str) -> None:
    python, flag, module, *arguments = shlex.split(entrypoint())

    parsed = importlib.import_module(module).parse_arguments(arguments)

    assert (python, flag, module) == ("python", "-m", expected)
    assert str(parsed.manifest) == "/etc/fleet/models.json"
    assert not parsed.dry_run
