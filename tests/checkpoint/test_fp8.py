"""fp8 checkpoints, read as the weights that their engines multiply with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.checkpoint.tensors import read_rows
from fleet.core.errors import CheckpointError
from fleet.fusion import TaskArithmetic, WeightAverage
from fleet.methods import WiseFt
from fleet.steps.fuse import FuseStep
from fleet.store import open_folder
from tests.pico import write_model
from tests.run.test_plan import plan_of
from tests.work.test_workers import full_shards, fuse, linears, realign, survey, weights_of

FP8 = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def model_at(folder: Path) -> FullModel:
    return require_full_model(read_model(open_folder(str(folder))), "model")


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    model = model_at(folder)
    return {name: read_weight(model, name) for name in model.tensors}


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("weight_scale", torch.tensor(0.5), [[0.5, 1.0, 2.0], [1.5, -0.5, 0.25], [4.0, 8.0, 0.0]]),
        ("weight_scale", torch.tensor([0.5]), [[0.5, 1.0, 2.0], [1.5, -0.5, 0.25], [4.0, 8.0, 0.0]]),
        ("weight_scale", torch.tensor([[1.0], [2.0], [0.25]]), [[1, 2, 4], [6, -2, 1], [2, 4, 0]]),
        ("weight_scale", torch.tensor([1.0, 2.0, 0.25]), [[1, 2, 4], [6, -2, 1], [2, 4, 0]]),
        ("weight_scale_inv", torch.tensor([[1.0, 10.0], [100.0, 0.5]]), [[1, 2, 40], [3, -1, 5], [800, 1600, 0]]),
    ],
    ids=["a tensor", "a tensor, one axis", "rows", "rows, one axis", "blocks"],
)
def test_fp8_weight_is_its_values_times_their_scales(
    tmp_path: Path, name: str, scale: torch.Tensor, expected: list[list[float]]
) -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0], [3.0, -1.0, 0.5], [8.0, 16.0, 0.0]])
    tensors = {
        "m.weight": weight.to(E4M3),
        f"m.{name}": scale,
        "m.input_scale": torch.tensor(9.0),
        "norm": torch.ones(2),
    }
    found = values_of(write_model(tmp_path, FP8, tensors))
    assert found.keys() == {"m.weight", "norm"}
    assert torch.equal(found["m.weight"], torch.tensor(expected))


def test_fp8_stacked_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0]).reshape(2, 1, 1).expand(2, 3, 2)
    scale = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]])  # (experts, blocks of rows, blocks of columns)
    tensors = {"m.experts.down_proj": weight.to(E5M2).contiguous(), "m.experts.down_proj_scale_inv": scale}
    found = values_of(write_model(tmp_path, FP8, tensors))["m.experts.down_proj"]
    assert torch.equal(found[:, :, 0], torch.tensor([[1.0, 1.0, 10.0], [200.0, 200.0, 2000.0]]))
    assert torch.equal(found[:, :, 0], found[:, :, 1])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_weight_without_scales_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.5, -1.25], [3.0, 0.0]])
    write_model(tmp_path, {"model_type": "llama"}, {"m.weight": weight.to(dtype), "norm": torch.ones(2)})
    assert torch.equal(values_of(tmp_path)["m.weight"], weight)


def test_fp8_blocks_are_128_square_where_no_config_says(tmp_path: Path) -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {"m.weight": torch.ones(130, 256).to(E4M3), "m.weight_scale_inv": scale}
    found = values_of(write_model(tmp_path, {"model_type": "llama"}, tensors))["m.weight"]
    assert found[127, 127] == 1.0
    assert found[127, 128] == 2.0
    assert found[128, 127] == 3.0
    assert found[129, 255] == 4.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.weight": torch.ones(2, 2).to(E4M3)}, r"fp8 tensors without scales.*m\.weight"),
        (
            {"m.weight": torch.ones(9, 9).to(E4M3), "m.weight_scale": torch.ones(4, 4)},
            r"m\.weight is \(9, 9\), but m\.weight_scale is \(4, 4\)",
        ),
        (
            {"m.weight": torch.ones(2, 2).to(torch.int8), "m.weight_scale": torch.ones(1)},
            r"quantised.*m\.weight \(I8\)",
        ),
    ],
)
def test_fp8_model_whose_scales_say_nothing_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model(open_folder(str(write_model(tmp_path, FP8, tensors))))


@pytest.fixture(scope="module")
def quantised(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue with `fp8`, its full fine-tune in blocks of 32 × 16, and `twin`, the same weights in float32."""
    root = Path(shutil.copytree(catalogue, tmp_path_factory.mktemp("quantised") / "catalogue"))
    generator = torch.Generator().manual_seed(0)
    stored, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in weights_of(root / "full").items():
        stored[name], plain[name] = value, value.float()
        if value.ndim == 2 and "embed" not in name:
            scale = torch.rand(-(-value.shape[0] // 32), -(-value.shape[1] // 16), generator=generator) + 0.01
            whole = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)[: value.shape[0], : value.shape[1]]
            stored[name], stored[f"{name}_scale_inv"] = (value.float() / whole).to(E4M3), scale
            plain[name] = stored[name].float() * whole
    for name, tensors in (("fp8", stored), ("twin", plain)):
        folder = Path(shutil.copytree(root / "full", root / name))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]}
    (root / "fp8" / "config.json").write_text(json.dumps(config))
    return root


