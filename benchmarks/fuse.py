"""Fusing full models, compared with mergekit and a floor: `python -m benchmarks.fuse --mergekit PYTHON`.

The inputs are Llama-shaped bfloat16 checkpoints of 1.1B parameters, a base and four fine-tuned from it; the page cache
is warm. Methods and contestants take turns:

- `ours`: tensor workers as a run has them (two processes of one thread, started before), shard by shard from a queue.
- `mergekit`: `run_merge` of the given Python's mergekit, timed without its start and imports, with asynchronous writes
  and small shards, its fastest setting on CPUs (`python3.11 -m venv V && V/bin/pip install mergekit`).
- `floor`: as many workers only read every input once and write the output, with the same calls and as many bytes.

Memory is the processes' resident peak, without what they held before the first tensor; mergekit's likewise.
`--growth` instead measures the time per byte over 2 to 16 models and over shapes up to a 7B's, `--seven-billion` fuses
four of a 7B's shape, and `--equal` compares the results with mergekit's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fleet.algebra.sparsify import magnitude_threshold
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.tensors import TensorLayout, read_rows, write_tensors
from fleet.fusion import AnyFusionMethod
from fleet.fusion.member import Member
from fleet.fusion.streaming import COMPILED_RUNS, RUN_ENTRIES
from fleet.run.pools import WORKER_ENV
from fleet.store import open_folder, open_store
from fleet.store.local import LocalStore
from fleet.work.fusing import FuseUnit
from fleet.work.tensor_worker import TensorWorker

WORKERS = 2
SHARD_BYTES = 200_000_000


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    key_values: int
    vocabulary: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        h, i, kv = self.hidden, self.intermediate, self.key_values
        linears = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
        return found | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64, "num_key_value_heads": self.key_values // 64,
            "vocab_size": self.vocabulary, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        }  # fmt: skip


BILLION = Shape(2048, 5632, 22, 256)
SMALL = Shape(512, 1536, 4, 512, 8192)
SEVEN_BILLION = Shape(4096, 11008, 32, 4096)
GROWTH = {"0.1B": Shape(768, 2048, 12, 768), "1.1B": BILLION, "7B, 4 layers": Shape(4096, 11008, 4, 4096)}


@dataclass(frozen=True)
class Case:
    """One fusion, with our parameters and mergekit's, and the speed that is required of it."""

    method: dict[str, Any]
    models: int
    reads_base: bool
    mergekit: dict[str, Any]
    speedup: float
    floor_ratio: float | None


CASES = {
    "average": Case(
        {"method": "weight_average"}, 2, False, {"merge_method": "linear", "weight": 0.5}, 6.0, 1.6
    ),
    "task_arithmetic": Case(
        {"method": "task_arithmetic", "scale": 0.3}, 4, True, {"merge_method": "task_arithmetic", "weight": 0.3},
        4.0, 1.5,
    ),
    "ties": Case(
        {"method": "ties", "density": 0.2, "consensus": "mean", "scale": 1.0}, 4, True,
        {"merge_method": "ties", "weight": 1.0, "density": 0.2}, 45.0, 5.0,
    ),
    "dare_ties": Case(
        {"method": "dare", "drop_rate": 0.8, "consensus": "sum", "scale": 0.3}, 4, True,
        {"merge_method": "dare_ties", "weight": 0.3, "density": 0.2}, 25.0, None,
    ),
}  # fmt: skip


