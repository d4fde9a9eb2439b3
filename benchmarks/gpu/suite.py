"""`fasttune bench gpu`: correctness, kernels, training steps and contenders of this GPU, in one run.

Each part runs in processes of its own, most important first, until the time is used up; what was not
run is named. What is timed has ended its check, and passed it; a crash counts as wrong. Once something is
wrong, the steps, which contain it, are not run.
Rows are appended as they come, with the facts of the machine, to benchmarks/results/<gpu>.jsonl or
to `--out`; a short table ends the run. `--smoke` tries all of it out at tiny sizes on the CPU, and its rows go
to a temporary file.
"""

import argparse
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu.chosen_items import PARTS, asked, own_kernels
from benchmarks.gpu.judging import curves_file, judge_curves, judge_targets
from benchmarks.gpu.parts import LEAST_S, Said, run_beside, run_child, run_items, why
from benchmarks.gpu.planning import Planner, complete
from benchmarks.gpu.report_table import summary
from benchmarks.gpu.run import Run
from fasttune.errors import FasttuneError, HardwareError

_ENDS = {"correctness": 0.25, "kernels": 0.4, "steps": 0.8, "contenders": 1.0}
"""Share of the time after which a part gives way to the next. What it leaves is taken up at the end."""
_PLANNING = 0.15
"""Share of the time that the first step waits at most for the FLOPs of all."""
_PREFIX = "benchmarks.gpu."
_MOST_CHECKERS = 8
"""Processes that check at once: each has a CUDA context of half a GiB, and compiles with one core."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fasttune bench gpu`."""
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default 9)")
    parser.add_argument(
        "--out", type=Path, help="folder for the rows (default: benchmarks/results)"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="this part alone; may be repeated"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--steps", type=int, default=20, help="training steps of a case")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to unpack for this run: the contenders"
    )
    parser.add_argument("--commit", help="commit of the rows, where the source tree has no .git")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes on the CPU, to try the benchmarks out"
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 if something is wrong or crashed. HardwareError without a GPU, FasttuneError
    where there is nothing of the name asked for, or no time for anything."""
    if not 60 * args.minutes > LEAST_S:
        raise FasttuneError(f"--minutes {args.minutes:g}: more than {LEAST_S / 60:g}; default 9")
    if args.out is not None:
        args.out = args.out.resolve()  # children run elsewhere
    with harness.terminable(), tempfile.TemporaryDirectory(prefix="fasttune-bench-") as temporary:
        return _run(args, Path(temporary))


def _run(args: argparse.Namespace, temporary: Path) -> int:
    began = time.monotonic()
    environment = {} if args.wheels is None else _unpacked(args.wheels, temporary / "site")
    said, facts = Said(), _facts(args, environment)
    suite = Run(
        args=args,
        facts=facts,
        path=_results_file(args, facts),
        began=began,
        said=said,
        environment=environment,
    )
    said.notes += facts.pop("notes")
    suite.left = asked(args, facts, said)
    _all_parts(suite, temporary)
    judge_curves(suite)
    judge_targets(suite)
    print(summary(suite.rows, suite.said, suite.left))
    print(f"\n{len(suite.rows)} rows in {suite.path}, {time.monotonic() - began:.0f} s")
    return 1 if said.failed else 0


def _unpacked(folder: Path, site: Path) -> dict[str, str]:
    """Environment in which the wheels in `folder` can be imported. A wheel is a zip file of what belongs
    into site-packages; pip is not always there."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FasttuneError(
            f"--wheels {folder}: no wheels (*.whl) there; give the folder they are in"
        )
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    return {"PYTHONPATH": os.pathsep.join([harness.environment()["PYTHONPATH"], str(site)])}


