from __future__ import annotations

from evals.session import sample_seed


def test_sample_seed_is_anothers_for_every_seed_prompt_and_repeat() -> None:
    seeds = [sample_seed(seed, ids, repeat) for seed in (0, 1) for ids in ([1, 2], [12]) for repeat in (0, 1)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sample_seed_is_the_same_in_every_process() -> None:
    # The first 63 bits of sha256("[0, [1, 2], 0]"), by hand: `printf '[0, [1, 2], 0]' | sha256sum`.
    assert sample_seed(0, [1, 2], 0) == int("c0a09d2184303b4b", 16) >> 1
