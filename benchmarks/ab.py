"""The working tree against another revision, interleaved, in fresh processes, with one harness.

    fasttune bench ab --base REV [--suite loop|steps] [--fail LIMITS] [--out FILE]

Suites: `loop` is the training loop on the CPU with a tiny network; `steps` are training steps at full
size on a GPU. Both sides run the benchmarks of the working tree, on the code of their revision.

Rounds are added until the 95 % interval of each ratio that has a limit is narrower than +- a third of
the limit or lies wholly outside of it, or `--max-rounds` is reached (a rule that ends by the width
makes the interval a little optimistic); benchmarks/verdicts.py has the rule. An alarm is measured
again by a second series that shares no sample with the first, and fails the change only if that one
says the same of the same metric. Exit status: 0 no limit passed (also if nothing could be decided: the
table says so), 1 a limit passed twice, 2 a mistake in the arguments or a revision that cannot run.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ab_rounds import (
    Round,
    Workload,
    broken_in,
    changes_of,
    run_processes,
    run_round,
    series,
)
from benchmarks.gpu.step_cases import parse
from benchmarks.harness import Row, machine, terminable, write_rows
from benchmarks.revisions import Beside, side_by_side
from benchmarks.verdicts import (
    Change,
    Limit,
    LimitError,
    Outcome,
    check_limits,
    markdown,
    parse_limits,
)
from fasttune.errors import FasttuneError, HardwareError

LOOP = ("benchmarks.ab_workloads.loop", "--inputs", "{inputs}")
STEPS = ("benchmarks.gpu.steps", "--steps", "12", "--plan", "none")  # no plan: MFU is not compared
STEP_CASES = (
    "flux lora bf16 recompute b1 1024 compile",
    "sdxl lora bf16 recompute b1 1024 compile",
    "flux lora bf16 recompute b1 1024 eager",
    "sdxl lora bf16 recompute b1 1024 eager",
)
"""Compiled as on a user's GPU, where train.compile is "auto"; eager ones show what the compiler hides."""
SMOKE_ROUNDS = 2