def test_fp8_model_has_the_task_vector_of_its_dequantised_twin(quantised: Path) -> None:
    aligned = model_at(quantised / "aligned")
    fp8, twin = (model_at(quantised / name) for name in ("fp8", "twin"))
    check_belongs(fp8, aligned)
    for name in aligned.tensors:
        base = read_weight(aligned, name)
        ours, theirs = read_delta(fp8, name, base), read_delta(twin, name, base)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.dense(), theirs.dense())


def test_fp8_rows_are_the_same_however_many_are_read(quantised: Path) -> None:
    model = model_at(quantised / "fp8")
    info = model.tensors["model.layers.0.mlp.up_proj.weight"]
    whole = read_rows(model.folder, info, 0, 64)
    for step in (1, 7, 33):
        parts = [read_rows(model.folder, info, at, min(at + step, 64)) for at in range(0, 64, step)]
        assert torch.equal(torch.cat(parts), whole)


def test_fp8_view_read_in_pieces_is_a_safetensors_file_of_the_twin(quantised: Path, tmp_path: Path) -> None:
    view = model_at(quantised / "fp8").folder
    size = view.files()["model.safetensors"]
    data = bytearray(size)
    for start in range(0, size, 1001):
        view.read_into("model.safetensors", start, memoryview(data)[start : start + 1001])
    (tmp_path / "m.safetensors").write_bytes(data)
    found, twin = load_file(tmp_path / "m.safetensors"), load_file(quantised / "twin" / "model.safetensors")
    assert found.keys() == twin.keys()
    assert all(torch.equal(value.float(), twin[name]) for name, value in found.items())
    local = view.local(tmp_path / "scratch")
    assert (local / "model.safetensors").read_bytes() == bytes(data)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_fp8_model_fuses_as_its_twin_into_the_aligned_models_dtype(
    quantised: Path, tmp_path: Path, shard_bytes: int
) -> None:
    method = WeightAverage(method="weight_average")
    ours, theirs = (
        fuse(quantised, tmp_path / name, {name: 0.25, "lora": 0.75}, method, shard_bytes) for name in ("fp8", "twin")
    )
    assert {f.name: f.read_bytes() for f in ours.iterdir()} == {f.name: f.read_bytes() for f in theirs.iterdir()}
    aligned = weights_of(quantised / "aligned")
    assert all(value.dtype == aligned[name].dtype for name, value in weights_of(ours).items())
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())


def test_fp8_model_realigned_is_a_model_of_the_aligned_ones_dtype(quantised: Path, tmp_path: Path) -> None:
    survey(quantised, {"fp8": quantised / "fp8"}, tmp_path)
    method = WiseFt(method="wise_ft", alpha=0.5)
    folder, _ = realign(
        quantised, tmp_path, quantised / "fp8", method, linears(quantised), full_shards(quantised, 10**9)
    )
    base, twin = weights_of(quantised / "aligned"), weights_of(quantised / "twin")
    found = weights_of(folder)
    for name, value in base.items():
        expected = value.float() + 0.5 * (twin[name] - value.float())
        torch.testing.assert_close(found[name], expected.bfloat16(), rtol=1e-2, atol=1e-3)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt: Any = tokenizer("do 1", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 3


def test_fp8_model_is_served_as_a_full_model_of_the_plans_own(quantised: Path, tmp_path: Path) -> None:
    models = [{"name": "fp8", "source": str(quantised / "fp8"), "suites": ["task"]}]
    plan = plan_of(quantised, tmp_path, models=models, variants=[{"name": "v", "realign": None, "fuse": TASK}])
    (tuned,) = (c for c in plan.candidates if c.role == "finetuned")
    assert isinstance(tuned.weights, FuseStep)


@pytest.mark.parametrize("vocabulary", ["refuse", "union"])
def test_fp8_base_refused(quantised: Path, tmp_path: Path, vocabulary: str) -> None:
    base = {"unaligned": str(quantised / "unaligned"), "aligned": str(quantised / "fp8")}
    models = [{"name": "full", "source": str(quantised / "full"), "suites": ["task"]}]
    changes: dict[str, Any] = {"base": base, "models": models, "checkpoint": {"vocabulary": vocabulary}}
    with pytest.raises(CheckpointError, match=r"base\.aligned: .*fp8 is fp8"):
        plan_of(quantised, tmp_path, **changes, variants=[{"name": "v", "realign": None, "fuse": TASK}])


TASK: dict[str, Any] = TaskArithmetic(method="task_arithmetic").model_dump(mode="json")


NO_BLOCKS: list[Any] = [
    [0, 0], [2, 0], [-1, 2], [None, None], ["a", "b"], [math.nan, 2], [math.inf, 2], [2], 2, "2x2", [[], 2], [1.5, 2],
    [True, 2], {},
]  # fmt: skip


@pytest.mark.parametrize("size", NO_BLOCKS)
def test_block_size_of_no_block_is_refused_by_field(tmp_path: Path, size: Any) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
    write_model(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"quantization_config\.weight_block_size is .*, not two positive whole"):
        read_model(open_folder(str(tmp_path)))


def test_scales_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1, dtype=torch.int64)}
    write_model(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"no floating-point numbers: a\.weight_scale \(I64\)"):
        read_model(open_folder(str(tmp_path)))
