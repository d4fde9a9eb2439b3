"""How often `fasttune bench ab` accuses a change that is none.

    python -m benchmarks.false_alarms [--runs 20] [--rounds N] [--out FILE]

The commit of the working tree is compared with itself, again and again, exactly as `ab` compares two
revisions: own copies, own caches, fresh processes, the suite's limits. Every alarm is a false one.
Prints a line a run and appends a row with all ratios and bounds to the machine's results.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.ab import SUITES, Result, measure, prepare
from benchmarks.harness import RESULTS, Row, machine, machine_name, terminable, write_rows
from benchmarks.revisions import side_by_side
from benchmarks.verdicts import parse_limits
from fasttune.errors import FasttuneError

SUITE = "loop"
HEAD = (
    "| run | rounds | metric | ratio | 95 % | verdict |\n| ---: | ---: | --- | ---: | ---: | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: results/<machine>.jsonl")
    parser.add_argument(
        "--rounds", type=int, help="of a series, neither more nor less; default: ab's"
    )
    args = parser.parse_args()
    workload = SUITES[SUITE]
    if args.rounds is not None:
        workload = replace(workload, rounds=args.rounds, max_rounds=args.rounds)
    limits = parse_limits(workload.limits)
    results: list[Result] = []
    with terminable(), side_by_side("HEAD", "HEAD") as beside:
        print(HEAD)
        prepare(SUITE, beside)
        for number in range(1, args.runs + 1):
            results.append(measure(beside, workload, limits))
            print("\n".join(lines_of(number, results[-1])), flush=True)
    row = row_of(results)
    print(
        f"\n{row['runs']} runs without a change: {row['false_failures']} failed, "
        f"{row['first_alarms']} had an alarm in the first series, {row['undecided']} were undecided"
    )
    facts = machine()
    write_rows(args.out or RESULTS / f"{machine_name(facts)}.jsonl", [row | facts])
    # Runs that decide nothing prove nothing.
    sys.exit(int(row["false_failures"] > 0 or 2 * row["undecided"] > row["runs"]))


def lines_of(number: int, result: Result) -> list[str]:
    """A line of the table for each series and metric."""
    return [
        f"| {number} | {len(rounds)} | {c.metric} | {c.ratio.value:.4f} | "
        f"{c.ratio.low:.4f} to {c.ratio.high:.4f} | {c.outcome.value} |"
        for rounds, changes in zip(result.rounds, result.changes, strict=True)
        for c in changes
    ]


def row_of(results: Sequence[Result]) -> Row:
    """Counts, and of each metric [ratio, low, high] of the first series, run by run."""
    ratios: dict[str, list[list[float]]] = {}
    for result in results:
        for change in result.changes[0]:
            bounds = (change.ratio.value, change.ratio.low, change.ratio.high)
            ratios.setdefault(change.metric, []).append([round(each, 5) for each in bounds])
    return {
        "measurement": "false alarms of ab",
        "case": SUITE,
        "runs": len(results),
        "false_failures": sum(bool(result.failures) for result in results),
        "first_alarms": sum(bool(result.alarms) for result in results),
        "undecided": sum(bool(result.undecided) for result in results),
        "limits": SUITES[SUITE].limits,
        "rounds": [[len(rounds) for rounds in result.rounds] for result in results],
        "ratios": ratios,
    }


if __name__ == "__main__":
    try:
        main()
    except FasttuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
