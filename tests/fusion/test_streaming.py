"""Fusion in runs of rows, against fusion of tensors that are in memory whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

import fleet.algebra.sparsify
import fleet.fusion.streaming
import fleet.store.file_writer
import fleet.store.local
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.sparsify import WHOLE, merge_bfloat16, thresholds_of
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo, plan_shards, shard_name
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.tensors import TORCH_DTYPES
from fleet.fusion import (
    AnyFusionMethod,
    Breadcrumbs,
    Consensus,
    Dare,
    Della,
    Iso,
    Karcher,
    Knots,
    ModelStock,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    Ram,
    RamPlusTl,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
    Tsv,
    WeightAverage,
)
from fleet.fusion.member import Member
from fleet.fusion.place import places
from fleet.fusion.streaming import StreamedFusion
from fleet.store import open_folder, open_store
from fleet.store.local import LocalFolder
from fleet.work.fusing import FuseUnit
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import UnitRecord
from tests.pico import write_adapter, write_model

AVERAGE = WeightAverage(method="weight_average")
SUM = TaskArithmetic(method="task_arithmetic", scale=1.0)
LINEAR = (AVERAGE, TaskArithmetic(method="task_arithmetic"))
SPARSE = (
    Ties(method="ties"),
    Ties(method="ties", consensus="mean", density=0.35, scale=1.0),
    Dare(method="dare"),
    Dare(method="dare", consensus="sum", drop_rate=0.5),
    Breadcrumbs(method="breadcrumbs", density=0.6, outliers=0.05),
    Della(method="della"),
    Dare(method="dare", rescale=False),
)
WITHOUT_SUMS = (
    *LINEAR,
    *SPARSE,
    Consensus(method="consensus"),
    Ram(method="ram", epsilon=0.01),
    NearSwap(method="nearswap", t=0.01),
)
WITH_SUMS = (
    Sce(method="sce"),
    Sce(method="sce", select=0.4),
    Slerp(method="slerp", t=0.3),
    ModelStock(method="model_stock"),
    Karcher(method="karcher"),
    MultiSlerp(method="multi_slerp"),
    NuSlerp(method="nuslerp"),
    RamPlusTl(method="ramplus_tl", epsilon=0.01),
    Ties(method="ties", rescale=True),
)
MATRIX = (
    Knots(method="knots"),
    Tsv(method="tsv"),
    Iso(method="iso"),
    ModelStock(method="model_stock", filter_wise=True),
    NuSlerp(method="nuslerp", vectors="columns"),
)
OF_TWO = ("slerp", "nuslerp", "nearswap")
METHODS = (*WITHOUT_SUMS, *WITH_SUMS, *MATRIX)
WITH_THRESHOLDS = (*SPARSE[:2], SPARSE[4], WITH_SUMS[1])

Tensors: TypeAlias = Mapping[str, torch.Tensor]

CONFIG = {"model_type": "qwen3_moe"}
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 6, 8),
    "model.layers.0.self_attn.q_proj.weight": (10, 8),
    "model.layers.1.mlp.down_proj.weight": (70, 130),
    "model.layers.1.self_attn.q_proj.weight": (33, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}
DOWN, Q_PROJ = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
MIXED = ("full", "half", "single", "lora", "rslora")
FULL = ("full", "half", "single")


def named(method: AnyFusionMethod) -> str:
    changed = [str(v) for k, v in method if k in method.model_fields_set and k != "method"]
    return "-".join([method.method, *changed])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, dtype: torch.dtype, near: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Weights of a model, or of one close to another."""
    drawn = {n: normal(seed + i, *s) * (0.02 if near else 0.3) for i, (n, s) in enumerate(SHAPES.items())}
    return {n: (t + near[n].float() if near else t).to(dtype) for n, t in drawn.items()}