SUITES = {
    "loop": Workload(
        commands=(LOOP,),
        in_turns=True,
        limits="step_ms:3%,step_cpu_ms:3%",
        rounds=12,
        max_rounds=36,
    ),
    "steps": Workload(
        commands=tuple((*STEPS, "--case", case) for case in STEP_CASES),
        in_turns=False,
        limits="step_ms:3%,peak_gib:0.25%",
        rounds=6,
        max_rounds=20,
    ),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One or two series of rounds, and what they say."""

    rounds: tuple[list[Round], ...]
    changes: tuple[list[Change], ...]
    broken: list[str]
    """What fails without a number: a step that no longer fits, a limited metric that is gone."""

    @property
    def alarms(self) -> list[Change]:
        """What fails in the first series."""
        return [change for change in self.changes[0] if change.outcome is Outcome.FAILS]

    @property
    def failures(self) -> list[Change]:
        """What fails in both."""
        if len(self.changes) == 1:
            return []
        again = {_key(c) for c in self.changes[1] if c.outcome is Outcome.FAILS}
        return [change for change in self.alarms if _key(change) in again]

    @property
    def undecided(self) -> list[Change]:
        return [c for c in self.changes[-1] if c.outcome is Outcome.INCONCLUSIVE]


def _key(change: Change) -> tuple[str, str, str]:
    return change.measurement, change.case, change.metric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="REV", help="revision to compare with")
    parser.add_argument("--suite", choices=SUITES, default="loop", help="default: loop, on the CPU")
    parser.add_argument("--case", action="append", help="of the suite steps, again for more")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least so many")
    parser.add_argument("--max-rounds", type=int, metavar="N", help="at most so many a series")
    parser.add_argument(
        "--fail",
        metavar="LIMITS",
        help='default: the suite\'s, such as "step_ms:3%%,peak_gib:0.25%%"',
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append rows with samples to it")
    parser.add_argument(
        "--smoke", action="store_true", help="suite steps: tiny, on the CPU, to try the way out"
    )


def run(args: argparse.Namespace) -> int:
    workload = workload_of(args)
    limits = parse_limits(workload.limits)
    with terminable(), side_by_side(args.base) as beside:
        head = f"{args.suite}: base is {beside.base.text}, head is {beside.head.text}"
        print(head, file=sys.stderr)
        prepare(args.suite, beside)
        result = measure(beside, workload, limits)
        print(report(result, head))
        if args.out is not None:
            write_rows(args.out, rows_of(result, beside))
    return int(bool(result.failures or result.broken))


def workload_of(args: argparse.Namespace) -> Workload:
    """The suite as the arguments have it. FasttuneError for what does not fit together."""
    workload = SUITES[args.suite]
    if args.suite == "steps":
        smoke = ("--smoke",) if args.smoke else ()
        cases = args.case or STEP_CASES
        for case in cases:
            parse(case).config()  # refuses what is no case before a process does
        commands = tuple((*STEPS, "--case", case, *smoke) for case in cases)
        if not args.smoke and not _has_gpu():
            raise HardwareError(
                "suite steps needs a GPU that torch can use, and there is none. Without one there "
                "are --suite loop, and --smoke to see that everything is in place"
            )
        workload = replace(workload, commands=commands)
        if args.smoke:  # a CPU's allocator has no peak
            few = {"rounds": SMOKE_ROUNDS, "max_rounds": SMOKE_ROUNDS}
            workload = replace(workload, limits="step_ms:3%", **few)
    elif args.case or args.smoke:
        raise FasttuneError("--case and --smoke belong to --suite steps")
    rounds = workload.rounds if args.rounds is None else args.rounds
    most = max(workload.max_rounds, rounds) if args.max_rounds is None else args.max_rounds
    if not 2 <= rounds <= most:
        raise FasttuneError(
            f"--rounds {rounds} and --max-rounds {most}: at least 2 rounds, and no more than the most"
        )
    limits = workload.limits if args.fail is None else args.fail
    if not parse_limits(limits):
        raise LimitError('--fail is empty: without a limit rounds have no end; try "step_ms:3%"')
    return replace(workload, rounds=rounds, max_rounds=most, limits=limits)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def prepare(suite: str, beside: Beside) -> None:
    """Inputs, made once by head, and a first run of each side, which fills its cache and shows that
    it runs at all."""
    if suite != "loop":
        return
    run_processes(beside, [beside.head], (*LOOP, "--write-inputs"))
    shutil.copytree(beside.head.inputs, beside.base.inputs)
    for side in beside.sides:
        run_processes(beside, [side], (*LOOP, "--fill-cache"))


def measure(beside: Beside, workload: Workload, limits: Sequence[Limit]) -> Result:
    """A series of rounds, and where that has an alarm a second one."""

    def judge(rounds: Sequence[Round]) -> list[Change]:
        changes = changes_of(rounds, limits, step_by_step=workload.in_turns)
        if len(rounds) == 1:
            check_limits(limits, [change.metric for change in changes])
        return changes

    found: list[list[Round]] = []
    for title in ("rounds", "an alarm; rounds of a second series"):
        with bar(title) as progress:
            found.append(
                series(
                    lambda index: run_round(beside, workload, index),
                    judge,
                    rounds=workload.rounds,
                    max_rounds=workload.max_rounds,
                    progress=progress,
                )
            )
        if all(change.outcome is not Outcome.FAILS for change in judge(found[-1])):
            break
    broken = broken_in([each for rounds in found for each in rounds], limits)
    return Result(tuple(found), tuple(judge(rounds) for rounds in found), broken)


@contextmanager
def bar(title: str) -> Iterator[Any]:
    """A progress bar on stderr; called with the changes so far and the rounds expected."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="round", disable=None) as shown:

        def progress(changes: Sequence[Change], wanted: int) -> None:
            shown.total = wanted
            limited = [change for change in changes if change.limit is not None][:3]
            shown.set_postfix(
                {c.metric: f"{c.ratio.value:.3f}+-{c.ratio.half_width:.3f}" for c in limited},
                refresh=False,
            )
            shown.update()

        yield progress


def report(result: Result, head: str) -> str:
    """The tables in Markdown, and the conclusion."""
    parts = [f"{head}.", markdown(result.changes[0]), _counted(result.rounds[0])]
    if result.alarms:
        parts += ["Measured again:", markdown(result.changes[1]), _counted(result.rounds[1])]
    if result.failures:
        names = ", ".join(f"{c.metric} ({c.measurement} {c.case})" for c in result.failures)
        parts.append(f"**Slower or larger past the limit, in both series: {names}.**")
    elif result.alarms:
        parts.append("The second series did not confirm the alarm: no limit is passed.")
    parts += [f"**FAILS** {what}." for what in result.broken]
    if result.undecided:
        names = ", ".join(sorted({change.metric for change in result.undecided}))
        parts.append(
            f"Undecided after all rounds: {names}. The machine is too loud for the limit: run "
            "again when it is quiet, or with more --max-rounds."
        )
    return "\n\n".join(parts)


def _counted(rounds: Sequence[Round]) -> str:
    return f"{len(rounds)} rounds, each in fresh processes of both sides."


def rows_of(result: Result, beside: Beside) -> list[Row]:
    """A row for each side and identity: medians, and a sample a round. Head's has the ratios and
    their bounds, too."""
    facts = machine()
    rows = []
    for side in beside.sides:
        own: Row = {"side": side.name, "revision": side.text}
        if side.commit is not None:
            own |= {"commit": side.commit[:12], "changed_files": 0}
        found: dict[tuple[str, str], Row] = {}
        for change in result.changes[-1]:
            identity = change.measurement, change.case
            row = found.setdefault(identity, {"samples": {}, "ratios": {}})
            samples = [
                each[change.metric]
                for rounds in result.rounds
                for one in rounds
                for each in one[side.name]
                if (each["measurement"], each.get("case", "")) == identity
            ]
            row["samples"][change.metric] = samples
            row[change.metric] = statistics.median(samples)
            row["ratios"][change.metric] = [change.ratio.value, change.ratio.low, change.ratio.high]
        rows += [
            {"measurement": name, "case": case, **row, **facts, **own}
            for (name, case), row in found.items()
        ]
    for row in rows[: len(rows) // 2]:
        del row["ratios"]  # base's, to itself
    return rows
