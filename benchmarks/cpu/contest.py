"""Ours and named contenders, doing the same work in turns, in a process of their own.

    python -m benchmarks.cpu.contest NAME --rounds N --folder FOLDER [--quick]

prints one row for each contender of the measurement NAME. A contest begins with a check that all of
them come to the same result; where one does more or less work than ours, its row says so in
"differs".
"""

import argparse
import gc
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, emit
from benchmarks.ratios import abba, quantiles, ratio_of

MEASUREMENTS = {
    "loader": "benchmarks.cpu.cached_data:loader",
    "cache-write": "benchmarks.cpu.cached_data:cache_write",
    "cache-read": "benchmarks.cpu.cached_data:cache_read",
    "checkpoint-write": "benchmarks.cpu.checkpoints:checkpoint_write",
    "checkpoint-read": "benchmarks.cpu.checkpoints:checkpoint_read",
    "ema": "benchmarks.cpu.updates:ema",
    "adamw": "benchmarks.cpu.updates:adamw",
    "adamw-bf16": "benchmarks.cpu.updates:adamw_bf16",
    "adafactor": "benchmarks.cpu.updates:adafactor",
    "lion": "benchmarks.cpu.updates:lion",
    "clip": "benchmarks.cpu.updates:clip",
    "arena": "benchmarks.cpu.arena:arena",
    "loop": "benchmarks.cpu.loop:loop",
    "quickstart": "benchmarks.cpu.quickstart:quickstart",
}
"""Name -> function that yields contests: (folder for its files, quick=) -> Iterator[Contest]."""

SAMPLE_S = 0.05
QUICK_SAMPLE_S = 0.005
"""Seconds that a measurement of a short operation is repeated for; its time is the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Someone else's way to do the work."""

    measure: Callable[[], float]
    """Does it and returns the seconds it took."""
    package: str = "torch"
    """Whose code it is, for the version in the row."""
    differs: str = ""
    """What it does not do, or does beside, if it is not the same work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """One piece of work, done by us and by others."""

    what: str
    ours: Callable[[], float]
    theirs: Mapping[str, Contender]
    """Name of the contender -> what it does. Names are part of a row's identity."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The amount of work, for the rows."""


def timed(work: Callable[[], Any], *, quick: bool) -> Callable[[], float]:
    """Measures `work`, which is called now to warm up, in seconds a call."""
    work()
    seconds = _seconds(work, 1)
    calls = max(1, round((QUICK_SAMPLE_S if quick else SAMPLE_S) / max(seconds, 1e-9)))
    return lambda: _seconds(work, calls)


def _seconds(work: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) / calls


def after_sync(write: Callable[[], float]) -> Callable[[], float]:
    """`write` when all that was written before is on the disk: an fsync may wait for the pages of
    other files too, and would pay for a contender that leaves its own to later."""

    def measure() -> float:
        os.sync()
        return write()

    return measure


def installed(package: str) -> bool:
    """Whether a contender's package is there."""
    return importlib.util.find_spec(package) is not None


def play(contest: Contest, rounds: int) -> list[Row]:
    """One row a contender, from `rounds` interleaved rounds after one that is not counted."""
    measures = {"ours": contest.ours}
    measures |= {name: contender.measure for name, contender in contest.theirs.items()}
    for measure in measures.values():
        measure()
    gc.collect()
    gc.freeze()  # what is alive now is not looked at again in the middle of a measurement
    samples = abba(measures, rounds)
    gc.unfreeze()
    ours = _milliseconds(samples["ours"])
    rows = []
    for name, contender in contest.theirs.items():
        theirs = _milliseconds(samples[name])
        ratio = ratio_of(ours, theirs, paired=True)
        rows.append(
            {
                "case": f"{contest.what} against {name}",
                "ratio": round(ratio.value, 4),
                # of a single round nothing is known, and JSON has no infinity
                "bounds_95": [round(ratio.low, 4), round(ratio.high, 4)] if rounds > 1 else None,
                **_quantiles(ours, theirs),
                "rounds": rounds,
                **contest.facts,
                "contender": f"{contender.package} {version(contender.package)}",
                **({"differs": contender.differs} if contender.differs else {}),
                "samples": {
                    "ours_ms": ours,
                    "theirs_ms": theirs,
                    "ratio": [round(a / b, 4) for a, b in zip(ours, theirs, strict=True)],
                },
            }
        )
    return rows


def _milliseconds(seconds: list[float]) -> list[float]:
    return [round(1000 * s, 6) for s in seconds]


def _quantiles(ours: list[float], theirs: list[float]) -> Row:
    """Medians; and, below names of their own so that nobody takes them for exact numbers, the 20 and
    80 % quantiles."""
    found = {"ours_ms": quantiles(ours), "theirs_ms": quantiles(theirs)}
    return {
        **{name: round(q["median"], 5) for name, q in found.items()},
        **{p: {name: round(q[p], 5) for name, q in found.items()} for p in ("p20", "p80")},
    }


def contests(name: str, folder: Path, *, quick: bool) -> Iterator[Contest]:
    """The contests of a measurement; its inputs are written to `folder`."""
    module, function = MEASUREMENTS[name].split(":")
    yield from getattr(importlib.import_module(module), function)(folder, quick=quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for contest in contests(args.name, args.folder, quick=args.quick):
        for row in play(contest, args.rounds):
            emit("cpu", **row)


if __name__ == "__main__":
    main()