def eighths(seed: int, *shape: int) -> torch.Tensor:
    """Factors whose products are exact, however they are added up."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8.0


def factors(seed: int, modules: Sequence[str], rank: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for i, module in enumerate(modules):
        d_out, d_in = SHAPES[f"{module}.weight"]
        found[f"{module}.lora_A.weight"] = eighths(seed + i, rank, d_in)
        found[f"{module}.lora_B.weight"] = eighths(seed + i + 50, d_out, rank) / 16.0
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned` in bfloat16, `aligned32`, and near them full models in three dtypes, a LoRA and an rsLoRA."""
    root = tmp_path_factory.mktemp("models")
    base = weights(0, torch.bfloat16)
    write_model(root / "aligned", CONFIG, base)
    write_model(root / "aligned32", CONFIG, weights(0, torch.float32))
    for seed, (name, dtype) in enumerate(zip(FULL, (torch.bfloat16, torch.float16, torch.float32), strict=True)):
        write_model(root / name, CONFIG, weights(100 * seed + 100, dtype, base))
    modules = [DOWN, Q_PROJ]
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj", "q_proj"]}
    write_adapter(root / "lora", lora, factors(7, modules, 2))
    write_adapter(root / "rslora", lora | {"r": 4, "use_rslora": True}, factors(9, modules, 4))
    return root


def members_of(method: AnyFusionMethod) -> tuple[str, ...]:
    return ("half", "lora") if method.method in OF_TWO else MIXED


def full_model(folder: Path) -> FullModel:
    return require_full_model(read_model(open_folder(str(folder))), folder.name)


def shards_of(folder: Path, shard_bytes: int) -> list[Shard]:
    groups = plan_shards(full_model(folder).tensors.values(), shard_bytes)
    files = [shard_name(i, len(groups)) for i in range(len(groups))]
    index = {n: f for f, names in zip(files, groups, strict=True) for n in names}
    return [Shard(f, tuple(g), index if i == 0 else None) for i, (f, g) in enumerate(zip(files, groups, strict=True))]


def units(
    root: Path, out: Path, members: Sequence[str], method: AnyFusionMethod, aligned: str, shard_bytes: int
) -> list[FuseUnit]:
    members_M = tuple(Member(name, str(root / name)) for name in members)
    return [
        FuseUnit(str(root / aligned), members_M, method, False, None, shard, Output(str(out), "m"))
        for shard in shards_of(root / aligned, shard_bytes)
    ]


