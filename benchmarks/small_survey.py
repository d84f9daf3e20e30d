"""The survey of a small model, SmolLM2-135M's shapes with three LoRAs, beside a script that does no more than it must.

Both take the same files from the page cache, with one thread for products, and end with the same numbers, each in the
environment that a shell gives it (in a worker's own, whose allocator keeps memory, both are faster). The script
compares each LoRA with V, module by module, and measures, checks and writes nothing else. The survey is a first night:
it leaves V's leading directions, if they are asked for, and the records of all three models.

A ratio is of CPU seconds, which other work on the machine changes least: the best of some runs over the best of as many
of the script, in turns. Each is the first in a process of its own, so that nothing is kept from an earlier one. The
seconds of imports, of starting Ray and a worker of it, and of a survey by that worker are said beside it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from benchmarks.checkpoints import RANK, SMOLLM2_135M, generate
from benchmarks.processes import fresh
from fleet.algebra.statistics import Asked
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.opened import open_full
from fleet.checkpoint.shards import Output
from fleet.run.pools import WORKER_ENV
from fleet.steps.record import to_bytes
from fleet.steps.view import UNIT_BYTES
from fleet.work.survey import OwnPart, Surveyed, SurveyUnit
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import Found

ADAPTERS = [f"adapter-{i:02d}" for i in range(3)]
DIRECTIONS = 8
TURNS = 5

MAX_RATIO = 1.5
MAX_DIRECTIONS_RATIO = 4.0
TOLERANCE = 1e-5
"""By how much two cosines of the same weights may differ: float32 products in another order."""


class Run(NamedTuple):
    """One pass over the models."""

    cpu_seconds: float
    seconds: float
    cosines: dict[str, float]
    """`{adapter}.{module}` -> cosine."""


class RayRun(NamedTuple):
    """What starts before a survey by Ray's workers, and that survey."""

    ray_seconds: float
    worker_seconds: float
    seconds: float


# -- in a process of its own -------------------------------------------------------------------------------------


