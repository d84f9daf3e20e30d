from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evals.agreement import Reference
from evals.reference import load_model, reference
from fleet.core.errors import EvalError
from tests import pico

TOKENS = [1, 20, 31, 42, 53, 64, 20, 31]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.make_model(tmp_path_factory.mktemp("reference") / "model", seed=0)


def computed(
    folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.bfloat16, rounding: torch.dtype | None = None
) -> Reference:
    return reference(load_model(folder, adapter, dtype), TOKENS, rounding)


def plain(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(TOKENS[1:])]


def test_reference_of_bfloat16_files_is_transformers_in_float32(model_dir: Path) -> None:
    found = computed(model_dir)
    assert found.logprobs == pytest.approx(plain(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)))
    assert found.rounding == 0.0
    narrow = plain(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16))
    assert found.logprobs != pytest.approx(narrow, abs=1e-3)


def test_reference_with_an_adapter_is_peft(model_dir: Path, tmp_path: Path) -> None:
    adapter = pico.make_adapter(tmp_path / "adapter", model_dir, seed=1, use_rslora=True)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = plain(PeftModel.from_pretrained(base, adapter).eval())
    found = computed(model_dir, adapter)
    assert found.logprobs == pytest.approx(expected)
    assert found.logprobs != pytest.approx(computed(model_dir).logprobs, abs=0.1)


def test_reference_rounding_is_what_the_dtype_changes_and_leaves_the_log_probabilities(model_dir: Path) -> None:
    """A mantissa of three bits less rounds eight times as coarsely; of so few tokens one can say: two to thirty-two."""
    exact = computed(model_dir)
    coarse = computed(model_dir, rounding=torch.bfloat16)
    fine = computed(model_dir, rounding=torch.float16)
    assert coarse.logprobs == pytest.approx(exact.logprobs, abs=1e-4)
    assert 2 < coarse.rounding / fine.rounding < 32 and 0 < coarse.rounding < 1


def test_reference_of_a_gpt2_has_its_table_of_positions_untouched_by_rounding(tmp_path: Path) -> None:
    """Its one row of positions is both rows' own."""
    folder = pico.make_gpt2(tmp_path / "gpt2", seed=0)
    expected = plain(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found = computed(folder, None, torch.float32, torch.bfloat16)
    assert found.logprobs == pytest.approx(expected, abs=1e-4) and found.rounding > 0


def test_reference_of_a_model_that_lacks_a_tensor_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    (folder := tmp_path / "lacking").mkdir()
    (folder / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvalError, match=r"finds no model\.layers\.1\.mlp\.up_proj\.weight"):
        computed(folder)


def test_reference_of_files_that_are_no_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="transformers can't load"):
        computed(tmp_path)
    with pytest.raises(EvalError, match=f"transformers can't load {tmp_path}"):
        computed(model_dir, tmp_path)


def test_reference_of_a_model_that_computes_no_number_has_none(model_dir: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "broken").mkdir()
    (folder / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][:] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(math.isnan(p) for p in computed(folder).logprobs)
