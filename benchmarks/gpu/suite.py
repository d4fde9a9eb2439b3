"""`fasttune bench gpu`: correctness, kernels, training steps and contenders of this GPU, in one run.

Each part runs in processes of its own, most important first, until the time is used up; what was not
run is named. A kernel that fails its check is not timed, and the steps, which contain it, are not run.
Rows are appended as they come, with the facts of the machine, to benchmarks/results/<gpu>.jsonl or
to `--out`; a short table ends the run. `--smoke` tries all of it out at tiny sizes on the CPU, and its rows go
to a temporary file.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu import loss_curves
from benchmarks.gpu.parts import LEAST_S, Said, run_child, run_items, why
from benchmarks.gpu.report_table import summary
from benchmarks.gpu.step_cases import CAPS_GIB, StepCase, cases
from fasttune.errors import FasttuneError, HardwareError

PARTS = ("correctness", "kernels", "steps", "contenders")
_ENDS = {"correctness": 0.25, "kernels": 0.4, "steps": 0.8, "contenders": 1.0}
"""Share of the time after which a part gives way to the next. What it leaves is taken up at the end."""
_PLANNED = 12
"""Steps whose peak is predicted beside the kernels: what 9 minutes have room for."""
_PREFIX = "benchmarks.gpu."


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
    parser.add_argument("--commit", help="commit of the rows, where the source tree has no .git")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes on the CPU, to try the benchmarks out"
    )


@dataclass(kw_only=True, slots=True)
class Run:
    """One run of the suite."""

    args: argparse.Namespace
    facts: harness.Row
    path: Path
    began: float
    rows: list[harness.Row] = field(default_factory=list)
    said: Said = field(default_factory=Said)
    left: dict[str, list[str]] = field(default_factory=dict)
    """Part -> items that are not run yet."""

    def deadline(self, share: float = 1.0) -> float:
        seconds: float = 60 * self.args.minutes * share
        return self.began + seconds

    def has_time(self, share: float = 1.0) -> bool:
        return self.deadline(share) - time.monotonic() > LEAST_S

    def add(self, row: harness.Row) -> None:
        """Writes a row with the facts of the machine; what the row says itself holds."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {**self.facts, "time": now, **row}
        head = {"measurement": whole.pop("measurement"), "case": whole.pop("case", "")}
        harness.write_rows(self.path, [{**head, **whole}])
        self.rows.append({**head, **whole})
        print(f"  {head['measurement']}: {head['case']}", flush=True)

    @property
    def smoke(self) -> list[str]:
        return ["--smoke"] if self.args.smoke else []


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 if something is wrong or crashed. HardwareError without a GPU."""
    began = time.monotonic()
    said, facts = Said(), _facts(args)
    path = _results_file(args, facts)
    suite = Run(args=args, facts=facts, path=path, began=began, said=said)
    said.notes += facts.pop("notes")
    suite.left = {part: list(_items(suite, part)) for part in args.part or PARTS}
    with tempfile.TemporaryDirectory() as temporary:
        _all_parts(suite, Path(temporary))
    if not args.smoke:
        curves = args.out / "loss_curves.json" if args.out else loss_curves.FILE
        if added := loss_curves.record(suite.rows, curves):
            said.notes.append(f"{len(added)} loss curves are new and recorded in {curves}")
    for row in suite.rows:
        if row.get("loss_curve") == "differs":
            said.failed.append((row["case"], "the losses differ from the recorded curve"))
    print(summary(suite.rows, suite.said, suite.left))
    print(f"\n{len(suite.rows)} rows in {suite.path}, {time.monotonic() - began:.0f} s")
    return 1 if said.failed else 0


def _facts(args: argparse.Namespace) -> harness.Row:
    """Facts of the machine, from a process that gives the card back. HardwareError without a card."""
    found: list[harness.Row] = []
    said = Said()
    options = ["--smoke"] if args.smoke else []
    ended = run_child(
        f"{_PREFIX}card", options, deadline=time.monotonic() + 300, said=said, on_row=found.append
    )
    if not found:
        raise HardwareError(why(ended).removeprefix("fasttune.errors.HardwareError: "))
    facts = {key: value for key, value in found[0].items() if key != "measurement"}
    if args.commit:
        facts["commit"] = args.commit
    return {**facts, "notes": said.notes}


def _results_file(args: argparse.Namespace, facts: harness.Row) -> Path:
    name = f"{harness.machine_name(facts)}.jsonl"
    if not args.smoke:
        return (args.out or harness.RESULTS) / name
    if args.out is None:
        return Path(tempfile.mkdtemp(prefix="fasttune-bench-")) / name
    folder: Path = args.out.resolve()
    if folder == harness.RESULTS.resolve():
        raise FasttuneError(
            f"--smoke --out {args.out}: rows of tiny sizes on the CPU are no results; give another "
            "folder, or leave --out away"
        )
    return folder / name


def _items(suite: Run, part: str) -> Iterator[str]:
    """Names of what a part runs."""
    wanted: Callable[[str], bool] = lambda name: suite.args.only in name  # noqa: E731
    yield from filter(wanted, _LISTS[part](suite))


def _correctness_items(suite: Run) -> list[str]:
    from benchmarks.gpu import correctness

    return list(dict.fromkeys(check.operation for check in correctness.checks()))


def _kernel_items(suite: Run) -> list[str]:
    from benchmarks.gpu import kernels

    return kernels.items(smoke=suite.args.smoke)


def _step_items(suite: Run) -> list[str]:
    if suite.args.smoke:
        case = StepCase(model="flux")
        return [case.name, replace(case, compiled=True).name, replace(case, cap_gib=12).name]
    memory = suite.facts.get("memory_gib")
    too_large = [cap for cap in CAPS_GIB if memory is None or cap >= memory]
    suite.said.absent += [f"cap{cap}: the card has {memory} GiB" for cap in too_large]
    return [case.name for case in cases() if case.cap_gib not in too_large]


def _contender_items(suite: Run) -> list[str]:
    from benchmarks.gpu import contenders

    pairs = contenders.items()[: 1 if suite.args.smoke else None]
    return [f"{name} | {case.name}" for name, case in pairs]


_LISTS: dict[str, Callable[[Run], Sequence[str]]] = {
    "correctness": _correctness_items,
    "kernels": _kernel_items,
    "steps": _step_items,
    "contenders": _contender_items,
}


def _all_parts(suite: Run, temporary: Path) -> None:
    plan = temporary / "plan.json"
    planning = _start_planning(suite, plan)
    try:
        # Twice: what a part had no time for in its share is taken up with what the others left.
        for share in (None, 1.0):
            for part in suite.left:
                _run_part(suite, part, share or _share(suite, part), plan, temporary)
    finally:
        if planning is not None:
            planning.kill()
            planning.wait()


def _share(suite: Run, part: str) -> float:
    return 1.0 if part == list(suite.left)[-1] else _ENDS[part]


def _run_part(suite: Run, part: str, share: float, plan: Path, temporary: Path) -> None:
    if part in ("correctness", "kernels"):
        if part == "kernels":
            _leave_out_failed(suite)
        suite.left[part] = run_items(
            f"{_PREFIX}{part}",
            suite.left[part],
            options=suite.smoke,
            on_crash=("--no-libraries",) if part == "kernels" else (),
            deadline=suite.deadline(share),
            said=suite.said,
            on_row=suite.add,
        )
        return
    if wrong := _wrong_kernels(suite):
        if suite.left[part]:
            suite.said.notes.append(f"{part} were not run: {', '.join(wrong)} failed its check")
        suite.left[part] = []
    run_one = _step if part == "steps" else _contender
    while suite.left[part] and suite.has_time(share):
        item = suite.left[part][0]
        if not run_one(suite, item, suite.deadline(share), plan, temporary):
            return  # no time: it stays the first of what is left
        suite.left[part].pop(0)


def _wrong_kernels(suite: Run) -> list[str]:
    rows = [row for row in suite.rows if row["measurement"] == "correctness"]
    return sorted({row["operation"] for row in rows if not row["passed"]})


def _leave_out_failed(suite: Run) -> None:
    """Takes what failed its check, or crashed in it, out of what is timed."""
    wrong = {*_wrong_kernels(suite), *(item for item, _ in suite.said.failed)}
    names = suite.left["kernels"]
    bad = [name for name in names if name in wrong or name.rpartition(" b")[0] in wrong]
    if bad:
        suite.said.notes.append(f"not timed after their check failed: {', '.join(bad)}")
        suite.left["kernels"] = [name for name in names if name not in bad]


def _step(suite: Run, name: str, deadline: float, plan: Path, temporary: Path) -> bool:
    """One case of training steps; False if the time was up before it ended. Compiled ones run twice,
    with an empty compile cache and with what the first left there."""
    options = ["--case", name, "--plan", str(plan), *suite.smoke]
    if " compile" not in name:
        return _child(suite, "steps", name, [*options, *_steps(suite)], deadline, {})
    with tempfile.TemporaryDirectory(dir=temporary) as cache:
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        cold: list[harness.Row] = []
        if not _child(
            suite, "steps", name, [*options, "--steps", "1"], deadline, environment, cold.append
        ):
            return False
        if not cold:  # it failed, which has been said
            return True
        seconds = cold[0].get("first_step_s")

        def add(row: harness.Row) -> None:
            suite.add({**row, "first_step_cold_s": seconds})

        options += _steps(suite)
        return _child(suite, "steps", name, options, deadline, environment, add)


def _steps(suite: Run) -> list[str]:
    return ["--steps", "5" if suite.args.smoke else str(suite.args.steps)]


def _contender(suite: Run, item: str, deadline: float, plan: Path, temporary: Path) -> bool:
    contender, _, case = item.partition(" | ")
    options = ["--case", case, "--contender", contender, "--plan", str(plan), *suite.smoke]
    return _child(suite, "contenders", item, [*options, *_steps(suite)], deadline, {})


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
        environment=environment,
    )
    if ended.status != 0 and ended.in_time:
        suite.said.failed.append((item, why(ended)))
    return ended.in_time


def _start_planning(suite: Run, plan: Path) -> "subprocess.Popen[bytes] | None":
    """Predictions need the CPU alone, and events do not feel them: they run beside the kernels."""
    names = suite.left.get("steps", [])[:_PLANNED]
    if not names:
        return None
    wanted = [word for name in names for word in ("--case", name)]
    command = [sys.executable, "-m", f"{_PREFIX}step_plan", str(plan), *suite.smoke, *wanted]
    return subprocess.Popen(
        command,
        cwd=harness.ROOT,
        env=harness.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
