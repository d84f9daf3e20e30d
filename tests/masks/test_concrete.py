from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from fleet.algebra.noise import noise_key, uniform
from fleet.masks import concrete
from fleet.masks.concrete import (
    Hardening,
    draw_,
    floored,
    hardened,
    logit_gradient_,
    masked_weight_,
    multipliers,
    relaxed,
    weighted_sum,
)

SEEDS = st.integers(0, 2**31)
KEY = noise_key(0, 0, "mask")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- drawing ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 2.0), st.floats(-4.0, 4.0), SEEDS)
def test_relaxed_is_the_formula(temperature: float, logit: float, seed: int) -> None:
    logits = logit + normal(seed, 50)
    u = uniform(noise_key(seed), 0, 50)
    x, v = logits.double(), u.double()
    expected = 1.0 / (1.0 + torch.exp(-(x + torch.log(v) - torch.log(1.0 - v)) / temperature))
    torch.testing.assert_close(relaxed(logits, u, temperature).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("start", [0, 123])
def test_draw_in_chunks_equals_relaxed_and_returns_the_sum(
    monkeypatch: pytest.MonkeyPatch, chunk: int, start: int
) -> None:
    logits, out = normal(0, 100), torch.empty(100)
    whole = torch.empty(100)
    whole_sum = draw_(whole, logits, start, KEY, 0.5)
    monkeypatch.setattr(concrete, "CPU_CHUNK", chunk)
    total = draw_(out, logits, start, KEY, 0.5)
    torch.testing.assert_close(out, relaxed(logits, uniform(KEY, start, 100), 0.5), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-7)
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(float(out.double().sum()), rel=1e-12) == pytest.approx(float(whole_sum))


def test_draw_of_some_rows_is_those_rows_of_the_whole() -> None:
    logits, whole, rows = normal(0, 100), torch.empty(100), torch.empty(30)
    draw_(whole, logits, 0, KEY, 0.5)
    draw_(rows, logits[40:70], 40, KEY, 0.5)
    torch.testing.assert_close(rows, whole[40:70], rtol=1e-6, atol=1e-7)


def test_draw_without_a_key_is_the_expected_mask_at_any_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concrete, "CPU_CHUNK", 9)
    logits, out = normal(1, 50), torch.empty(50)
    total = draw_(out, logits, 0, None, 0.1)
    assert torch.equal(out, torch.sigmoid(logits))
    assert float(total) == pytest.approx(float(out.double().sum()), rel=1e-12)


def test_draw_halves_above_a_half_as_often_as_bernoulli_says() -> None:
    """P(m > ½) = P(x + logit(u) > 0) = σ(x), whatever the temperature."""
    n = 40_000
    for logit in (-2.0, 0.0, 1.0):
        out = torch.empty(n)
        draw_(out, torch.full((n,), logit), 0, noise_key(0, str(logit)), 0.5)
        # Four standard errors of a share of 40,000 are at most 0.01.
        assert float((out > 0.5).float().mean()) == pytest.approx(1 / (1 + 2.718281828**-logit), abs=0.01)


def test_draw_of_extreme_logits_has_no_nan() -> None:
    out = torch.empty(4)
    draw_(out, torch.tensor([-1e30, 1e30, -200.0, 200.0]), 0, KEY, 0.5)
    assert torch.equal(out, torch.tensor([0.0, 1.0, 0.0, 1.0]))


# -- rescaling and hardening -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(-5.0, 5.0), SEEDS)
def test_multipliers_have_mean_one(rows: int, columns: int, logit: float, seed: int) -> None:
    values, delta = torch.sigmoid(logit + normal(seed, rows, columns)), normal(seed + 1, rows, columns)
    assume(float(values.sum()) > 1.0)  # below, the floor holds it
    share = multipliers(values).double() * delta / delta
    assert float(share.mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(share, values.double() / values.double().mean(), rtol=1e-5, atol=0.0)


@settings(deadline=None)
@given(st.integers(1, 100), st.floats(-4.0, 80.0))
def test_multipliers_of_uniform_logits_of_any_value_are_one(count: int, logit: float) -> None:
    values = hardened(torch.full((count,), logit), "expected", KEY)
    assume(float(values.sum()) > 1.0)
    torch.testing.assert_close(multipliers(values), torch.ones(count))


def test_multipliers_of_an_empty_mask_are_zero() -> None:
    assert torch.equal(multipliers(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_multipliers_by_hand() -> None:
    torch.testing.assert_close(multipliers(torch.tensor([1.0, 0.0, 0.0, 1.0])), torch.tensor([2.0, 0.0, 0.0, 2.0]))
    # One of four kept is the floor itself; less than one in all is held there.
    torch.testing.assert_close(multipliers(torch.tensor([0.0, 1.0, 0.0, 0.0])), torch.tensor([0.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(multipliers(torch.tensor([0.0, 0.1, 0.0, 0.1])), torch.tensor([0.0, 0.4, 0.0, 0.4]))


def test_floored_holds_the_mean_at_one_entry() -> None:
    means = torch.tensor([0.0, 0.1, 0.25, 0.3])
    torch.testing.assert_close(floored(means, 4), torch.tensor([0.25, 0.25, 0.25, 0.3]))


def test_hardened_threshold_keeps_zero() -> None:
    logits = torch.tensor([[-1.0, 0.0], [1e-20, -1e-20]])
    assert torch.equal(hardened(logits, "threshold", KEY), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_hardened_expected_is_sigma() -> None:
    logits = torch.tensor([[-1.0, 0.0, 2.0]])
    torch.testing.assert_close(hardened(logits, "expected", KEY), torch.tensor([[0.26894142, 0.5, 0.88079708]]))


def test_hardened_sample_is_seeded_and_as_frequent_as_sigma() -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(20_000).view(3, 20_000)
    found = hardened(logits, "sample", KEY)
    assert found.shape == logits.shape and found.unique().tolist() == [0.0, 1.0]
    assert torch.equal(found, hardened(logits, "sample", KEY))
    assert not torch.equal(found, hardened(logits, "sample", noise_key(1, 0, "mask")))
    # Four standard errors of a share of 20,000 are at most 0.0142.
    torch.testing.assert_close(found.mean(dim=1), torch.sigmoid(logits[:, 0]), rtol=0.0, atol=0.0142)


@pytest.mark.parametrize("rule", ["threshold", "expected", "sample"])
def test_hardened_values_are_float32_and_certain_logits_are_certain(rule: Hardening) -> None:
    found = hardened(torch.tensor([-200.0, 200.0]), rule, KEY)
    assert found.dtype == torch.float32 and found.tolist() == [0.0, 1.0]


# -- the dense mask's weights and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weight_is_the_formula_cast_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(concrete, "CPU_CHUNK", 13)
    base, delta, values = normal(0, 100).to(dtype), (0.1 * normal(1, 100)).to(dtype), torch.rand(100)
    out = torch.empty(100, dtype=dtype)
    masked_weight_(out, base, delta, values, 2.5)
    expected = (base.float() + 2.5 * (values * delta.float())).to(dtype)
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 0.0, atol=1e-7)


def loss_of(x: torch.Tensor, u: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, lam: float) -> torch.Tensor:
    """A smooth loss of θ = W + m ⊙ δ / mean(m), with the mean in the graph; all float64."""
    m = relaxed(x, u, lam)
    theta = base + m * delta / floored(m.mean(), m.numel())
    return (torch.sin(theta) * torch.arange(1, x.numel() + 1, dtype=x.dtype)).sum()


def closed_form(x: torch.Tensor, u: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, lam: float) -> torch.Tensor:
    """What the folded tensor does of it."""
    values = relaxed(x, u, lam)
    total, n = float(values.sum()), values.numel()
    mean = float(floored(values.mean(), n))
    theta = base + values * delta / mean
    gradient = torch.cos(theta) * torch.arange(1, n + 1, dtype=x.dtype)
    centre = float(weighted_sum(gradient, delta, values)) / total if total >= 1.0 else 0.0
    logit_gradient_(values, gradient, delta, centre, 1.0 / (mean * lam))
    return values


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.floats(0.2, 2.0), st.sampled_from([-12.0, -2.0, 0.0, 3.0]), SEEDS)
def test_logit_gradient_equals_autograd_through_the_mean(n: int, temperature: float, logit: float, seed: int) -> None:
    """Logits of −12 keep less than one entry in all, so there the floor holds the mean."""
    x = (logit + normal(seed, n, dtype=torch.float64)).requires_grad_()
    u = uniform(noise_key(seed), 0, n).double().clamp(0.01, 0.99)
    base, delta = normal(seed + 1, n, dtype=torch.float64), normal(seed + 2, n, dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss_of(x, u, base, delta, temperature), x)
    found = closed_form(x.detach(), u, base, delta, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("logit", [0.0, -12.0])
def test_logit_gradient_equals_finite_differences(logit: float) -> None:
    n, step = 12, 1e-5
    x = logit + normal(0, n, dtype=torch.float64)
    u = uniform(KEY, 0, n).double()
    base, delta = normal(1, n, dtype=torch.float64), normal(2, n, dtype=torch.float64)
    found = closed_form(x, u, base, delta, 0.5)
    for j in range(n):
        nudge = torch.zeros(n, dtype=torch.float64)
        nudge[j] = step
        up, down = (loss_of(x + sign * nudge, u, base, delta, 0.5) for sign in (1, -1))
        assert float(found[j]) == pytest.approx(float(up - down) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("chunk", [5, 1 << 16])
def test_logit_gradient_in_chunks_and_float32_is_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(concrete, "CPU_CHUNK", chunk)
    values, gradient, delta = torch.rand(33), normal(0, 33).bfloat16(), normal(1, 33).bfloat16()
    g, d, m = gradient.double(), delta.double(), values.double()
    centre = float((g * d * m).sum() / m.sum())
    found_sum = weighted_sum(gradient, delta, values)
    assert found_sum.dtype == torch.float64
    assert float(found_sum) == pytest.approx(float((g * d * m).sum()), rel=1e-5, abs=1e-6)
    out = values.clone()
    logit_gradient_(out, gradient, delta, centre, 3.0)
    torch.testing.assert_close(out.double(), 3.0 * m * (1 - m) * (g * d - centre), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.floats(0.01, 5.0), SEEDS)
def test_logit_gradient_of_a_uniform_mask_adds_up_to_nothing(n: int, logit: float, seed: int) -> None:
    """The rescaling makes all uniform masks one model, so no loss moves them together."""
    x, u = torch.full((n,), logit, dtype=torch.float64), torch.full((n,), 0.5, dtype=torch.float64)
    base, delta = normal(seed + 1, n, dtype=torch.float64), normal(seed + 2, n, dtype=torch.float64)
    found = closed_form(x, u, base, delta, 0.5)
    assert abs(float(found.sum())) <= 1e-9 * float(found.abs().sum()) + 1e-12
