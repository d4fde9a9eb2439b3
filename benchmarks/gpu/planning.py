"""Predictions of the steps while nothing that they disturb is timed, and rows that they complete.

The planner (benchmarks.gpu.step_plan) needs the CPU alone, and events on the device do not feel it, so it runs
beside checks and kernels. The host takes part in eager steps, so it stands still while those are
timed, and goes on after them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu.step_cases import StepCase, parse
from benchmarks.gpu.step_plan import read_plan
from benchmarks.gpu.steps import with_plan

_STEPS = ("training step", "contender step")


class Planner:
    """The process that predicts `cases`, most important first, FLOPs of all before any peak."""

    def __init__(
        self, cases: Sequence[str], file: Path, environment: Mapping[str, str], *, smoke: bool
    ) -> None:
        self.file = file
        self._cases = list(dict.fromkeys(cases))
        self._process: subprocess.Popen[bytes] | None = None
        if self._cases:
            command = [sys.executable, "-m", "benchmarks.gpu.step_plan", str(file)]
            command += ["--smoke"] if smoke else []
            self._process = subprocess.Popen(
                [*command, *(word for name in self._cases for word in ("--case", name))],
                cwd=harness.ROOT,
                env={**harness.environment(), **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def wait_for_flops(self, deadline: float) -> None:
        """Until MFU of every case can be said."""
        self._wait(lambda: all(self._has_flops(name) for name in self._cases), deadline)

    def wait_for(self, rows: Sequence[harness.Row], deadline: float) -> None:
        """Until all that these rows lack is predicted."""
        self._wait(lambda: all(self._has_all(row) for row in rows), deadline)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Not for a moment does it run within; where processes cannot be stopped it is ended."""
        if self._running():
            self._signal("SIGSTOP")
        try:
            yield
        finally:
            if self._running():
                self._signal("SIGCONT")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _signal(self, name: str) -> None:
        assert self._process is not None
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))
        else:
            self.end()

    def _wait(self, ready: Callable[[], bool], deadline: float) -> None:
        while self._running() and time.monotonic() < deadline and not ready():
            time.sleep(0.2)

    def _has_flops(self, name: str) -> bool:
        return not {"tflop", "no_prediction"}.isdisjoint(read_plan(self.file).get(name, {}))

    def _has_all(self, row: harness.Row) -> bool:
        if row["measurement"] not in _STEPS:
            return True
        case, entry = case_of(row), read_plan(self.file).get(case_of(row).name, {})
        wants_peak = row["measurement"] == "training step" and not case.compiled
        wanted = {"tflop", "predicted_peak_gib"} if wants_peak else {"tflop"}
        return wanted <= set(entry) or "no_prediction" in entry


def case_of(row: harness.Row) -> StepCase:
    """The training step of a row; of a contender's, ours that it does the same as."""
    step, comma, _ = row["case"].partition(", ")
    return parse(f"{step} eager" if comma else step)


def complete(rows: Sequence[harness.Row], path: Path, plan: Path) -> None:
    """Puts what was predicted after they were written into rows that lack it, and into the file."""
    changed: dict[str, str] = {}
    for row in rows:
        if row["measurement"] not in _STEPS:
            continue
        before = json.dumps(row)
        with_plan(row, case_of(row), plan, smoke=False)
        if row["measurement"] == "contender step":
            row["predicted_peak_gib"] = None  # it is of our network
        if (after := json.dumps(row)) != before:
            changed[before] = after
    if changed:
        lines = path.read_text(encoding="utf-8").splitlines()
        part = path.with_suffix(".part")
        part.write_text("".join(f"{changed.get(line, line)}\n" for line in lines), encoding="utf-8")
        os.replace(part, path)
