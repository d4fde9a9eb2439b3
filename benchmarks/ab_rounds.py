"""Rounds of base and head in fresh processes, in turns, and what they add up to.

A round is a process of each side. Either one runs after the other (A B, then B A in the next
round), or both are started together and are given turns of one step: A B B A. See
benchmarks/ab_workloads/loop.py for the second.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.ab_child import ORIGINS, TURN
from benchmarks.compare import exact
from benchmarks.harness import ROW, Row, environment
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.revisions import Beside, RevisionError, Side, search_path
from benchmarks.verdicts import Change, Limit, broken, direction, limit_for

Round = dict[str, list[Row]]
"""Side -> its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What both sides run: modules of `benchmarks`, each with the folder of its side's inputs."""

    commands: tuple[tuple[str, ...], ...]
    """Module and arguments; `{inputs}` in an argument is the folder of the side's inputs."""
    in_turns: bool
    """Whether the processes take turns. One after the other otherwise."""
    limits: str
    """As in `--fail`, unless the user says otherwise."""
    rounds: int
    """At the least."""
    max_rounds: int


class Process:
    """A side's process. Ends with the `with` block, whatever happens."""

    def __init__(self, side: Side, beside: Beside, command: Sequence[str], log: IO[str]) -> None:
        arguments = [each.replace("{inputs}", str(side.inputs)) for each in command]
        inherited = environment()
        path = search_path(beside.harness, side.tree, inherited["PYTHONPATH"])
        elsewhere = side.inputs.parent  # `python -m` puts the folder it runs in before the path
        elsewhere.mkdir(parents=True, exist_ok=True)
        self.side, self.rows, self._beside, self._log = side, list[Row](), beside, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ab_child", *arguments],
            text=True,
            cwd=elsewhere,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**inherited, "PYTHONPATH": path},
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def go(self) -> bool:
        """Gives a turn, waits for its end, and returns whether there is another."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and what follows says how
        return self.until_turn()

    def until_turn(self) -> bool:
        """Reads to the next turn, True, or to the end of the process, False."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ORIGINS):
                self._check_origins(json.loads(line.removeprefix(ORIGINS)))
            elif line.startswith(ROW):
                self.rows.append(json.loads(line.removeprefix(ROW)))
            elif line.strip() == TURN:
                return True
        status = self._process.wait()
        if status != 0:
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or [f"exit status {status}"]
            tail = "\n  ".join(said[-12:])
            raise RevisionError(
                f"{self.side.name}, {self.side.text}, cannot run this: {said[-1]}\n"
                f"The end of what its process wrote:\n  {tail}"
            )
        return False

    def _check_origins(self, origins: Mapping[str, str | None]) -> None:
        trees = {
            "benchmarks": self._beside.harness,
            "fasttune": self.side.tree,
            "fasttune_kernels": self.side.tree / "kernels",
        }
        for name, tree in trees.items():
            origin = origins[name]
            if origin is None and name == "fasttune_kernels":
                continue  # before there were any
            if origin is None or not Path(origin).resolve().is_relative_to(tree.resolve()):
                raise RevisionError(
                    f"{self.side.name} imports {name} from {origin} and not from {tree}: an install "
                    "of the project comes before PYTHONPATH in this environment. Uninstall it "
                    "(`pip uninstall fasttune`) or use another environment"
                )


def run_round(beside: Beside, workload: Workload, index: int) -> Round:
    """One round; those with an odd index begin with head."""
    order = list(beside.sides) if index % 2 == 0 else list(reversed(beside.sides))
    found: Round = {side.name: [] for side in order}
    together = order if workload.in_turns else []
    for command in workload.commands:
        for sides in [together] if together else [[side] for side in order]:
            for process in run_processes(beside, sides, command):
                found[process.side.name] += process.rows
    for side in order:
        if not found[side.name]:
            raise RevisionError(f"{side.name}, {side.text}, printed no rows")
    return found


