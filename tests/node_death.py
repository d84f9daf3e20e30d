"""A cluster of three raylets loses one and goes on; `tests/test_coordinator.py` runs it in a process of its own."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import fleet.run.pools
from fleet.work.fusing import FuseUnit
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import Found, Unit
from tests.run.test_coordinator import tensor_plan, walk

FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class SlowWorker(TensorWorker):
    """Takes long enough for a node to die in the middle."""

    def run(self, unit: Unit) -> Found:
        if isinstance(unit, FuseUnit):
            time.sleep(1.0)
        return super().run(unit)


def main(catalogue: Path, work: Path) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 << 20,
            "include_dashboard": False,
            "_system_config": FAST_HEALTH_CHECKS,
        },
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    fleet.run.pools.TensorWorker = SlowWorker
    plan = tensor_plan(catalogue, work / "disturbed", placement={"workers": 2})

    def kill_when_fusing() -> None:
        while not plan.store.list("fuse/"):
            time.sleep(0.2)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill_when_fusing)
    killer.start()
    result = walk(plan)
    killer.join(timeout=30)
    result.raise_failures()
    alive = sum(node["Alive"] for node in ray.nodes())
    assert alive == 2, f"{alive} nodes alive: the node was not lost"
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