def fuse(
    root: Path,
    out: Path,
    members: Sequence[str],
    method: AnyFusionMethod,
    aligned: str = "aligned",
    shard_bytes: int = 10**9,
) -> dict[str, torch.Tensor]:
    """The fused model's tensors."""
    for unit in units(root, out, members, method, aligned, shard_bytes):
        TensorWorker().run(unit)
    return weights_in(out / "m")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def task_vectors(root: Path, name: str, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's, whole and dense, float32."""
    if "lora" not in name:
        return {n: t.float() - base[n].float() for n, t in weights_in(root / name).items()}
    stored = {n.removeprefix("base_model.model."): t for n, t in weights_in(root / name).items()}
    scale = 2.0  # 4/2, and of the rsLoRA 4/√4
    return {f"{m}.weight": stored[f"{m}.lora_B.weight"] @ stored[f"{m}.lora_A.weight"] * scale for m in (DOWN, Q_PROJ)}


def in_memory(root: Path, members: Sequence[str], method: AnyFusionMethod, aligned: str) -> dict[str, torch.Tensor]:
    """θ + what the method makes of whole task vectors, float64."""
    base = weights_in(root / aligned)
    vectors = {name: task_vectors(root, name, base) for name in members}
    found: dict[str, torch.Tensor] = {}
    for name, place in places(base).items():
        deltas: dict[str, Delta] = {m: Dense(v[name]) for m, v in vectors.items() if name in v}
        fused = method.fuse(deltas, method.coefficients([*members], place), place, WHOLE)
        found[name] = base[name].double() + fused.dense().double()
    return found


def assert_one_rounding(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bits: int, slack: float = 3e-6
) -> None:
    """Within half a last place of numbers with this many significant bits; a little more for sums in float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value).abs()
        excess = error - value.abs() * 2.0**-bits - slack * float(value.abs().max())
        assert float(excess.max()) <= 0.0, (name, float(error.max()))


# -- the same as in memory -------------------------------------------------------------------------------------------


def test_streamed_model_by_hand(tmp_path: Path) -> None:
    tensors = {"aligned": [[1.0, 2.0], [-4.0, 0.5]], "a": [[3.0, 2.0], [0.0, 0.5]], "b": [[1.0, 4.0], [4.0, 0.25]]}
    for name, values in tensors.items():
        stored = {"model.layers.0.self_attn.q_proj.weight": torch.tensor(values, dtype=torch.bfloat16)}
        write_model(tmp_path / name, CONFIG, stored)
    expected = {
        "average": (AVERAGE, [[2.0, 3.0], [2.0, 0.375]]),
        "sum": (SUM, [[3.0, 4.0], [8.0, 0.25]]),
        # One of four entries of each: 4 of a's, 8 of b's.
        "ties": (Ties(method="ties", density=0.25, scale=0.5), [[1.0, 2.0], [2.0, 0.5]]),
        "stock": (WeightAverage(method="weight_average", weights={"b": 3.0}), [[1.5, 3.5], [3.0, 0.3125]]),
    }
    for name, (method, values) in expected.items():
        found = fuse(tmp_path, tmp_path / name, ["a", "b"], method)
        assert found["model.layers.0.self_attn.q_proj.weight"].tolist() == values, name


@pytest.mark.parametrize("run_entries", [100, 1 << 16])
@pytest.mark.parametrize("aligned", ["aligned", "aligned32"])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_streamed_model_is_the_one_in_memory(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: AnyFusionMethod,
    aligned: str,
    run_entries: int,
) -> None:
    """Members of three dtypes, a LoRA and an rsLoRA; matrices, experts, a vector."""
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", run_entries)
    members = members_of(method)
    found = fuse(models, tmp_path, members, method, aligned)
    expected = in_memory(models, members, method, aligned)
    assert_one_rounding(found, expected, 8 if aligned == "aligned" else 24, 1e-5 if method in MATRIX else 3e-6)


@pytest.mark.parametrize("method", LINEAR, ids=named)
@pytest.mark.parametrize("members", [MIXED, FULL, ("full",), ("full", "full2"), ("lora",), ("lora", "rslora")])
def test_streamed_linear_model_is_the_weighted_sum_in_double(
    models: Path, tmp_path: Path, method: WeightAverage | TaskArithmetic, members: Sequence[str]
) -> None:
    """Written out; with a second full model in bfloat16, which is where the compiled loop is."""
    if "full2" in members and not (models / "full2").exists():
        write_model(models / "full2", CONFIG, weights(900, torch.bfloat16, weights(0, torch.bfloat16)))
    relative = dict(zip(members, (1.0, 0.5, 2.0, 0.75, 1.5), strict=False))
    method = method.model_copy(update={"weights": relative})
    base = weights_in(models / "aligned")
    total = sum(relative.values()) if method.method == "weight_average" else 1.0 / 0.3
    expected = {name: tensor.double() for name, tensor in base.items()}
    for member, weight in relative.items():
        for name, vector in task_vectors(models, member, base).items():
            expected[name] = expected[name] + vector.double() * (weight / total)
    assert_one_rounding(fuse(models, tmp_path, members, method), expected, 8)


@pytest.mark.parametrize("method", [*LINEAR, *SPARSE[:4]], ids=named)
def test_streamed_bfloat16_model_beside_a_lora_is_the_one_in_memory(
    models: Path, tmp_path: Path, method: AnyFusionMethod
) -> None:
    """The compiled loops can't have the LoRA."""
    found = fuse(models, tmp_path, ("full", "lora"), method)
    assert_one_rounding(found, in_memory(models, ("full", "lora"), method, "aligned"), 8)


# -- however it is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_streamed_bytes_do_not_depend_on_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod
) -> None:
    """LoRAs are multiplied out, and sums made, in blocks that follow from the tensor's shape; here smaller than it."""
    monkeypatch.setattr(fleet.fusion.streaming, "FIXED_ENTRIES", 300)
    members = members_of(method)
    expected = fuse(models, tmp_path / "default", members, method, "aligned32")
    for entries in (1, 64, 1000, 1 << 20):
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", entries)
        assert_same_bits(fuse(models, tmp_path / str(entries), members, method, "aligned32"), expected)


