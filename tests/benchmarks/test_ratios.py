"""Order of interleaved calls, quantiles, and what the bounds of a ratio are worth."""

import statistics

import numpy as np
import pytest

from benchmarks.ratios import Ratio, abba, quantiles, ratio_of


def test_contenders_take_turns_in_the_order_abba() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = abba({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=4)
    assert "".join(calls) == "abbaabba"
    assert samples == {"a": [1.0, 4.0, 5.0, 8.0], "b": [2.0, 3.0, 6.0, 7.0]}


def test_abba_cancels_a_linear_drift() -> None:
    clock = iter(range(1000))
    samples = abba({name: lambda: 100.0 + next(clock) for name in "ab"}, rounds=10)
    assert statistics.fmean(samples["a"]) == statistics.fmean(samples["b"])


def test_three_contenders_reverse_as_well() -> None:
    order: list[str] = []
    abba({name: lambda name=name: order.append(name) or 1.0 for name in "xyz"}, rounds=2)
    assert "".join(order) == "xyzzyx"


def test_quantiles_are_numpys() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert quantiles(values) == pytest.approx({"p20": 1.8, "median": 3, "p80": 4.2, "rounds": 5})


def test_a_ratio_is_that_of_the_medians_or_the_median_of_ratios() -> None:
    base, head = [1.0, 2.0, 9.0], [4.0, 3.0, 12.0]
    assert ratio_of(head, base, paired=False).value == pytest.approx(2.0)  # 4 / 2
    assert ratio_of(head, base, paired=True).value == pytest.approx(1.5)  # of 4, 1.5, 1.33


def test_pairing_removes_what_rounds_share() -> None:
    drift = np.random.default_rng(0).lognormal(0, 0.3, 20)
    noise = np.random.default_rng(1).lognormal(0, 0.005, (2, 20))
    base, head = 10 * drift * noise[0], 10.5 * drift * noise[1]
    paired = ratio_of(head, base, paired=True)
    assert 1.03 < paired.low < paired.value < paired.high < 1.07
    assert ratio_of(head, base, paired=False).half_width > 10 * paired.half_width


def test_samples_that_never_vary_are_exact() -> None:
    ratio = ratio_of([3.0] * 5, [2.0] * 5, paired=True)
    assert ratio.low == ratio.value == ratio.high == pytest.approx(1.5)
    ratio = ratio_of([7.0] * 9, [7.0] * 6, paired=False)
    assert ratio == Ratio(1.0, 1.0, 1.0)


def test_one_round_tells_nothing_of_its_spread() -> None:
    assert ratio_of([2.0], [1.0], paired=True) == Ratio(2.0, 0.0, float("inf"))


def test_the_seed_alone_decides_the_draws() -> None:
    base, head = np.random.default_rng(2).lognormal(0, 0.02, (2, 12)).tolist()
    assert ratio_of(head, base, paired=True) == ratio_of(head, base, paired=True)
    other = ratio_of(head, base, paired=True, seed=1)
    assert other.value == ratio_of(head, base, paired=True).value
    assert other.low != ratio_of(head, base, paired=True).low


@pytest.mark.parametrize(
    ("rounds", "paired", "at_least"),
    [(2, True, 0.93), (3, True, 0.93), (5, True, 0.88), (7, True, 0.88), (12, True, 0.9)]
    + [(3, False, 0.95), (8, False, 0.92)],
)
def test_bounds_hold_the_true_ratio(rounds: int, paired: bool, at_least: float) -> None:
    # 250 data sets of known ratio: a coverage of 95 % has a standard error of 1.4 %.
    true, held = 1.1, 0
    for seed in range(250):
        rng = np.random.default_rng(seed)
        drift = rng.lognormal(0, 0.1, rounds) if paired else 1.0
        base = 50 * drift * rng.lognormal(0, 0.02, rounds)
        head = 50 * true * drift * rng.lognormal(0, 0.02, rounds)
        ratio = ratio_of(head, base, paired=paired, seed=seed)
        held += ratio.low <= true <= ratio.high
    assert held / 250 >= at_least


@pytest.mark.parametrize(
    ("head", "base", "paired", "message"),
    [
        ([], [1.0], False, "at least one sample"),
        ([1.0, 0.0], [1.0, 1.0], True, "positive and finite"),
        ([1.0, float("nan")], [1.0, 1.0], True, "positive and finite"),
        ([1.0, 1.0], [1.0], True, "differ in number: 2 and 1"),
    ],
)
def test_samples_that_make_no_ratio_are_refused(
    head: list[float], base: list[float], paired: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_of(head, base, paired=paired)
