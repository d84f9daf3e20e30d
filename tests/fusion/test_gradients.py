"""Gradients through every fusion that a mask can be learned through, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import pytest
import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.sparsify import WHOLE, Piece
from fleet.fusion import (
    AnyFusionMethod,
    Breadcrumbs,
    Consensus,
    Dare,
    Della,
    FusionMethod,
    Karcher,
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
    WeightAverage,
)
from fleet.fusion.place import Place
from tests.pieces import in_pieces

PLACE = Place("model.layers.1.q.weight", 0.5)
SHARES = {"m1": 0.7}
METHODS: tuple[AnyFusionMethod, ...] = (
    WeightAverage(method="weight_average", weights=SHARES),
    TaskArithmetic(method="task_arithmetic", weights=SHARES),
    Ties(method="ties", density=0.6, weights=SHARES),
    Ties(method="ties", density=0.6, consensus="mean", weights=SHARES),
    Dare(method="dare", drop_rate=0.3, weights=SHARES),
    Della(method="della", consensus="mean", weights=SHARES),
    Breadcrumbs(method="breadcrumbs", density=0.6, outliers=0.2, weights=SHARES),
    Consensus(method="consensus", mask_scale=0.43, weights=SHARES),
    Sce(method="sce", weights=SHARES),
    Sce(method="sce", select=0.5),
    MultiSlerp(method="multi_slerp", weights=SHARES),
    Karcher(method="karcher", weights=SHARES),
    Karcher(method="karcher", max_iter=40, tol=1e-12),
    ModelStock(method="model_stock", weights=SHARES),
    Slerp(method="slerp", t=0.3),
    NuSlerp(method="nuslerp", weights=SHARES),
    Ties(method="ties", density=0.6, rescale=True, weights=SHARES),
    Breadcrumbs(method="breadcrumbs", density=0.6, outliers=0.2, rescale=True, consensus="mean", weights=SHARES),
    Della(method="della", rescale=False, weights=SHARES),
    MultiSlerp(method="multi_slerp", normalize_weights=False, weights=SHARES),
    NearSwap(method="nearswap", t=6.5),
    Ram(method="ram", epsilon=4.5),
    RamPlusTl(method="ramplus_tl", epsilon=4.5),
)
OF_TWO = (Slerp, NuSlerp)
LORA = tuple(m for m in METHODS if m.keeps_lora)
STEP = 2.0**-6
"""A power of two, so that float32 has the moved entries exactly, of which thresholds are taken."""


def named(method: AnyFusionMethod) -> str:
    return "-".join([method.method, *(str(v) for k, v in method if k in method.model_fields_set and k != "method")])


def deltas_of(method: AnyFusionMethod, rows: int = 4, columns: int = 3) -> dict[str, torch.Tensor]:
    """Task vectors of whole numbers, no two of a model's entries equal in magnitude, that point about the same way."""
    generator = torch.Generator().manual_seed(5)
    sign = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1.0, 1.0).double()
    # Of two models the variance of whole numbers is exact in float32, which a threshold is given in.
    is_of_two = isinstance(method, (*OF_TWO, NearSwap)) or (isinstance(method, Sce) and method.select != 1.0)
    count = 2 if is_of_two else 3
    found: dict[str, torch.Tensor] = {}
    for i in range(count):
        size = torch.randperm(rows * columns, generator=generator).view(rows, columns) + 1.0
        flips = torch.where(torch.rand(rows, columns, generator=generator) < 0.2, -1.0, 1.0)
        found[f"m{i}"] = sign * flips * size
    return found


def fused(method: AnyFusionMethod, deltas: Mapping[str, Delta], piece: Piece = WHOLE) -> torch.Tensor:
    return method.fuse(deltas, method.coefficients([*deltas], PLACE), PLACE, piece).dense()


def slope(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, index: int) -> float:
    """The central difference of fourth order in one entry."""

    def moved(steps: int) -> float:
        there = at.detach().clone()
        there.view(-1)[index] += steps * STEP
        return float(loss(there))

    return (8.0 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12.0 * STEP)


def check(loss: Callable[[torch.Tensor], torch.Tensor], masks: torch.Tensor) -> None:
    """∂loss/∂masks is what moving each of them measures."""
    leaf = masks.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    expected = torch.tensor([slope(loss, masks, i) for i in range(masks.numel())], dtype=torch.float64)
    torch.testing.assert_close(found.view(-1), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def weighing(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_every_fusion_that_a_mask_can_be_learned_through_is_here() -> None:
    (union, *_) = get_args(AnyFusionMethod)
    kinds: tuple[type[FusionMethod], ...] = get_args(union)
    every = [kind.model_validate({"method": kind.model_fields["method"].annotation.__args__[0]}) for kind in kinds]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue] - a Literal's one value
    learnable = {
        type(m) for m in every if m.is_entrywise and not m.is_global and m.curvature is None and not m.reads_aligned
    }
    assert {type(m) for m in METHODS} == learnable


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_gradient_of_masks_through_a_fusion_is_the_finite_difference(method: AnyFusionMethod) -> None:
    """Of the coefficients too: lengths, angles and shares move with the masks."""
    deltas = deltas_of(method)
    up = weighing(torch.Size((4, 3)))

    def loss(masks: torch.Tensor) -> torch.Tensor:
        masked: dict[str, Delta] = {n: Dense(d * m) for (n, d), m in zip(deltas.items(), masks, strict=True)}
        return (fused(method, masked) * up).sum()

    check(loss, torch.ones(len(deltas), 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("method", LORA, ids=named)
def test_gradient_of_masks_on_factors_through_a_fusion_is_the_finite_difference(method: AnyFusionMethod) -> None:
    generator = torch.Generator().manual_seed(1)
    count = 2 if isinstance(method, OF_TWO) else 3
    factors = [
        LowRank(*(torch.rand(s, generator=generator, dtype=torch.float64) + 0.1 for s in ((4, 2), (2, 3))))
        for _ in range(count)
    ]
    up = weighing(torch.Size((4, 3)))

    def loss(masks: torch.Tensor) -> torch.Tensor:
        """A mask over the rows of each B, and one over the columns of each A."""
        masked: dict[str, Delta] = {
            f"m{i}": LowRank(f.b * m[:4, None], f.a * m[4:])
            for i, (f, m) in enumerate(zip(factors, masks, strict=True))
        }
        return (fused(method, masked) * up).sum()

    check(loss, torch.ones(count, 7, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 3), (12,)])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_gradient_over_workers_that_share_a_tensor_is_that_of_one(
    method: AnyFusionMethod, shape: tuple[int, ...]
) -> None:
    """The third worker's part is empty, as the last worker's of a short tensor is; it joins in all sums."""
    deltas = {n: d.view(shape) for n, d in deltas_of(method).items()}
    up = weighing(torch.Size(shape))

    def gradients(rows: slice, piece: Piece) -> torch.Tensor:
        own = [d[rows].clone().requires_grad_() for d in deltas.values()]
        found = fused(method, {n: Dense(d) for n, d in zip(deltas, own, strict=True)}, piece)
        return torch.stack(torch.autograd.grad((found * up[rows]).sum(), own))

    expected = gradients(slice(0, shape[0]), WHOLE)
    sizes = (shape[0] // 4, shape[0] - shape[0] // 4, 0)
    found = torch.cat(in_pieces(sizes, gradients, 1 if len(shape) == 1 else shape[1]), dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [m for m in LORA if not m.is_linear], ids=named)
@pytest.mark.parametrize(
    "second", [[0.0, 0.0], [2.0, 4.0], [-1.0, -2.0], [-2.0, -4.0]], ids=["zero", "parallel", "cancelling", "opposite"]
)
def test_gradient_where_angles_are_degenerate_is_finite(method: AnyFusionMethod, second: list[float]) -> None:
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 2.0], second)]
    plain = method.model_copy(update={"weights": {}})
    fused(plain, {f"m{i}": Dense(v) for i, v in enumerate(values)}).sum().backward()
    assert all(v.grad is not None and bool(v.grad.isfinite().all()) for v in values)
