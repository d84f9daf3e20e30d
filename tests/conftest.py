"""Fixtures that several test files share, and the marks that their use means.

Nothing heavy is imported here: a test file that needs no torch, Ray or S3 client runs without loading one.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.catalogue import make_catalogue

# As many test processes as cores, so a thread each; and what is promised of a product's bits is promised of one thread,
# as tensor workers have it. torch reads this when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test is marked by what the fixtures it uses do, directly or through another fixture. A test that starts something
# itself, or is slow by itself, carries the mark in its file.
MARK_BY_FIXTURE = {
    "s3_endpoint": "s3",
    "local_ray": "ray",
    "head": "ray",  # tests/jobs/test_jobs.py
    "engines": "vllm",  # tests/work/test_scoring.py
    "finished": "vllm",  # tests/run/test_realign.py
    "replica": "vllm",  # tests/evals/test_replicas.py
    "bench": "slow",  # tests/masks/test_mask_training.py
    "sharded": "slow",  # tests/masks/test_masked_model.py
    "nights": "slow",  # tests/report/test_published.py: MLflow's registry, several times a test
}


@pytest.hookimpl(tryfirst=True)  # before pytest itself chooses by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, mark in MARK_BY_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


@pytest.fixture(scope="session")
def s3_endpoint() -> Generator[str]:
    """The address of an S3 server for this session, which the `AWS_*` environment points at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(f"{endpoint}/moto-api/", server)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in settings.items():
                patch.setenv(name, value)
            yield endpoint
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """The name of a new, empty bucket."""
    import boto3.session

    name = f"test-{uuid.uuid4().hex}"
    session: Any = boto3.session.Session()
    session.client("s3").create_bucket(Bucket=name)
    return name


def _wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the S3 server for tests did not start: is moto[server] installed?")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico catalogue on disk; read-only for tests, which copy what they change."""
    return make_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="session")
def local_ray(s3_endpoint: str) -> Generator[None]:
    """One Ray for the whole session, whose workers know the S3 server; tests never start their own in this process."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
