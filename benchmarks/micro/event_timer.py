"""Time of a GPU as a clock that pytest-benchmark can read.

pytest-benchmark calls its timer before and after the iterations of a round, and takes the difference.
The host's clock would tell how long Python took to launch the kernels. `EventTimer` instead
records an event in each call, waits for it, and adds up the device's time between the event that
ended the call before and this one. Details that matter:

- **Difference by difference.** `elapsed_time` returns milliseconds in float32. Counted from one event at
  the start, an hour's clock would tick in steps of 0.25 ms; here each interval is short, and the
  sum is a Python float.
- **A head start for the host.** Before a call ends it writes over a buffer, larger than any cache, for
  about HEAD_START_S, and records the next interval's first event behind that. The host so queues the
  round's kernels while the device is still busy, and they run without gaps between launches; an
  operation whose launches take longer than this shows them, as it would in training. The writes
  also leave the caches cold. They are in no interval.
- **Calibration.** pytest-benchmark first calls the timer twice with nothing in between, up to a
  hundred times: that measures what two events take by themselves, which is a part of every round and
  the precision that its calibration then uses. It also times one iteration, ten and so on until a round is
  long enough; OPTIONS makes one iteration enough, as only the first one of a round has cold caches.
- **Precision.** CUDA gives the resolution of events as about half a microsecond. A shorter interval
  counts as RESOLUTION_S, so that no round takes no time at all. Kernels below some 10 us are
  therefore known to 5 % a round at best; the median over the rounds is better than that, and
  `fasttune bench gpu` replays them in a graph.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

RESOLUTION_S = 0.5e-6
"""https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__EVENT.html, cudaEventElapsedTime."""
HEAD_START_S = 0.5e-3
"""The host takes 5 to 15 us for a launch in eager mode: some fifty launches."""
BUFFER_BYTES = 256 * 2**20
"""The largest last-level cache of a GPU is the 256 MB of AMD's MI300X."""

OPTIONS: dict[str, Any] = {
    "min_time": RESOLUTION_S,
    "calibration_precision": 1,
    "max_time": 0.1,
    "min_rounds": 20,
    "warmup": True,
    "warmup_iterations": 20,
}
"""For the benchmark mark. A round costs the host about a millisecond, however short its kernels, so
that pytest-benchmark's own second of rounds would take minutes."""


class Event(Protocol):
    """What is used of torch.cuda.Event(enable_timing=True)."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # milliseconds


class EventTimer:
    """Call it for seconds of device time; only differences between two calls mean anything."""

    __name__ = "cuda_events"  # in the results

    def __init__(self, new_event: Callable[[], Event], occupy: Callable[[], None]) -> None:
        """`occupy` queues work that keeps the device busy while the host gets ahead."""
        self._begin = new_event()
        self._end = new_event()
        self._occupy = occupy
        self._running = False
        self._seconds = 0.0

    def __call__(self) -> float:
        if self._running:
            self._end.record()
            self._end.synchronize()
            elapsed = self._begin.elapsed_time(self._end) / 1000
            self._seconds += max(elapsed, RESOLUTION_S)
        self._occupy()
        self._begin.record()
        self._running = True
        return self._seconds


def cuda_timer() -> EventTimer:
    """A timer of the current CUDA or ROCm device."""
    import torch

    def new_event() -> Event:
        return torch.cuda.Event(enable_timing=True)

    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cuda")
    return EventTimer(new_event, occupier(new_event, buffer.zero_))


def occupier(new_event: Callable[[], Event], write: Callable[[], Any]) -> Callable[[], None]:
    """A function that queues `write` so often that the device is busy for HEAD_START_S."""
    begin, end = new_event(), new_event()
    for _ in range(2):  # the first time also wakes the device
        begin.record()
        write()
        end.record()
        end.synchronize()
    seconds = max(begin.elapsed_time(end) / 1000, RESOLUTION_S)
    times = math.ceil(HEAD_START_S / seconds)

    def occupy() -> None:
        for _ in range(times):
            write()

    return occupy
