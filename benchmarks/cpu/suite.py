"""`fasttune bench cpu`: what fasttune does on a processor, as ratios against named contenders.

Each measurement runs in a process of its own (contest.py), ours and theirs in turns A B B A. What
counts is the ratio of their times, ours / theirs: it changes little with the machine, where a time
does not. No row is held to a threshold.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.cpu.contest import MEASUREMENTS
from benchmarks.harness import RESULTS, Row, collect, machine, machine_name, table, write_rows

ROUNDS = 20
QUICK_ROUNDS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `fasttune bench cpu`."""
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS)
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        help=f"measurements of each contender; default {ROUNDS}, with --quick {QUICK_ROUNDS}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="little work and few rounds, to try it out"
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the temporary folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSONL file the rows are appended to; default results/<machine>.jsonl, with --quick none",
    )


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a measurement failed; the others' rows are kept."""
    from tqdm import tqdm

    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    rows: list[Row] = []
    failed = False
    for name in tqdm(args.only or list(MEASUREMENTS), desc="cpu", unit="measurement"):
        try:
            found = measure(name, rounds=rounds, quick=args.quick, folder=args.folder)
        except RuntimeError as error:
            print(f"{name}: failed\n{error}", file=sys.stderr)
            failed = True
            continue
        rows += found
        if args.out or not args.quick:
            write_rows(args.out or RESULTS / f"{machine_name(found[0])}.jsonl", found)
    if rows:
        print(summary(rows))
    return 1 if failed else 0


def measure(name: str, *, rounds: int, quick: bool, folder: Path | None = None) -> list[Row]:
    """The rows of one measurement, with the machine's state before it. RuntimeError if it fails."""
    facts = machine()
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"fasttune-{name}-") as inputs:
        command = [sys.executable, "-m", "benchmarks.cpu.contest", name, "--folder", inputs]
        rows = collect([*command, "--rounds", str(rounds), *(["--quick"] if quick else [])])
    return [{**row, "quick": quick, **facts} for row in rows]


def summary(rows: list[Row]) -> str:
    """One line a row. The bounds are those of 95 % confidence."""
    lines = [["case", "ours ms", "theirs ms", "ours / theirs", "95 %", "rounds"]]
    for row in rows:
        bounds = row["bounds_95"]
        lines.append(
            [
                row["case"],
                _spread(row, "ours_ms"),
                _spread(row, "theirs_ms"),
                f"{row['ratio']:.3f}",
                f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "",
                str(row["rounds"]),
            ]
        )
    return table(lines)


def _spread(row: Row, metric: str) -> str:
    """Median, and between which values the middle 60 % of the rounds lie."""
    return f"{row[metric]:.4g} ({row['p20'][metric]:.4g} to {row['p80'][metric]:.4g})"


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds: 1 or more")
    return int(text)
