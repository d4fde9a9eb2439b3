"""Stand-ins for CUDA's events, graphs and allocator, which keep the host's time and given sizes: they show that
the code around them runs and counts right, not what a GPU would say."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return max(1000 * (end.at - self.at), 1e-6)


class _Graph:
    """Remembers that it was captured, and replays in no time."""

    replays = 0

    def replay(self) -> None:
        _Graph.replays += 1


class Cuda(SimpleNamespace):
    """What was asked of the stand-in."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    asked = Cuda(captures=0, fractions=[], fail_capture=False, free=70 * 2**30, total=80 * 2**30)

    @contextmanager
    def graph(captured: Any, *, stream: Any = None) -> Iterator[None]:
        assert stream is not None
        asked.captures += 1
        if asked.fail_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    @contextmanager
    def stream_of(stream: Any) -> Iterator[None]:
        yield

    properties = SimpleNamespace(L2_cache_size=1024, total_memory=asked.total)
    for name, value in {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": graph,
        "stream": stream_of,
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: None,
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "mem_get_info": lambda device=None: (asked.free, asked.total),
        "memory_reserved": lambda: 2**30,
        "get_device_properties": lambda device=None: properties,
        "set_per_process_memory_fraction": asked.fractions.append,
        "max_memory_allocated": lambda: 3 * 2**30,
        "max_memory_reserved": lambda: 4 * 2**30,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked
