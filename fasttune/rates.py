"""Step times on any device, the rates that follow from them, and peak memory."""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARMUP_STEPS = 3
"""Steps after a start that are not timed: kernels are chosen, compiled and cached in them."""

ETA_STEPS = 1000
"""The ETA takes the median of this many of the newest step times."""

_GIB = 2**30


class Rates:
    """Step time and what follows from it, from durations alone."""

    def __init__(self, *, batch_images: int, warmup_steps: int = WARMUP_STEPS) -> None:
        self.batch_images = batch_images
        self._warmup_left = warmup_steps
        self._settled: list[float] = []
        self._after_pause: list[float] = []

    def add(self, seconds: float, *, after_pause: bool = False) -> bool:
        """Count one step; True if its time is a fair one.

        The first `warmup_steps` are not, nor is the step after validation or a checkpoint: it
        starts with an emptied allocator and cold caches.
        """
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return False
        (self._after_pause if after_pause else self._settled).append(seconds)
        return not after_pause

    @property
    def step_seconds(self) -> Sequence[float]:
        """Times of the steps after warm-up; those after pauses only if there are no others."""
        return self._settled or self._after_pause

    def median_s(self) -> float | None:
        """Median step time in seconds; None during warm-up."""
        newest = self.step_seconds[-ETA_STEPS:]
        return statistics.median(newest) if newest else None

    def images_per_s(self, step_s: float | None) -> float | None:
        """Throughput at this step time."""
        return self.batch_images / step_s if step_s else None

    def eta_s(self, steps_left: int, *, pause_s_per_step: float = 0.0) -> float | None:
        """Seconds for the remaining steps, with pauses as frequent as until now."""
        median = self.median_s()
        return None if median is None else steps_left * (median + pause_s_per_step)


class StepTimer:
    """Durations of steps on the device, without waiting for it.

    On a GPU the host only queues work, so its clock says nothing about a single step; events in
    the queue do, and their times are read after the device has been waited for anyway.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._start: Any = None
        self._after_pause = False
        self._pending: list[tuple[Any, Any, bool]] = []

    def _mark(self) -> Any:
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
        elif self._device.type == "mps":
            event = torch.mps.event.Event(enable_timing=True)
        else:
            return self._clock()
        event.record()
        return event

    def step_done(self) -> None:
        """The step has been queued to its end; the next one starts here."""
        now = self._mark()
        self._pending.append((self._start, now, self._after_pause))
        self._start = now
        self._after_pause = False

    def restart(self) -> None:
        """Time from here on; what lies before, since the last step, belongs to no step."""
        self._start = self._mark()
        self._after_pause = True

    def collect(self) -> list[tuple[float | None, bool]]:
        """(seconds, follows a pause) of each step since the last call; the device must be idle.

        Seconds are None for the first step, whose start nobody marked.
        """
        pending, self._pending = self._pending, []
        return [
            (None if start is None else self._seconds(start, end), after_pause)
            for start, end, after_pause in pending
        ]

    def _seconds(self, start: Any, end: Any) -> float:
        if self._device.type in ("cuda", "mps"):
            return start.elapsed_time(end) / 1000
        return end - start


def wait_for(device: torch.device) -> None:
    """Returns when all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak device memory in GiB since `reset_peak_memory`; on a CPU, of the process's whole life.

    MPS keeps no peak: there it is what the driver holds now, and the caller keeps the maximum.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / _GIB
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / _GIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _GIB if sys.platform == "darwin" else peak * 1024 / _GIB


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the device keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
