"""The training loop on a tiny SDXL, one CPU thread, a step at a time.

`fasttune.train.train` runs as it is: cached data, LoRA in float32, AdamW, a line of metrics in every
step. A step ends where the next backward begins, found by a hook on `torch.Tensor.backward`, which
every revision calls: no name inside fasttune is relied on but `train` and the config.

After each step the process says "turn" and waits for a line. Two processes that are given turns by
one parent take the same step, on the same data, within a tenth of a second of each other. What else
the machine does then meets both, and the ratio of the two times is some ten times steadier than
that of two runs one after the other. Waiting is not timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ab_child import TURN
from benchmarks.harness import emit
from benchmarks.tiny_run import config, write_inputs
from fasttune.config import Config
from fasttune.train import train

WARM_UP = 8
"""Steps before the first turn."""


class Turns:
    """Times of steps, each begun when the parent says so."""

    def __init__(self) -> None:
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self._steps = 0
        self._begin = (0.0, 0.0)

    def hooked(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """`backward`, preceded by the end of one turn and the wait for the next."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._steps >= WARM_UP:
                now = (time.perf_counter(), time.thread_time())
                if self._steps > WARM_UP:
                    self.wall_ms.append(1000 * (now[0] - self._begin[0]))
                    self.cpu_ms.append(1000 * (now[1] - self._begin[1]))
                print(TURN, flush=True)
                if not sys.stdin.readline():
                    raise SystemExit("the parent has gone")
                self._begin = (time.perf_counter(), time.thread_time())
            self._steps += 1
            return backward(*args, **kwargs)

        return call


def run_of(inputs: Path, steps: int, name: str) -> Config:
    """The tiny run, logging in every step, so that each has all that a step can have."""
    return config(inputs, steps=steps, log_every=1, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=Path, required=True, help="folder of model and images")
    parser.add_argument("--write-inputs", action="store_true", help="make them, and do no more")
    parser.add_argument("--fill-cache", action="store_true", help="two steps, not timed")
    parser.add_argument("--steps", type=int, default=60, help="that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the other cores are for the loader, and for what else is running
    if args.write_inputs:
        write_inputs(args.inputs)
    elif args.fill_cache:
        train(run_of(args.inputs, 2, "cache"))
    else:
        measure(args.inputs, args.steps)


def measure(inputs: Path, steps: int) -> None:
    turns = Turns()
    torch.Tensor.backward = turns.hooked(torch.Tensor.backward)  # type: ignore[method-assign]
    # The last step ends where a further one's backward begins.
    train(run_of(inputs, WARM_UP + steps + 1, "loop"))
    if len(turns.wall_ms) != steps:
        raise SystemExit(f"{len(turns.wall_ms)} steps were seen, not {steps}")
    emit(
        "ab loop",
        case="tiny sdxl, lora, fp32, 1 thread",
        step_ms=statistics.median(turns.wall_ms),
        step_cpu_ms=statistics.median(turns.cpu_ms),
        samples={"step_ms": turns.wall_ms, "step_cpu_ms": turns.cpu_ms},
    )


if __name__ == "__main__":
    main()
