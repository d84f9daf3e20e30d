"""What a LoRA config means, checked against PEFT itself where that is the question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga

from fleet.checkpoint.peft_rules import (
    DeclaredValues,
    changes_base,
    declared_ranks,
    why_unreadable,
    why_unservable,
)
from fleet.core.errors import CheckpointError

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


class Doubled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 2.0


@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "lora_ga"],
)
def test_init_changes_the_base_where_peft_does(init: bool | str) -> None:
    torch.manual_seed(0)
    model = Doubled()
    before = model.linear.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=init)  # type: ignore[arg-type]
    if init == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        inputs = torch.randn(5, 8, requires_grad=True)
        preprocess_loraga(model, config, lambda: model(inputs).square().sum().backward())
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    after: Any = wrapped.base_model.model.linear.base_layer.weight  # type: ignore[union-attr]
    assert changes_base({"init_lora_weights": init}) == (not torch.equal(after, before))


@pytest.mark.parametrize("init", ["corda", "loftq", "LoRA_GA", "of_next_year"])
def test_init_with_a_changed_base_or_an_unknown_one_is_neither_read_nor_served(init: str) -> None:
    config = LORA | {"init_lora_weights": init}
    assert "changed base" in why_unreadable(config)
    assert why_unservable(config) == [f"init_lora_weights={init!r} changes the base weights"]


def test_config_of_a_plain_lora_is_read_and_served() -> None:
    plain = LORA | {"bias": None, "modules_to_save": [], "kasa_config": None, "trainable_token_indices": {}}
    assert (why_unreadable(plain), why_unservable(plain)) == ("", [])


def test_config_with_dora_saved_modules_and_biases_is_read_and_not_served() -> None:
    config = LORA | {"use_dora": True, "lora_bias": True, "modules_to_save": ["embed_tokens"], "bias": "all"}
    assert why_unreadable(config) == ""
    assert len(why_unservable(config)) == 4


def test_rank_and_scale_are_the_patterns_first_match_by_the_end_of_the_name() -> None:
    config = LORA | {"rank_pattern": {"a.q": 2, "q": 3}, "alpha_pattern": {r"\d+\.q": 6}}
    declared = DeclaredValues("here", config)
    assert [declared.rank(name) for name in ("m.a.q", "m.b.q", "m.bq")] == [2, 3, 4]
    assert declared_ranks(config) == [4, 2, 3]
    assert [declared.scale(name, 2) for name in ("m.1.q", "m.a.q")] == [3.0, 4.0]
    assert DeclaredValues("here", config | {"use_rslora": True}).scale("v", 16) == 2.0


def test_rank_and_scale_that_are_no_numbers_are_refused_by_field() -> None:
    config = LORA | {"r": None, "alpha_pattern": {"q": "8"}}
    with pytest.raises(CheckpointError, match=r"^here: .*: r is None, not a number"):
        DeclaredValues("here", config).rank("q")
    with pytest.raises(CheckpointError, match=r"alpha_pattern\['q'\] is '8', not a number"):
        DeclaredValues("here", config).scale("q", 4)
