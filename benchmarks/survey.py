"""The survey of Llama-2-7B's shapes, compared with the least it could take and with the way the papers do it.

    python -m benchmarks.survey [--folder F] [--layers 32] [--keep] [--small]

A row of its own is for a small model, see `benchmarks.small_survey`; with --small it is all.

Every run starts in fresh processes, so that peaks don't mix, and follows a run that read the same files. So the page
cache has these files, or a part of them if they are larger than the memory; a column says how much came from the disk.
(Dropping the files from the cache first would measure something else: on a virtual machine, how fast the host gives
memory back that it took away meanwhile, which was two to three times as slow as the disk.) As in production there is a
worker per core, with one thread for its products, and the units of a night go to whichever is free; but Ray is left
out. A peak is that of one worker. Cases take turns, so that whatever else the machine does affects them alike.

The floor of a case is the sum of two times: reading both base models once, and its products at the rate of float32
products on this machine. It is the sum because reading needs the cores too: the kernel copies every byte, and the CPU
seconds of `read` say how long that takes. The larger of the two, as if they overlapped at no cost, is a stricter floor,
and is reported as well. Reading adapters, subtracting and everything else make up what the ratio is above 1.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import LLAMA_2_7B, RANK, SMOLLM2_135M, generate
from benchmarks.processes import fresh
from benchmarks.small_survey import SmallSurvey
from fleet.algebra.products import BLOCK_ENTRIES
from fleet.algebra.spectral import KRYLOV_OVERSAMPLING, KRYLOV_STEPS
from fleet.algebra.statistics import Asked
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards, read_headers, shard_name
from fleet.checkpoint.model import read_model
from fleet.checkpoint.shards import Output
from fleet.checkpoint.tensors import read_tensor
from fleet.run.pools import WORKER_ENV
from fleet.steps.view import UNIT_BYTES
from fleet.store.local import LocalFolder
from fleet.work.survey import READERS, OwnPart, Surveyed, SurveyUnit
from fleet.work.tensor_worker import TensorWorker

CORES = os.cpu_count() or 1
BLOCK_BYTES = 2 * BLOCK_ENTRIES
"""How much the survey reads at a time from a model in bfloat16."""

START_SECONDS = 0.5
"""Each worker is first given a sleep this long, so that the pool starts all of them, and not one that takes every
task."""

DIRECTIONS = 8
ADAPTERS = (1, 16, 64)
REPEATS = 3
GB = 1e9

MAX_FLOOR_RATIO = 1.5
MAX_EXTRA_SHARE = 0.03
MAX_PEAK_GB = 2.0
MIN_SPEEDUP = 100.0


@dataclass(frozen=True)
class Case:
    """One kind of night."""

    name: str
    adapters: int
    rho: bool
    repeats: int
    first_night: bool = False
    """Whether V's leading directions are measured and written, instead of read back."""

    def flops(self, parameters: int) -> float:
        """Flops of the products with V, which has `parameters` entries in linear modules."""
        columns = RANK * self.adapters * (2 if self.rho else 1)
        if self.first_night:
            columns += 2 * (KRYLOV_STEPS + 1) * (DIRECTIONS + KRYLOV_OVERSAMPLING)
        return 2.0 * parameters * columns


class Cost(NamedTuple):
    """What one run took."""

    seconds: float
    cpu_seconds: float
    disk_gb: float
    """Read from the disk, not from the page cache."""
    peak_gb: float
    others: float
    """Cores that everything else on the machine used meanwhile."""


# -- in a process of its own -------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What one process has used so far."""

    process: int
    cpu_seconds: float
    disk_gb: float
    peak_gb: float


def usage() -> Usage:
    """This process's usage. `ru_maxrss` won't do for the peak: it includes the parent's from before exec."""
    read_bytes, peak_kib = _proc_number("io", "read_bytes:"), _proc_number("status", "VmHWM:")
    return Usage(os.getpid(), time.process_time(), read_bytes / GB, peak_kib * 1024 / GB)


def _proc_number(file: str, key: str) -> int:
    words = Path("/proc/self", file).read_text().split()
    return int(words[words.index(key) + 1])


def busy_seconds() -> float:
    """Core-seconds that the machine has worked."""
    user, nice, system, _, _, irq, soft, *_ = Path("/proc/stat").read_text().split()[1:9]
    return sum(int(x) for x in (user, nice, system, irq, soft)) / os.sysconf("SC_CLK_TCK")


