"""What the results' page reads: rows of any age, the static expectation, and what is odd in them.

Nothing here raises for a row's sake. A line that is no row, or a number that is none, is set aside
with its place and reason, and the page lists it.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row
from fasttune.errors import FasttuneError

FACTS = frozenset(
    """
    measurement case time commit changed_files torch triton python cpu cores threads gpu driver clocks
    temperature load_average samples quick rounds runs starts steps pairs checksum
    memory_gib processors cuda cudnn clock_mhz memory_clock_mhz temperature_c power_w
    """.split()
)
"""Keys that describe a row and are no measurement."""

LARGEST = 1e18
"""Numbers beyond, and what is not finite, are no measurements and would break an axis."""

_METRIC = re.compile(
    r"(^|_)(ms|us|ns|s|gib|mib|kib|bytes|u|ratio|mfu|launches|recompiles|(\w+_)?per_s)$"
)
_COMPANION = re.compile(r"(^|_)(mean|p10|p20|p80|p90|fastest|slowest)(_|$)|_(low|high)$")
"""Other numbers of the same samples."""


@dataclass(frozen=True, slots=True)
class Odd:
    """Something in a file that the page could not use."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """One row of a results file."""

    place: str
    """File and line."""
    row: Row

    @property
    def measurement(self) -> str:
        return str(self.row["measurement"])

    @property
    def case(self) -> str:
        return str(self.row.get("case") or "")

    @property
    def title(self) -> str:
        """Short: rows of `fasttune bench cpu` say all in their case."""
        return title_of(self.measurement, self.case)

    @property
    def machine(self) -> str:
        """The GPU, or the processor with its cores: rows of others are no history of these."""
        if gpu := self.row.get("gpu"):
            return str(gpu)
        cores = self.row.get("cores")
        cpu = str(self.row.get("cpu") or "unknown machine")
        return f"{cpu}, {cores} cores" if cores else cpu

    @property
    def commit(self) -> str:
        """Short, with a mark where files were changed."""
        commit = str(self.row.get("commit") or "unknown commit")[:12]
        return f"{commit} with changes" if number(self.row.get("changed_files")) else commit

    @property
    def time(self) -> str:
        return str(self.row.get("time") or "")


@dataclass(frozen=True, slots=True)
class Reading:
    """All that was found in some files."""

    results: list[Result] = field(default_factory=list)
    odd: list[Odd] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Point:
    """A metric of one row, and the share of its samples that the band holds."""

    result: Result
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class History:
    """One metric of one case on one machine, oldest first."""

    machine: str
    measurement: str
    case: str
    metric: str
    points: tuple[Point, ...]

    @property
    def title(self) -> str:
        return title_of(self.measurement, self.case)


def title_of(measurement: str, case: str) -> str:
    """A row's identity as a heading."""
    if measurement == "cpu" and case:
        return case
    return f"{measurement}: {case}" if case else measurement