def _facts(args: argparse.Namespace, environment: dict[str, str]) -> harness.Row:
    """Facts of the machine, from a process that gives the card back. HardwareError without a card."""
    found: list[harness.Row] = []
    said = Said()
    options = ["--smoke"] if args.smoke else []
    ended = run_child(
        f"{_PREFIX}card",
        options,
        deadline=time.monotonic() + 300,
        said=said,
        on_row=found.append,
        environment=environment,
    )
    if not found:
        raise HardwareError(why(ended).removeprefix("fasttune.errors.HardwareError: "))
    facts = {key: value for key, value in found[0].items() if key != "measurement"}
    if facts["commit"] == "unknown":
        facts["changed_files"] = None  # git cannot tell
    if args.commit:
        facts["commit"] = args.commit
    return {**facts, "notes": said.notes}


def _results_file(args: argparse.Namespace, facts: harness.Row) -> Path:
    name = f"{harness.machine_name(facts)}.jsonl"
    if not args.smoke:
        return (args.out or harness.RESULTS) / name
    if args.out is None:
        return Path(tempfile.mkdtemp(prefix="fasttune-bench-")) / name
    folder: Path = args.out
    if folder.resolve() == harness.RESULTS.resolve():
        raise FasttuneError(
            f"--smoke --out {args.out}: rows of tiny sizes on the CPU are no results; give another "
            "folder, or leave --out away"
        )
    return folder / name


def _all_parts(suite: Run, temporary: Path) -> None:
    cases = [name for name in suite.left.get("steps", ()) if not name.endswith(" buckets")]
    cases += [item.partition(" | ")[2] for item in suite.left.get("contenders", ())]
    planner = Planner(cases, temporary / "plan.json", suite.environment, smoke=suite.args.smoke)
    try:
        # Twice: what a part had no time for in its share is taken up with what the others left.
        for share in (None, 1.0):
            for part in suite.left:
                _run_part(suite, part, share or _share(suite, part), planner, temporary)
        planner.wait_for(suite.rows, suite.deadline())
    finally:
        planner.end()
        complete(suite.rows, suite.path, planner.file)


def _share(suite: Run, part: str) -> float:
    return 1.0 if part == list(suite.left)[-1] else _ENDS[part]


def _run_part(suite: Run, part: str, share: float, planner: Planner, temporary: Path) -> None:
    if part == "correctness":
        before = len(suite.said.failed)
        suite.left[part] = _items_of(suite, part, suite.left[part], share)
        _crashes_are_wrong(suite, suite.said.failed[before:])
        return
    if part == "kernels":
        _leave_out_failed(suite)
        names, ready = suite.left[part], _checked(suite)
        left = _items_of(suite, part, ready, share, on_crash=("--no-libraries",))
        suite.left[part] = [name for name in names if name in left or name not in ready]
        return
    if wrong := sorted(own_kernels().intersection(suite.wrong())):
        if suite.left[part]:
            suite.said.notes.append(f"{part} were not run: {', '.join(wrong)} failed its check")
        suite.left[part] = []
    if part == "steps" and not own_kernels() <= suite.right():
        return  # their checks had no time yet
    if not (suite.left[part] and suite.has_time(share)):
        return
    seconds = 60 * suite.args.minutes * _PLANNING
    planner.wait_for_flops(min(suite.deadline(share), time.monotonic() + seconds))
    with planner.standing_still():
        while suite.left[part] and suite.has_time(share):
            item = suite.left[part][0]
            run_one = _step if part == "steps" else _contender
            if not run_one(suite, item, suite.deadline(share), planner.file, temporary):
                return  # no time: it stays the first of what is left
            suite.left[part].pop(0)


