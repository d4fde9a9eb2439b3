"""Two result files side by side: a Markdown table, and an exit status for limits.

    fasttune bench compare BASE HEAD [--fail "step_ms:3%,peak_gib:0.25%"]

Rows are joined by (measurement, case). A file is a history, so of each identity the rows of the
commit that was measured last count: samples of several such rows are pooled unless files were
changed, and of a number without samples the last row's counts. Quick rows meet quick ones alone.
Medians are compared; benchmarks/verdicts.py has the rule by which a metric fails. A rate
without samples beside a time that has them is not judged apart; a row that no longer fits or is no longer right fails, and
so does one that lost a metric with a limit. Exit status: 0 no limit passed, 1 a limit passed, 2 an
argument or file that cannot be used.

A file's samples were taken at another time than the other's, so drift of the machine is in the
ratio and not in its bounds: a verdict on a few percent needs `fasttune bench ab`, which interleaves.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.verdicts import (
    Change,
    Limit,
    Outcome,
    broken,
    check_limits,
    direction,
    is_clocked,
    is_number,
    limit_for,
    markdown,
    number,
    parse_limits,
)
from fasttune.errors import FasttuneError

Identity = tuple[str, str]
"""(measurement, case)."""

MACHINE = ("gpu", "cpu", "cores", "threads", "torch", "triton", "driver", "python")
"""Facts in which base and head had better not differ."""

FACTS = (*MACHINE, "time", "commit", "changed_files", "load_average", "measurement", "case")


APART = (
    "The two sides were measured apart: how the machine and each process differed between the two is "
    "in no interval above. For a few percent, `fasttune bench ab` measures them in turns."
)


class ResultsError(FasttuneError):
    """A results file that cannot be read."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one identity in one file."""

    values: Mapping[str, float]
    """Metric -> its number; the median where it has samples."""
    samples: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="results before (JSON lines)")
    parser.add_argument("head", type=Path, metavar="HEAD", help="results after")
    parser.add_argument(
        "--fail",
        default="",
        metavar="LIMITS",
        help='exit with status 1 past a limit: "step_ms:3%%,peak_gib:0.25%%"; * and ? match names',
    )


def run(args: argparse.Namespace) -> int:
    limits = parse_limits(args.fail)
    base, head = measured(read_rows(args.base)), measured(read_rows(args.head))
    common = [identity for identity in base if identity in head]
    metrics = [metric for identity in common for metric in base[identity].values]
    check_limits(limits, metrics)
    if not common:
        raise ResultsError(f"{args.base} and {args.head} have no measurement in common")
    changes = [
        change
        for identity in common
        for change in changes_of(identity, base[identity], head[identity], limits)
    ]
    failures = [
        failure
        for identity in common
        for failure in broken(
            " ".join(filter(None, identity)), base[identity].facts, head[identity].facts, limits
        )
    ]
    print(markdown(changes))
    for failure in failures:
        print(f"\n**FAILS** {failure}.")
    for note in notes(base, head):
        print(f"\n{note}")
    if any(not change.is_exact for change in changes):
        print(f"\n{APART}")
    return int(bool(failures) or any(change.outcome is Outcome.FAILS for change in changes))


def read_rows(path: Path) -> list[Row]:
    """Rows of a results file. ResultsError if it is no such file or has no rows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ResultsError(f"{path} cannot be read: {why}") from error
    rows = []
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}:{at} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("measurement"), str):
            raise ResultsError(f'{path}:{at} is not a row: an object with "measurement" is wanted')
        if not all(map(_is_samples, _samples(row).values())):
            raise ResultsError(f'{path}:{at}: "samples" must be lists of numbers by metric')
        rows.append(row)
    if not rows:
        raise ResultsError(f"{path} has no rows")
    return rows


def _samples(row: Row) -> Mapping[str, Any]:
    """The samples of a row; in the oldest rows the name is a count's."""
    value = row.get("samples")
    return value if isinstance(value, dict) else {}


