"""Time on the device: cold caches, warmed up, without the host's share.

Three ways, by device and length of the call:

- events around a call, behind a flush of the L2 cache and a pause of the device that lets the host
  queue the whole call first, so that launch gaps are those of the device alone;
- replays of a CUDA graph of many calls, for calls under 50 us, where events would measure
  themselves. The calls take turns on copies of the inputs that together are larger than the cache;
  contenders of one case are all timed in one of these two ways;
- the host's clock around a synchronisation, where there are no events (CPU, MPS).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.card import is_out_of_memory, synchronize

Call = Callable[[int], Any]
"""Queues one call on copy number i of its inputs."""

SHORT_US = 50.0
GRAPH_CALLS = 20
"""Calls in a graph, at least: their replay takes far longer than the launch of the graph."""
WARM_UP_CALLS = 3
_SAMPLE_US = 2000.0
"""Time of a sample: of so many calls that they take this long, ten at most, it is the median."""
_ASSUMED_GHZ = 2.0
"""Cycles of the pause before a call: of the fastest clocks there are, so that a pause is not short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timer:
    """Calls give microseconds of one call."""

    sample: Callable[[], float]
    method: str
    """events, graph or host."""
    note: str | None = None

    def __call__(self) -> float:
        return self.sample()


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory; 0 where it is not known."""
    if device.type != "cuda":
        return 0
    size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    # MI300's Infinity Cache, 256 MiB behind the L2, is in no property.
    return max(size, 256 * 2**20) if torch.version.hip is not None else size


def copies_needed(input_bytes: int, device: torch.device, *, most: int = 64) -> int:
    """Copies of inputs that, taken in turns, find nothing of themselves left in the cache. They take
    a quarter of the free memory at most."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    fitting = max(1, int(free / 4 / max(input_bytes, 1)))
    return min(most, fitting, 2 * cache_bytes(device) // max(input_bytes, 1) + 2)


class Flush:
    """Fills the cache with something else: a write of twice its size."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * cache_bytes(device)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=device) if size else None

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()


class CaptureError(RuntimeError):
    """A call cannot be captured in a graph. Stream, allocator and random numbers of this process may still
    be in the capture, so nothing more may be timed in it."""


def timers_for(
    calls: Mapping[str, Call],
    *,
    copies: int,
    device: torch.device,
    flush: Flush,
    graphs: bool = True,
) -> tuple[dict[str, Timer], list[str]]:
    """Warms the calls up and times all in the same way: by graphs if one of them is short, else by
    events. Also the names of those that do not fit into the memory, which have no timer.

    CaptureError if one cannot be captured; `graphs` false does without.
    """
    samples: dict[str, Callable[[], float]] = {}
    too_large = []
    for name, call in calls.items():
        try:
            for i in range(WARM_UP_CALLS):
                call(i % copies)
            synchronize(device)
            samples[name] = (
                _Events(call, copies, device, flush)
                if device.type == "cuda"
                else _host(call, copies, device)
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large.append(name)
    if device.type != "cuda":
        return {n: Timer(sample=s, method="host") for n, s in samples.items()}, too_large
    short = any(sample() < SHORT_US for sample in samples.values())
    if not (short and graphs):
        note = "no graph: one of the contenders cannot be captured" if short else None
        found = {n: Timer(sample=s, method="events", note=note) for n, s in samples.items()}
        return found, too_large
    captured = {name: _captured(name, calls[name], copies, device) for name in samples}
    return {n: Timer(sample=g, method="graph") for n, g in captured.items()}, too_large


def _captured(name: str, call: Call, copies: int, device: torch.device) -> "_Graph":
    try:
        return _Graph(call, copies, device)
    except RuntimeError as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptureError(f"{name} cannot be captured: {why}") from error


def _host(call: Call, copies: int, device: torch.device) -> Callable[[], float]:
    def sample() -> float:
        synchronize(device)
        start = time.perf_counter()
        call(0)
        synchronize(device)
        return max(time.perf_counter() - start, 1e-9) * 1e6

    return sample


class _Events:
    """Median over the calls of a sample, each between two events."""

    def __init__(self, call: Call, copies: int, device: torch.device, flush: Flush) -> None:
        self._call, self._copies, self._device, self._flush = call, copies, device, flush
        start = time.perf_counter()
        call(0)
        host_s = time.perf_counter() - start
        torch.cuda.synchronize(device)
        self._pause = int(min(1.5 * host_s, 0.02) * _ASSUMED_GHZ * 1e9)
        self._calls = 1
        once = self()
        self._calls = max(1, min(10, int(_SAMPLE_US / max(once, 1.0))))

    def __call__(self) -> float:
        pairs = []
        for i in range(self._calls):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            self._flush()
            torch.cuda._sleep(self._pause)
            start.record()
            self._call(i % self._copies)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1000


class _Graph:
    """Mean over the calls of a replay, of which there are as many as a sample takes."""

    def __init__(self, call: Call, copies: int, device: torch.device) -> None:
        self._device = device
        self._calls = copies * -(-GRAPH_CALLS // copies)
        # Warmed up and captured on one stream: handles of the BLAS library belong to a stream, and
        # making one is not allowed while capturing (on ROCm it would be made lazily).
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for i in range(WARM_UP_CALLS):
                call(i % copies)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(self._calls):
                call(i % copies)
        torch.cuda.synchronize(device)
        self._replays = 1
        self()
        self._replays = max(1, min(10, int(_SAMPLE_US / max(self() * self._calls, 1.0))))

    def __call__(self) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._graph.replay()  # the first one of a sample fills the queue behind which events stand
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1000 / (self._replays * self._calls)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this device reaches in this run, doing nothing else."""

    gb_per_s: float
    """Bytes read plus bytes written by a large copy."""
    tflop_per_s: float
    """A large matrix product of random bf16 numbers (float32 where smoke runs on the CPU)."""

    def floor_us(self, moved: int, flops: int) -> float:
        """The least time of a call that moves and computes so much."""
        return max(moved / self.gb_per_s / 1e3, flops / self.tflop_per_s / 1e6)


def measure_ceilings(
    device: torch.device, flush: Flush, *, small: bool
) -> tuple[Ceilings, dict[str, list[float]]]:
    """The ceilings, and the samples they are the medians of. Seconds."""
    rounds, size, side = (2, 1 << 20, 128) if small else (10, _copy_bytes(device), 8192)
    copies = _sampled(_copy(size, device), rounds, device, flush)
    products = _sampled(_multiply(side, device), rounds, device, flush)
    samples = {
        "gb_per_s": [2 * size / us / 1e3 for us in copies],
        "tflop_per_s": [2 * side**3 / us / 1e6 for us in products],
    }
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return Ceilings(**medians), samples


def _sampled(call: Call, rounds: int, device: torch.device, flush: Flush) -> list[float]:
    timers, too_large = timers_for({"": call}, copies=1, device=device, flush=flush, graphs=False)
    if too_large:
        raise torch.OutOfMemoryError("the ceilings: out of memory; another process has the card's")
    return [timers[""]() for _ in range(rounds)]


def _copy(size: int, device: torch.device) -> Call:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)


def _multiply(side: int, device: torch.device) -> Call:
    """Of random numbers, because a card draws less power on zeros and runs faster."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    return lambda i: a @ b


def _copy_bytes(device: torch.device) -> int:
    """2 GiB, or an eighth of what is free."""
    if device.type != "cuda":
        return 1 << 28
    free, _ = torch.cuda.mem_get_info(device)
    return min(2 << 30, free // 8) // 1024 * 1024
