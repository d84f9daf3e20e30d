"""Against each token's own product; against transformers and PEFT in tests/test_replicas.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from evals import cpu_lora

INDICES = st.lists(st.integers(-1, 3), min_size=1, max_size=12)


@given(INDICES)
def test_group_holds_every_token_with_an_adapter_once_and_no_other(indices: list[int]) -> None:
    groups = cpu_lora.group(torch.tensor(indices))
    order = list(range(len(indices))) if groups.order is None else groups.order.tolist()
    found = {token: adapter for adapter, start, stop in groups.spans for token in order[start:stop]}
    assert found == {token: adapter for token, adapter in enumerate(indices) if adapter >= 0}
    assert sum(stop - start for _, start, stop in groups.spans) == len(found)


@settings(deadline=None, max_examples=30)
@given(INDICES, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**31))
def test_products_of_any_mixture_are_each_tokens_own_and_none_without(
    indices: list[int], widths: list[int], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(len(indices), 4, generator=g), torch.randn(len(indices), sum(widths), generator=g)
    a = [torch.randn(4, 1, 2, 4, generator=g) for _ in widths]
    b = [torch.randn(4, 1, width, 2, generator=g) for width in widths]
    expected = y.clone()
    for t, adapter in enumerate(indices):
        if adapter >= 0:
            expected[t] += 0.5 * torch.cat(
                [bi[adapter, 0] @ (ai[adapter, 0] @ x[t]) for ai, bi in zip(a, b, strict=True)]
            )
    cpu_lora.add_products(y, x, a, b, 0.5, widths, cpu_lora.group(torch.tensor(indices)))
    torch.testing.assert_close(y, expected)


def test_products_are_float32_whatever_the_dtype() -> None:
    """4097 ones add up in bfloat16 to 256 at most."""
    x, a = torch.ones(1, 4097, dtype=torch.bfloat16), torch.ones(1, 1, 1, 4097, dtype=torch.bfloat16)
    y = torch.zeros(1, 1, dtype=torch.bfloat16)
    cpu_lora.add_products(y, x, [a], [torch.ones(1, 1, 1, 1)], 1.0, [1], cpu_lora.group(torch.tensor([0])))
    assert y.item() == 4096


def test_install_groups_once_a_step_and_twice_is_once() -> None:
    class Wrapper:
        token_lora_indices = torch.tensor([0, -1])

        def update_metadata(self, mapping: object) -> None:
            self.mapping = mapping

        add_lora_linear = None

    cpu_lora.install(Wrapper)
    replaced: Any = Wrapper.update_metadata
    cpu_lora.install(Wrapper)
    assert Wrapper.update_metadata is replaced
    wrapper: Any = Wrapper()
    wrapper.update_metadata(mapping := SimpleNamespace())
    assert wrapper.mapping is mapping and wrapper.groups.spans == ((0, 0, 1),)
    y = torch.zeros(1, 2, 1)
    wrapper.add_lora_linear(y, torch.ones(1, 2, 1), (torch.ones(1, 1, 1, 1),), (torch.ones(1, 1, 1, 1),), 2.0, (1,))
    assert y.flatten().tolist() == [2.0, 0.0]