def _items_of(
    suite: Run, part: str, names: Sequence[str], share: float, on_crash: Sequence[str] = ()
) -> list[str]:
    """Runs items of a part that takes several in a process, and returns what there was no time for.
    Checks run side by side; where they are tried out on the CPU, Triton interprets its kernels."""
    options: dict[str, Any] = {
        "options": suite.smoke,
        "on_crash": on_crash,
        "deadline": suite.deadline(share),
        "said": suite.said,
        "on_row": suite.add,
        "environment": suite.environment,
    }
    module = f"{_PREFIX}{part}"
    if part != "correctness":
        return run_items(module, names, **options)
    if suite.args.smoke:
        interpreter = {"TRITON_INTERPRET": "1"}
        return run_items(
            module, names, **{**options, "environment": {**suite.environment, **interpreter}}
        )
    processes = max(1, min(_MOST_CHECKERS, (os.cpu_count() or 1) // 2))
    return run_beside(module, names, processes=processes, **options)


def _crashes_are_wrong(suite: Run, failed: Sequence[tuple[str, str]]) -> None:
    """A row for each check that ended its process before it could say anything."""
    wrong = suite.wrong()
    for item, text in failed:
        if item not in wrong:
            suite.add(
                {
                    "measurement": "correctness",
                    "case": f"{item}, crashed",
                    "operation": item,
                    "own_kernel": item in own_kernels(),
                    "passed": False,
                    "crashed": text,
                }
            )


def _checked(suite: Run) -> list[str]:
    """The kernels' items that may be timed by now."""
    from benchmarks.gpu.kernels import CEILINGS, operation_of

    right = {*suite.right(), CEILINGS}
    return [name for name in suite.left["kernels"] if operation_of(name) in right]


def _leave_out_failed(suite: Run) -> None:
    """Takes what failed its check, or crashed in it, out of what is timed."""
    from benchmarks.gpu.kernels import operation_of

    wrong, names = suite.wrong(), suite.left["kernels"]
    bad = [name for name in names if operation_of(name) in wrong]
    if bad:
        suite.said.notes.append(f"not timed after their check failed: {', '.join(bad)}")
        suite.left["kernels"] = [name for name in names if name not in bad]


def _step(suite: Run, name: str, deadline: float, plan: Path, temporary: Path) -> bool:
    """One case of training steps; False if the time was up before it ended."""
    options = ["--case", name, "--plan", str(plan), "--curves", str(curves_file(suite.args))]
    return _cold_and_warm(suite, "steps", name, [*options, *suite.smoke], deadline, temporary)


def _cold_and_warm(
    suite: Run,
    module: str,
    item: str,
    options: Sequence[str],
    deadline: float,
    temporary: Path,
) -> bool:
    """As `_child`; what is compiled runs twice, with an empty compile cache and with what the first
    left there, never with the user's own."""
    timed = [*options, "--steps", "5" if suite.args.smoke else str(suite.args.steps)]
    is_sweep = item.endswith(" buckets")  # compiles all the time, so that cold is what it is
    if " compile" not in item:
        return _child(suite, module, item, timed, deadline, {})
    with tempfile.TemporaryDirectory(dir=temporary) as cache:
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        if is_sweep:
            return _child(suite, module, item, timed, deadline, environment)
        cold: list[harness.Row] = []
        if not _child(
            suite, module, item, [*options, "--steps", "1"], deadline, environment, cold.append
        ):
            return False
        if not cold:  # it failed or is absent, which has been said
            return True
        seconds = cold[0].get("first_step_s")

        def add(row: harness.Row) -> None:
            suite.add({**row, "first_step_cold_s": seconds})

        return _child(suite, module, item, timed, deadline, environment, add)


def _contender(suite: Run, item: str, deadline: float, plan: Path, temporary: Path) -> bool:
    contender, _, case = item.partition(" | ")
    options = ["--case", case, "--contender", contender, "--plan", str(plan), *suite.smoke]
    return _cold_and_warm(suite, "contenders", item, options, deadline, temporary)


def _child(
    suite: Run,
    module: str,
    item: str,
    options: Sequence[str],
    deadline: float,
    environment: dict[str, str],
    on_row: Callable[[harness.Row], None] | None = None,
) -> bool:
    """One process of one item; False if the time was up before it ended."""
    ended = run_child(
        f"{_PREFIX}{module}",
        options,
        deadline=deadline,
        said=suite.said,
        on_row=on_row or suite.add,
        environment={**suite.environment, **environment},
    )
    if ended.status != 0 and ended.in_time:
        suite.said.failed.append((item, why(ended)))
    return ended.in_time