def import_seconds() -> float:
    """What a survey imports, in a process that has imported nothing yet."""
    command = [sys.executable, "-c", "import fleet.work.survey, fleet.work.tensor_worker"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def plain(folder: Path) -> Run:
    """The script."""
    torch.set_num_threads(1)
    prefix = "base_model.model."

    def tensors_of(name: str) -> dict[str, Any]:
        weight_map = json.loads((folder / name / "model.safetensors.index.json").read_text())["weight_map"]
        files = {file: safe_open(folder / name / file, "pt") for file in set(weight_map.values())}
        return {tensor: files[file] for tensor, file in weight_map.items()}

    def run() -> dict[str, float]:
        aligned, base = tensors_of("aligned"), tensors_of("base")
        adapters: dict[str, Any] = {
            name: safe_open(folder / name / "adapter_model.safetensors", "pt") for name in ADAPTERS
        }
        found: dict[str, float] = {}
        for name in (name for name in aligned if name.endswith("_proj.weight")):
            v = aligned[name].get_tensor(name).float() - base[name].get_tensor(name).float()
            norm = v.norm()
            module = name.removesuffix(".weight")
            for adapter, file in adapters.items():
                b, a = (file.get_tensor(f"{prefix}{module}.lora_{x}.weight").float() for x in "BA")
                delta = b @ a  # scaled or not, its cosine is the same
                found[f"{adapter}.{module}"] = float((delta * v).sum() / (norm * delta.norm()))
        return found

    return _timed(run)


def surveyed(folder: Path, directions: int) -> Run:
    """The survey, by a worker in this process."""
    worker = TensorWorker()

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            found = [worker.run(unit) for unit in _units(folder, store, directions)]
            return _cosines(found, Path(store))

    return _timed(run)


def through_ray(folder: Path) -> RayRun:
    """The same by two actors, once they are up."""
    marks = [time.perf_counter()]
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    marks.append(time.perf_counter())
    remote: Any = ray
    try:
        worker_class = remote.remote(TensorWorker).options(num_cpus=1, runtime_env={"env_vars": WORKER_ENV})
        workers = [worker_class.remote() for _ in range(2)]
        remote.get([worker.ready.remote() for worker in workers])
        marks.append(time.perf_counter())
        with tempfile.TemporaryDirectory(dir=folder) as store:
            units = _units(folder, store, 0)
            remote.get([workers[i % 2].run.remote(unit) for i, unit in enumerate(units)])
        marks.append(time.perf_counter())
    finally:
        ray.shutdown()
    return RayRun(*(after - before for before, after in pairwise(marks)))


def _timed(run: Callable[[], dict[str, float]]) -> Run:
    started, cpu = time.perf_counter(), time.process_time()
    cosines = run()
    return Run(time.process_time() - cpu, time.perf_counter() - started, cosines)


def _units(folder: Path, store: str, directions: int) -> list[SurveyUnit]:
    groups = plan_shards(open_full(str(folder / "aligned")).tensors.values(), UNIT_BYTES)
    asked = Asked(displacement=True, energies=directions)
    basis = OwnPart("displacement", Output(store, "displacement")) if directions else None
    return [
        SurveyUnit(
            aligned=str(folder / "aligned"),
            unaligned=str(folder / "base"),
            models={name: Surveyed(str(folder / name), asked) for name in ADAPTERS},
            tensors=tuple(names),
            file=shard_name(index, len(groups)),
            directions=directions,
            basis=basis,
        )
        for index, names in enumerate(groups)
    ]


def _cosines(found: Sequence[Found], store: Path) -> dict[str, float]:
    """The cosines of all units, whose records are written."""
    cosines: dict[str, float] = {}
    for index, records in enumerate(found):
        assert isinstance(records, Mapping)
        for key, record in records.items():
            (store / f"{key}-{index}.json").write_bytes(to_bytes(record))
            rows: Any = record.result.get("modules", [])
            cosines |= {f"{key}.{row['module']}": row["cosine"] for row in rows}
    return cosines


# -- the row -----------------------------------------------------------------------------------------------------


class SmallSurvey:
    """All runs on the models of one folder.

    Raises:
        ValueError: the script and the survey don't agree.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        generate(folder, SMOLLM2_135M, len(ADAPTERS))
        self.runs: dict[str, list[Run]] = {"script": [], "cosine": [], "directions": []}
        fresh(plain, folder)  # fills the page cache
        for _ in range(TURNS):
            self.runs["script"].append(fresh(plain, folder))
            self.runs["cosine"].append(fresh(surveyed, folder, 0))
            self.runs["directions"].append(fresh(surveyed, folder, DIRECTIONS))
        self.import_seconds = min(import_seconds() for _ in range(2))
        self.ray = fresh(through_ray, folder)
        expected = self.runs["script"][0].cosines
        for name, runs in self.runs.items():
            if runs[0].cosines.keys() != expected.keys():
                raise ValueError(f"{name}: not the modules of the script")
            if max(abs(runs[0].cosines[key] - value) for key, value in expected.items()) > TOLERANCE:
                raise ValueError(f"{name}: not the cosines of the script")
        console.print(self.table())
        console.print(
            f"Apart from these: imports {self.import_seconds:.1f} s, starting Ray {self.ray.ray_seconds:.1f} s, its "
            f"workers, which import the same, {self.ray.worker_seconds:.1f} s; then the survey of cosines took "
            f"{self.ray.seconds:.2f} s by two of them."
        )

    def ratio(self, name: str) -> float:
        return self._best(name) / self._best("script")

    def _best(self, name: str) -> float:
        return min(run.cpu_seconds for run in self.runs[name])

    @property
    def required(self) -> dict[str, tuple[float, float, str]]:
        """Name -> what was measured, its bound, and which side of it is right."""
        return {
            "small_ratio": (self.ratio("cosine"), MAX_RATIO, "max"),
            "small_directions_ratio": (self.ratio("directions"), MAX_DIRECTIONS_RATIO, "max"),
        }

    def result(self) -> dict[str, object]:
        """What the last line of the output says beside that."""
        return {
            "small_cpu_seconds": {n: [round(run.cpu_seconds, 3) for run in runs] for n, runs in self.runs.items()},
            "small_seconds": {n: [round(run.seconds, 3) for run in runs] for n, runs in self.runs.items()},
            "small_import_seconds": round(self.import_seconds, 2),
            "small_ray": {name: round(value, 2) for name, value in self.ray._asdict().items()},
        }

    def table(self) -> Table:
        table = Table(
            title=f"Survey of SmolLM2-135M's shapes, {len(ADAPTERS)} LoRA adapters of rank {RANK}, one thread"
        )
        for heading in ("", "CPU s", "best", "x script", "best s on the clock"):
            table.add_column(heading, justify="left" if not heading else "right")
        names = {"script": "script, cosine", "cosine": "survey, cosine", "directions": f"and {DIRECTIONS} directions"}
        for name, title in names.items():
            cpu = " ".join(f"{run.cpu_seconds:.2f}" for run in self.runs[name])
            clock = min(run.seconds for run in self.runs[name])
            table.add_row(title, cpu, f"{self._best(name):.2f}", f"{self.ratio(name):.2f}", f"{clock:.2f}")
        return table