def number(value: object) -> float | None:
    """The value if it is a number that something can measure, else None. A bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value) if abs(value) > 1 / LARGEST else 0.0


def numbers(value: object) -> list[float]:
    """The finite numbers of a list; none of anything else."""
    found = [number(item) for item in value] if isinstance(value, list) else []
    return [item for item in found if item is not None]


def read_results(paths: Iterable[Path]) -> Reading:
    """Rows of JSONL files, and of all *.jsonl in folders. FasttuneError for a path that is absent."""
    reading = Reading()
    for path in paths:
        if not path.exists():
            raise FasttuneError(
                f"--results {path}: no such file or folder; give files that `fasttune bench cpu` or "
                "`fasttune bench gpu` wrote, or a folder with them"
            )
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            _read_file(file, reading)
    return reading


def _read_file(path: Path, reading: Reading) -> None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        reading.odd.append(Odd(shortened(path), f"cannot be read: {error.strerror}"))
        return
    if not any(line.strip() for line in lines):
        reading.odd.append(Odd(shortened(path), "has no rows"))
    for index, line in enumerate(lines, start=1):
        place = f"{shortened(path)}:{index}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.odd.append(Odd(place, f"is no JSON: {error}"))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("measurement"), str):
            reading.odd.append(Odd(place, "has no measurement"))
            continue
        bad = [key for key, value in row.items() if _has_no_number(value)]
        if bad:
            reading.odd.append(Odd(place, f"not finite or too large: {', '.join(bad)}"))
        reading.results.append(Result(place, row))


def _has_no_number(value: object) -> bool:
    """Whether a number in it is not finite or too large."""
    if isinstance(value, dict):
        return any(_has_no_number(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_no_number(item) for item in value)
    return isinstance(value, int | float) and not abs(value) < LARGEST


def shortened(path: Path) -> str:
    """Below the source tree if it is there."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_expected(path: Path, odd: list[Odd]) -> tuple[dict[str, str], dict[str, dict[str, Row]]]:
    """Versions, and gate -> case -> row, of the static expectation; empty where there is no file."""
    if not path.exists():
        return {}, {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        odd.append(Odd(shortened(path), f"cannot be read: {error}"))
        return {}, {}
    gates: dict[str, dict[str, Row]] = {}
    stored = found.get("gates") if isinstance(found, dict) else None
    if not isinstance(stored, dict):
        odd.append(Odd(shortened(path), "has no gates"))
        return {}, {}
    for gate, cases in stored.items():
        for case, row in cases.items() if isinstance(cases, dict) else ():
            if isinstance(row, dict):
                gates.setdefault(gate, {})[case] = row
            else:
                odd.append(Odd(f"{shortened(path)}: {gate} / {case}", "is no object"))
        if not isinstance(cases, dict):
            odd.append(Odd(f"{shortened(path)}: {gate}", "is no object"))
    versions = found.get("versions")
    return {k: str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}, gates


def metrics(row: Mapping[str, Any]) -> list[str]:
    """Keys that hold a measurement, by the unit in their name. Rates beside samples of a time are
    left out: they follow from it."""
    stored = row.get("samples")
    sampled = stored if isinstance(stored, dict) else {}
    return [
        key
        for key, value in row.items()
        if key not in FACTS
        and _METRIC.search(key)
        and not _COMPANION.search(key)
        and not (sampled and key.endswith("_per_s") and key not in sampled)
        and (number(value) is not None or numbers(value))
    ]


def point(result: Result, metric: str) -> Point | None:
    """The metric's value, the median where a row has a list, and its 20 % and 80 % quantiles: of its
    samples, or as the row gives them."""
    row = result.row
    stored = row.get("samples")
    samples = numbers(stored.get(metric)) if isinstance(stored, dict) else []
    value = number(row.get(metric))
    if value is None:
        samples = samples or numbers(row.get(metric))
        value = statistics.median(samples) if samples else None
    if value is None:
        return None
    if len(samples) > 1:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Point(result, value, fifths[0], fifths[-1])
    return Point(result, value, _quantile(row, metric, "p20"), _quantile(row, metric, "p80"))


def _quantile(row: Row, metric: str, name: str) -> float | None:
    """Under us_p20, p20_us or p20: {us: }."""
    by_metric = row.get(name)
    if isinstance(by_metric, dict):
        return number(by_metric.get(metric))
    bare = metric.removeprefix("median_")
    return number(row.get(f"{metric}_{name}", row.get(f"{name}_{bare}")))


def histories(results: Sequence[Result]) -> list[History]:
    """Metrics that were measured at more than one commit. Quick rows are left out."""
    groups: dict[tuple[str, str, str, str], list[Point]] = {}
    for result in results:
        if result.row.get("quick"):
            continue
        for metric in metrics(result.row):
            if found := point(result, metric):
                key = (result.machine, result.measurement, result.case, metric)
                groups.setdefault(key, []).append(found)
    return [
        History(*key, tuple(sorted(points, key=lambda p: p.result.time)))
        for key, points in groups.items()
        if len({p.result.commit for p in points}) > 1
    ]


def newest(results: Iterable[Result]) -> list[Result]:
    """Of each machine, measurement and case the last row, in the order of first appearance. Quick
    rows are left out."""
    found: dict[tuple[str, str, str], Result] = {}
    for result in results:
        if result.row.get("quick"):
            continue
        key = (result.machine, result.measurement, result.case)
        if key not in found or result.time >= found[key].time:
            found[key] = result
    return list(found.values())
