"""What a step costs beside forward, backward and update: the loop's own Python.

    python -m benchmarks.foundation.loop_overhead [--steps 400] [--folder FOLDER]

The real `fasttune.train.train` runs on the tiny SDXL with cached data, twice:

- network: the clock runs around every call of the denoiser, the backward and the update (clipping,
  AdamW). A step's overhead is its wall time less these. It contains the data, seeds, noise, the
  objective's arithmetic, metrics and, every tenth step, the line of metrics.jsonl. Freeing the
  forward's graph, which torch does when the last reference to the loss goes, is timed apart ("graph")
  and belongs to the backward.
- empty: the denoiser is replaced by a multiplication with one trainable number. The whole step is
  then overhead, with what the loader thread takes from the interpreter included: an upper bound.

Each is given in wall time and in processor time of the loop's thread. The second does not grow when
other processes compete for the machine, and leaves out waiting for the loader.
"""

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness import emit, spread
from benchmarks.tiny_run import config, write_inputs
from fasttune import train as loop
from fasttune.data.loader import Reader
from fasttune.trained import Trained

WARMUP_STEPS = 20
PARTS = ("forward", "backward", "graph", "update")


Times = tuple[float, float]
"""Seconds of wall time and of processor time of this thread."""


def now() -> Times:
    return time.perf_counter(), time.thread_time()


def since(begin: Times) -> Times:
    wall, cpu = now()
    return wall - begin[0], cpu - begin[1]


class Clock:
    """Times of each step and of its parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Times]] = []
        self.batches: list[Times] = []
        self._parts: dict[str, Times] = {}
        self._begin = now()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] = since(begin)

        return call

    def step_done(self) -> None:
        self.steps.append({"step": since(self._begin), **self._parts})
        self._parts = {}
        self._begin = now()

    def timed_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For the loader's thread."""

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.batches.append(since(begin))

        return call


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Within, `clock` measures the training loop. A step ends where the next one begins: at the
    learning rate, which the loop sets first."""
    family = loop.MODELS["sdxl"]
    backward = clock.timed("backward", Trained.backward)
    free_graph = clock.timed("graph", torch.Tensor.detach_)

    def backward_and_free(self: Trained, loss: Tensor) -> None:
        backward(self, loss)
        free_graph(loss)

    timed = dataclasses.replace(family, predict=clock.timed("forward", family.predict))
    set_lr = Trained.set_lr

    def begin_step(self: Trained, step: int) -> float:
        clock.step_done()
        return set_lr(self, step)

    with (
        mock.patch.object(loop, "MODELS", {"sdxl": timed}),
        mock.patch.object(Trained, "set_lr", begin_step),
        mock.patch.object(Trained, "backward", backward_and_free),
        mock.patch.object(Trained, "update", clock.timed("update", Trained.update)),
        mock.patch.object(Reader, "_collate", clock.timed_batch(Reader._collate)),
    ):
        yield


class Empty(nn.Module):
    """A network with nothing to compute, one trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x * self.factor


@contextlib.contextmanager
def emptied() -> Iterator[None]:
    """Within, the loop trains `Empty`, and exports nothing."""
    with (
        mock.patch.object(loop, "denoiser_for", lambda *_: Empty()),
        mock.patch.object(loop, "set_recompute", lambda *_: None),
        mock.patch.object(loop, "export", lambda *_, **__: []),
    ):
        yield


def measure(folder: Path, steps: int, variant: str) -> None:
    clock = Clock()
    with contextlib.ExitStack() as stack:
        if variant == "empty":
            stack.enter_context(emptied())
        stack.enter_context(watched(clock))
        loop.train(config(folder, steps=steps, name=f"loop-{variant}"))
    # The first interval is what came before the loop.
    fair = clock.steps[1 + WARMUP_STEPS :]
    overhead = {
        unit: [
            1000 * (s["step"][i] - (0 if variant == "empty" else sum(s[p][i] for p in PARTS)))
            for s in fair
        ]
        for i, unit in enumerate(("ms", "cpu_ms"))
    }
    emit(
        f"loop overhead: {variant}",
        **spread(overhead["ms"], "ms"),
        **spread(overhead["cpu_ms"], "cpu_ms"),
        steps=len(fair),
        **{f"median_{part}_ms": median_ms([s[part][0] for s in fair]) for part in ("step", *PARTS)},
        median_loader_thread_cpu_ms=median_ms([cpu for _, cpu in clock.batches]),
    )


def median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="for inputs and runs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        write_inputs(folder)
        for variant in ("network", "empty"):
            measure(folder, args.steps, variant)


if __name__ == "__main__":
    main()
