"""The Ray cluster that a run uses: one that is there, or a local one that fits the placement."""

from __future__ import annotations

import logging
import math
import os
import socket
from typing import Any

import ray
from ray.exceptions import RayError

from fleet.core.errors import InputError
from fleet.manifest import Placement

logger = logging.getLogger(__name__)

_ray: Any = ray
"""Ray types some calls in part."""

_CONNECT_SECONDS = 10.0


def start_ray(address: str | None, placement: Placement) -> None:
    """Attach to the cluster at `address` (or the one this job runs on), or start a local Ray that fits the placement.

    A process that is attached already stays where it is.

    Raises:
        InputError: no such cluster, or this machine has not the GPUs one replica asks for.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        # CPUs are counted, not measured: the local Ray offers what the placement asks for, however few cores there are.
        # "local", because Ray would else join whatever cluster it finds running on this machine.
        replicas = placement.replicas + placement.judges
        cpus = placement.workers * placement.worker_cpus + replicas * placement.replica_cpus
        cpus += placement.trainings * placement.training_workers * placement.training_cpus
        _ray.init("local", num_cpus=math.ceil(cpus), include_dashboard=False, **quiet)
        if placement.replica_gpus > (gpus := _ray.cluster_resources().get("GPU", 0)):
            raise InputError(f"placement.replica_gpus is {placement.replica_gpus}, but this machine has {gpus:g} GPUs")
        return
    _require_listening(address)
    try:
        _ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, RayError) as e:
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"no Ray cluster at {address}: {reason}; start one with `ray start --head`") from e
    _warn_if_too_small(placement)


def _require_listening(address: str) -> None:
    """Ray itself knocks for ten minutes at a port where nobody is.

    Raises:
        InputError: nothing listens at an address that is a host and a port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as e:
        raise InputError(f"no Ray cluster at {address}: {e}; start one with `ray start --head`") from e


def _warn_if_too_small(placement: Placement) -> None:
    """An actor that fits no node waits without a word; an autoscaler may bring such a node, so this is no error."""
    wanted = {
        "tensor worker": {"CPU": placement.worker_cpus, "memory": float(placement.worker_memory_bytes)},
        "replica": {"CPU": placement.replica_cpus, "GPU": float(placement.replica_gpus)},
        "training worker": {"CPU": placement.training_cpus, "GPU": float(placement.training_gpus)},
    }
    nodes = [node["Resources"] for node in _ray.nodes() if node["Alive"]]
    for what, needs in wanted.items():
        if not any(all(node.get(name, 0.0) >= amount for name, amount in needs.items()) for node in nodes):
            asked = ", ".join(f"{name} {amount:g}" for name, amount in needs.items() if amount)
            logger.warning("no node has room for a %s (%s); waiting for the cluster to grow", what, asked)