@pytest.mark.parametrize("method", [WITH_SUMS[0], Sce(method="sce")], ids=named)
def test_streamed_sums_have_the_same_bits_whatever_the_runs(
    monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod
) -> None:
    """Of float64, which weights in float32 hardly show."""
    monkeypatch.setattr(fleet.fusion.streaming, "FIXED_ENTRIES", 300)
    name, found = "layers.0.weight", list[torch.Tensor]()
    models = {model: held({name: normal(i, 70, 13)})[0] for i, model in enumerate(("aligned", "a", "b"))}
    summed = fleet.fusion.streaming._Tensor.sums

    def noted(*args: Any) -> torch.Tensor | None:
        sums = summed(*args)
        assert sums is not None
        found.append(sums)
        return sums

    monkeypatch.setattr(fleet.fusion.streaming._Tensor, "sums", noted)
    for entries in (1, 40, 1000):
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", entries)
        streamed(models["aligned"], {"a": models["a"], "b": models["b"]}, method)
    assert len(found) == 3 and all(torch.equal(sums, found[0]) for sums in found)


def test_loras_rows_have_the_same_bits_in_any_run_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one row, which a BLAS multiplies by another routine than many."""
    monkeypatch.setattr(fleet.fusion.streaming, "FIXED_ENTRIES", 300)
    delta = LowRank(normal(0, 50, 40), normal(1, 40, 29))
    part = fleet.fusion.streaming._Product(delta)
    whole = part.read(0, 50)
    torch.testing.assert_close(whole, delta.dense())
    for step in (1, 3, 10, 17, 49):
        runs = [part.read(at, min(at + step, 50)) for at in range(0, 50, step)]
        assert torch.equal(torch.cat(runs), whole)


@pytest.mark.parametrize("method", WITH_SUMS, ids=named)
def test_streamed_sums_over_blocks_are_the_wholes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod
) -> None:
    """Added up over blocks and at once: float64's rounding of the same sums."""
    members = members_of(method)
    expected = fuse(models, tmp_path / "default", members, method, "aligned32")
    for entries in (1, 64, 1000, 1 << 20):
        monkeypatch.setattr(fleet.fusion.streaming, "FIXED_ENTRIES", entries)
        found = fuse(models, tmp_path / str(entries), members, method, "aligned32")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 4, 40])
@pytest.mark.parametrize("method", WITH_THRESHOLDS, ids=named)
def test_streamed_search_from_a_sample_finds_the_same_thresholds(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod, samples: int
) -> None:
    """Whatever the sample says, the bytes are those of the search in one piece."""
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 200)
    expected = fuse(models, tmp_path / "exact", MIXED, method)
    monkeypatch.setattr(fleet.fusion.streaming, "SAMPLE_ENTRIES", samples)
    monkeypatch.setattr(fleet.fusion.streaming, "_SAMPLE_ROWS", 5)
    monkeypatch.setattr(fleet.fusion.streaming, "thresholds_of", _only_for(16 * samples))
    assert_same_bits(fuse(models, tmp_path / "sampled", MIXED, method), expected)