def write_models(root: Path, shape: Shape, models: int) -> None:
    """`base`, and `tuned0` … which differ from it by a fiftieth; what is there already stays."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 25, generator=generator)
    for number, name in enumerate(["base", *(f"tuned{i}" for i in range(models))]):
        store = LocalStore(root / name)
        if store.read("config.json") is not None:
            continue
        layout = [TensorLayout(n, "BF16", s) for n, s in shape.tensors().items()]
        write_tensors(store, "model.safetensors", layout, (_values(block, i, e, number) for i, e in enumerate(layout)))
        store.replace("config.json", json.dumps(shape.config()).encode())


def _values(block: torch.Tensor, index: int, entry: TensorLayout, model: int) -> Iterator[torch.Tensor]:
    left, at = math.prod(entry.shape), index * 7_919_003
    while left:
        first, second = (start % block.numel() for start in (at, at + model * 1_299_709))
        count = min(left, block.numel() - max(first, second))
        piece = block[first : first + count] * 0.02
        yield piece.add_(block[second : second + count], alpha=0.0004) if model else piece
        left, at = left - count, at + count


def shards_of(model: FullModel) -> list[Shard]:
    groups = plan_shards(model.tensors.values(), SHARD_BYTES)
    files = [shard_name(i, len(groups)) for i in range(len(groups))]
    index = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    return [Shard(f, tuple(g), index if i == 0 else None) for i, (f, g) in enumerate(zip(files, groups, strict=True))]


class FloorWorker:
    """Reads once what a fusion reads, and writes as many bytes."""

    def run(self, unit: FuseUnit) -> None:
        aligned = require_full_model(read_model(open_folder(unit.aligned)), "aligned")
        uris = [*([unit.aligned] if unit.as_lora else []), *(m.uri for m in unit.members_M)]  # here: also read the base
        models = [require_full_model(read_model(open_folder(uri)), uri) for uri in uris]

        def pieces(name: str) -> Iterator[torch.Tensor]:
            info = aligned.tensors[name]
            columns = info.shape[-1]
            rows, step = math.prod(info.shape) // columns, max(COMPILED_RUNS * RUN_ENTRIES // columns, 1)
            for at in range(0, rows, step):
                found = [read_rows(m.folder, m.tensors[name], at, min(at + step, rows)) for m in models]
                yield found[0]

        store = open_store(unit.output.store)
        with store.writer(f"{unit.output.prefix}/{unit.shard.file}") as out:
            for name in unit.shard.tensors:
                for piece in pieces(name):
                    out.write(piece.reshape(-1).view(torch.uint8).numpy().data)


def serve(kind: type[Any], first: FuseUnit, units: Any, answers: Any) -> None:
    """One worker process: runs a first unit, which loads its compiled code, then those of a queue until None comes.

    It answers each of the latter with its peak memory so far, beyond what it held at its start.
    """
    importlib.import_module("fleet.algebra.kernels")
    torch.set_num_threads(1)
    worker = kind()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    worker.run(first)
    answers.put(0)
    while (unit := units.get()) is not None:
        worker.run(unit)
        answers.put(resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def warm(root: Path, case: Case) -> None:
    """Bring the inputs into the page cache: they are read twice, so that the kernel keeps them."""
    for name in ["base", *(f"tuned{i}" for i in range(case.models))] * 2:
        with open(root / name / "model.safetensors", "rb") as file:
            while file.read(1 << 24):
                pass


def run_ours(kind: type[Any], root: Path, out: Path, case: Case) -> tuple[float, int]:
    """Seconds, and the workers' peak bytes together."""
    aligned = require_full_model(read_model(open_folder(str(root / "base"))), "base")
    method = TypeAdapter[AnyFusionMethod](AnyFusionMethod).validate_python(case.method)
    members = tuple(Member(f"tuned{i}", str(root / f"tuned{i}")) for i in range(case.models))
    os.environ.update(WORKER_ENV)
    context = multiprocessing.get_context("spawn")
    units, answers = context.SimpleQueue(), context.SimpleQueue()
    shards = shards_of(aligned)
    as_lora = case.reads_base if kind is FloorWorker else False
    unit = FuseUnit(str(root / "base"), members, method, as_lora, None, shards[0], Output(str(out), "first"))
    workers = [context.Process(target=serve, args=(kind, unit, units, answers)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for _ in workers:
        answers.get()
    start = time.perf_counter()
    for shard in shards:
        units.put(replace(unit, shard=shard, output=Output(str(out), "m")))
    peaks = [answers.get() for _ in shards]
    seconds = time.perf_counter() - start
    for _ in workers:
        units.put(None)
    for worker in workers:
        worker.join()
    return seconds, WORKERS * max(peaks)


_MERGEKIT = """
import json, resource, sys, time, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
config, out, shard = MergeConfiguration.model_validate(yaml.safe_load(sys.argv[1])), sys.argv[2], int(sys.argv[3])
options = MergeOptions(async_write=True, out_shard_size=shard, copy_tokenizer=False, quiet=True, random_seed=0)
before = resident("VmRSS")
start = time.perf_counter()
run_merge(config, out, options=options)
print(json.dumps({"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - before}))
"""


def run_mergekit(
    python: str, root: Path, out: Path, case: Case, dtypes: dict[str, str] | None = None
) -> tuple[float, int]:
    """Seconds, and its peak bytes."""
    parameters = {k: v for k, v in case.mergekit.items() if k != "merge_method"}
    config: dict[str, Any] = {
        "merge_method": case.mergekit["merge_method"], **(dtypes or {"dtype": "bfloat16"}),
        "models": [{"model": str(root / f"tuned{i}"), "parameters": parameters} for i in range(case.models)],
    }  # fmt: skip
    if case.reads_base:
        config["base_model"] = str(root / "base")
    command = [python, "-c", _MERGEKIT, json.dumps(config), str(out), str(SHARD_BYTES // 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mergekit failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["seconds"], found["peak"]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def differing(ours: Path, theirs: Path) -> dict[str, torch.Tensor]:
    """Tensor -> where the entries of two fused models differ: bool, of its shape."""
    one, two = tensors_in(ours), tensors_in(theirs)
    assert one.keys() == two.keys()
    return {n: one[n] != two[n] for n in one}


def at_thresholds(root: Path, case: Case) -> dict[str, torch.Tensor]:
    """Tensor -> where any model's task vector has exactly the magnitude of TIES' threshold: bool, of its shape."""
    base = tensors_in(root / "base")
    found = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in base.items()}
    for i in range(case.models):
        for name, tensor in tensors_in(root / f"tuned{i}").items():
            size = (tensor.float() - base[name].float()).abs()
            kept = max(round(case.method["density"] * size.numel()), 1)
            found[name] |= size == magnitude_threshold(size, kept)
    return found


def share_of(entries: dict[str, torch.Tensor]) -> float:
    return sum(int(e.sum()) for e in entries.values()) / sum(e.numel() for e in entries.values())


def equal(python: str, scratch: Path, console: Console) -> None:
    """Print the share of entries that differ from mergekit's, which sums in float32 here, as we do.

    DARE's random draws differ, so it is compared without drops. TIES' threshold: we keep every entry at it, mergekit
    only as many as make up the number, and in bfloat16 many entries of a task vector have the same magnitude. Where
    task vectors cancel, we elect no sign, and mergekit plus: these are the other entries that differ.
    """
    write_models(scratch, SMALL, 4)
    none_dropped = replace(
        CASES["dare_ties"],
        method=CASES["dare_ties"].method | {"drop_rate": 0.0},
        mergekit=CASES["dare_ties"].mergekit | {"density": 1.0},
    )
    cases = {name: CASES[name] for name in ("average", "task_arithmetic", "ties")}
    for name, case in (cases | {"dare_ties, none dropped": none_dropped}).items():
        run_ours(TensorWorker, scratch, scratch / "ours", case)
        run_mergekit(python, scratch, scratch / "theirs", case, {"dtype": "float32", "out_dtype": "bfloat16"})
        found = differing(scratch / "ours" / "m", scratch / "theirs")
        console.print(f"{name}: {100 * share_of(found):.4f} % of the entries differ from mergekit's")
        if name == "ties":
            ties = at_thresholds(scratch, case)
            others = {n: found[n] & ~ties[n] for n in found}
            console.print(f"  of those at no model's threshold: {100 * share_of(others):.4f} %")
        for folder in ("ours", "theirs"):
            shutil.rmtree(scratch / folder)


def compare(arguments: argparse.Namespace, scratch: Path, console: Console) -> None:
    root = Path(arguments.models) if arguments.models else scratch / "models"
    write_models(root, BILLION, max(case.models for case in CASES.values()))
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], list[int]] = {}
    for number in range(arguments.turns):
        for name in arguments.methods:
            case = CASES[name]
            contestants = {
                "floor": lambda out, case=case: run_ours(FloorWorker, root, out, case),
                "ours": lambda out, case=case: run_ours(TensorWorker, root, out, case),
            }
            slow = name in ("ties", "dare_ties") and number > 0  # minutes each: one turn says enough
            if arguments.mergekit and not slow:
                contestants["mergekit"] = lambda out, case=case: run_mergekit(arguments.mergekit, root, out, case)
            for who, run in contestants.items():
                out = scratch / "out"
                warm(root, case)
                spent, peak = run(out)
                shutil.rmtree(out)
                seconds.setdefault((name, who), []).append(spent)
                peaks.setdefault((name, who), []).append(peak)
                console.print(f"turn {number + 1}, {name}, {who}: {spent:.2f} s, {peak / 1e6:.0f} MB")
    table = Table(title=f"{BILLION.parameters / 1e9:.2f}B parameters, {WORKERS} workers of one thread")
    for heading in ("", "floor, s", "ours, s", "× floor", "GB/s", "MB", "mergekit, s", "MB", "× ours"):
        table.add_column(heading, justify="right")
    required: dict[str, tuple[float, float, str]] = {}
    shares: list[float] = []
    for name in arguments.methods:
        case = CASES[name]
        floor, ours = (statistics.median(seconds[name, who]) for who in ("floor", "ours"))
        volume = 2 * BILLION.parameters * (case.models + case.reads_base + 1)
        row = [name, f"{floor:.2f}", f"{ours:.2f}", f"{ours / floor:.2f}", f"{volume / ours / 1e9:.2f}"]
        row.append(f"{max(peaks[name, 'ours']) / 1e6:.0f}")
        if case.floor_ratio is not None:
            required[f"{name}_floor_ratio"] = (ours / floor, case.floor_ratio, "max")
        if (name, "mergekit") in seconds:
            theirs = statistics.median(seconds[name, "mergekit"])
            required[f"{name}_speedup"] = (theirs / ours, case.speedup, "min")
            shares.append(max(peaks[name, "ours"]) / max(peaks[name, "mergekit"]))
            row += [f"{theirs:.2f}", f"{max(peaks[name, 'mergekit']) / 1e6:.0f}", f"{theirs / ours:.1f}"]
        table.add_row(*row)
    console.print(table)
    if shares:
        required["peak_memory_share"] = (max(shares), 1 / 6, "max")
    met = all(x <= bound if kind == "max" else x >= bound for x, bound, kind in required.values())
    rows = {n: {"measured": round(x, 3), "bound": round(b, 3), "kind": k} for n, (x, b, k) in required.items()}
    print(json.dumps({"benchmark": "fuse", "required": rows, "met": met}))


def growth(scratch: Path, console: Console) -> None:
    """Print nanoseconds per byte of the inputs and the output, which should not grow; takes 14 GB of disk at most.

    The better of two turns counts: what else runs on the machine only adds time.
    """
    for name, shape in GROWTH.items():
        root = scratch / name.replace(" ", "")
        for models in (2, 4, 8, 16) if shape.parameters < 2e8 else (2, 4):
            write_models(root, shape, models)
            for method in ("task_arithmetic", "ties"):
                case = replace(CASES[method], models=models)
                warm(root, case)
                spent, peak = math.inf, 0
                for _ in range(2):
                    seconds, peak = run_ours(TensorWorker, root, scratch / "out", case)
                    shutil.rmtree(scratch / "out")
                    spent = min(spent, seconds)
                each = spent / (2 * shape.parameters * (models + 2)) * 1e9
                console.print(f"{name}, {models} models, {method}: {each:.2f} ns per byte, {peak / 1e6:.0f} MB")
        shutil.rmtree(root)


def seven_billion(root: Path, console: Console) -> None:
    """Print time and memory of fusing four models of a 7B's shape, from the disk.

    It takes 40 GB: the base, the result, and the four models, which are one file under four names.
    """
    write_models(root, SEVEN_BILLION, 1)
    for i in range(1, 4):
        shutil.copytree(root / "tuned0", root / f"tuned{i}", copy_function=os.link)
    for name in ("task_arithmetic", "ties"):
        case = CASES[name]
        seconds, peak = run_ours(TensorWorker, root, root / "out", case)
        shutil.rmtree(root / "out")
        rate = 2 * SEVEN_BILLION.parameters * (case.models + 2) / seconds / 1e9
        console.print(
            f"{SEVEN_BILLION.parameters / 1e9:.2f}B, {case.models} models, {name}: {seconds:.0f} s, {rate:.2f} GB/s, "
            f"{peak / 1e6:.0f} MB in {WORKERS} workers"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuse", description=__doc__)
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    parser.add_argument("--models", help="folder for the inputs (11 GB), kept and used again")
    parser.add_argument("--methods", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--seven-billion", action="store_true", help="instead fuse four models of a 7B's shape")
    parser.add_argument("--equal", action="store_true", help="count the entries that aren't mergekit's instead")
    arguments = parser.parse_args()
    console = Console()
    if arguments.models is not None:
        Path(arguments.models).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.models) as scratch:
        if arguments.equal:
            equal(arguments.mergekit, Path(scratch), console)
        elif arguments.growth:
            growth(Path(scratch), console)
        elif arguments.seven_billion:
            seven_billion(Path(scratch), console)
        else:
            compare(arguments, Path(scratch), console)


if __name__ == "__main__":
    main()
