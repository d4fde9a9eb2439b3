"""Where Triton's kernels cannot be launched, PyTorch computes, and it is said why. GPUs are pretended."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from fasttune_kernels import dispatch, triton_probe
from fasttune_kernels.triton_probe import why_no_triton

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class OnGpu(torch.Tensor):
    is_cuda = True
    device = GPU  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    triton_probe._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(triton_probe.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(triton_probe, "HAS_TRITON", True)
    yield
    triton_probe._problem.cache_clear()


def kernel(monkeypatch: pytest.MonkeyPatch, launch: Callable[[], None]) -> list[int]:
    """Has the probe's kernel do `launch`; returns a list that grows with each."""
    tries: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            tries.append(1)
            return lambda *_, **__: launch()

    monkeypatch.setattr(triton_probe, "_probe_kernel", Kernel())
    return tries


def fails() -> None:
    raise RuntimeError("\nFailed to find C compiler.\nPlease set CC.")


def test_a_kernel_that_fails_once_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = kernel(monkeypatch, fails)
    for _ in range(2):
        assert why_no_triton(GPU) == "RuntimeError: Failed to find C compiler."
        assert not dispatch.runs_triton(torch.ones(2).as_subclass(OnGpu))
    assert len(tries) == 1


def test_a_kernel_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = kernel(monkeypatch, lambda: None)
    assert why_no_triton(GPU) is None and why_no_triton(CPU) is None
    assert dispatch.runs_triton(torch.ones(2).as_subclass(OnGpu))
    assert not dispatch.runs_triton(torch.ones(2))
    assert len(tries) == 1


def test_too_little_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("full")

    tries = kernel(monkeypatch, full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            why_no_triton(GPU)
    assert len(tries) == 2


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_probe, "HAS_TRITON", False)
    assert why_no_triton(GPU) == "Triton is not installed"
