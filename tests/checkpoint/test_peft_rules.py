"""What a LoRA config means, checked against PEFT itself where that is the question."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from peft.utils.other import get_pattern_key

from fleet.checkpoint import peft_rules
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.model import read_model
from fleet.checkpoint.peft_rules import (
    DeclaredValues,
    changes_base,
    plain_config,
    why_unreadable,
)
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import write_adapter

FACTORS = {"m.q.lora_A.weight": torch.ones(1, 2), "m.q.lora_B.weight": torch.ones(3, 1)}
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
def test_init_with_a_changed_base_or_an_unknown_one_is_not_read(init: str) -> None:
    config: dict[str, Any] = LORA | {"init_lora_weights": init}
    assert "changed base" in why_unreadable(config)


def test_config_of_a_plain_lora_is_read() -> None:
    plain = LORA | {"bias": None, "modules_to_save": [], "kasa_config": None, "trainable_token_indices": {}}
    assert why_unreadable(plain) == ""


def test_config_with_dora_saved_modules_and_biases_is_read() -> None:
    config: dict[str, Any] = LORA | {
        "use_dora": True,
        "lora_bias": True,
        "modules_to_save": ["embed_tokens"],
        "bias": "all",
    }
    assert why_unreadable(config) == ""


def test_rank_and_scale_are_the_patterns_first_match_by_the_end_of_the_name() -> None:
    config: dict[str, Any] = LORA | {"rank_pattern": {"a.q": 2, "q": 3}, "alpha_pattern": {r"\d+\.q": 6}}
    declared = DeclaredValues("here", config)
    assert [declared.rank(name) for name in ("m.a.q", "m.b.q", "m.bq")] == [2, 3, 4]
    assert [declared.scale(name, 2) for name in ("m.1.q", "m.a.q")] == [3.0, 4.0]
    assert DeclaredValues("here", config | {"use_rslora": True}).scale("v", 16) == 2.0


def test_rank_and_scale_that_are_no_numbers_are_refused_by_field() -> None:
    config: dict[str, Any] = LORA | {"r": None, "alpha_pattern": {"q": "8"}}
    with pytest.raises(CheckpointError, match=r"^here: .*: r is None, not a number"):
        DeclaredValues("here", config).rank("q")
    with pytest.raises(CheckpointError, match=r"alpha_pattern\['q'\] is '8', not a number"):
        DeclaredValues("here", config).scale("q", 4)


def test_patterns_are_matched_as_peft_matches_them() -> None:
    keys = [
        "q_proj",
        r"layers\.\d+\.mlp",
        "a|b",
        "^model",
        "[ab]c",
        ".*",
        "q",
        r"(x|y)\.z",
        "model.layers.1.q_proj",
        "",
        "d{2}",
    ]
    names = [
        "model.layers.1.q_proj",
        "model.layers.10.mlp",
        "m.b",
        "b",
        "m.q_proj.x",
        "m.ac",
        "m.xq",
        "m.y.z",
        "q",
        "m.dd",
    ]
    for name in names:
        for first, second in itertools.permutations(keys, 2):
            config: dict[str, Any] = LORA | {"rank_pattern": {first: 1, second: 2}}
            found = get_pattern_key([first, second], name)
            expected = {first: 1, second: 2}.get(found, 4)
            assert DeclaredValues("here", config).rank(name) == expected, (first, second, name)


def test_pattern_that_takes_exponential_time_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_rules, "MATCHING_SECONDS", 0.01)
    config: dict[str, Any] = LORA | {"alpha_pattern": {"(a|aa)+$": 1}}
    with pytest.raises(
        CheckpointError, match=r"here: .*: alpha_pattern\['\(a\|aa\)\+\$'\] takes more than .* to match"
    ):
        DeclaredValues("here", config).scale("m." + "a" * 60 + "!", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"*q_proj": 8}}, r"rank_pattern\['\*q_proj'\] is no regular expression.*mean '\.\*q_proj'"),
        ({"rank_pattern": {"(": 8}}, r"rank_pattern\['\('\] is no regular expression \(missing \)"),
        ({"rank_pattern": [["q", 8]]}, r"rank_pattern is \[\['q', 8\]\], not an object"),
        ({"alpha_pattern": "q"}, "alpha_pattern is 'q', not an object"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] is None, not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, not a finite number"),
        ({"lora_alpha": -math.inf}, "lora_alpha is -inf, not a finite number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 1000+\.\.\.0+, not a finite number"),
        ({"lora_alpha": 0}, "lora_alpha is 0, so the adapter changes nothing"),
        ({"lora_alpha": True}, "lora_alpha is True, not a number"),
        ({"r": True}, "r is True, not a number"),
        ({"r": 0}, "r is 0, not a positive whole number"),
        ({"r": -4}, "r is -4, not a positive whole number"),
        ({"r": 1.5}, "r is 1.5, not a positive whole number"),
        ({"r": "1"}, "r is '1', not a number"),
        ({"use_rslora": "false"}, "use_rslora is 'false', neither true nor false"),
        ({"use_dora": 2}, "use_dora is 2, neither true nor false"),
        ({"init_lora_weights": {}}, "init_lora_weights is {}, neither true, false nor the name"),
        ({"init_lora_weights": "of_next_year"}, "set it to true in adapter_config.json if it only chose"),
        ({"target_modules": "*q_proj"}, r"target_modules='\*q_proj' is no regular expression"),
        ({"target_modules": {"q": 1}}, "target_modules is {'q': 1}, not a list"),
        ({"exclude_modules": "("}, "exclude_modules='\\(' is no regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list"),
        ({"base_model_name_or_path": ["x"]}, r"base_model_name_or_path is \['x'\], not the name"),
    ],
)
def test_adapter_with_a_value_of_an_odd_kind_is_refused_in_a_line_with_its_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path, changes, FACTORS)
    with pytest.raises(CheckpointError, match=message) as e:
        read_model(open_folder(str(tmp_path)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 1.0, "lora_alpha": 4.0},
        {"init_lora_weights": "true"},
        {"init_lora_weights": "False"},
        {"rank_pattern": {}, "alpha_pattern": None},
        {"rank_pattern": {"q": 1.0}, "r": 8},
        {"target_modules": "all-linear", "exclude_modules": ".*lm_head"},
        {"use_rslora": None, "lora_bias": False, "some_future_field": {"a": 1}},
        {"lora_alpha": -2},
    ],
)
def test_adapter_with_values_that_peft_takes_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path, changes, FACTORS)
    assert isinstance(read_model(open_folder(str(tmp_path))), Adapter)


FIELDS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "init_lora_weights", "modules_to_save", "target_modules", "exclude_modules", "fan_in_fan_out", "layer_replication",
    "base_model_name_or_path", "trainable_token_indices", "target_parameters", "kasa_config", "use_qalora",
    "layers_pattern", "layers_to_transform", "corda_config", "alora_invocation_tokens", "use_bdlora",
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(["q", "m.q", "*q", "(", "(q+)+$", "(q|qq)*$", "[", "q{99999999999}"]), st.text(max_size=9)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=9)
    | st.integers()
    | st.sampled_from([10**400, -(10**400)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_adapter_with_any_value_in_any_field_is_read_or_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_adapter(tmp_path, changes, FACTORS)
    try:
        model = read_model(open_folder(str(tmp_path)))
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    assert isinstance(model, Adapter)
    plain = plain_config(model.config)
    assert json.loads(json.dumps(plain)) is not None


@pytest.mark.parametrize("alpha", [1e39, -1e39, 1e300])
def test_alpha_that_float32_does_not_have_refused(alpha: float) -> None:
    with pytest.raises(CheckpointError, match=r"lora_alpha is .*, not a finite number, or none that float32 has"):
        DeclaredValues("here", LORA | {"lora_alpha": alpha}).alpha("m.q")


def test_pattern_of_alternatives_alone_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_rules, "MATCHING_SECONDS", 0.05)
    config: dict[str, Any] = LORA | {"alpha_pattern": {"(.|[a-z_.0-9])" * 30 + "[A-Z]": 8}}
    declared = DeclaredValues("here", config)
    with pytest.raises(CheckpointError, match=r"alpha_pattern\[.*takes more than 0\.05 s"):
        declared.alpha("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("value", ["false", [], 8.5])
def test_flag_of_tied_weights_that_is_no_truth_value_refused(tmp_path: Path, value: Any) -> None:
    write_adapter(tmp_path, {"ensure_weight_tying": value}, FACTORS)
    with pytest.raises(CheckpointError, match=r"ensure_weight_tying is .*, neither true nor false"):
        read_model(open_folder(str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "told"),
    [("lora", 'where PEFT writes "LORA"'), (None, 'where PEFT writes "LORA"'), ("IA3", "only LORA is supported")],
)
def test_type_of_an_adapter_that_is_not_read_says_what_to_do(kind: Any, told: str) -> None:
    reason = why_unreadable(LORA | {"peft_type": kind})
    assert reason.startswith(f"adapter_config.json: peft_type is {kind!r}")
    assert told in reason