def measured(function: Callable[[], list[Usage]]) -> Cost:
    """The cost of a call, which returns what its processes had used at first and at last."""
    busy, started = busy_seconds(), time.perf_counter()
    usages = function()
    seconds, busy = time.perf_counter() - started, busy_seconds() - busy
    of_each = [[u for u in usages if u.process == process] for process in {u.process for u in usages}]
    cpu = sum(max(u.cpu_seconds for u in own) - min(u.cpu_seconds for u in own) for own in of_each)
    disk = sum(max(u.disk_gb for u in own) - min(u.disk_gb for u in own) for own in of_each)
    return Cost(seconds, cpu, disk, max(u.peak_gb for u in usages), max(busy - cpu, 0.0) / seconds)


_worker = TensorWorker()
"""This process's worker, if it is one of the pool's."""


def _survey_unit(unit: SurveyUnit) -> tuple[Usage, Usage]:
    before = usage()
    _worker.run(unit)
    return before, usage()


def survey_models(folder: Path, case: Case, displacement: str | Output, groups: list[list[str]]) -> Cost:
    """One night's survey."""
    asked = Asked(displacement=True, rho=case.rho, energies=DIRECTIONS)
    names = [f"adapter-{i:02d}" for i in range(case.adapters)]
    units = [
        SurveyUnit(
            aligned=str(folder / "aligned"),
            unaligned=str(folder / "base"),
            models={name: Surveyed(str(folder / name), asked) for name in names},
            tensors=tuple(tensors),
            file=shard_name(index, len(groups)),
            directions=DIRECTIONS,
            basis=OwnPart("displacement", displacement),
        )
        for index, tensors in enumerate(groups)
    ]
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as workers:
        for started in [workers.submit(time.sleep, START_SECONDS) for _ in range(CORES)]:
            started.result()
        return measured(lambda: [u for pair in workers.map(_survey_unit, units) for u in pair])


def read_models(folder: Path) -> Cost:
    """Read every byte of both base models once, with the survey's number of threads and size of reads, and no more."""
    jobs = [
        (path, start, min(BLOCK_BYTES, path.stat().st_size - start))
        for name in sorted(p.name for p in (folder / "aligned").glob("*.safetensors"))
        for start in range(0, (folder / "aligned" / name).stat().st_size, BLOCK_BYTES)
        for path in (folder / "aligned" / name, folder / "base" / name)
    ]
    own = threading.local()

    def read(job: tuple[Path, int, int]) -> None:
        path, start, size = job
        if not hasattr(own, "memory"):
            own.memory = memoryview(bytearray(BLOCK_BYTES))
        LocalFolder(path.parent).read_into(path.name, start, own.memory[:size])

    def read_all() -> list[Usage]:
        before = usage()
        with ThreadPoolExecutor(CORES * READERS) as readers:
            for _ in readers.map(read, jobs):
                pass
        return [before, usage()]

    return measured(read_all)


