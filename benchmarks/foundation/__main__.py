"""Speed and memory of the foundation, in one command.

    python -m benchmarks.foundation [--only NAME ...] [--quick] [--diffusers-script PATH] [--out FILE]

Runs the measurements one after another, each in processes of its own, prints what was found beside
what is asked for, and appends the rows to results/<machine>.jsonl. See README.md for the protocol.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Row, collect, machine, machine_name, table, write_rows

PACKAGE = "benchmarks.foundation"


@dataclass(frozen=True, slots=True)
class Target:
    """What a value of a row is asked to be."""

    measurement: str
    """The row's name."""
    key: str
    limit: float | None
    """None: shown without a verdict."""
    at_least: bool = False


TARGETS = (
    Target("loop overhead: network", "median_ms", 1.0),
    Target("loop overhead: network", "p90_ms", None),
    Target("loop overhead: network", "median_cpu_ms", None),
    Target("loop overhead: empty", "median_ms", None),
    Target("fasttune --help", "median_ms", 200.0),
    Target("config error", "median_ms", None),
    Target("first step: quickstart, nothing cached", "median_s", 20.0),
    Target("first step: quickstart, all cached", "median_s", None),
    Target("first step: tiny sdxl, nothing cached", "median_s", None),
    Target("first step: tiny sdxl, all cached", "median_s", None),
    Target("load 5 GB: fasttune", "peak_anon_ratio", 1.1),
    Target("load 5 GB: fasttune", "load_s", None),
    Target("load 5 GB: diffusers", "peak_anon_ratio", None),
    Target("load 5 GB: diffusers", "load_s", None),
    Target("loss beside diffusers: its latents in float32", "max_relative_difference", 1e-3),
    Target("loss beside diffusers: its latents in float16", "max_relative_difference", 1e-5),
    Target("loss beside diffusers: its latents in float32", "effect_of_training", None),
    Target("step rate beside diffusers", "rate_ratio", 1.0, at_least=True),
    Target("step rate beside diffusers", "rate_ratio_without_encoding", None),
)


def commands(script: Path | None, quick: bool) -> dict[str, list[str] | None]:
    """Measurement -> its module and arguments; None if it cannot run."""
    diffusers = None
    if script is not None:
        short = ["--steps", "40", "--pairs", "1"] if quick else []
        diffusers = ["against_diffusers", "--diffusers-script", str(script.absolute()), *short]
    return {
        "loop": ["loop_overhead", *(["--steps", "100"] if quick else [])],
        "startup": ["startup", *(["--runs", "5", "--starts", "1"] if quick else [])],
        "load": ["load_memory", *(["--pairs", "1"] if quick else [])],
        "diffusers": diffusers,
    }


def run(name: str, command: list[str], quick: bool) -> list[Row]:
    """The rows of one measurement, with the machine's state at its beginning."""
    facts = machine()
    print(f"{name}: running (load average {facts['load_average']})", file=sys.stderr, flush=True)
    rows = collect([sys.executable, "-m", f"{PACKAGE}.{command[0]}", *command[1:]])
    return [{**row, "quick": quick, **facts} for row in rows]


def report(rows: list[Row]) -> str:
    """Measured beside asked, one line a target."""
    lines = [
        _line(target, row[target.key])
        for target in TARGETS
        for row in rows
        if row["measurement"] == target.measurement
    ]
    return table([["measurement", "value", "measured", "asked", ""], *lines])


def _line(target: Target, value: Any) -> list[str]:
    # of repeated runs the worst counts
    values = value if isinstance(value, list) else [value]
    worst = min(values) if target.at_least else max(values)
    shown = " ".join(f"{number:.4g}" for number in values)
    if target.limit is None:
        return [target.measurement, target.key, shown, "", ""]
    met = worst >= target.limit if target.at_least else worst <= target.limit
    sign = ">=" if target.at_least else "<="
    verdict = "met" if met else "MISSED"
    return [target.measurement, target.key, shown, f"{sign} {target.limit:g}", verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=list(commands(None, False)), help="repeat for several"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try it out")
    parser.add_argument(
        "--diffusers-script",
        type=Path,
        help="examples/text_to_image/train_text_to_image_lora_sdxl.py of the diffusers repository; "
        "without it that comparison is left out",
    )
    parser.add_argument("--out", type=Path, help="JSONL file the rows are appended to")
    args = parser.parse_args()
    if args.diffusers_script is not None and not args.diffusers_script.is_file():
        parser.error(f"--diffusers-script {args.diffusers_script}: no such file")
    rows: list[Row] = []
    failed = False
    for name, command in commands(args.diffusers_script, args.quick).items():
        if args.only and name not in args.only:
            continue
        if command is None:
            print(f"{name}: left out, it needs --diffusers-script", file=sys.stderr)
            continue
        try:
            found = run(name, command, args.quick)
        except RuntimeError as error:
            print(f"{name}: failed\n{error}", file=sys.stderr)
            failed = True
            continue
        write_rows(args.out or RESULTS / f"{machine_name(found[0])}.jsonl", found)
        rows += found
    print(report(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
