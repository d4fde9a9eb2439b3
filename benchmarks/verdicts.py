"""What a change of a number means: which direction is worse, whether the change is real, and whether
it passes a limit.

The rule, for a metric whose limit is L (`step_ms:3%`: L = 0.03) and whose ratio head / base is r:

- A count or a size, or samples that never vary, are exact. They fail when worse by more than L.
- What a clock gave (times, rates, shares of a rate) and stands alone, without samples, tells nothing
  of its spread: unless both are equal, it is "inconclusive: more rounds" whatever r is.
- With samples r has a 95 % bootstrap interval [low, high] of half-width h. It fails when the change
  is real, low > 1, and one of L's size cannot be excluded, high >= 1 + L. It is ok when high < 1 + L,
  also where a small change is real. Otherwise nothing can be said: "inconclusive: more rounds".
- An interval with h > L / 3 is too wide for a change of L to stand out, and "low > 1" comes about by
  chance in every fortieth unchanged pair. There low must exceed 1 by the excess, h - L / 3, or the
  verdict is inconclusive too.

So a change of L fails in 97 of 100 cases where h <= 0.44 L, and no change at all in fewer than one
of 100 whatever h is; where h <= L / 3 it is one of ten thousand (normal errors: high >= 1 + L then
takes a deviation of 2 L / 3, which is 3.9 standard errors). tests/benchmarks/test_compare.py measures
both rates. Where more is better everything is mirrored: `images_per_s:3%` fails at r = 0.97.
Inconclusive does not fail.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.ratios import Ratio
from fasttune.errors import FasttuneError

HIGHER: tuple[str, ...] = ("*_per_s", "*mfu", "*fraction", "fraction_*")
LOWER: tuple[str, ...] = (
    "us",
    "ratio",
    "*_s",
    "*_ms",
    "*_us",
    "*_ns",
    "*_gib",
    "*_mib",
    "*_kib",
    "*_bytes",
    "*_u",
    "*_tflop",
)
LOWER += ("*launches", "*graphs", "*graph_breaks", "*recompiles", "*registers", "*spills")
"""Metrics by the unit or the count at the end of their name. Nothing is known of others."""

CLOCKED = ("us", "*_us", "*_ns", "*_ms", "*_s", "*mfu", "*fraction", "fraction_*", "ratio")
"""Metrics that a clock gave: a number of them alone says nothing of its spread."""

BAD = {"fits": False, "passed": False, "losses_agree": False, "loss_curve": "differs"}
"""What a row says of itself -> the value that is worse than any number in it."""


class LimitError(FasttuneError):
    """A limit that cannot be read, or for a metric that is not there."""


class Better(Enum):
    """The direction in which a metric improves."""

    LOWER = "lower"
    HIGHER = "higher"


class Outcome(Enum):
    """What is to be said about a metric; the value is what the table says."""

    EQUAL = "equal"
    BETTER = "better"
    NOISE = "no difference seen"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive: more rounds"
    FAILS = "FAILS"


@dataclass(frozen=True, slots=True)
class Limit:
    """How much worse the metrics that match `pattern` may become."""

    pattern: str
    fraction: float

    def __str__(self) -> str:
        return f"{self.pattern}:{100 * self.fraction:g}%"


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of one measurement in base and head."""

    measurement: str
    case: str
    metric: str
    base: float
    head: float
    ratio: Ratio
    """Head / base; of an exact number both bounds are its value."""
    better: Better
    limit: float | None = None

    @property
    def cost(self) -> Ratio:
        """The ratio, mirrored where more is better: above 1 is always worse."""
        r = self.ratio
        return r if self.better is Better.LOWER else Ratio(2 - r.value, 2 - r.high, 2 - r.low)

    @property
    def is_exact(self) -> bool:
        return self.ratio.low == self.ratio.high

    @property
    def is_settled(self) -> bool:
        """Whether more rounds are of no use: the interval is narrow enough for a change of the
        limit's size to stand out, or no part of it is within the limit, for better or worse."""
        if self.limit is None or self.is_exact or self.ratio.half_width <= self.limit / 3:
            return True
        return self.cost.high < 1 - self.limit or self.cost.low > 1 + self.limit

    @property
    def outcome(self) -> Outcome:
        """By the rule above; without a limit, what is seen."""
        cost = self.cost
        if math.isinf(self.ratio.half_width):  # an exact one has no width, or none that is a number
            return Outcome.INCONCLUSIVE
        if self.limit is not None:
            if self.is_exact:
                if cost.value > 1 + self.limit:
                    return Outcome.FAILS
            elif cost.high >= 1 + self.limit:
                excess = max(0.0, cost.half_width - self.limit / 3)
                return Outcome.FAILS if cost.low > 1 + excess else Outcome.INCONCLUSIVE
        if cost.low == cost.high == 1:
            return Outcome.EQUAL
        if cost.low > 1:
            return Outcome.WORSE
        return Outcome.BETTER if cost.high < 1 else Outcome.NOISE


