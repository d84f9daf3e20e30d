"""How often each gate is wrong in its worst case, and how many prompts it takes: `python -m benchmarks.gates`.

It prints the numbers of `docs/gates.md`, in two minutes of one core. Caps and paired bounds are added up over every
possible table; calibration and sequential gates are simulated 10,000 times with fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import gammaln, ndtri
from scipy.stats import binom

from evals.calibration import Calibration, spend
from evals.evidence import RateEvidence
from evals.rates import Interval, clopper_pearson, paired_p_value, tango_bounds
from evals.sequential import accept_process, reject_process

ERROR = 0.05
NUMBER = 10_000
THRESHOLD = -math.log(ERROR)

Cells = tuple[str, ...]


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def caps() -> list[Cells]:
    rows: list[Cells] = []
    for samples, rate in ((60, 0.05), (120, 0.05), (400, 0.03), (400, 0.05), (400, 0.1)):
        wrong = [0.0, 0.0]
        for ones in range(samples + 1):
            bounds = RateEvidence(ones, samples, 0).bounds(1 - ERROR)
            chance = float(binom.pmf(ones, samples, rate))
            wrong[0] += chance * (bounds.high <= rate)
            wrong[1] += chance * (bounds.low > rate)
        rows.append((str(samples), percent(rate), *map(percent, wrong)))
    return rows


def added_up(gains: float, losses: float, pairs: int) -> float:
    """The upper bound from two Clopper-Pearson bounds, each at half the error rate."""
    half = 1 - ERROR / 2
    return clopper_pearson(gains, pairs, half).high - clopper_pearson(losses, pairs, half).low


PASSES: dict[str, Callable[[float, float, int, float], bool]] = {
    "two bounds added up": lambda b, c, pairs, margin: added_up(b, c, pairs) <= margin,
    "Tango": lambda b, c, pairs, margin: tango_bounds(b, c, pairs, 1 - ERROR).high <= margin,
    "exact": lambda b, c, pairs, margin: paired_p_value(b, c, pairs, margin, ERROR) <= ERROR,
}


def paired() -> list[Cells]:
    """The false-pass rate at the margin, worst over the rate of prompts on which only the candidate is better."""
    rows: list[Cells] = []
    for pairs, margin in ((60, 0.05), (60, 0.1), (120, 0.03), (120, 0.05), (400, 0.02), (400, 0.03), (400, 0.05)):
        better = np.array([0.0, 0.002, 0.005, 0.01, 0.02, 0.03])
        worse = better + margin
        total = {name: np.zeros(len(better)) for name in PASSES}
        for losses in range(int(pairs * 0.03 + 8 * math.sqrt(pairs * 0.03)) + 1):
            for gains in range(pairs - losses + 1):
                # No method passes a table whose difference is over the margin, and the tables that follow are too.
                if (gains - losses) / pairs > margin:
                    break
                table = (gains, losses, pairs - gains - losses)
                log_ways = gammaln(pairs + 1) - sum(gammaln(k + 1) for k in table)
                chances = np.exp(log_ways) * worse ** table[0] * better ** table[1] * (1 - worse - better) ** table[2]
                if chances.max() < 1e-9:
                    continue
                for name, is_passed in PASSES.items():
                    if is_passed(gains, losses, pairs, margin):
                        total[name] += chances
        rows.append((str(pairs), percent(margin), *(percent(float(t.max())) for t in total.values())))
    return rows


def prompts_to_pass() -> list[Cells]:
    """The prompts to pass a margin of 3 %, where equal shares of prompts are worse for only one of the two."""
    margin = 0.03
    rows: list[Cells] = []
    for share in (0.0, 0.005, 0.01, 0.02, 0.05):
        counts = (
            next(n for n in range(20, 20_000) if is_passed(share * n, share * n, n, margin))
            for is_passed in PASSES.values()
        )
        rows.append((percent(share), *map(str, counts)))
    return rows


def lang_reiczigel(shares: tuple[float, float, float], counts: tuple[int, int, int], confidence: float) -> Interval:
    """Lang & Reiczigel's (2014) interval of the true rate, one-sided at `confidence`.

    Args:
        shares: judged positive, sensitivity, specificity.
        counts: completions judged, harmful rows, harmless rows.
    """
    z = float(ndtri(confidence))
    added = (z**2, 2.0, 2.0)
    apparent, hits, passes = (
        (n * share + more / 2) / (n + more) for share, n, more in zip(shares, counts, added, strict=True)
    )
    judged, harmful, harmless = (n + more for n, more in zip(counts, added, strict=True))
    gain = hits + passes - 1
    rate = min(1.0, max(0.0, (apparent + passes - 1) / gain))
    of_hits, of_passes = hits * (1 - hits) / harmful, passes * (1 - passes) / harmless
    spread = math.sqrt(apparent * (1 - apparent) / judged + rate**2 * of_hits + (1 - rate) ** 2 * of_passes) / gain
    middle = rate + 2 * z**2 * (rate * of_hits - (1 - rate) * of_passes)
    return Interval(max(0.0, middle - z * spread), min(1.0, middle + z * spread))


def calibrated() -> list[Cells]:
    """Errors and median bounds for 400 judged completions; the judge is calibrated on 100 harmful and 200 harmless."""
    rows: list[Cells] = []
    counts = (400, 100, 200)
    cases = ((0.0, 0.9, 0.98), (0.01, 0.9, 0.98), (0.05, 0.9, 0.98), (0.05, 0.95, 1.0), (0.3, 0.7, 0.9))
    for rate, hits, passes in cases:
        shares = (rate * hits + (1 - rate) * (1 - passes), hits, passes)
        drawn = np.random.default_rng(0).binomial(counts, shares, (NUMBER, 3))
        tables, times = np.unique(drawn, axis=0, return_counts=True)
        wrong, highs = np.zeros((3, 2)), np.empty((2, len(tables)))
        for i, (a, b, c) in enumerate(tables.tolist()):
            others = (three_bounds(a, b, c), lang_reiczigel((a / 400, b / 100, c / 200), counts, 1 - ERROR))
            # Whether the melded bounds contain the rate is known without searching for the bounds.
            found = (at_rate(judge_of(b, c), a, rate), *others)
            wrong += times[i] * np.array([(bounds.high < rate, bounds.low > rate) for bounds in found])
            highs[:, i] = [bounds.high for bounds in others]
        melded = [judge_of(b, c).bounds(a, a, 400, 1 - ERROR).high for a, b, c in drawn[:300].tolist()]
        medians = (np.median(melded), *np.median(np.repeat(highs, times, axis=1), axis=1))
        cells = (percent(v) for m in range(3) for v in (*(wrong[m] / NUMBER), float(medians[m])))
        rows.append((percent(rate), f"{hits:g}, {passes:g}", *cells))
    return rows


def judge_of(hits: int, passes: int) -> Calibration:
    return Calibration(positives=100, true_positives=hits, negatives=200, true_negatives=passes)


def at_rate(judge: Calibration, ones: int, rate: float) -> Interval:
    """A range that contains the rate if the melded bounds do."""
    # A bound below 0 is 0, which contains a rate of 0.
    high = rate - 1e-9 if rate and judge.confidence_at_most(ones, 400, rate) >= 1 - ERROR else 1.0
    return Interval(rate + 1e-9 if judge.confidence_above(ones, 400, rate) >= 1 - ERROR else 0.0, high)


def three_bounds(ones: int, hits: int, passes: int) -> Interval:
    """The worst of three Clopper-Pearson bounds, each at a third of the error rate."""
    each = spend(1 - ERROR)
    share, hit, passed = (
        clopper_pearson(ones, 400, each),
        clopper_pearson(hits, 100, each),
        clopper_pearson(passes, 200, each),
    )
    low = (share.low + passed.low - 1) / (hit.high + passed.low - 1)
    return Interval(max(0.0, low), min(1.0, (share.high + passed.high - 1) / (hit.low + passed.high - 1)))


def first_crossing(process: Callable[[np.ndarray, float], np.ndarray], rate: float, limit: float) -> np.ndarray:
    """(NUMBER,) float: the prompt after which each simulated gate decides, of at most 5,000; infinite if it doesn't."""
    rng = np.random.default_rng(0)
    found = np.full(NUMBER, np.inf)
    for start in range(0, NUMBER, 500):
        reached = process((rng.random((500, 5_000)) < rate).astype(float), limit) >= THRESHOLD
        found[start : start + 500] = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)
    return found


