"""`jobs.curvature`: what it writes, beside plain transformers, PEFT and autograd, and that a plan takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.checkpoint.model import read_model, require_full_model
from fleet.manifest import load_manifest
from fleet.masks.batches import Text, collate
from fleet.run.plan import make_plan
from fleet.store import open_folder
from jobs.curvature.__main__ import main
from jobs.curvature.measure import gram, network_of
from tests.catalogue import manifest_document, prompt_rows, write_manifest, write_rows
from tests.pico import make_gpt2

EXAMPLES = 3
MODELS = ("lora", "full")


@pytest.fixture(scope="module")
def measured(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Fishers and Gram matrices of two models are."""
    work = tmp_path_factory.mktemp("curvature")
    prompts = write_rows(work / "prompts.jsonl", prompt_rows(EXAMPLES + 2))
    models = [{"name": name, "source": str(catalogue / name), "prompts": str(prompts)} for name in MODELS]
    variants = [{"name": "plain", "realign": None, "fuse": {"method": "weight_average"}}]
    document = manifest_document(catalogue, work, models=models, variants=variants)
    manifest = write_manifest(work / "models.json", document)
    out = work / "out"
    assert main(["--manifest", str(manifest), "--output", str(out), "--examples", str(EXAMPLES)]) == 0
    return out


def plain_model(catalogue: Path, name: str) -> Any:
    """The model as its users load it."""
    if name == "full":
        return AutoModelForCausalLM.from_pretrained(catalogue / "full", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(catalogue / "aligned", dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(catalogue / name)).merge_and_unload()  # pyright: ignore[reportCallIssue]


def exchanges(catalogue: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels), each (1, tokens), of every example; prompts have no label."""
    tokenizer = AutoTokenizer.from_pretrained(catalogue / "aligned")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in prompt_rows(EXAMPLES):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        reply = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append((torch.tensor([prompt + reply]), torch.tensor([[-100] * len(prompt) + reply])))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_fisher_is_the_mean_of_squared_gradients(catalogue: Path, measured: Path, name: str) -> None:
    model = plain_model(catalogue, name)
    model.requires_grad_(True)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for ids, labels in exchanges(catalogue):
        model.zero_grad()
        log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        chosen = labels[:, 1:]
        log_probs.gather(-1, chosen.clamp_min(0)[..., None])[..., 0][chosen >= 0].sum().backward()
        for n, p in model.named_parameters():
            expected[n] += p.grad**2 / EXAMPLES
    found = load_file(measured / "fisher" / name / "model.safetensors")
    assert found.keys() == expected.keys()
    for n, values in found.items():
        torch.testing.assert_close(values, expected[n], rtol=1e-3, atol=1e-5 * float(expected[n].max()))


@pytest.mark.parametrize("name", MODELS)
def test_gram_is_the_mean_over_tokens_of_what_goes_into_a_linear(catalogue: Path, measured: Path, name: str) -> None:
    model = plain_model(catalogue, name)
    expected: dict[str, torch.Tensor] = {}
    all_ids = [ids for ids, _ in exchanges(catalogue)]
    tokens = sum(ids.numel() for ids in all_ids)
    with torch.no_grad():
        for ids in all_ids:
            states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
            for i, layer in enumerate(model.model.layers):
                x = layer.input_layernorm(states[i])[0]
                for leaf in ("q_proj", "k_proj", "v_proj"):
                    key = f"model.layers.{i}.self_attn.{leaf}.weight"
                    expected[key] = expected.get(key, torch.zeros(())) + x.T @ x / tokens
    found = load_file(measured / "gram" / name / "model.safetensors")
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert found.keys() == linears
    for n, values in expected.items():
        torch.testing.assert_close(found[n], values, rtol=1e-4, atol=1e-5)


def test_gram_of_a_conv1d_is_of_its_inputs(tmp_path: Path) -> None:
    aligned = require_full_model(read_model(open_folder(str(make_gpt2(tmp_path / "gpt2", 0)))), "aligned")
    network = network_of(aligned, aligned, torch.device("cpu"))
    ids = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        states = network(input_ids=ids, output_hidden_states=True).hidden_states
        x = network.transformer.h[0].ln_1(states[0])[0]
    found = gram(network, [collate([Text((5, 7), (11, 13))], torch.device("cpu"))])
    torch.testing.assert_close(found["transformer.h.0.attn.c_attn.weight"], x.T @ x / ids.numel(), rtol=1e-4, atol=1e-5)
    assert found["transformer.h.1.mlp.c_proj.weight"].shape == (network.config.n_embd * 4,) * 2
    assert "lm_head.weight" not in found


def test_plan_takes_what_was_measured(catalogue: Path, measured: Path, tmp_path: Path) -> None:
    models = [
        {
            "name": name,
            "source": str(catalogue / name),
            "fisher": str(measured / "fisher" / name),
            "gram": str(measured / "gram" / name),
        }
        for name in MODELS
    ]
    variants = [{"name": m, "realign": None, "fuse": {"method": m}} for m in ("fisher", "regmean")]
    document = manifest_document(catalogue, tmp_path, models=models, variants=variants)
    plan = make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))
    assert {step.name for step in plan.steps if step.kind == "fuse"} == {"fisher", "regmean"}


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "lora, rslora, full: nothing to measure on"), (["--models", "lara"], "has no lara")]
)
def test_command_with_a_mistake_names_it_and_writes_nothing(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    manifest = write_manifest(tmp_path / "models.json", manifest_document(catalogue, tmp_path))
    assert main(["--manifest", str(manifest), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
