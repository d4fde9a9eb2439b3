"""How calls are timed, and the ceilings beside them."""

import time
from typing import Any

import pytest
import torch

from benchmarks.gpu import timing

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class _NoFlush:
    def __call__(self) -> None:
        pass


def _timers(*, copies: int = 1, graphs: bool = True, **calls: Any) -> dict[str, timing.Timer]:
    timers, too_large = timing.timers_for(
        calls,
        copies=copies,
        device=CUDA,
        flush=_NoFlush(),  # type: ignore[arg-type]
        graphs=graphs,
    )
    assert not too_large
    return timers


def test_long_calls_are_timed_by_events(cuda: Any) -> None:
    timer = _timers(a=lambda i: time.sleep(0.002))["a"]
    assert timer.method == "events" and cuda.captures == 0
    assert 1500 < timer() < 100_000


def test_short_calls_are_timed_by_a_graph_of_many(cuda: Any) -> None:
    calls: list[int] = []
    timer = _timers(copies=3, a=calls.append)["a"]
    assert timer.method == "graph" and cuda.captures == 1
    captured = calls[-21:]
    assert captured == [0, 1, 2] * 7  # 20 at least, all copies alike
    before = torch.cuda.CUDAGraph.replays
    assert timer() > 0 and torch.cuda.CUDAGraph.replays > before + 1


def _nothing(i: int) -> None:
    pass


def test_contenders_of_a_case_are_timed_alike(cuda: Any) -> None:
    timers = _timers(short=_nothing, long=lambda i: time.sleep(0.001))
    assert [timer.method for timer in timers.values()] == ["graph", "graph"]
    timers = _timers(short=_nothing, long=lambda i: time.sleep(0.001), graphs=False)
    assert [timer.method for timer in timers.values()] == ["events", "events"]
    assert all("cannot be captured" in str(timer.note) for timer in timers.values())


def test_after_a_failed_capture_nothing_is_timed_in_the_process(cuda: Any) -> None:
    cuda.fail_capture = True
    with pytest.raises(timing.CaptureError, match="a cannot be captured: operation not permitted"):
        _timers(a=_nothing)


def test_what_does_not_fit_has_no_timer(cuda: Any) -> None:
    def large(i: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timers, too_large = timing.timers_for(
        {"large": large, "long": lambda i: time.sleep(0.001)},
        copies=1,
        device=CUDA,
        flush=_NoFlush(),  # type: ignore[arg-type]
    )
    assert list(timers) == ["long"] and too_large == ["large"]


def test_copies_are_more_than_the_cache_holds(cuda: Any) -> None:
    for size in (1, 100, 1000, 5000):
        copies = timing.copies_needed(size, CUDA)
        assert copies == 64 or copies * size > 2 * 1024
    cuda.free = 4000
    assert timing.copies_needed(1000, CUDA) == 1


def test_ceilings() -> None:
    ceilings, samples = timing.measure_ceilings(CPU, timing.Flush(CPU), small=True)
    assert ceilings.gb_per_s > 0 and len(samples["tflop_per_s"]) == 2
    exact = timing.Ceilings(gb_per_s=1000.0, tflop_per_s=100.0)
    assert exact.floor_us(moved=10**9, flops=0) == pytest.approx(1000)
    assert exact.floor_us(moved=10**6, flops=10**12) == pytest.approx(10_000)
