from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from fleet.algebra import noise
from fleet.algebra.noise import MAX_ENTRIES, NoiseKey, noise_key, uniform

WORDS = st.integers(-(1 << 31), (1 << 31) - 1)
# Where the counter turns negative as an int32, and where it wraps to 0.
EDGES = st.sampled_from([(1 << 31) - 1, (1 << 31) - 40, -(1 << 31), -1, -40, 0])


def entry_of(hashed: int) -> int:
    """The entry that a key of zeros hashes to this word: the rounds, each undone."""

    def unshifted(word: int, by: int) -> int:
        found = word
        for _ in range(32 // by + 1):
            found = word ^ (found >> by)
        return found

    def divided(word: int, by: int) -> int:
        return word * pow(by, -1, 1 << 32) % (1 << 32)

    return unshifted(divided(unshifted(divided(unshifted(hashed, 15), 0xD35A2D97), 15), 0x21F0AAAD), 16)


def by_hand(key: NoiseKey, entry: int) -> float:
    """The hash in whole numbers, of the published constants."""
    word = (entry + key.first) % 2**32
    word = (word ^ (word >> 16)) * 0x21F0AAAD % 2**32
    word = ((word ^ (word >> 15)) + key.second) % 2**32
    word = word * 0xD35A2D97 % 2**32
    return (word ^ (word >> 15)) / 2**32


@settings(deadline=None, max_examples=60)
@given(EDGES | WORDS, EDGES | WORDS, st.integers(0, 100), st.integers(1, 60))
def test_uniform_is_the_published_hash_on_every_device(first: int, second: int, start: int, count: int) -> None:
    """What a GPU computes in torch's operators has the same bits as the CPU's loop."""
    key = NoiseKey(first, second)
    found = uniform(key, start, count)
    expected = torch.tensor([by_hand(key, start + i) for i in range(count)], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=2**-22)
    other = noise._hashed((start + first) % MAX_ENTRIES, second % MAX_ENTRIES, count, torch.device("cpu"))
    assert torch.equal(found, other)


@pytest.mark.parametrize("hashed", [0, 0xFF, 0x100, 0x1FF, 0x7FFFFFFF, 0x80000000, 0xFFFFFE00, 0xFFFFFF00, 0xFFFFFFFF])
def test_uniform_of_the_smallest_and_the_largest_hash_is_neither_0_nor_1(hashed: int) -> None:
    """Float32 rounds 2²⁴ − ½ up to 2²⁴, which is where a 1 could come from."""
    found = float(uniform(NoiseKey(0, 0), entry_of(hashed), 1))
    assert 0.0 < found < 1.0
    assert found == pytest.approx(hashed / 2**32, abs=2**-22)


def test_uniform_is_float32_inside_the_interval() -> None:
    found = uniform(noise_key(0, "tensor"), 0, 1 << 21)
    assert found.dtype == torch.float32 and found.shape == (1 << 21,)
    assert 0.0 < float(found.min()) < 1e-5 and 1.0 - 1e-5 < float(found.max()) < 1.0


@settings(deadline=None)
@given(EDGES | WORDS, WORDS, st.integers(0, 100), st.integers(0, 80), st.integers(0, 80))
def test_uniform_slice_is_the_slice_of_the_whole(first: int, second: int, start: int, skip: int, count: int) -> None:
    key = NoiseKey(first, second)
    whole = uniform(key, start, skip + count + 10)
    assert torch.equal(uniform(key, start + skip, count), whole[skip : skip + count])


@settings(deadline=None, max_examples=30)
@given(EDGES, st.integers(1, 40))
def test_uniform_slice_over_the_counters_wrap_equals_its_entries(first: int, count: int) -> None:
    """Each entry drawn alone, which never crosses an edge, against all at once, which does."""
    key = NoiseKey(first, 5)
    alone = torch.cat([uniform(key, i, 1) for i in range(count)])
    assert torch.equal(uniform(key, 0, count), alone)


def test_uniform_last_entry_of_the_counter_is_there_and_no_further() -> None:
    key = noise_key("edge")
    assert uniform(key, MAX_ENTRIES - 3, 3).shape == (3,)
    for start, count in ((MAX_ENTRIES - 3, 4), (MAX_ENTRIES, 1), (-1, 2)):
        with pytest.raises(ValueError, match="noise has entries 0 to 4294967295"):
            uniform(key, start, count)


@pytest.mark.parametrize("parts", [(0, 0, "a"), (0, 1, "a"), (7, 0, "*/model.layers.0.q_proj.weight/entries")])
def test_uniform_is_uniform(parts: tuple[int | str, ...]) -> None:
    found = uniform(noise_key(*parts), 0, 200_000).double().numpy()
    assert stats.kstest(found, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_uniform_pairs_fill_the_square_evenly(lag: int) -> None:
    found = uniform(noise_key(3, "pairs"), 0, 400_000 + lag)
    cells = (found[:-lag] * 16).long() * 16 + (found[lag:] * 16).long()
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-3


def test_uniform_low_bits_are_even_too() -> None:
    """The ones that a multiplication alone leaves regular."""
    found = uniform(noise_key(3, "bits"), 0, 400_000)
    low = (found.double() * 2**20).long() & 0xFF
    assert stats.chisquare(torch.bincount(low, minlength=256).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", "x")])
def test_uniform_streams_of_other_keys_are_uncorrelated(other: tuple[int | str, ...]) -> None:
    one, two = (uniform(noise_key(*parts), 0, 100_000).double() for parts in ((0, 0, "a"), other))
    # 100,000 entries: four standard errors of a correlation are 0.0127.
    assert abs(float(torch.corrcoef(torch.stack((one, two)))[0, 1])) < 0.0127
    cells = (one * 16).long() * 16 + (two * 16).long()
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-3


def test_noise_key_second_word_alone_makes_another_stream() -> None:
    one, two = (uniform(NoiseKey(9, second), 0, 1000) for second in (0, 1 << 20))
    assert not bool((one == two).any())


def test_noise_key_names_its_parts_and_has_signed_words() -> None:
    assert noise_key(1, 2, "a") == noise_key("1", "2", "a") != noise_key(1, "2a")
    keys = [noise_key(i) for i in range(200)]
    assert len(set(keys)) == 200
    assert all(-(1 << 31) <= word < 1 << 31 for key in keys for word in key)
    assert min(w for k in keys for w in k) < 0 < max(w for k in keys for w in k)