def is_clocked(metric: str) -> bool:
    """Whether the metric was measured with a clock, or follows from one that was."""
    return any(fnmatchcase(metric, pattern) for pattern in CLOCKED)


def broken(
    what: str, base: Mapping[str, Any], head: Mapping[str, Any], limits: Sequence[Limit]
) -> list[str]:
    """What fails a change without any number being compared, of two rows of one identity: it no
    longer fits or is no longer right, or a metric that has a limit is gone."""
    found = [
        f"{what}: {key} is {json.dumps(bad)}, and was not"
        for key, bad in BAD.items()
        if head.get(key) == bad and base.get(key) != bad
    ]
    gone = [m for m in base if is_number(base[m]) and not is_number(head.get(m))]
    return found + [
        f"{what}: {metric} is gone, and has a limit"
        for metric in gone
        if direction(metric) is not None and limit_for(metric, limits) is not None
    ]


def is_number(value: object) -> bool:
    """A bool is none, and neither is NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def direction(metric: str) -> Better | None:
    """Which way a metric improves, from its name; None if the name does not tell, or says that it is
    a contender's."""
    if metric.startswith("theirs_"):
        return None
    if any(fnmatchcase(metric, pattern) for pattern in HIGHER):
        return Better.HIGHER
    return Better.LOWER if any(fnmatchcase(metric, pattern) for pattern in LOWER) else None


def parse_limits(text: str) -> tuple[Limit, ...]:
    """`step_ms:3%,*_gib:0.25%` as limits. LimitError if it does not read so."""
    return tuple(_parse_limit(part.strip()) for part in text.split(",")) if text.strip() else ()


def _parse_limit(text: str) -> Limit:
    found = re.fullmatch(r"([^:%\s]+):(\d+(?:\.\d+)?|\.\d+)%", text)
    if found is None:
        raise LimitError(
            f"{text!r} is not a limit. Limits are written METRIC:PERCENT%, with a comma between two: "
            '"step_ms:3%,peak_gib:0.25%"; METRIC may hold * and ?, as in "*_ms:3%"'
        )
    return Limit(found[1], float(found[2]) / 100)


def limit_for(metric: str, limits: Sequence[Limit]) -> float | None:
    """The first limit that matches: narrow patterns go before wide ones."""
    return next((each.fraction for each in limits if fnmatchcase(metric, each.pattern)), None)


def check_limits(limits: Sequence[Limit], metrics: Sequence[str]) -> None:
    """LimitError for a limit that no metric with a direction matches: it would never fail."""
    judged = sorted({metric for metric in metrics if direction(metric) is not None})
    for limit in limits:
        if any(fnmatchcase(metric, limit.pattern) for metric in judged):
            continue
        without = [metric for metric in metrics if fnmatchcase(metric, limit.pattern)]
        why = (
            f"{without[0]} has no unit that tells which way is better"
            if without
            else "both sides have no such metric"
        )
        raise LimitError(f"limit {limit}: {why}; there are: {', '.join(judged) or 'none'}")


HEAD = ("measurement", "case", "metric", "base", "head", "head / base", "95 %", "verdict")


def markdown(changes: Sequence[Change]) -> str:
    """The changes as a Markdown table, a line each."""
    lines = [HEAD, tuple("---:" if 3 <= i <= 6 else "---" for i in range(len(HEAD)))]
    for change in changes:
        bounds = f"{change.ratio.low:.3f} to {change.ratio.high:.3f}"
        cells = (
            change.measurement,
            change.case,
            change.metric,
            number(change.base),
            number(change.head),
            f"{change.ratio.value:.4f}",
            "exact" if change.is_exact else bounds,
            verdict(change),
        )
        lines.append(tuple(cell.replace("|", "\\|") for cell in cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(change: Change) -> str:
    """The outcome in words, with the limit."""
    outcome, limit = change.outcome, change.limit
    if outcome is Outcome.FAILS:
        return f"**FAILS** (limit {100 * (limit or 0):g} %)"
    if outcome is Outcome.WORSE and limit is not None:
        return f"{outcome.value}, within {100 * limit:g} %"
    return outcome.value


def number(value: float) -> str:
    """Five digits, without an exponent where the number can be read without."""
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
