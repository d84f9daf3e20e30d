"""LoRA products on the CPU, one per adapter in a batch instead of one per token.

vLLM's CPU kernels gather a copy of the whole padded adapter for every token, `weights[indices]`, before they multiply:
at rank 256 a suite takes sixty times as long as on the bare model. Here the tokens of a batch are sorted by adapter
once a step, and each adapter multiplies its own. And a token without an adapter, index -1, gets no product: vLLM's
kernels give it the last adapter's, so that the base model, in a batch with adapters or after them, answers as one of
them. This replaces two methods of vLLM 0.32's `PunicaWrapperCPU`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch


@dataclass(frozen=True)
class Groups:
    """The tokens of a batch by adapter."""

    order: torch.Tensor | None
    """(tokens with an adapter,) int64: which they are, adapter after adapter; None is all of them as they stand."""
    spans: tuple[tuple[int, int, int], ...]
    """(adapter, start, stop) in that order."""


def group(indices: torch.Tensor) -> Groups:
    """
    Args:
        indices: (tokens,) int64, the adapter of each token; -1 is none.
    """
    order = indices.argsort(stable=True)
    unique = cast(Callable[..., Sequence[Any]], torch.unique_consecutive)  # pyright: ignore[reportUnknownMemberType]
    found, counts = unique(indices[order], return_counts=True)
    spans: list[tuple[int, int, int]] = []
    start = without = 0
    for adapter, count in zip(found.tolist(), counts.tolist(), strict=True):
        if adapter < 0:
            without = count
        else:
            spans.append((adapter, start, start + count))
            start += count
    alone = len(spans) == 1 and not without
    return Groups(None if alone else order[without:], tuple(spans))


def add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: Sequence[torch.Tensor],
    b_stacked: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
    groups: Groups,
) -> None:
    """y[t] += scale · B A x[t] in float32, with the adapter of token t; several products side by side in y.

    Args:
        y: (tokens, Σ widths).
        x: (tokens, d_in).
        a_stacked: per product (adapters, 1, rank, d_in).
        b_stacked: per product (adapters, 1, width, rank).
        scale: of all products.
        widths: of each product.
        groups: the tokens by adapter.
    """
    if not groups.spans:
        return
    inputs = (x if groups.order is None else x[groups.order]).float()
    products = inputs.new_empty(inputs.shape[0], sum(widths))
    for adapter, start, stop in groups.spans:
        at = 0
        for a, b, width in zip(a_stacked, b_stacked, widths, strict=True):
            low = inputs[start:stop] @ a[adapter, 0].float().T
            torch.mm(low, b[adapter, 0].float().T, out=products[start:stop, at : at + width])
            at += width
    products = products.mul_(scale).to(y.dtype)
    if groups.order is None:
        y += products
    else:
        y.index_add_(0, groups.order, products)


def install(wrapper: Any) -> None:
    """Put these into vLLM's `PunicaWrapperCPU`; any number of times per process, before an engine starts."""
    if getattr(wrapper, "groups_tokens", False):
        return
    update_metadata = wrapper.update_metadata

    def grouped_metadata(self: Any, *arguments: Any, **options: Any) -> None:
        update_metadata(self, *arguments, **options)
        self.groups = group(self.token_lora_indices)

    def add_lora_linear(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: Any, output_slices: Any, **_: Any
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        add_products(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, self.groups)

    wrapper.update_metadata = grouped_metadata
    wrapper.add_lora_linear = add_lora_linear
    wrapper.groups_tokens = True