def product_rate() -> float:
    """Flops per second of float32 products, torch on all cores: the best of a square one and the survey's widest."""
    torch.set_num_threads(CORES)
    rates: list[float] = []
    for rows, inner, columns in ((4096, 4096, 4096), (RANK * max(ADAPTERS), 4096, 4096)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(left, right)
            rates.append(2.0 * rows * inner * columns / (time.perf_counter() - started))
    return max(rates)


def publish_layer(folder: Path) -> Cost:
    """ρ of one adapter in layer 0 as published: C = VVᵀ/‖V‖ and CΔW dense, float32; from the page cache."""
    aligned, base, adapter = (LocalFolder(folder / name) for name in ("aligned", "base", "adapter-00"))
    aligned_tensors, base_tensors = read_headers(aligned, "model"), read_headers(base, "model")
    factors = read_headers(adapter, "adapter")

    torch.set_num_threads(CORES)

    def decide() -> list[Usage]:
        before = usage()
        for module in LLAMA_2_7B.linears:
            name = f"model.layers.0.{module}"
            tensor = f"{name}.weight"
            v = read_tensor(aligned, aligned_tensors[tensor]).float() - read_tensor(base, base_tensors[tensor]).float()
            b, a = (
                read_tensor(adapter, factors[f"base_model.model.{name}.lora_{x}.weight"]).float() for x in ("B", "A")
            )
            operator = v @ v.T / torch.linalg.matrix_norm(v)
            delta = b @ a
            projected = operator @ delta
            torch.nn.functional.cosine_similarity(projected.view(1, -1), delta.view(1, -1))
        return [before, usage()]

    return measured(decide)


# -- the benchmark -----------------------------------------------------------------------------------------------


class Benchmark:
    """All cases on the models of one folder."""

    def __init__(self, folder: Path, scratch: Path, layers: int, console: Console) -> None:
        self._folder = folder
        self._scratch = scratch
        self._layers = layers
        self._console = console
        aligned = read_model(LocalFolder(folder / "aligned"))
        assert isinstance(aligned, FullModel)
        self._groups = plan_shards(aligned.tensors.values(), UNIT_BYTES)
        self.num_bytes = 2 * aligned.num_bytes
        self.parameters = layers * sum(math.prod(shape) for shape in LLAMA_2_7B.linears.values())
        self.costs: dict[str, list[Cost]] = {}
        self.rates: list[float] = []

    def run(self) -> None:
        """All runs, in turns."""
        fresh(read_models, self._folder)
        self._survey(FIRST, Output(str(self._scratch), "displacement"))
        for turn in range(REPEATS):
            self._add("read", fresh(read_models, self._folder))
            self.rates.append(fresh(product_rate))
            for case in (*LIFT, *RHO):
                if turn < case.repeats:
                    self._survey(case, str(self._scratch / "displacement"))
        self._one_layer_both_ways()

    def _survey(self, case: Case, displacement: str | Output) -> None:
        self._add(case.name, survey_models(self._folder, case, displacement, self._groups))

    def _one_layer_both_ways(self) -> None:
        """From the page cache: once to fill it, then measured."""
        displacement = str(self._scratch / "displacement")
        modules = [[f"model.layers.0.{module}.weight"] for module in LLAMA_2_7B.linears]
        survey_models(self._folder, RHO[0], displacement, modules)
        for _ in range(REPEATS):
            self._add("cached", survey_models(self._folder, RHO[0], displacement, modules * CACHED_TIMES))
        self._add("published", fresh(publish_layer, self._folder))

    def _add(self, name: str, cost: Cost) -> None:
        self.costs.setdefault(name, []).append(cost)
        self._console.print(
            f"[dim]{name}: {cost.seconds:.1f} s, CPU {cost.cpu_seconds:.1f} s, {cost.disk_gb:.1f} GB from disk, "
            f"peak {cost.peak_gb:.2f} GB, others on {cost.others:.1f} cores[/dim]"
        )

    def seconds(self, name: str) -> float:
        return statistics.median(cost.seconds for cost in self.costs[name])

    def floor(self, case: Case) -> tuple[float, float]:
        """Seconds of reading, and of the products at the best rate seen."""
        return self.seconds("read"), case.flops(self.parameters) / max(self.rates)

    def ratio(self, case: Case) -> float:
        return self.seconds(case.name) / sum(self.floor(case))

    def overlapped_ratio(self, case: Case) -> float:
        """The same over the stricter floor, as if reading took no time of the cores."""
        return self.seconds(case.name) / max(self.floor(case))

    def extra_share(self, cases: tuple[Case, ...]) -> float:
        """What one adapter more costs, as a share of a night with one."""
        first, most = cases[0], cases[-1]
        one = self.seconds(first.name)
        return (self.seconds(most.name) - one) / (most.adapters - first.adapters) / one

    def published_seconds(self) -> float:
        """For the whole model, scaled up from one layer."""
        return self.seconds("published") * self._layers

    def cached_speedup(self) -> float:
        """How many times as fast as published one layer is, both from the page cache."""
        return self.seconds("published") / (self.seconds("cached") / CACHED_TIMES)

    def peak_gb(self) -> float:
        return max(cost.peak_gb for case in (FIRST, *LIFT, *RHO) for cost in self.costs[case.name])

    def table(self) -> Table:
        title = (
            f"Survey of Llama-2-7B's shapes, {self._layers} of {LLAMA_2_7B.layers} layers, LoRA adapters of rank {RANK}"
        )
        table = Table(title=title)
        headings = (
            "night", "adapters", "s", "runs", "CPU s", "disk GB", "read s", "products s", "x sum", "x max", "peak GB",
        )  # fmt: skip
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "night" else "right")
        for case in (*LIFT, *RHO, FIRST):
            costs, (read, products) = self.costs[case.name], self.floor(case)
            table.add_row(
                "first" if case.first_night else "later, with ρ" if case.rho else "later (lift)",
                str(case.adapters),
                f"{self.seconds(case.name):.1f}",
                " ".join(f"{cost.seconds:.1f}" for cost in costs),
                f"{statistics.median(cost.cpu_seconds for cost in costs):.0f}",
                f"{statistics.median(cost.disk_gb for cost in costs):.1f}",
                f"{read:.1f}",
                f"{products:.1f}",
                f"{self.ratio(case):.2f}",
                f"{self.overlapped_ratio(case):.2f}",
                f"{max(cost.peak_gb for cost in costs):.2f}",
            )
        return table

    @property
    def required(self) -> dict[str, tuple[float, float, str]]:
        """Name -> what was measured, its bound, and which side of it is right."""
        return {
            "floor_ratio": (max(self.ratio(case) for case in LIFT), MAX_FLOOR_RATIO, "max"),
            "extra_adapter_share": (self.extra_share(LIFT), MAX_EXTRA_SHARE, "max"),
            "peak_gb": (self.peak_gb(), MAX_PEAK_GB, "max"),
            "published_speedup": (self.published_seconds() / self.seconds(RHO[0].name), MIN_SPEEDUP, "min"),
        }

    def result(self) -> dict[str, object]:
        """What the last line of the output says beside that."""
        return {
            "layers": self._layers,
            "overlapped_floor_ratio": round(max(self.overlapped_ratio(case) for case in LIFT), 4),
            "rho_floor_ratio": round(max(self.ratio(case) for case in RHO), 4),
            "rho_extra_adapter_share": round(self.extra_share(RHO), 4),
            "first_night_floor_ratio": round(self.ratio(FIRST), 4),
            "published_speedup_cached": round(self.cached_speedup(), 1),
            "published_seconds_scaled": round(self.published_seconds(), 1),
            "read_gb_per_second": round(self.num_bytes / GB / self.seconds("read"), 2),
            "gflop_per_second": round(max(self.rates) / GB, 1),
            "seconds": {name: [round(cost.seconds, 2) for cost in costs] for name, costs in self.costs.items()},
            "read_disk_gb": [round(cost.disk_gb, 1) for cost in self.costs["read"]],
            "others_cores": round(statistics.median(c.others for costs in self.costs.values() for c in costs), 2),
        }


LIFT = tuple(Case(f"lift-{n}", n, False, REPEATS - (n == max(ADAPTERS))) for n in ADAPTERS)
RHO = tuple(Case(f"rho-{n}", n, True, REPEATS if n == 1 else 1) for n in ADAPTERS)
FIRST = Case("first-night-1", 1, True, 1, first_night=True)

CACHED_TIMES = 8
"""How often the layer is surveyed in one run, so that opening the models is a small part of it."""


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "fleet-benchmark"))
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B.layers, help="fewer, if the disk is short of 33 GB")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for the next time")
    parser.add_argument("--small", action="store_true", help="only the small model")
    args = parser.parse_args()
    console = Console(width=140)
    args.folder.mkdir(parents=True, exist_ok=True)
    large = args.folder / f"{LLAMA_2_7B.name}-{args.layers}"
    small = args.folder / SMOLLM2_135M.name
    try:
        rows: list[Benchmark | SmallSurvey] = [SmallSurvey(small, console)]
        if not args.small:
            os.environ.update(WORKER_ENV)  # the processes to come: a worker's products have one thread
            rows.append(measure_large(large, args.layers, console))
    finally:
        if not args.keep:
            shutil.rmtree(large, ignore_errors=True)
            shutil.rmtree(small, ignore_errors=True)
    required = {name: entry for row in rows for name, entry in row.required.items()}
    found: dict[str, object] = {
        "benchmark": "survey",
        "required": {
            name: {"measured": round(x, 4), "bound": bound, "kind": kind} for name, (x, bound, kind) in required.items()
        },
        "met": all(x <= bound if kind == "max" else x >= bound for x, bound, kind in required.values()),
    }
    for row in rows:
        found |= row.result()
    print(json.dumps(found))


def measure_large(folder: Path, layers: int, console: Console) -> Benchmark:
    """All runs on Llama-2-7B's shapes, of which `folder` gets checkpoints."""
    generate(folder, replace(LLAMA_2_7B, layers=layers), max(ADAPTERS))
    with tempfile.TemporaryDirectory(prefix="displacement-", dir=folder.parent) as scratch:
        benchmark = Benchmark(folder, Path(scratch), layers, console)

        def tera(case: Case) -> str:
            return f"{case.flops(benchmark.parameters) / 1e12:.2f}"

        console.print(
            f"{layers} of {LLAMA_2_7B.layers} layers: {benchmark.num_bytes / GB:.1f} GB in both base models, "
            f"{benchmark.parameters / GB:.2f}e9 weights in linear modules. Products, in Tflop: one adapter "
            f"{tera(LIFT[0])}, with ρ {tera(RHO[0])}, the first night {tera(FIRST)}. "
            f"{CORES} cores and workers, load {os.getloadavg()[0]:.1f}."
        )
        benchmark.run()
    console.print(benchmark.table())
    console.print(
        f"As published, ρ of one adapter: {benchmark.published_seconds():.0f} s for the model, scaled up from "
        f"{benchmark.seconds('published'):.1f} s for one layer; both from the page cache, one layer is "
        f"{benchmark.cached_speedup():.0f} times as fast. 's' is the median; x sum: over read + products, "
        f"x max: over the larger; products at {max(benchmark.rates) / GB:.0f} Gflop/s, the best seen."
    )
    return benchmark


if __name__ == "__main__":
    main()
