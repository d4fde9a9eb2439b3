"""Parts of the suite as processes of their own: their rows as they come, and their end at a deadline.

What a child prints, line by line:

    row: {...}                a row
    begin: NAME, end: NAME    the items of a part that has several
    absent: WHAT: WHY         a contender that is not there or does not work
    failed: NAME: WHY         an item that is wrong
    note: TEXT
    retry: OPTION             before a crash: the item needs a new process, with this option

A crash loses nothing that was printed before it: the part goes on in a new process without the item
that was begun and not ended.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks import harness

OnRow = Callable[[harness.Row], None]
LEAST_S = 15.0
"""A child is not started with less time than this left: it would be killed while it imports torch."""


@dataclass(kw_only=True, slots=True)
class Said:
    """What children have said, but for their rows."""

    absent: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(item, why)."""
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Ended:
    """How a child ended."""

    status: int
    in_time: bool
    begun: str | None
    """The item it was at."""
    done: list[str]
    """The items it ended."""
    error: str
    """The end of its stderr."""
    retry: str | None = None
    """The option with which it asked to be tried again."""


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    deadline: float,
    said: Said,
    on_row: OnRow,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs `python -m module` until it ends or `deadline` (time.monotonic) is there.

    The rows of an item are passed on when it ends: those of one that crashes are dropped, since it may
    be tried again. At the deadline they count.
    """
    begun: str | None = None
    retry: str | None = None
    done: list[str] = []
    held: list[harness.Row] = []

    def pass_on() -> None:
        for row in held:
            on_row(row)
        held.clear()

    late = threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            cwd=harness.ROOT,
            env={**harness.environment(), **(environment or {})},
            start_new_session=True,
        )

        def stop() -> None:
            late.set()
            _kill(child)

        timer = threading.Timer(max(0.1, deadline - time.monotonic()), stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                kind, _, text = line.rstrip("\n").partition(": ")
                if kind == harness.ROW.rstrip(": "):
                    held.append(json.loads(text))
                    if begun is None:
                        pass_on()
                elif kind == "begin":
                    begun = text
                elif kind == "end":
                    done.append(text)
                    begun = None
                    pass_on()
                elif kind == "absent" and text not in said.absent:
                    said.absent.append(text)
                elif kind == "failed":
                    item, _, why = text.partition(": ")
                    said.failed.append((item, why))
                elif kind == "retry":
                    retry = text
                elif kind == "note" and text not in said.notes:
                    said.notes.append(text)
            status = child.wait()
        finally:
            timer.cancel()
            if child.poll() is None:
                _kill(child)
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if late.is_set():
            pass_on()
        errors.seek(0)
        end = errors.read()[-4000:]
    in_time = not late.is_set()
    return Ended(status=status, in_time=in_time, begun=begun, done=done, error=end, retry=retry)


def _kill(child: "subprocess.Popen[str]") -> None:
    """The child and whatever it has started: a compile worker that outlives it holds its output."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:  # all of them have ended
            pass
    else:
        child.kill()


def why(ended: Ended) -> str:
    """A crash in one line."""
    if ended.status < 0:
        return f"killed by {signal.Signals(-ended.status).name}"
    lines = [line for line in ended.error.strip().splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"exit status {ended.status}")[:300]


def run_items(
    module: str,
    items: Sequence[str],
    *,
    options: Sequence[str] = (),
    on_crash: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    deadline: float,
    said: Said,
    on_row: OnRow,
) -> list[str]:
    """Runs the items of a part and returns those that there was no time for.

    After a crash the others go on in a new process; the item itself is tried once more with the
    option it asked for, and once with the options `on_crash`, where there are any.
    """
    left, again = list(items), dict[str, list[str]]()
    while left and deadline - time.monotonic() > LEAST_S:
        extra = [*options, *again.get(left[0], ())]
        asked = left[:1] if left[0] in again else left
        ended = run_child(
            module,
            [*extra, *asked],
            deadline=deadline,
            said=said,
            on_row=on_row,
            environment=environment,
        )
        left = [item for item in left if item not in ended.done]
        if not ended.in_time:
            return left
        if ended.begun is None:
            if not ended.done:  # it failed before the first item
                said.failed += [(item, why(ended)) for item in left]
                return []
            continue
        item = ended.begun
        tried = again.get(item, [])
        wanted = [ended.retry] if ended.retry is not None else list(on_crash)
        if new := [option for option in wanted if option not in tried]:
            again[item] = [*tried, *new]
            said.notes.append(f"{item}: {why(ended)}; tried again with {' '.join(new)}")
            left = [item, *(other for other in left if other != item)]
        else:
            said.failed.append((item, why(ended)))
            left = [other for other in left if other != item]
    return left


def run_beside(
    module: str, items: Sequence[str], *, processes: int, on_row: OnRow, **options: Any
) -> list[str]:
    """`run_items` in several processes at once, each with a share of the items: for what compiles long
    and is not timed."""
    lock = threading.Lock()

    def one_by_one(row: harness.Row) -> None:
        with lock:
            on_row(row)

    def run(share: Sequence[str]) -> list[str]:
        return run_items(module, share, on_row=one_by_one, **options)

    shares = [items[i::processes] for i in range(processes) if items[i::processes]]
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        left = {item for of_share in pool.map(run, shares) for item in of_share}
    return [item for item in items if item in left]
