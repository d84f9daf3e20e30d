from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import TypeAdapter, ValidationError

from fleet.fusion.place import Place, Rule, Schedule, at, places

NUMBERS = st.floats(-1e6, 1e6)
DEPTHS = st.floats(0.0, 1.0)
SCHEDULE: TypeAdapter[Schedule] = TypeAdapter(Schedule)


def layers(count: int, name: str = "model.layers.{}.mlp.up_proj.weight") -> list[str]:
    return [name.format(i) for i in range(count)]


def depths(*tensors: str) -> list[float]:
    return [place.depth for place in places(tensors).values()]


# -- a schedule's value --------------------------------------------------------------------------------------------


@given(NUMBERS, DEPTHS)
def test_number_is_itself_everywhere(number: float, depth: float) -> None:
    assert at(number, Place("any", depth)) == number


def test_gradient_of_five_over_nine_layers_by_hand() -> None:
    found = places(layers(9))
    values = [at((0.0, 0.4, 0.2, 1.0, 0.6), found[name]) for name in layers(9)]
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.3, 0.2, 0.6, 1.0, 0.8, 0.6])


def test_gradient_numbers_need_not_fall_on_layers() -> None:
    found = places(layers(4))
    assert [at((0.0, 1.0, 0.0), found[name]) for name in layers(4)] == pytest.approx([0.0, 2 / 3, 2 / 3, 0.0])


@given(NUMBERS, st.integers(1, 9), DEPTHS)
def test_gradient_of_equal_numbers_is_that_number(number: float, count: int, depth: float) -> None:
    assert at((number,) * count, Place("any", depth)) == pytest.approx(number)


@given(st.lists(NUMBERS, min_size=1).map(tuple), DEPTHS)
def test_gradient_ends_are_its_first_and_last_number(numbers: tuple[float, ...], depth: float) -> None:
    assert at(numbers, Place("any", 0.0)) == numbers[0]
    assert at(numbers, Place("any", 1.0)) == numbers[-1]
    assert min(numbers) - 1e-6 <= at(numbers, Place("any", depth)) <= max(numbers) + 1e-6


def test_rules_first_match_wins_and_the_last_is_for_the_rest() -> None:
    rules = (
        Rule(filter="self_attn.q_proj", value=0.1),
        Rule(filter="self_attn", value=0.2),
        Rule(filter="q_proj", value=0.3),
        Rule(value=0.4),
    )
    values = [
        at(rules, Place(name, 0.5))
        for name in ("l.self_attn.q_proj.weight", "l.self_attn.k_proj.weight", "l.mlp.q_proj.weight", "l.norm.weight")
    ]
    assert values == [0.1, 0.2, 0.3, 0.4]


def test_rule_without_filter_hides_those_after_it() -> None:
    assert at((Rule(value=1.0), Rule(filter="mlp", value=2.0), Rule(value=3.0)), Place("mlp", 0.0)) == 1.0


def test_rule_may_hold_a_gradient() -> None:
    rules = (Rule(filter="mlp", value=(0.0, 1.0)), Rule(value=0.5))
    assert [at(rules, Place(name, 0.25)) for name in ("l.mlp.weight", "l.norm.weight")] == [0.25, 0.5]


def test_schedule_of_a_manifest_is_read_in_each_of_its_forms() -> None:
    assert SCHEDULE.validate_python(1) == 1
    assert SCHEDULE.validate_python([0, 1]) == (0.0, 1.0)
    assert SCHEDULE.validate_python([{"filter": "mlp", "value": [0, 1]}, {"value": 2}]) == (
        Rule(filter="mlp", value=(0.0, 1.0)),
        Rule(value=2.0),
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "at least 1 item"),
        ([{"filter": "mlp", "value": 1}], "the last rule has to be one without a filter"),
        ([{"value": []}], "at least 1 item"),
        ([{"filters": "mlp", "value": 1}, {"value": 2}], "filters"),
        ("half", "valid number"),
    ],
)
def test_schedule_written_wrong_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SCHEDULE.validate_python(written)


# -- where a tensor is ---------------------------------------------------------------------------------------------


def test_depth_runs_evenly_from_the_first_layer_to_the_last() -> None:
    assert depths(*layers(5)) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_depth_of_embeddings_is_0_and_of_norm_and_head_1() -> None:
    found = depths("model.embed_tokens.weight", *layers(3), "model.norm.weight", "lm_head.weight")
    assert found == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


def test_depth_does_not_depend_on_the_order_of_names() -> None:
    names = [*layers(4), "lm_head.weight", "model.embed_tokens.weight"]
    assert places(names[::-1]) == places(names)


def test_depth_of_a_model_with_one_layer_or_none() -> None:
    assert depths("model.embed_tokens.weight", *layers(1), "lm_head.weight") == [0.0, 1.0, 1.0]
    assert depths("embed.weight", "head.weight") == [0.0, 1.0]


def test_depth_of_gpt_2() -> None:
    names = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.bias")
    assert depths(*names, "transformer.h.3.attn.c_attn.weight", "transformer.h.12.mlp.c_fc.weight") == [
        0.0, 0.0, 0.0, 0.25, 1.0,
    ]  # fmt: skip
    assert depths("transformer.h.3.mlp.c_fc.weight", "transformer.ln_f.weight") == [1.0, 1.0]


def test_depth_of_an_expert_is_its_layers() -> None:
    experts = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    names = [experts.format(layer, expert) for layer, expert in ((0, 0), (0, 7), (1, 7), (2, 0))]
    assert depths(*names) == [0.0, 0.0, 0.5, 1.0]


def test_place_keeps_the_tensors_name() -> None:
    assert {name: place.tensor for name, place in places(layers(2)).items()} == {n: n for n in layers(2)}