def run_processes(beside: Beside, sides: Sequence[Side], command: Sequence[str]) -> list[Process]:
    """Runs the command for each side, in turns of the order A B B A; the ended processes."""
    with ExitStack() as stack:
        processes = []
        for side in sides:
            log = stack.enter_context((beside.harness / f"{side.name}.log").open("w+"))
            processes.append(stack.enter_context(Process(side, beside, command, log)))
        waiting = [each for each in processes if each.until_turn()]
        while waiting:
            waiting = [each for each in waiting if each.go()]
            waiting.reverse()
        return processes


def changes_of(
    rounds: Sequence[Round], limits: Sequence[Limit], *, step_by_step: bool
) -> list[Change]:
    """What the rounds say of each metric that all of them have and whose unit tells a direction.

    A round is one sample: processes differ in ways that no number of steps averages out. Its ratio
    is that of the two numbers, or with `step_by_step` the median of the ratios of steps of the same
    index, which were taken beside each other.
    """
    sides = [(_by_metric(each["base"]), _by_metric(each["head"])) for each in rounds]
    keys = [key for key in sides[0][0] if all(key in a and key in b for a, b in sides)]
    changes = []
    for key in keys:
        better = direction(key[2])
        if better is None:
            continue
        pairs = [(base[key], head[key]) for base, head in sides]
        base, head = [pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs]
        if len(set(base)) == len(set(head)) == 1 or min(*base, *head) <= 0:
            ratio = exact(statistics.median(head), statistics.median(base))
        else:
            ratio = _ratio([_of_round(*pair, step_by_step) for pair in pairs])
        medians = statistics.median(base), statistics.median(head)
        changes.append(Change(*key, *medians, ratio, better, limit_for(key[2], limits)))
    return changes


def broken_in(rounds: Sequence[Round], limits: Sequence[Limit]) -> list[str]:
    """What fails the change without a number, in any round; each once."""
    found: dict[str, None] = {}
    for each in rounds:
        head = {(row["measurement"], row.get("case", "")): row for row in each["head"]}
        for row in each["base"]:
            key = row["measurement"], row.get("case", "")
            found |= dict.fromkeys(broken(" ".join(key), row, head.get(key, {}), limits))
    return list(found)


Value = tuple[float, Sequence[float]]
"""A metric of a row, and its samples."""


def _by_metric(rows: Sequence[Row]) -> dict[tuple[str, str, str], Value]:
    """(measurement, case, metric) -> value and samples."""
    return {
        (row["measurement"], row.get("case", ""), name): (
            value,
            row.get("samples", {}).get(name, []),
        )
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _of_round(base: Value, head: Value, step_by_step: bool) -> float:
    if not step_by_step or len(base[1]) != len(head[1]) or not base[1]:
        return head[0] / base[0]
    return statistics.median(h / b for b, h in zip(base[1], head[1], strict=True))


def _ratio(ratios: Sequence[float]) -> Ratio:
    return ratio_of(ratios, [1.0] * len(ratios), paired=True)


def series(
    run: Callable[[int], Round],
    judge: Callable[[Sequence[Round]], list[Change]],
    *,
    rounds: int,
    max_rounds: int,
    progress: Callable[[list[Change], int], None] = lambda changes, wanted: None,
) -> list[Round]:
    """Rounds until every interval that has a limit is narrow enough for it or lies wholly outside of
    it, `rounds` at the least and `max_rounds` at most; both orders equally often.

    A difference that merely shows ends no series: looking again and again until one does would find
    one. `progress` gets the state and the rounds then expected.
    """
    done: list[Round] = []
    wanted = min(rounds + rounds % 2, max_rounds)
    while len(done) < wanted:
        done.append(run(len(done)))
        changes = judge(done)
        if len(done) == wanted and not all(change.is_settled for change in changes):
            wanted = min(wanted + 2, max_rounds)
        progress(changes, wanted)
    return done
