"""A manifest as a Ray job: sent once, followed to its end.

The job's files are the packages `fleet` and `evals` with their data, and the manifest; models go by address, never by
upload.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import evals
import fleet
from fleet.core.errors import FleetError, InputError
from fleet.manifest import Manifest
from fleet.run.plan import make_plan

logger = logging.getLogger("jobs.submit")

ENTRYPOINT = "python -m fleet.realign --manifest models.json"

_POLL_SECONDS = 1.0


def submit(manifest: Manifest, address: str) -> int:
    """Run a manifest as a job of the cluster whose dashboard is at `address`; returns the job's exit code.

    It is planned here first, so that mistakes surface before anything is queued. The job is named by the plan's run id,
    which is the same for the same work: a job that is under way or done is followed, not started again.

    Raises:
        InputError: the manifest can't be planned, or the cluster isn't there or refuses us.
        FleetError: the cluster failed to take the job, or the connection was lost while the job goes on.
    """
    plan = make_plan(manifest)
    _warn_of_local_paths(manifest)
    try:
        client = JobSubmissionClient(address)
        submission_id = _submit_once(client, manifest, f"fleet-{plan.run_id}")
    except AuthenticationError as e:
        raise InputError(
            f"the cluster at {address} refuses us: {str(e).splitlines()[0]}; set RAY_AUTH_MODE=token, and its token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from e
    except OSError as e:
        raise InputError(f"no Ray dashboard at {address}: {e}") from e
    except RuntimeError as e:
        raise FleetError(f"the cluster at {address} didn't take the job: {e}") from e
    try:
        return asyncio.run(_follow(client, submission_id))
    except (RuntimeError, OSError, aiohttp.ClientError) as e:
        raise FleetError(
            f"lost the connection to {address} ({e}); job {submission_id} goes on: type the same again to follow it"
        ) from e


def _submit_once(client: JobSubmissionClient, manifest: Manifest, name: str) -> str:
    """The id of the job that does this work: the one there is, unless it failed, else a new one."""
    status = {job.submission_id: job.status for job in client.list_jobs()}
    submission_id, attempt = name, 1
    while status.get(submission_id) in (JobStatus.FAILED, JobStatus.STOPPED):
        attempt += 1
        submission_id = f"{name}-{attempt}"
    if submission_id in status:
        logger.warning(
            "job %s already exists (%s): this work was submitted before, and isn't again",
            submission_id, status[submission_id],
        )  # fmt: skip
        return submission_id
    with tempfile.TemporaryDirectory(prefix="fleet-job-") as folder:
        for package in (fleet, evals):
            source = Path(package.__path__[0])
            shutil.copytree(source, Path(folder, source.name), ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, "models.json").write_text(manifest.model_dump_json(by_alias=True, indent=1) + "\n")
        client.submit_job(entrypoint=ENTRYPOINT, submission_id=submission_id, runtime_env={"working_dir": folder})
    logger.info("submitted job %s", submission_id)
    return submission_id


async def _follow(client: JobSubmissionClient, submission_id: str) -> int:
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)
    # The log's end arrives a moment before the status does.
    while not (job := client.get_job_info(submission_id)).status.is_terminal():
        await asyncio.sleep(_POLL_SECONDS)
    logger.info("job %s: %s", submission_id, job.status)
    return (job.driver_exit_code or 1) if job.status != JobStatus.SUCCEEDED else 0


def _warn_of_local_paths(manifest: Manifest) -> None:
    uris = [*manifest.base.sources, *(m.source for m in manifest.models), manifest.artifacts]
    local = [uri for uri in (*uris, *manifest.evaluation.folders) if "://" not in uri]
    local += [manifest.tracking.uri] if manifest.tracking.uri.startswith("sqlite:") else []
    if local:
        logger.warning("every node must see the same under these local paths: %s", ", ".join(local))