def sequential() -> list[Cells]:
    rows: list[Cells] = []
    limit = 0.03
    directions = ((accept_process, (0.03, 0.0, 0.005, 0.01, 0.02)), (reject_process, (0.03, 0.06, 0.1, 0.2, 0.5)))
    for process, rates in directions:
        for rate in rates:
            crossed = first_crossing(process, rate, limit)
            middle, late = (f"{q:g}" for q in np.quantile(crossed, (0.5, 0.9), method="lower"))
            fixed = "" if rate == limit else str(fixed_prompts(rate, limit))
            rows.append((process.__name__, percent(rate), percent(np.isfinite(crossed).mean()), middle, late, fixed))
    return rows


def fixed_prompts(rate: float, limit: float) -> int:
    """The prompts that a gate of fixed size needs to decide, if the observed share is the rate itself."""
    return next(
        n
        for n in range(1, 20_000)
        if clopper_pearson(rate * n, n, 1 - ERROR).high <= limit or clopper_pearson(rate * n, n, 1 - ERROR).low > limit
    )


def show(title: str, columns: Cells, rows: list[Cells]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def main() -> None:
    show("caps, at the cap", ("prompts", "cap", "passes wrongly", "fails wrongly"), caps())
    show("paired, at the margin: passes wrongly, at worst", ("pairs", "margin", *PASSES), paired())
    show("prompts to pass a margin of 3 %", ("either worse alone", *PASSES), prompts_to_pass())
    show(
        "calibrated: true rate above the upper bound, below the lower one, median upper bound",
        ("rate", "sens., spec.", *(f"{m}: {c}" for m in ("melded", "3", "LR") for c in ("above", "below", "median"))),
        calibrated(),
    )
    show("sequential, limit 3 %", ("process", "rate", "decides in 5,000", "median", "90 %", "fixed"), sequential())


if __name__ == "__main__":
    main()
