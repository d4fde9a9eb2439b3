"""Interleaved measurements, their quantiles, and ratios with bootstrap bounds.

A machine's speed drifts: clocks, caches, neighbours. Two contenders measured one after the other
differ by the drift between them; measured in turns they share it, and in the order A B B A also its
linear part. What is compared is the ratio of medians, which one disturbed round does not move, and
how far it can be trusted is read from the bootstrap [Efron 1979, doi:10.1214/aos/1176344552]: the
samples are drawn anew with replacement, and the 95 % of the ratios in the middle are the interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Bootstrap draws: the bounds then move by about a tenth of the interval's half-width with the seed."""

COVERAGE = 0.95

STRETCH = {2: 9.0, 3: 3.0, 4: 1.6}
"""Rounds -> what the bounds are moved out by: no bootstrap knows the spread of so few samples."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Head / base, and the bounds within which it lies at 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def abba(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls every contender once a round, in the order given and in the reverse one by turns; a
    call returns its own measurement. Samples by name, one per round. An even number of rounds
    balances the order."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            samples[name].append(contenders[name]())
        order.reverse()
    return samples


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20 %, 50 % and 80 % quantile (between neighbours, linear) and the number of rounds."""
    p20, median, p80 = np.quantile(_checked(values), (0.2, 0.5, 0.8))
    return {
        "p20": float(p20),
        "median": float(median),
        "p80": float(p80),
        "rounds": float(len(values)),
    }


def ratio_of(head: Sequence[float], base: Sequence[float], *, paired: bool, seed: int = 0) -> Ratio:
    """Median of head / median of base, or `paired` (samples of one round share the machine's
    state) the median of the ratios round by round, with bootstrap bounds.

    Of samples that never vary the bounds are the ratio itself; of a single round, which tells nothing
    of its spread, 0 and infinity. ValueError if samples are missing, not
    finite or not positive, or paired ones differ in number.
    """
    head_n, base_n = np.log(_checked(head)), np.log(_checked(base))
    if paired and len(head_n) != len(base_n):
        raise ValueError(f"paired samples differ in number: {len(head_n)} and {len(base_n)}")
    rounds = min(len(head_n), len(base_n))
    rng = np.random.default_rng(seed)
    if paired:
        centre = float(np.median(head_n - base_n))
        drawn = _medians(head_n - base_n, rng)
    else:
        centre = float(np.median(head_n) - np.median(base_n))
        drawn = _medians(head_n, rng) - _medians(base_n, rng)
    if rounds < 2:
        return Ratio(float(np.exp(centre)), 0.0, float("inf"))
    tail = (1 - COVERAGE) / 2
    bounds = np.quantile(drawn, (tail, 1 - tail))
    low, high = np.exp(centre + STRETCH.get(rounds, 1.0) * (bounds - centre))
    return Ratio(float(np.exp(centre)), float(low), float(high))


def _medians(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of the bootstrap's draws, (RESAMPLES,).

    The draws are smoothed [Silverman & Young 1987, doi:10.1093/biomet/74.3.469] by a standard error's
    worth of noise: the plain bootstrap of a median knows the samples' own values alone, and its 95 %
    interval of seven normal samples covers 87 %, this one's 91 %; of twelve, 94 %.
    """
    draws = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    quartiles = np.quantile(values, (0.25, 0.75))
    deviation = (quartiles[1] - quartiles[0]) / 1.349  # of normal samples the standard deviation
    if deviation > 0:
        draws = draws + rng.normal(0.0, deviation / np.sqrt(len(values)), draws.shape)
    medians: NDArray[np.float64] = np.median(draws, axis=1)
    return medians


def _checked(values: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError("at least one sample is needed")
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError(f"samples must be positive and finite: {numbers.tolist()}")
    return numbers