def _only_for(limit: int) -> Callable[[Tensors, Mapping[str, Sequence[int]]], dict[str, tuple[float, ...]]]:
    """The search in one piece, of so many entries and no more."""

    def checked(scores: Tensors, ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
        assert all(score.numel() <= limit for score in scores.values())
        return thresholds_of(scores, ranks)

    return checked


@pytest.mark.parametrize(
    "method", [AVERAGE, SPARSE[0], SPARSE[3], SPARSE[5], WITH_SUMS[1], WITH_SUMS[4], MATRIX[1]], ids=named
)
def test_streamed_shards_hold_the_tensors_of_one_file(models: Path, tmp_path: Path, method: AnyFusionMethod) -> None:
    one = fuse(models, tmp_path / "one", MIXED, method)
    many = fuse(models, tmp_path / "many", MIXED, method, shard_bytes=500)
    assert len([*(tmp_path / "many" / "m").glob("*.safetensors")]) > 3
    assert_same_bits(many, one)


def test_streamed_catalogue_in_shards_is_the_same_as_in_one(catalogue: Path, tmp_path: Path) -> None:
    members, method = ("lora", "rslora", "full"), Ties(method="ties")
    one = fuse(catalogue, tmp_path / "one", members, method)
    many = fuse(catalogue, tmp_path / "many", members, method, shard_bytes=20_000)
    assert len([*(tmp_path / "many" / "m").glob("*.safetensors")]) > 1
    assert_same_bits(many, one)


def test_streamed_model_with_thresholds_of_its_own_takes_them(models: Path) -> None:
    """Where they are the whole model's, nothing is searched for."""
    base, full = (weights_in(models / name) for name in ("aligned", "full"))
    aligned, member = full_model(models / "aligned"), full_model(models / "full")
    method = Ties(method="ties", trim="model", scale=1.0)
    with ThreadPoolExecutor(1) as reader:
        fusion = StreamedFusion(aligned, {"full": member}, method, {"full": (0.04,)}, reader)
        for name, tensor in base.items():
            found = torch.cat([piece.reshape(-1) for piece in fusion.tensor(name)]).view(tensor.shape).bfloat16()
            moved = (full[name].float() - tensor.float()).abs() >= 0.04
            assert name.startswith("model.norm") or 0.0 < float(moved.float().mean()) < 0.5
            assert torch.equal(found, torch.where(moved, full[name], tensor))


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", ["aligned", "aligned32"])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_streamed_zero_task_vectors_give_the_aligned_model_bit_for_bit(
    models: Path, tmp_path: Path, method: AnyFusionMethod, aligned: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj", "q_proj"]}
    zeros = {n: t * ("lora_A" in n) for n, t in factors(7, [DOWN, Q_PROJ], 2).items()}
    write_adapter(root / "zero", lora, zeros)
    for name in ("aligned", "aligned32"):
        (root / name).symlink_to(models / name)
    found = fuse(root, tmp_path / "out", [aligned, "zero"], method, aligned)
    assert_same_bits(found, weights_in(models / aligned))


@dataclass
class MemoryFolder:
    """Files in memory, which says what was read; as a remote folder is, not a local one."""

    data: dict[str, bytes]
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    uri: str = "memory://"

    def only(self, names: Collection[str]) -> MemoryFolder:
        raise NotImplementedError

    def files(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.data.items()}

    def digests(self) -> dict[str, str]:
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        return self.data[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        self.reads.append((name, start, len(view)))
        view[:] = self.data[name][start : start + len(view)]

    def local(self, scratch: Path) -> Path:
        raise NotImplementedError


@dataclass(frozen=True)
class CountingFolder(LocalFolder):
    """A local folder that says what was read."""

    reads: list[tuple[str, int, int]] = field(default_factory=list)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.reads.append((name, start, buffer.nbytes))
        super().read_into(name, start, buffer)


def held(tensors: Mapping[str, torch.Tensor]) -> tuple[FullModel, MemoryFolder]:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    infos: dict[str, TensorInfo] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        shape = tuple(tensor.shape)
        infos[name] = TensorInfo(name, names[tensor.dtype], shape, "f", len(data), len(data) + len(raw))
        data += raw
    folder = MemoryFolder({"f": data})
    return FullModel(folder, {"model_type": "llama"}, infos), folder


def streamed(
    aligned: FullModel, members: Mapping[str, FullModel], method: AnyFusionMethod, names: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """As written: each tensor in the aligned model's dtype and shape."""
    with ThreadPoolExecutor(1) as reader:
        fusion = StreamedFusion(aligned, members, method, None, reader)
        found: dict[str, torch.Tensor] = {}
        for name in names or aligned.tensors:
            info = aligned.tensors[name]
            pieces = [p.to(TORCH_DTYPES[info.dtype], copy=True).reshape(-1) for p in fusion.tensor(name)]
            whole = torch.cat(pieces) if pieces else torch.empty(0, dtype=TORCH_DTYPES[info.dtype])
            found[name] = whole.reshape(info.shape)
        return found


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@settings(deadline=None, max_examples=80)
@given(DTYPES, st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9), st.booleans(), st.booleans())
def test_streamed_model_alone_at_weight_one_is_that_model_bit_for_bit(
    dtype: torch.dtype, seed: int, rows: int, columns: int, is_sum: bool, beside: bool
) -> None:
    """Any bits, with exponents far from the aligned model's; another model of weight 0 changes nothing."""
    size = torch.finfo(dtype).bits
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 1 << size, (3, rows, columns), generator=generator)
    values = words.to(torch.int32 if size == 32 else torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, torch.ones((), dtype=dtype))
    (aligned, _), (model, _), (other, _) = (held({"layers.0.weight": v}) for v in values)
    members = {"other": other, "model": model} if beside else {"model": model}
    method = (SUM if is_sum else AVERAGE).model_copy(update={"weights": {"other": 0.0}})
    assert_same_bits(streamed(aligned, members, method), {"layers.0.weight": values[1]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", [AVERAGE, SUM], ids=named)
def test_streamed_model_of_another_dtype_alone_is_that_model_cast_once(
    dtype: torch.dtype, method: AnyFusionMethod
) -> None:
    values = {"layers.0.weight": normal(1, 9, 7).to(dtype)}
    for into in (torch.bfloat16, torch.float16, torch.float32):
        aligned, _ = held({"layers.0.weight": normal(0, 9, 7).to(into)})
        expected = {"layers.0.weight": values["layers.0.weight"].to(into)}
        assert_same_bits(streamed(aligned, {"m": held(values)[0]}, method), expected)


@settings(deadline=None, max_examples=40)
@given(DTYPES, st.integers(0, 2**31), st.integers(2, 4))
def test_streamed_average_of_one_model_thrice_is_that_model(dtype: torch.dtype, seed: int, copies: int) -> None:
    """Differences of equal weights are exactly zero, whatever the aligned model is."""
    exponents = torch.randint(-12, 5, (5, 6), generator=torch.Generator().manual_seed(seed))
    values = (normal(seed, 5, 6) * torch.exp2(exponents)).to(dtype)
    members = {str(i): held({"w": values})[0] for i in range(copies)}
    aligned, _ = held({"w": normal(seed + 1, 5, 6).to(dtype) * 1000.0})
    assert torch.equal(streamed(aligned, members, AVERAGE)["w"], values)


# -- what is read ----------------------------------------------------------------------------------------------------


def counting(folder: Path) -> tuple[FullModel, list[tuple[str, int, int]]]:
    model = full_model(folder)
    found = CountingFolder(folder)
    return FullModel(found, model.config, model.tensors), found.reads


def bytes_of(reads: Sequence[tuple[str, int, int]]) -> int:
    return sum(count for _, _, count in reads)


@pytest.mark.parametrize("method", [AVERAGE, SUM], ids=named)
def test_streamed_average_of_full_models_does_not_read_the_aligned_one(models: Path, method: AnyFusionMethod) -> None:
    aligned, base_reads = counting(models / "aligned")
    members = {name: counting(models / name) for name in FULL}
    shares = method.model_copy(update={"weights": dict(zip(FULL, (0.5, 0.25, 0.25), strict=True))})
    streamed(aligned, {name: model for name, (model, _) in members.items()}, shares)
    assert not base_reads
    for model, reads in members.values():
        assert bytes_of(reads) == model.num_bytes == bytes_of([*set(reads)]), "each byte once"


def test_streamed_sum_reads_every_model_once(models: Path) -> None:
    method = TaskArithmetic(method="task_arithmetic")
    opened = {name: counting(models / name) for name in ("aligned", *FULL)}
    streamed(opened["aligned"][0], {name: opened[name][0] for name in FULL}, method)
    for model, reads in opened.values():
        assert bytes_of(reads) == model.num_bytes == bytes_of([*set(reads)])


@pytest.mark.parametrize("method", LINEAR, ids=named)
def test_streamed_model_with_weight_zero_is_not_read(models: Path, method: AnyFusionMethod) -> None:
    aligned, _ = counting(models / "aligned")
    opened = {name: counting(models / name) for name in FULL}
    method = method.model_copy(update={"weights": {"half": 0.0}})
    found = streamed(aligned, {name: model for name, (model, _) in opened.items()}, method)
    assert not opened["half"][1] and opened["full"][1] and opened["single"][1]
    two = {name: opened[name][0] for name in ("full", "single")}
    assert_same_bits(found, streamed(aligned, two, method))


def test_streamed_model_with_no_weight_at_all_is_the_aligned_one(models: Path) -> None:
    aligned, _ = counting(models / "aligned")
    full, reads = counting(models / "full")
    method = TaskArithmetic(method="task_arithmetic", weights={"full": 0.0})
    assert_same_bits(streamed(aligned, {"full": full}, method), weights_in(models / "aligned"))
    assert not reads


def test_streamed_tensor_is_read_in_runs_of_whole_rows(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 1000)
    aligned, reads = counting(models / "aligned")
    streamed(aligned, {"half": full_model(models / "half")}, LINEAR[1], [f"{DOWN}.weight"])
    assert [count // 260 for _, _, count in reads] == [7] * 10  # of 130 entries, 2 bytes each


@pytest.mark.parametrize("method", [m for m in (*WITHOUT_SUMS, *WITH_SUMS) if m.method not in OF_TWO], ids=named)
def test_streamed_remote_models_give_what_local_ones_give(
    models: Path, monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod
) -> None:
    """A thread reads ahead there."""
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 300)
    local = streamed(full_model(models / "aligned"), {n: full_model(models / n) for n in FULL}, method)
    aligned, folder = held(weights_in(models / "aligned"))
    remote = streamed(aligned, {n: held(weights_in(models / n))[0] for n in FULL}, method)
    assert_same_bits(remote, local)
    assert method.method == "weight_average" or folder.reads


def test_streamed_read_that_fails_ahead_is_raised(models: Path) -> None:
    aligned, folder = held(weights_in(models / "aligned"))
    model, _ = held(weights_in(models / "full"))
    folder.data["f"] = folder.data["f"][:100]
    with pytest.raises(ValueError, match="memoryview"):
        streamed(aligned, {"full": model}, LINEAR[1])


# -- the compiled loops over bfloat16 --------------------------------------------------------------------------------


def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Folders in memory pass for local ones from now on; and how many entries each compiled merge had."""
    seen: list[int] = []

    def counted(rows: torch.Tensor, *arguments: Any) -> None:
        seen.append(rows.shape[1])
        merge_bfloat16(rows, *arguments)

    monkeypatch.setattr(fleet.fusion.streaming, "is_local", lambda folder: isinstance(folder, MemoryFolder))
    monkeypatch.setattr(fleet.algebra.sparsify, "merge_bfloat16", counted)
    return seen


SHARES, MODES = st.floats(0.01, 1.0), st.sampled_from(["sum", "mean", "none"])
MERGED = st.builds(
    Ties, method=st.just("ties"), density=SHARES, consensus=MODES, scale=st.sampled_from([0.4, 1.0])
) | st.builds(Dare, method=st.just("dare"), drop_rate=st.floats(0.0, 0.95), consensus=MODES, seed=st.integers(0, 9))


@settings(deadline=None, max_examples=60)
@given(
    MERGED, st.lists(st.sampled_from([1.0, 0.0, 0.3, -0.5, 2.0]), min_size=1, max_size=6), st.integers(0, 2**31),
    st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 100, 1 << 16]), st.sampled_from([1, 20, 1 << 16]),
)  # fmt: skip
def test_streamed_bfloat16_model_is_torchs_bit_for_bit(
    method: Ties | Dare, weights: list[float], seed: int, rows: int, columns: int, run_entries: int, samples: int
) -> None:
    """Whatever the runs and the sample; against operators of torch on tensors that want gradients."""
    base = normal(seed, rows, columns).bfloat16()
    tuned = {f"m{i}": (base + normal(seed + i + 1, rows, columns) * 0.02).bfloat16() for i in range(len(weights))}
    method = method.model_copy(update={"weights": dict(zip(tuned, weights, strict=True))})
    name = "model.layers.0.t.weight"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", run_entries)
        monkeypatch.setattr(fleet.fusion.streaming, "SAMPLE_ENTRIES", samples)
        merged = here(monkeypatch)
        members = {model: held({name: tensor})[0] for model, tensor in tuned.items()}
        found = streamed(held({name: base})[0], members, method)[name]
    assert sum(merged) == base.numel()
    place = places([name])[name]
    deltas: dict[str, Delta] = {m: Dense((t.float() - base.float()).requires_grad_()) for m, t in tuned.items()}
    fused = method.fuse(deltas, method.coefficients([*tuned], place), place, WHOLE).dense()
    assert fused.requires_grad
    assert torch.equal(found, (base.float() + fused).bfloat16())


@pytest.mark.parametrize("method", [*SPARSE, WITH_SUMS[1]], ids=named)
def test_streamed_bfloat16_models_give_what_remote_or_mixed_ones_give(
    monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod
) -> None:
    """The same weights, all read ahead; or one model's in float32."""
    monkeypatch.setattr(fleet.fusion.streaming, "SAMPLE_ENTRIES", 100)
    weights = normal(0, 70, 130).bfloat16()
    tuned = [(weights + normal(i, 70, 130) * 0.02).bfloat16() for i in (1, 2, 3)]
    aligned = held({"layers.0.weight": weights})[0]
    members = {str(i): held({"layers.0.weight": t})[0] for i, t in enumerate(tuned)}
    remote = streamed(aligned, members, method)
    merged = here(monkeypatch)
    mixed = streamed(aligned, members | {"1": held({"layers.0.weight": tuned[1].float()})[0]}, method)
    assert not merged
    assert_same_bits(streamed(aligned, members, method), remote)
    assert_same_bits(mixed, remote)
    assert bool(merged) == isinstance(method, Ties | Dare)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (7, 1), (1, 7), (2, 3, 4), (2, 1, 2, 3)])
def test_streamed_tensor_of_any_shape_is_the_one_in_memory(
    monkeypatch: pytest.MonkeyPatch, method: AnyFusionMethod, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 4)
    stored = {name: normal(seed, *shape) for seed, name in enumerate(("aligned", "a", "b"))}
    name = "model.layers.0.t.weight"
    models = {model: held({name: tensor})[0] for model, tensor in stored.items()}
    found = streamed(models["aligned"], {"a": models["a"], "b": models["b"]}, method)[name]
    place = places([name])[name]
    deltas: dict[str, Delta] = {m: Dense(stored[m] - stored["aligned"]) for m in "ab"}
    fused = method.fuse(deltas, method.coefficients(["a", "b"], place), place, WHOLE).dense()
    torch.testing.assert_close(found, stored["aligned"] + fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 3, 4)])
