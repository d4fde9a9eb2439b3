"""What blocks keep for their backward, in host memory meanwhile.

After a block's forward its tensors are copied to pinned memory on a stream of their own, while the next
block computes; in the backward they come back while the block after them computes. At most one block's
tensors are on the way at a time, out or back: the next block's copy begins only where the computation
waits for the last one's end. So the memory beyond "recompute" is two blocks' tensors, whatever the bus
does, and a bus that is too slow costs time alone: at 25 GB/s a Flux single block's "mlp" (113 MB at 1024 px)
takes 4.5 ms each way.

A device tensor is held until the computation's stream has waited for its copy, and then freed to that
stream, where it came from. `record_stream` would do without the wait, but leave the block out of use
until the host sees the copy done: the host is many blocks ahead, and each would find new memory.

Pinned memory comes from torch's caching host allocator (ATen/core/CachingHostAllocator.h): a copy with
`non_blocking` records its stream with the host block (native/cuda/Copy.cu), and a block that is freed
is given out again once what its streams had to do then is done. It rounds sizes up to a power of two,
so buckets of nearly equal area share buffers, and 113 MB take 134. Pinning new memory is slow, and a matter
of the first steps. Host tensors are given up one by one in the backward, not with the graph: by the time the
next forward asks, the copies from most of them are done, however far ahead the host is.

Where the device is the host nothing is copied: on a CPU, and on Apple's GPUs, whose memory is the host's; a
copy there would take the same bytes a second time.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Road(Protocol):
    """Copies between a device and its host, one after the other, beside the computation."""

    def out(self, tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """Begins copies of what the computation has made so far: host tensors, or what stands for
        them, and the event of their end."""

    def back(self, hosts: Sequence[Any]) -> tuple[list[Tensor], Any]:
        """Begins the way back: tensors that may be used after the event, and the event."""

    def wait(self, event: Any) -> None:
        """What the computation does from here on follows the event. The host does not wait."""


class CudaRoad:
    """On a stream of a CUDA or ROCm device. Tensors belong to the computation's stream throughout."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._computing = torch.cuda.current_stream(device)

    def out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        hosts = [torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors]
        self._computing = torch.cuda.current_stream(self._device)
        return hosts, self._copy(tensors, hosts)

    def back(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        found = [torch.empty_like(x, device=self._device, pin_memory=False) for x in hosts]
        return found, self._copy(hosts, found)

    def wait(self, event: Any) -> None:
        # The asking thread may be another's, such as one in which a dropped graph is collected.
        for stream in {self._computing, torch.cuda.current_stream(self._device)}:
            stream.wait_event(event)

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Any:
        # Also of targets: their memory may be in use up to here.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()


@dataclass(frozen=True, slots=True)
class Absent:
    """A tensor on a host that is not there."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class RehearsedRoad:
    """For fake tensors on another device that stand for a GPU's: what is away takes no memory, and what
    comes back is new."""

    def out(self, tensors: Sequence[Tensor]) -> tuple[list[Absent], None]:
        return [Absent(x.shape, x.stride(), x.dtype, x.device) for x in tensors], None

    def back(self, hosts: Sequence[Absent]) -> tuple[list[Tensor], None]:
        made = [
            torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device) for x in hosts
        ]
        return made, None

    def wait(self, event: None) -> None:
        pass


class Away:
    """One block's tensors, from its forward to its backward."""

    def __init__(
        self, road: Road, names: tuple[str, ...], tensors: list[Tensor], before: "Away | None"
    ) -> None:
        self._here: list[Tensor] | None = None
        """On the device, while the copy out or back is under way; the event is that copy's end."""
        self._road, self._names = road, names
        self._hosts, self._event = road.out(tensors)
        self._here = tensors
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> "Away | None":
        """Of the block before, if its backward is still to come."""
        before = None if self._before is None else self._before()
        return before if before is not None and before._hosts else None

    def begin(self) -> None:
        """Starts the way back, unless the tensors are here."""
        if self._here is None:
            self._here, self._event = self._road.back(self._hosts)

    def leave(self) -> None:
        """Leaves the tensors to the host; the computation waits for a copy under way."""
        if self._here is not None:
            self._road.wait(self._event)
            self._here = None

    def take(self, *, again: bool) -> dict[str, Tensor]:
        """The tensors, which the caller then owns; with `again` they can be had once more."""
        self.begin()
        tensors = self._here
        self.leave()  # the wait is before their use
        assert tensors is not None
        if not again:
            self._hosts = []
        return dict(zip(self._names, tensors, strict=True))

    def __del__(self) -> None:
        # A graph that is dropped without its backward: the copy may still read this memory.
        if not sys.is_finalizing():
            self.leave()


class Offload:
    """Of one network: what leaves, in the order of the forward, and what comes back ahead of its turn.

    It owns nothing. What was sent belongs to the graph, so that a forward without a backward leaves
    nothing behind, and the graphs of several micro-batches can live side by side.
    """

    def __init__(self, *, road: Road | None = None, stands_for: str | None = None) -> None:
        """`stands_for` is the kind of device that a rehearsal's fake CPU tensors stand for. By default
        the road is what the tensors' device has."""
        self._road, self._stands_for = road, stands_for
        self._last: weakref.ref[Away] | None = None
        self._ahead: weakref.ref[Away] | None = None

    def send(self, tensors: Mapping[str, Tensor]) -> Away | None:
        """Begins to move a block's tensors to the host. None if they stay, which is where the device is
        the host; then the caller keeps them."""
        road = self._road_from(next(iter(tensors.values()))) if tensors else None
        if road is None:
            return None
        last = None if self._last is None else self._last()
        ahead = None if self._ahead is None else self._ahead()
        for other in (last, ahead):  # ahead: of a backward that was broken off
            if other is not None:
                other.leave()
        away = Away(road, tuple(tensors), list(tensors.values()), last)
        self._last, self._ahead = weakref.ref(away), None
        return away

    def fetch(self, away: Away) -> dict[str, Tensor]:
        """A block's tensors, for its backward; those of the block before start on their way."""
        away.begin()
        ahead = away.before
        if ahead is not None:
            ahead.begin()
            self._ahead = weakref.ref(ahead)
        return away.take(again=torch._C._autograd._get_current_graph_task_keep_graph())

    def _road_from(self, tensor: Tensor) -> Road | None:
        if self._road is None:
            if tensor.device.type == "cuda":
                self._road = CudaRoad(tensor.device)
            elif self._stands_for == "cuda" and isinstance(tensor, FakeTensor):
                self._road = RehearsedRoad()
        return self._road
