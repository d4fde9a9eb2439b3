"""What a run measures: metrics.jsonl, step times, throughput, memory.

`Metrics.step` runs once a step and waits for the device after the first one alone: losses stay where
they are and time on a GPU is taken by events in its own queue. Both are read at logging steps, in
one transfer.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttune.metrics_file import MetricsFile, finite, read_metrics
from fasttune.models.compiled import Compiler
from fasttune.progress import Progress, setup_run_log
from fasttune.rates import Rates, StepTimer, peak_memory_gib, reset_peak_memory, wait_for
from fasttune.trackers import Tracker, open_trackers

# The loop needs nothing beyond these.
__all__ = ["Metrics", "MetricsFile", "open_trackers", "read_metrics", "setup_run_log"]

LOSS_DECAY = 0.98
"""Decay of the smoothed loss a step: an average over about 50 steps."""


class Metrics:
    """Everything the loop says about its progress, in one place.

    total_steps, start_step: of the whole run, and those an earlier start made. batch_images: images
    a step, over all micro-batches and devices. images_per_epoch: for the `epoch` of each line.
    norms_may_overflow: a loss scale skips updates whose gradient norm is not finite.
    compiler: of the network's blocks, if they are compiled. begin: when this start began, on the clock;
    None: the first step is not timed. clock: seconds, for tests.

    The loop calls `step` after each step and `log_now` at logging steps and after the last one,
    puts validation and checkpoints inside `paused`, and ends with `close`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        batch_images: int,
        start_step: int = 0,
        trackers: Sequence[Tracker] = (),
        show_progress: bool = True,
        images_per_epoch: int | None = None,
        norms_may_overflow: bool = False,
        compiler: Compiler | None = None,
        begin: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._start_step = start_step
        self._batch_images = batch_images
        self._images_per_epoch = images_per_epoch
        self._trackers = tuple(trackers)
        self._clock = clock
        self._file = MetricsFile(run_dir / "metrics.jsonl", start_step)
        self._rates = Rates(batch_images=batch_images)
        self._timer: StepTimer | None = None
        self._device: torch.device | None = None
        self.first_nonfinite_step: int | None = None
        """The first step whose loss or gradient was NaN or infinite; known after `log_now`."""
        self._norms_may_overflow = norms_may_overflow
        self._compiler = compiler
        self._first_step_s: float | None = None

        # A resumed curve goes on as if it had never stopped: the sum behind the smoothed loss
        # follows from its value and the number of steps it has seen.
        past = [line for line in self._file.kept if line.get("loss_smoothed") is not None]
        self._loss_weight = 1 - LOSS_DECAY ** past[-1]["step"] if past else 0.0
        self._loss_sum = past[-1]["loss_smoothed"] * self._loss_weight if past else 0.0
        self._elapsed_before = max((line.get("elapsed_s") or 0.0 for line in past), default=0.0)
        held_out = [line["held_out_loss"] for line in self._file.kept if "held_out_loss" in line]
        self._held_out: list[float | None] = held_out

        self._step = start_step
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._lr = 0.0
        self._grad_norms: list[Tensor] = []
        self._data_waits: list[float] = []
        self._wait_total = 0.0
        self._wait_steps_s = 0.0
        self._peak: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}
        self._pause_s_after_first_step = 0.0
        self._started = clock()
        self._begin = begin
        self.progress = Progress(
            total_steps=total_steps, start_step=start_step, enabled=show_progress
        )

    def step(
        self,
        step: int,
        loss: Tensor,
        lr: float,
        grad_norm: Tensor,
        data_wait_s: float,
    ) -> None:
        """Count a step that has been queued. Waits for the device after the first one alone.

        loss, grad_norm (before clipping): scalars, on any device, read at the next `log_now`; the
        loss is copied, so its memory may be used again. data_wait_s: seconds that the loop waited
        for the step's batches.
        """
        if self._timer is None:
            self._device = loss.device
            self._timer = StepTimer(loss.device, self._clock)
            reset_peak_memory(loss.device)
            if self._begin is not None:
                self._first_step_done(loss.device, self._begin)
        self._timer.step_done()
        self._step = step
        self._steps.append(step)
        self._losses.append(loss.detach().clone())
        self._lr = lr
        self._grad_norms.append(grad_norm)
        self._data_waits.append(data_wait_s)
        self.progress.update(step)

    def log_now(self, step: int) -> dict[str, Any]:
        """Write the line of `step` to every output and return it; {} if there was no new step.

        Waits for the device once, for all losses since the last call.
        """
        if not self._losses or self._timer is None or self._device is None:
            return {}
        # sync: logging steps alone; one transfer for the whole window.
        scalars = [*self._losses, *self._grad_norms]
        values = torch.stack([value.reshape(()).float() for value in scalars]).tolist()
        losses, norms = values[: len(self._losses)], values[len(self._losses) :]
        self._smooth(losses, norms)
        step_s, data_wait_share = self._time_window()
        self._note_peak("training")
        line: dict[str, Any] = {
            "step": step,
            "loss": losses[-1],
            "loss_smoothed": self._loss_smoothed(),
            "lr": self._lr,
            "grad_norm": norms[-1],
            "step_ms": None if step_s is None else step_s * 1000,
            "images_per_s": self._rates.images_per_s(step_s),
            "peak_gib": self._peak.get("training"),
            "data_wait_share": data_wait_share,
            "epoch": self._epoch(step),
            "elapsed_s": self._elapsed(),
        }
        self._steps.clear()
        self._losses.clear()
        self._grad_norms.clear()
        self._data_waits.clear()
        self._file.write(line)
        self._track(step, {f"train/{key}": line[key] for key in line if key != "step"})
        median = self._rates.median_s()
        self.progress.update(
            step,
            line
            | {
                "step_ms": None if median is None else median * 1000,
                "images_per_s": self._rates.images_per_s(median),
                "eta_s": self._eta(step),
            },
        )
        return line

    @contextmanager
    def paused(self, phase: str = "validation") -> Iterator[None]:
        """Around validation, checkpoints and the like: their time and memory are not the step's."""
        begin = self._clock()
        if self._device is not None:
            self._note_peak("training")
            reset_peak_memory(self._device)
        try:
            yield
        finally:
            seconds = self._clock() - begin
            self._pause_s[phase] = self._pause_s.get(phase, 0.0) + seconds
            if self._step > self._start_step:
                self._pause_s_after_first_step += seconds
            if self._device is not None:
                self._note_peak(phase)
                reset_peak_memory(self._device)
            if self._timer is not None:
                self._timer.restart()

    def held_out(
        self,
        step: int,
        loss: float,
        per_timestep: Sequence[float],
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Record the held-out loss, and its parts at the fixed noise levels `timesteps`."""
        record: dict[str, Any] = {
            "step": step,
            "held_out_loss": float(loss),
            "held_out_per_timestep": [float(value) for value in per_timestep],
        }
        if timesteps is not None:
            record["held_out_timesteps"] = [float(value) for value in timesteps]
        self._held_out.append(float(loss))
        self._file.write(record)
        self._track(step, {"held_out/loss": float(loss)})
        self.progress.note(f"step {step}: held-out loss {loss:.5f}")

    def samples(self, step: int, path: Path) -> None:
        """Record a sample grid, a PNG in the run folder."""
        shown = path.relative_to(self._run_dir) if path.is_relative_to(self._run_dir) else path
        self._file.write({"step": step, "samples": shown.as_posix()})
        for tracker in self._trackers:
            tracker.image(step, "samples", path)
        self.progress.note(f"step {step}: samples at {path}")

    def has(self, step: int, key: str) -> bool:
        """Whether an earlier start has recorded `key` ("samples", "held_out_loss") for `step`."""
        return any(line["step"] == step and key in line for line in self._file.kept)

    def note(self, message: str) -> None:
        """Log a message above the progress bar."""
        self.progress.note(message)

    def summary(self) -> dict[str, Any]:
        """The run in numbers, for summary.json and the report.

        Times by phase are of this start alone; elapsed_s includes earlier ones. Quantities that
        were not measured are None.
        """
        times_ms = [seconds * 1000 for seconds in self._rates.step_seconds]
        quantiles = statistics.quantiles(times_ms, n=10) if len(times_ms) > 1 else times_ms * 9
        median_ms = statistics.median(times_ms) if times_ms else None
        elapsed = self._elapsed()
        pauses = dict(self._pause_s)
        this_start = elapsed - self._elapsed_before
        wait_share = self._wait_total / self._wait_steps_s if self._wait_steps_s else None
        return finite(
            {
                "steps": self._step,
                "total_steps": self._total_steps,
                "start_step": self._start_step,
                "images_seen": self._step * self._batch_images,
                "loss_smoothed": self._loss_smoothed(),
                "held_out_first": self._held_out[0] if self._held_out else None,
                "held_out_last": self._held_out[-1] if self._held_out else None,
                "step_ms": median_ms,
                "step_ms_p10": quantiles[0] if quantiles else None,
                "step_ms_p90": quantiles[-1] if quantiles else None,
                "images_per_s": self._rates.images_per_s(median_ms and median_ms / 1000),
                "peak_gib": self._peak.get("training"),
                "peak_gib_by_phase": dict(self._peak),
                "data_wait_share": wait_share,
                "elapsed_s": elapsed,
                "seconds": {"training": this_start - sum(pauses.values()), **pauses},
                "first_step_s": self._first_step_s,
                "compiled": None if self._compiler is None else self._compiler.summary(),
            }
        )

    def close(self) -> None:
        """Close every output; the loop has called `log_now` for its last step."""
        self.progress.close()
        for tracker in self._trackers:
            tracker.close()
        self._file.close()

    def _first_step_done(self, device: torch.device, begin: float) -> None:
        """Notes the time that a user waits before training runs: preparation, loading, an untrained
        grid, compilation."""
        wait_for(device)  # sync: once a start
        self._first_step_s = self._clock() - begin
        text = f"first step done after {self._first_step_s:.1f} s"
        self.note(text if self._compiler is None else f"{text}; {self._compiler}")

    def _smooth(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        for step, loss, norm in zip(self._steps, losses, norms, strict=True):
            if math.isfinite(loss):
                self._loss_sum = LOSS_DECAY * self._loss_sum + (1 - LOSS_DECAY) * loss
                self._loss_weight = LOSS_DECAY * self._loss_weight + (1 - LOSS_DECAY)
            finite = math.isfinite(loss) and (math.isfinite(norm) or self._norms_may_overflow)
            if not finite and self.first_nonfinite_step is None:
                self.first_nonfinite_step = step

    def _loss_smoothed(self) -> float | None:
        return self._loss_sum / self._loss_weight if self._loss_weight else None

    def _time_window(self) -> tuple[float | None, float | None]:
        """(mean step time in seconds, data-wait share) of the window's fair steps."""
        assert self._timer is not None
        fair: list[tuple[float, float]] = []
        for (seconds, after_pause), wait in zip(
            self._timer.collect(), self._data_waits, strict=True
        ):
            if self._rates.add(seconds or 0.0, after_pause=after_pause) and seconds:
                fair.append((seconds, wait))
        total_s = sum(seconds for seconds, _ in fair)
        wait_s = sum(wait for _, wait in fair)
        self._wait_total += wait_s
        self._wait_steps_s += total_s
        # A host that runs ahead of the GPU can wait longer than the steps last.
        return (total_s / len(fair), min(wait_s / total_s, 1.0)) if fair else (None, None)

    def _note_peak(self, phase: str) -> None:
        assert self._device is not None
        peak = peak_memory_gib(self._device)
        if peak is not None:
            self._peak[phase] = max(peak, self._peak.get(phase, 0.0))

    def _track(self, step: int, values: Mapping[str, float | None]) -> None:
        scalars = {key: value for key, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def _epoch(self, step: int) -> float | None:
        if not self._images_per_epoch:
            return None
        return step * self._batch_images / self._images_per_epoch

    def _elapsed(self) -> float:
        return self._elapsed_before + self._clock() - self._started

    def _eta(self, step: int) -> float | None:
        done = step - self._start_step
        pause = self._pause_s_after_first_step / done if done > 0 else 0.0
        return self._rates.eta_s(self._total_steps - step, pause_s_per_step=pause)