def test_streamed_tensor_without_entries_has_none(method: AnyFusionMethod, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.t.weight"
    aligned, one, two = (held({name: torch.empty(shape, dtype=torch.bfloat16)})[0] for _ in range(3))
    assert streamed(aligned, {"a": one, "b": two}, method)[name].shape == shape


# -- a worker that dies ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streamed_unit_killed_in_a_shard_leaves_nothing_and_writes_the_same_when_done_again(
    models: Path, tmp_path: Path
) -> None:
    method = Dare(method="dare")
    (unit,) = units(models, tmp_path / "killed", MIXED, method, "aligned", 10**9)
    command = [sys.executable, "-m", "tests.fusion.test_streaming", str(models), str(tmp_path / "killed")]
    worker = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        for line in _lines(worker.stdout, 3):
            assert line == "written\n"
        assert worker.poll() is None
        partial = [*(tmp_path / "killed" / "m").iterdir()]
        assert len(partial) == 1 and partial[0].stat().st_size > 0, "in the middle of the shard"
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        assert worker.wait(timeout=30) == -signal.SIGKILL
    store = open_store(str(tmp_path / "killed"))
    assert store.list("") == {} and store.read("m/model-00001-of-00001.safetensors") is None
    again = TensorWorker().run(unit)
    (other,) = units(models, tmp_path / "quiet", MIXED, method, "aligned", 10**9)
    undisturbed = TensorWorker().run(other)
    assert again == undisturbed and isinstance(again, UnitRecord)
    found, expected = ({k: open_store(str(tmp_path / x)).read(k) for k in store.list("")} for x in ("killed", "quiet"))
    assert found == expected and len(found) == 2


def _lines(stream: Iterator[str], count: int) -> Iterator[str]:
    return (next(stream) for _ in range(count))


class _SlowWriter(fleet.store.local._Writer):
    """Says when a piece has come, and takes its time."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        super().write(data)
        print("written", flush=True)  # noqa: T201
        time.sleep(0.5)


def _fuse_slowly(root: Path, out: Path) -> None:
    fleet.store.local._Writer = _SlowWriter  # type: ignore[misc]
    fleet.store.file_writer._BLOCK_BYTES = 512  # so that pieces go to the disk as they come
    (unit,) = units(root, out, MIXED, Dare(method="dare"), "aligned", 10**9)
    TensorWorker().run(unit)


if __name__ == "__main__":
    _fuse_slowly(Path(sys.argv[1]), Path(sys.argv[2]))