def _is_samples(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def measured(rows: Sequence[Row]) -> dict[Identity, Measured]:
    """What the rows say of each identity, by the last commit that has it."""
    found: dict[Identity, list[Row]] = {}
    for row in rows:
        found.setdefault(_identity(row), []).append(row)
    return {identity: _latest(rows) for identity, rows in found.items()}


def _identity(row: Row) -> Identity:
    """Quick and smoke rows are of other work than full ones."""
    short = ["quick"] if row.get("quick") or row.get("smoke") else []
    return row["measurement"], ", ".join(filter(None, [str(row.get("case", "")), *short]))


def _latest(rows: Sequence[Row]) -> Measured:
    last = max(reversed(rows), key=lambda row: str(row.get("time", "")))  # of equal ones the later
    same = [row for row in rows if row.get("commit") == last.get("commit")]
    if any(row.get("changed_files") for row in same):  # who knows whether it was the same change
        same = [last]
    values: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for row in same:
        values |= {key: v for key, v in row.items() if key not in FACTS and is_number(v)}
        for metric, numbers in _samples(row).items():
            samples.setdefault(metric, []).extend(numbers)
    values |= {metric: statistics.median(numbers) for metric, numbers in samples.items() if numbers}
    return Measured(values, samples, last)


def changes_of(
    identity: Identity, base: Measured, head: Measured, limits: Sequence[Limit]
) -> list[Change]:
    """A change for each metric that both have and whose unit tells a direction."""
    return [
        Change(
            *identity,
            metric,
            base.values[metric],
            head.values[metric],
            _ratio(metric, base, head),
            better,
            limit_for(metric, limits),
        )
        for metric in base.values
        if metric in head.values
        and (better := direction(metric)) is not None
        and not _follows(metric, base, head)
    ]


def _follows(metric: str, base: Measured, head: Measured) -> bool:
    """Whether the metric follows from another one of its row, whose samples it lacks: a rate from
    its time. Judging both would judge the one without its spread."""
    sampled = {*base.samples, *head.samples}
    return is_clocked(metric) and bool(sampled) and metric not in sampled


def _ratio(metric: str, base: Measured, head: Measured) -> Ratio:
    of_base, of_head = base.samples.get(metric, ()), head.samples.get(metric, ())
    if of_base and of_head and min(*of_base, *of_head) > 0:
        if is_clocked(metric) or len({*of_base, *of_head}) > 1:
            return ratio_of(of_head, of_base, paired=False)
    ratio = exact(head.values[metric], base.values[metric])
    if is_clocked(metric) and ratio.value != 1 and not (of_base and of_head):
        return Ratio(ratio.value, 0.0, float("inf"))  # as of a single round
    return ratio


def exact(head: float, base: float) -> Ratio:
    """The ratio of two numbers without spread; from 0 to something it is infinite."""
    ratio = 1.0 if head == base else float("inf") if base == 0 else head / base
    return Ratio(ratio, ratio, ratio)


def notes(base: Mapping[Identity, Measured], head: Mapping[Identity, Measured]) -> list[str]:
    """What the table does not say: what was not judged, other machines, rows without a partner."""
    lines = []
    common = [identity for identity in base if identity in head]
    for fact in MACHINE:
        pairs = {(base[i].facts.get(fact), head[i].facts.get(fact)) for i in common}
        different = sorted({f"{a} / {b}" for a, b in pairs if a != b and None not in (a, b)})
        if different:
            lines.append(f"Base and head differ in {fact}: {', '.join(different)}.")
    unjudged: dict[str, str] = {}
    for identity in common:
        before, after = base[identity].values, head[identity].values
        for metric in before:
            if metric in after and direction(metric) is None and before[metric] != after[metric]:
                name = " ".join(filter(None, identity))
                unjudged[f"{name}: {metric}"] = (
                    f"{number(before[metric])} -> {number(after[metric])}"
                )
    if unjudged:
        listed = ", ".join(f"{what} {how}" for what, how in unjudged.items())
        lines.append(f"Not judged, as their names tell no direction: {listed}.")
    for side, other, name in ((base, head, "base"), (head, base, "head")):
        alone = [" ".join(filter(None, identity)) for identity in side if identity not in other]
        if alone:
            lines.append(f"Only in {name}: {', '.join(alone)}.")
    return lines
