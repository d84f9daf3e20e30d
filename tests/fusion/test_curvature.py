"""Fisher-weighted averaging and RegMean: their equations in float64, what they read, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

import fleet.fusion.streaming
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.sparsify import WHOLE
from fleet.checkpoint.curvature import Curvature, read_curvature
from fleet.checkpoint.curvature_tensors import CurvatureOf, read_fisher_rows, read_gram
from fleet.checkpoint.modules import module_views
from fleet.checkpoint.shards import Output, Shard
from fleet.core.errors import CheckpointError, ManifestError
from fleet.fusion import AnyFusionMethod, Fisher, RegMean
from fleet.fusion.member import Member
from fleet.fusion.place import Place
from fleet.fusion.regmean import least_eigenvalue
from fleet.fusion.streaming import StreamedFusion
from fleet.manifest import load_manifest
from fleet.run.plan import Plan, make_plan
from fleet.steps.fuse import FuseStep
from fleet.steps.record import attempt_prefix
from fleet.store import open_folder
from fleet.work.fusing import FuseUnit
from fleet.work.tensor_worker import TensorWorker
from tests.catalogue import manifest_document, write_manifest
from tests.fusion.test_streaming import assert_one_rounding, assert_same_bits, full_model, held, shards_of, weights_in
from tests.pico import write_adapter, write_model
from tests.run.test_coordinator import tensor_plan, walk

PLACE = Place("model.layers.1.q.weight", 0.5)
FISHER = Fisher(method="fisher")
REGMEAN = RegMean(method="regmean")
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 7)

Tensors = Mapping[str, torch.Tensor]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, tokens: int, *shape: int) -> torch.Tensor:
    """X of a Linear, (…, tokens, d_in) float64: correlated, and of very different sizes."""
    d_in = shape[-1]
    drawn = normal(seed, *shape[:-1], tokens, d_in).double()
    return (drawn + drawn[..., :1]) * torch.logspace(-3, 3, d_in, dtype=torch.float64)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return x.mT @ x


def fused(
    method: AnyFusionMethod, deltas: Mapping[str, Delta], curvature: Tensors, absent: Sequence[str] = ()
) -> Delta:
    weights = method.coefficients([*deltas, *absent], PLACE)
    return method.fuse(deltas, weights, PLACE, WHOLE, None, curvature)


def rows(**values: Sequence[Any]) -> dict[str, Delta]:
    return {name: Dense(torch.tensor(value)) for name, value in values.items()}


def assert_near(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float((found.double() - expected).norm()) <= rel * float(expected.norm()) + 1e-30


# -- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_methods_with_curvature_are_read_by_their_names(method: AnyFusionMethod) -> None:
    assert TypeAdapter(AnyFusionMethod).validate_json(method.model_dump_json()) == method
    assert not method.is_linear and method.curvature == ("fisher" if method is FISHER else "gram")


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_methods_with_curvature_refuse_weights_that_are_no_shares(method: AnyFusionMethod) -> None:
    for weights in ({"a": -0.5}, {"a": 0.0, "b": 0.0}):
        with pytest.raises(ManifestError, match="at least one over 0"):
            method.model_copy(update={"weights": weights}).coefficients(["a", "b"], PLACE)


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_methods_with_curvature_of_zero_task_vectors_give_exactly_zero(method: AnyFusionMethod) -> None:
    known = {n: normal(i, 4, 4).square() if method is FISHER else gram_of(normal(i, 9, 4)) for i, n in enumerate("ab")}
    deltas: dict[str, Delta] = {n: Dense(torch.zeros(4, 4)) for n in "ab"}
    assert torch.equal(fused(method, deltas, known).dense(), torch.zeros(4, 4))


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_methods_with_curvature_give_the_one_model_that_has_weight_exactly(method: AnyFusionMethod) -> None:
    known = {n: normal(i, 9, 9).square() if method is FISHER else gram_of(inputs(i, 9, 9)) for i, n in enumerate("ab")}
    deltas: dict[str, Delta] = {n: Dense(normal(7 + i, 9, 9) * 10.0**i) for i, n in enumerate("ab")}
    method = method.model_copy(update={"weights": {"b": 0.0}})
    assert torch.equal(fused(method, deltas, known).dense(), deltas["a"].dense())


# -- Fisher ----------------------------------------------------------------------------------------------------------


def test_fisher_by_hand() -> None:
    """The last two: nobody depends on the one, b alone on the other."""
    deltas = rows(a=[2.0, 2.0, 2.0, 2.0], b=[4.0, 4.0, 4.0, 4.0])
    known = {"a": torch.tensor([1.0, 3.0, 0.0, 0.0]), "b": torch.tensor([1.0, 1.0, 0.0, 5.0])}
    assert_near(fused(FISHER, deltas, known).dense(), torch.tensor([3.0, 2.5, 3.0, 4.0]).double(), 1e-6)
    weighted = FISHER.model_copy(update={"weights": {"a": 3.0}})
    assert_near(fused(weighted, deltas, known).dense(), torch.tensor([2.5, 2.2, 2.5, 4.0]).double(), 1e-6)


def test_fisher_of_a_model_that_leaves_the_tensor_alone_pulls_to_the_aligned_one() -> None:
    known = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([3.0, 1.0])}
    found = fused(FISHER, rows(a=[8.0, 8.0]), known, absent=["b"]).dense()
    assert_near(found, torch.tensor([2.0, 0.0]).double(), 1e-6)


def test_fisher_floor_is_the_least_an_entry_counts_as() -> None:
    known = {"a": torch.tensor([0.01, 3.0]), "b": torch.tensor([0.0, 1.0])}
    found = fused(Fisher(method="fisher", floor=1.0), rows(a=[8.0, 8.0], b=[0.0, 0.0]), known).dense()
    assert found.tolist() == [4.0, 6.0]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 4), SIZES, SIZES, st.floats(1e-12, 1e6))
def test_fisher_is_its_equation_whatever_the_unit(seed: int, models: int, d_out: int, d_in: int, unit: float) -> None:
    names = [f"m{i}" for i in range(models)]
    relative = {n: 1.0 + i for i, n in enumerate(names)}
    deltas: dict[str, Delta] = {n: Dense(normal(seed + i, d_out, d_in)) for i, n in enumerate(names)}
    known = {n: normal(seed + 9 + i, d_out, d_in).square() * unit for i, n in enumerate(names)}
    top = sum(relative[n] * known[n].double() * deltas[n].dense().double() for n in names)
    bottom = sum(relative[n] * known[n].double() for n in names)
    method = FISHER.model_copy(update={"weights": relative})
    assert_near(fused(method, deltas, known).dense(), torch.as_tensor(top / bottom), 1e-6)


# -- RegMean ---------------------------------------------------------------------------------------------------------


def test_regmean_by_hand_without_correlations_is_a_mean_per_input() -> None:
    deltas = rows(a=[[4.0, 4.0]], b=[[8.0, 8.0]])
    known = {"a": torch.tensor([[1.0, 0.0], [0.0, 3.0]]), "b": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
    assert_near(fused(REGMEAN, deltas, known).dense(), torch.tensor([[7.0, 5.0]]).double(), 1e-6)


def test_regmean_by_hand_halves_what_is_off_the_diagonal() -> None:
    # G̃_a = [[2, 1], [1, 2]], G̃_b = [[2, 0], [0, 2]]: W [[4, 1], [1, 4]] = [15, 0] [[2, 1], [1, 2]] = [30, 15].
    deltas = rows(a=[[15.0, 0.0]], b=[[0.0, 0.0]])
    known = {"a": torch.tensor([[2.0, 2.0], [2.0, 2.0]]), "b": torch.tensor([[2.0, 0.0], [0.0, 2.0]])}
    found = fused(RegMean(method="regmean", off_diagonal=0.5), deltas, known).dense()
    assert_near(found, torch.tensor([[7.0, 2.0]]).double(), 1e-6)
    diagonal = fused(RegMean(method="regmean", off_diagonal=0.0), deltas, known).dense()
    assert_near(diagonal, torch.tensor([[7.5, 0.0]]).double(), 1e-6)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 4), SIZES, SIZES, st.sampled_from([1e-9, 1.0, 1e9]))
def test_regmean_is_the_least_squares_of_the_models_outputs(
    seed: int, models: int, d_out: int, d_in: int, unit: float
) -> None:
    """α = 1, by another route: QR of the stacked inputs, in units in which they are alike. In any unit as given."""
    names = [f"m{i}" for i in range(models)]
    relative = {n: 1.0 + i for i, n in enumerate(names)}
    given_as = {n: inputs(seed + i, 3 * d_in + 5, d_in) for i, n in enumerate(names)}
    sizes = torch.logspace(-3, 3, d_in, dtype=torch.float64)
    deltas = {n: normal(seed + 20 + i, d_out, d_in).double() / sizes for i, n in enumerate(names)}
    left = torch.cat([given_as[n] / sizes * relative[n] ** 0.5 for n in names])
    right = torch.cat([given_as[n] @ deltas[n].T * relative[n] ** 0.5 for n in names])
    expected = torch.linalg.lstsq(left, right).solution.T
    method = RegMean(method="regmean", off_diagonal=1.0, weights=relative)
    found = fused(
        method, {n: Dense(d.float()) for n, d in deltas.items()}, {n: gram_of(x * unit) for n, x in given_as.items()}
    )
    assert_near((found.dense() * sizes).float(), expected, 1e-4)


def regression(deltas: Tensors, grams: Tensors, weights: Mapping[str, float], alpha: float) -> torch.Tensor:
    """The equation, by an inverse: (d_out, d_in) float64."""
    d_in = next(iter(grams.values())).shape[-1]
    shrink = alpha + (1.0 - alpha) * torch.eye(d_in, dtype=torch.float64)
    kept = {n: g.double() * shrink * weights[n] for n, g in grams.items()}
    pulled = torch.stack([deltas[n].double() @ kept[n] for n in deltas]).sum(0)
    return pulled @ torch.linalg.inv(torch.stack([*kept.values()]).sum(0))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 4), SIZES, SIZES, st.booleans())
def test_regmean_of_loras_is_a_lora_of_the_equation(
    seed: int, models: int, d_out: int, d_in: int, has_absent: bool
) -> None:
    """Also of few tokens, and with a model that leaves the tensor alone."""
    names = [f"m{i}" for i in range(models)]
    loras = {n: LowRank(normal(seed + i, d_out, 2), normal(seed + 30 + i, 2, d_in)) for i, n in enumerate(names)}
    absent = ["x"] if has_absent else []
    known = {n: gram_of(normal(seed + 60 + i, 2, d_in).double()) for i, n in enumerate([*names, *absent])}
    found = fused(REGMEAN, loras, known, absent)
    assert isinstance(found, LowRank) and found.rank == 2 * models
    weights = dict.fromkeys(known, 1.0)
    products = {n: d.b.double() @ d.a.double() for n, d in loras.items()}
    assert_near(found.dense(), regression(products, known, weights, 0.9), 1e-4)
    whole = fused(REGMEAN, {n: Dense(d.dense()) for n, d in loras.items()}, known, absent)
    assert isinstance(whole, Dense)
    assert_near(whole.value, regression(products, known, weights, 0.9), 1e-4)


def test_regmean_of_experts_is_each_ones_own() -> None:
    deltas = {n: normal(i, 3, 5, 4) for i, n in enumerate("ab")}
    known = {n: gram_of(inputs(i, 9, 3, 4)) for i, n in enumerate("ab")}
    found = fused(REGMEAN, {n: Dense(d) for n, d in deltas.items()}, known).dense()
    for e in range(3):
        one = fused(REGMEAN, {n: Dense(d[e]) for n, d in deltas.items()}, {n: g[e] for n, g in known.items()})
        assert_near(found[e], one.dense().double(), 1e-6)


def test_regmean_of_inputs_that_are_always_zero_is_the_mean_there() -> None:
    known = {n: gram_of(inputs(i, 9, 4)) for i, n in enumerate("ab")}
    for gram in known.values():
        gram[1], gram[:, 1] = 0.0, 0.0
    deltas = {n: normal(i, 3, 4) for i, n in enumerate("ab")}
    keep = torch.tensor([0, 2, 3])
    expected = (deltas["a"] + deltas["b"]).double() / 2.0
    without = {n: g[keep][:, keep] for n, g in known.items()}
    expected[:, keep] = regression({n: d[:, keep] for n, d in deltas.items()}, without, {"a": 1.0, "b": 1.0}, 0.9)
    assert_near(fused(REGMEAN, {n: Dense(d) for n, d in deltas.items()}, known).dense(), expected)
    loras: dict[str, Delta] = {n: LowRank(torch.eye(3), d) for n, d in deltas.items()}
    assert_near(fused(REGMEAN, loras, known).dense(), expected)


def test_regmean_without_gram_matrices_is_the_mean() -> None:
    method = REGMEAN.model_copy(update={"weights": {"a": 3.0}})
    assert fused(method, rows(a=[4.0], b=[8.0]), {}).dense().tolist() == [5.0]


def test_regmean_of_models_that_agree_is_what_they_agree_on() -> None:
    known = {n: gram_of(inputs(i, 9, 6)) for i, n in enumerate("abc")}
    same: dict[str, Delta] = {n: Dense(normal(5, 4, 6)) for n in "abc"}
    assert_near(fused(REGMEAN, same, known).dense(), same["a"].dense().double(), 1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_regmean_of_too_few_tokens_without_shrinking_is_refused_by_name(tokens: int) -> None:
    known = {n: gram_of(normal(i, tokens, 8)) for i, n in enumerate("ab")}
    deltas: dict[str, Delta] = {n: Dense(normal(i, 3, 8)) for i, n in enumerate("ab")}
    with pytest.raises(CheckpointError, match=r"layers\.1\.q\.weight: .*no inverse; set fuse\.off_diagonal"):
        fused(RegMean(method="regmean", off_diagonal=1.0), deltas, known)
    assert bool(fused(REGMEAN, deltas, known).dense().isfinite().all())
    alone = RegMean(method="regmean", off_diagonal=1.0, weights={"b": 0.0})
    assert torch.equal(fused(alone, deltas, known).dense(), deltas["a"].dense()), "whatever its Gram matrix"


@pytest.mark.parametrize("given_as", [{"off_diagonal": 1.1}, {"off_diagonal": -0.1}, {"without_gram": "skip"}])
def test_regmean_parameters_out_of_range_are_refused(given_as: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RegMean(method="regmean", **given_as)


# -- streamed, by workers --------------------------------------------------------------------------------------------

CONFIG = {"model_type": "gpt2"}
C_FC, C_PROJ = "h.0.mlp.c_fc", "h.1.attn.c_proj"
SHAPES = {"wte.weight": (12, 8), f"{C_FC}.weight": (8, 70), f"{C_PROJ}.weight": (8, 8), "ln_f.weight": (8,)}
"""GPT-2's Conv1D: its files hold (d_in, d_out), and one of these is square."""
NAMES = ("full", "half", "lora")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned`, two full models and a LoRA on one module, each with a Fisher and Gram matrices beside it."""
    root = tmp_path_factory.mktemp("gpt2")
    base = {n: normal(i, *s) * 0.3 for i, (n, s) in enumerate(SHAPES.items())}
    write_model(root / "aligned", CONFIG, base)
    for seed, (name, dtype) in enumerate(zip(NAMES[:2], (torch.float32, torch.float16), strict=True)):
        write_model(
            root / name, CONFIG, {n: (t + normal(9 + seed, *t.shape) * 0.02).to(dtype) for n, t in base.items()}
        )
    lora = {"r": 2, "lora_alpha": 2, "target_modules": ["c_fc"]}
    factors = {f"{C_FC}.lora_A.weight": normal(5, 2, 8), f"{C_FC}.lora_B.weight": normal(6, 70, 2) * 0.02}
    write_adapter(root / "lora", lora, factors)
    for seed, name in enumerate(NAMES):
        dtype = (torch.bfloat16, torch.float32, torch.float64)[seed]
        fisher = {n: (normal(50 + seed, *s).square() * 1e-9).to(dtype) for n, s in SHAPES.items()}
        grams = {f"{m}.weight": gram_of(normal(70 + seed, 20, 8)) for m in (C_FC, C_PROJ)}
        for kind, tensors in (("fisher", fisher), ("gram", grams)):
            (root / f"{name}.{kind}").mkdir()
            save_file(tensors, root / f"{name}.{kind}" / "model.safetensors")
    return root


def expected_of(root: Path, method: Fisher | RegMean) -> dict[str, torch.Tensor]:
    """The fused model from whole tensors, float64; weights in files' orientation, (d_in, d_out)."""
    base = weights_in(root / "aligned")
    vectors = {m: {n: t.double() - base[n].double() for n, t in weights_in(root / m).items()} for m in NAMES[:2]}
    lora = {n.removeprefix("base_model.model."): t for n, t in weights_in(root / "lora").items()}
    vectors["lora"] = {n: torch.zeros_like(t).double() for n, t in base.items()}
    product = lora[f"{C_FC}.lora_B.weight"].double() @ lora[f"{C_FC}.lora_A.weight"].double()
    vectors["lora"][f"{C_FC}.weight"] = product.T
    found: dict[str, torch.Tensor] = {}
    for name, weight in base.items():
        known = {m: weights_in(root / f"{m}.{method.curvature}").get(name) for m in NAMES}
        kept = {m: k.double() for m, k in known.items() if k is not None}
        if method.method == "fisher":
            moved = sum(kept[m] * vectors[m][name] for m in NAMES) / sum(kept.values())
        elif kept:
            moved = regression({m: vectors[m][name].T for m in NAMES}, kept, dict.fromkeys(NAMES, 1.0), 0.9).T
        else:
            moved = sum(vectors[m][name] for m in NAMES) / 3.0
        found[name] = weight.double() + moved
    return found


def fuse_files(
    root: Path, out: Path, method: Fisher | RegMean, shard_bytes: int = 10**9, turn: int = 1
) -> dict[str, torch.Tensor]:
    """By a worker of its own for each shard, in either order."""
    members = tuple(Member(m, str(root / m), str(root / f"{m}.{method.curvature}")) for m in NAMES)
    for shard in shards_of(root / "aligned", shard_bytes)[::turn]:
        output = Output(str(out), "m")
        TensorWorker().run(FuseUnit(str(root / "aligned"), members, method, False, None, shard, output))
    return weights_in(out / "m")


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_streamed_model_with_curvature_is_the_equations(gpt2: Path, tmp_path: Path, method: Fisher | RegMean) -> None:
    """Full models, a LoRA that leaves most tensors alone, Conv1D's orientation, a vector, a table, three dtypes."""
    assert_one_rounding(fuse_files(gpt2, tmp_path, method), expected_of(gpt2, method), 24)


@pytest.mark.parametrize("method", [FISHER, REGMEAN])
def test_streamed_bytes_with_curvature_depend_on_neither_runs_nor_workers(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Fisher | RegMean
) -> None:
    expected = fuse_files(gpt2, tmp_path / "default", method)
    for entries in (1, 64, 1000):
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", entries)
        assert_same_bits(fuse_files(gpt2, tmp_path / str(entries), method), expected)
        assert_same_bits(fuse_files(gpt2, tmp_path / f"{entries}-shards", method, 300, -1), expected)


def test_streamed_fisher_is_read_in_the_runs_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ahead, where it isn't local, with the same result."""
    monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", 20)
    name = "layers.0.weight"
    models = {n: held({name: normal(i, 30, 10)})[0] for i, n in enumerate(("aligned", "a", "b"))}
    drawn = {n: normal(5 + i, 30, 10).square() for i, n in enumerate("ab")}
    stored = {n: held({name: tensor}) for n, tensor in drawn.items()}
    curvatures = {n: Curvature(model.folder, model.tensors) for n, (model, _) in stored.items()}
    with ThreadPoolExecutor(1) as reader:
        members = {n: models[n] for n in "ab"}
        pieces = [*StreamedFusion(models["aligned"], members, FISHER, None, reader, curvatures).tensor(name)]
    for _, folder in stored.values():
        assert [size for _, _, size in folder.reads] == [2 * 10 * 4] * 15
    base, *others = (model.folder.read("f") for model in models.values())
    values = [torch.frombuffer(bytearray(raw), dtype=torch.float32).view(30, 10).double() for raw in (base, *others)]
    total = drawn["a"].double() + drawn["b"].double()
    mean = (values[1] * drawn["a"] + values[2] * drawn["b"]) / total
    assert_near(torch.cat(pieces), mean, 1e-6)


@pytest.mark.parametrize("method", [REGMEAN, Fisher(method="fisher", max_rank=70)])
def test_fused_adapter_with_curvature_is_nearest_to_the_fused_model(
    gpt2: Path, tmp_path: Path, method: Fisher | RegMean
) -> None:
    """Of LoRAs on a Conv1D, whose Fisher the files hold turned."""
    for seed, name in enumerate("ab"):
        config = {"r": 2, "lora_alpha": 2, "target_modules": ["c_fc"]}
        factors = {f"{C_FC}.lora_A.weight": normal(seed, 2, 8), f"{C_FC}.lora_B.weight": normal(6 + seed, 70, 2)}
        write_adapter(tmp_path / name, config, factors)
    known = {"a": gpt2 / f"full.{method.curvature}", "b": gpt2 / f"half.{method.curvature}"}
    members = tuple(Member(n, str(tmp_path / n), str(known[n])) for n in "ab")
    aligned, tensor = gpt2 / "aligned", f"{C_FC}.weight"
    as_adapter = Shard("adapter_model.safetensors", (tensor,), {})
    TensorWorker().run(FuseUnit(str(aligned), members, method, True, None, as_adapter, Output(str(tmp_path), "l")))
    (whole,) = shards_of(aligned, 10**9)
    full = method.model_copy(update={"max_rank": None})
    TensorWorker().run(FuseUnit(str(aligned), members, full, False, None, whole, Output(str(tmp_path), "f")))
    lora = load_file(tmp_path / "l" / "adapter_model.safetensors")
    (a,) = (t for n, t in lora.items() if "lora_A" in n)
    (b,) = (t for n, t in lora.items() if "lora_B" in n)
    moved = weights_in(tmp_path / "f")[tensor] - weights_in(aligned)[tensor]
    scale = json.loads((tmp_path / "l" / "adapter_config.json").read_text())
    assert scale["lora_alpha"] == scale["r"] == a.shape[0] == 4
    left, values, right = torch.linalg.svd(moved, full_matrices=False)
    assert (float(values[4]) > 0.1) == (method is not REGMEAN), (
        "Fisher's has a higher rank, of which the nearest is left"
    )
    nearest = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close((b @ a).T, nearest, rtol=1e-3, atol=1e-4)


# -- values that are no curvature ------------------------------------------------------------------------------------


def gram_with_least(n: int, least: float, overlap: float) -> torch.Tensor:
    """A unit-diagonal matrix, (n, n) float64, of which each input has `overlap` in common with all others.

    The last input is nearly the one before, so `least` is an eigenvalue; none of the others is below 1 − overlap.
    """
    gram = torch.full((n, n), overlap, dtype=torch.float64)
    gram[-1, -2] = gram[-2, -1] = 1.0 - least
    return gram.fill_diagonal_(1.0)


def test_least_eigenvalue_by_hand_follows_norm_size_and_dtype() -> None:
    """‖G‖ (2u/√n + what summing in float32 or better may leave + float64's own)."""
    unrelated, alike = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    half, single, double = 2.0**-8, 2.0**-24, 2.0**-53
    assert float(least_eigenvalue(unrelated, half)) == pytest.approx(2.0 * (half + single), rel=1e-6)
    assert float(least_eigenvalue(alike, half)) == pytest.approx(4.0 * (half + single), rel=1e-6)
    assert float(least_eigenvalue(unrelated, single)) == pytest.approx(2.0 * 2.0 * single, rel=1e-6)
    assert float(least_eigenvalue(unrelated, double)) == pytest.approx(2.0 * 10.0 * double, rel=1e-6)
    assert least_eigenvalue(torch.stack((unrelated, alike)), half).shape == (2,)


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-6, 1e6)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("n", [2, 8, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_regmean_refuses_gram_matrices_from_the_rounding_of_their_dtype_on(
    dtype: torch.dtype, n: int, overlap: float, sizes: tuple[float, float]
) -> None:
    """At half the least eigenvalue that the dtype's rounding leaves to be trusted, and at twice it."""
    method = RegMean(method="regmean", off_diagonal=1.0)
    roundoff = torch.finfo(dtype).eps / 2.0
    least = float(least_eigenvalue(gram_with_least(n, 0.0, overlap), roundoff))
    scale = torch.logspace(*(math.log10(size) for size in sizes), n, dtype=torch.float64)
    deltas: dict[str, Delta] = {name: Dense(normal(i, 2, n)) for i, name in enumerate("ab")}

    def fuse_at(eigenvalue: float) -> torch.Tensor:
        unit = gram_with_least(n, eigenvalue, overlap)
        # Exact in float64; the second model's dtype is what the roundoff is taken from, and adds nothing of its own.
        known = {"a": unit * scale[:, None] * scale, "b": torch.zeros(n, n, dtype=dtype)}
        return fused(method, deltas, known).dense()

    with pytest.raises(CheckpointError, match="no inverse"):
        fuse_at(0.5 * least)
    assert bool(fuse_at(2.0 * least).isfinite().all())


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (8, torch.float32),
        (64, torch.float32),
        (300, torch.float32),
        (64, torch.bfloat16),
        (300, torch.bfloat16),
        (300, torch.float64),
    ],
)
def test_regmean_of_fewer_tokens_than_inputs_is_refused_as_files_hold_them(n: int, dtype: torch.dtype) -> None:
    """Summed and stored in the dtype, of three quarters as many tokens, whatever the inputs have in common."""
    method = RegMean(method="regmean", off_diagonal=1.0)
    summed_in = torch.float32 if dtype == torch.bfloat16 else dtype
    deltas: dict[str, Delta] = {name: Dense(normal(i, 2, n)) for i, name in enumerate("ab")}
    for seed, mix in ((1, 0.0), (2, 1.0), (3, 3.0)):
        drawn = normal(seed, 3 * n // 4, n).to(summed_in)
        gram = gram_of(drawn + mix * drawn[:, :1]).to(dtype)
        with pytest.raises(CheckpointError, match="no inverse"):
            fused(method, deltas, {"a": gram, "b": gram})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [8, 300, 1024])
def test_regmean_with_shrinking_is_never_refused_of_inputs_that_differ(n: int, dtype: torch.dtype) -> None:
    """α = 0.9 leaves an eigenvalue of 0.1, of one token only and in the coarsest dtype."""
    deltas: dict[str, Delta] = {name: Dense(normal(i, 2, n)) for i, name in enumerate("ab")}
    known = {name: gram_of(normal(5 + i, 40, n)).to(dtype) for i, name in enumerate("ab")}
    found = fused(REGMEAN, deltas, known).dense()
    expected = regression({m: d.dense() for m, d in deltas.items()}, known, {"a": 1.0, "b": 1.0}, 0.9)
    assert_near(found, expected, 1e-5)


def curvature_in(folder: Path, tensors: Tensors) -> Curvature:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    return read_curvature(open_folder(str(folder)))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_fisher_values_that_are_none_are_refused_by_name(gpt2: Path, tmp_path: Path, value: float) -> None:
    found = curvature_in(tmp_path / "f", {"ln_f.weight": torch.tensor([1.0, value])})
    with pytest.raises(CheckpointError, match=r"/f: tensor ln_f\.weight is no Fisher"):
        read_fisher_rows(found, "ln_f.weight", 0, 1)
    with pytest.raises(CheckpointError, match=r"/f: tensor ln_f\.weight is no Fisher"):
        CurvatureOf("fisher", {"a": found}, full_model(gpt2 / "aligned"), "ln_f.weight")["a"]


@pytest.mark.parametrize(
    "value", [[[1.0, 2.0], [3.0, 9.0]], [[-1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, float("nan")]]]
)
def test_gram_values_that_are_none_are_refused_by_name(tmp_path: Path, value: list[list[float]]) -> None:
    found = curvature_in(tmp_path / "g", {"q.weight": torch.tensor(value)})
    with pytest.raises(CheckpointError, match=r"/g: tensor q\.weight is no Gram matrix"):
        read_gram(found, "q.weight")


def test_gram_rounded_to_bfloat16_is_taken_symmetric(tmp_path: Path) -> None:
    stored = gram_of(normal(0, 9, 6)).bfloat16()
    stored[0, 1] = stored[0, 1] * 1.01
    found = read_gram(curvature_in(tmp_path / "g", {"q.weight": stored}), "q.weight")
    assert torch.equal(found, found.T) and found.dtype == torch.bfloat16


def test_curvature_of_integers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q\.weight \(I32\): no floating-point numbers"):
        curvature_in(tmp_path / "g", {"q.weight": torch.ones(2, 2, dtype=torch.int32)})


# -- the manifest and the plan ---------------------------------------------------------------------------------------


def write_curvatures(catalogue: Path, root: Path, *models: str) -> dict[str, dict[str, str]]:
    """A Fisher and Gram matrices for each of these models, or all of the catalogue: model -> field -> folder."""
    aligned = full_model(catalogue / "aligned")
    found: dict[str, dict[str, str]] = {}
    for seed, name in enumerate(models or ("lora", "rslora", "full")):
        shapes = {n: t.shape for n, t in aligned.tensors.items()}
        fisher = {n: normal(seed, *s).square() + 1e-3 for n, s in shapes.items()}
        grams = {n: gram_of(normal(seed, 9, s[-1])) for n, s in shapes.items() if module_views(aligned, n)}
        for kind, tensors in (("fisher", fisher), ("gram", grams)):
            folder = root / f"{name}.{kind}"
            folder.mkdir(parents=True)
            save_file(tensors, folder / "model.safetensors")
            found.setdefault(name, {})[kind] = str(folder)
    return found


def document_with(catalogue: Path, work: Path, known: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Two variants of each of the two methods: full models of all, and of the LoRAs realigned."""
    document = manifest_document(catalogue, work)
    models = [model | known.get(model["name"], {}) for model in document["models"]]
    realign = {"method": "safemerge", "statistic": "lift", "threshold": 0.75}
    variants = [
        variant
        for method in ("fisher", "regmean")
        for variant in (
            {"name": method, "realign": None, "fuse": {"method": method}},
            {"name": f"{method}-loras", "realign": realign, "fuse": {"method": method}, "models": ["lora", "rslora"]},
        )
    ]
    return document | {"models": models, "variants": variants}


def planned(work: Path, document: dict[str, Any]) -> Plan:
    return make_plan(load_manifest(write_manifest(work / "models.json", document)))


def fuse_steps(plan: Plan) -> dict[str, FuseStep]:
    return {s.name: s for s in plan.steps if isinstance(s, FuseStep)}


def changed_file(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_plan_curvature_is_in_the_identity_by_content(catalogue: Path, tmp_path: Path) -> None:
    known = write_curvatures(catalogue, tmp_path / "known")
    before = fuse_steps(planned(tmp_path, document_with(catalogue, tmp_path, known)))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "known", moved)
    elsewhere = {m: {k: str(moved / Path(v).name) for k, v in kinds.items()} for m, kinds in known.items()}
    there = fuse_steps(planned(tmp_path, document_with(catalogue, tmp_path, elsewhere)))
    assert {n: s.key for n, s in there.items()} == {n: s.key for n, s in before.items()}
    changed_file(elsewhere["full"]["fisher"], lambda tensors: tensors["model.norm.weight"].mul_(2.0))
    after = fuse_steps(planned(tmp_path, document_with(catalogue, tmp_path, elsewhere)))
    assert [n for n in before if before[n].key != after[n].key] == ["fisher"]
    assert before["regmean-loras"].as_lora and not before["fisher-loras"].as_lora
    assert [*before["fisher-loras"].curvature] == ["lora", "rslora"], "realigned ones too"
    sizes = sum(Path(known[m]["gram"], "model.safetensors").stat().st_size for m in known)
    assert before["regmean"].read_bytes > sizes > 0


def test_plan_curvature_that_no_variant_asks_for_is_not_opened(catalogue: Path, tmp_path: Path) -> None:
    known = {"full": {"fisher": str(tmp_path / "nowhere"), "gram": str(tmp_path / "nowhere")}}
    document = document_with(catalogue, tmp_path, known)
    plain = fuse_steps(planned(tmp_path, manifest_document(catalogue, tmp_path)))
    loras = document_with(
        catalogue, tmp_path, known | write_curvatures(catalogue, tmp_path / "known", "lora", "rslora")
    )
    assert len(fuse_steps(planned(tmp_path, loras | {"variants": loras["variants"][1::2]}))) == 2
    document["variants"] = manifest_document(catalogue, tmp_path)["variants"]
    assert {n: s.key for n, s in fuse_steps(planned(tmp_path, document)).items()} == {
        n: s.key for n, s in plain.items()
    }


Change = Callable[[dict[str, torch.Tensor]], object]
Q_PROJ, TABLE, NORM = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def having(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fisher", without(NORM), r"models: full: fisher: .* has no model\.norm\.weight$"),
        ("gram", without(Q_PROJ), r"full: gram: .* has no model\..*q_proj\.weight; or set fuse\.without_gram"),
        ("fisher", having(Q_PROJ, 3, 2), r"full: fisher: model.*q_proj\.weight is \(3, 2\), not \("),
        ("gram", having(Q_PROJ, 3, 3), r"full: gram: model.*q_proj\.weight is \(3, 3\), not \("),
        ("gram", having(TABLE, 32, 32), r"lora: gram: .*lora\.gram has no model\.embed_tokens"),
    ],
)
def test_plan_curvature_that_does_not_fit_is_refused_with_model_and_tensor(
    catalogue: Path, tmp_path: Path, kind: str, change: Change, message: str
) -> None:
    known = write_curvatures(catalogue, tmp_path / "known")
    changed_file(known["full"][kind], change)
    with pytest.raises(CheckpointError, match=message) as e:
        planned(tmp_path, document_with(catalogue, tmp_path, known))
    assert "\n" not in str(e.value)


def test_plan_linear_without_gram_gets_the_mean_where_the_manifest_says_so(catalogue: Path, tmp_path: Path) -> None:
    known = write_curvatures(catalogue, tmp_path / "known")
    changed_file(known["full"]["gram"], without(Q_PROJ))
    document = document_with(catalogue, tmp_path, known)
    variant = document["variants"][2]
    document["variants"] = [variant | {"fuse": variant["fuse"] | {"without_gram": "mean"}}]
    assert len(fuse_steps(planned(tmp_path, document))) == 1


def test_manifest_model_without_the_curvature_its_fusion_needs_is_refused(catalogue: Path, tmp_path: Path) -> None:
    known = write_curvatures(catalogue, tmp_path / "known")
    del known["rslora"]["gram"]
    message = r"variants: regmean: regmean needs models\.gram, but rslora has none; set it"
    with pytest.raises(ManifestError, match=message):
        planned(tmp_path, document_with(catalogue, tmp_path, known))


def test_manifest_mask_learned_on_a_fusion_with_curvature_is_refused(catalogue: Path, tmp_path: Path) -> None:
    document = document_with(catalogue, tmp_path, write_curvatures(catalogue, tmp_path / "known"))
    realign = {"method": "somf", "learn_on": "fusion", "preferences": "p.jsonl"}
    document["variants"] = [document["variants"][0] | {"realign": realign}]
    with pytest.raises(ManifestError, match="fisher reads more than task vectors"):
        planned(tmp_path, document)


@pytest.mark.usefixtures("local_ray")
def test_run_fuses_with_curvature_what_the_equations_say(catalogue: Path, tmp_path: Path) -> None:
    known = write_curvatures(catalogue, tmp_path / "known")
    document = document_with(catalogue, tmp_path, known)
    plan = tensor_plan(catalogue, tmp_path, models=document["models"], variants=document["variants"])
    result = walk(plan)
    assert not result.failures
    base, full = weights_in(catalogue / "aligned"), weights_in(catalogue / "full")
    (step,) = (s for s in plan.steps if s.name == "fisher")
    record = result.records[step.key]
    found = weights_in(Path(plan.store.folder(attempt_prefix(step, record.attempt)).uri))
    fishers = {m: load_file(Path(kinds["fisher"], "model.safetensors")) for m, kinds in known.items()}
    for name in (TABLE, "model.norm.weight"):  # which the LoRAs leave alone
        share = fishers["full"][name].double() / sum(f[name].double() for f in fishers.values())
        expected = base[name].double() + (full[name].double() - base[name].double()) * share
        torch.testing.assert_close(found[name].double(), expected, rtol=2.0**-7, atol=1e-6)
