"""Which implementation of an operation runs: decided per call, from where its tensors are.

An operation is one custom op with one schema. Its body asks `runs_triton(x)` and launches a kernel, or
computes the same with PyTorch and the same saved tensors. Inside a compiled graph the op is opaque, so
the question is never part of a graph.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import CustomOpDef

from fasttune_kernels import cpu_library
from fasttune_kernels.triton_probe import why_no_triton

Backend = Literal["triton", "torch"]

_forced: Backend | None = None
_stands_for: str | None = None


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Inside, every operation runs this implementation: for tests, which run Triton's interpreter on CPU
    tensors, and for benchmarks. Holds for all threads, as backwards run in one of their own."""
    global _forced
    before = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def computed_as_on(device_type: str) -> Iterator[None]:
    """Inside, every operation runs the PyTorch implementation of this kind of device, such as "mps", where
    its tensors are: for tests of what the machine does not have. Holds for all threads."""
    global _stands_for
    before = _stands_for
    _stands_for = device_type
    try:
        with forced("torch"):
            yield
    finally:
        _stands_for = before


def device_type(x: Tensor) -> str:
    """The kind of device that the PyTorch implementation is chosen by."""
    return _stands_for or x.device.type


def custom_op(
    name: str, *, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.custom_op` for a body that launches kernels: it runs with the GPU of its tensors
    current, as those of PyTorch's own operators do. Launches go to the current GPU, wherever their
    pointers lead."""

    def register(body: Callable[..., Any]) -> CustomOpDef:
        @wraps(body)
        def on_its_gpu(*args: Any, **kwargs: Any) -> Any:
            if not _has_several_gpus() or (other := _gpu_to_make_current(args)) is None:
                return body(*args, **kwargs)
            with torch.cuda.device(other):
                return body(*args, **kwargs)

        return torch.library.custom_op(name, on_its_gpu, mutates_args=tuple(mutates_args))

    return register


@cache
def _has_several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _gpu_to_make_current(args: tuple[Any, ...]) -> int | None:
    """Index of the GPU of the first tensor, if it is on one that is not current."""
    for given in args:
        first = given[0] if isinstance(given, list | tuple) and given else given
        if isinstance(first, Tensor):
            index: int | None = first.device.index if first.is_cuda else None
            return None if index is None or index == torch.cuda.current_device() else index
    return None


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on `x` launches its Triton kernel: on NVIDIA and AMD GPUs."""
    if _forced is not None:
        return _forced == "triton"
    return x.is_cuda and why_no_triton(x.device) is None


def runs_cpp(x: Tensor) -> bool:
    """Whether an operation on `x` that csrc/cpu has runs there: on the CPU, where it is built."""
    return _forced is None and x.device.type == "cpu" and cpu_library.available()


def arch(device: torch.device) -> str:
    """The target that launch configs are chosen by: "sm_89", "gfx1100". Off a GPU "sm_80", whose
    configs are the smallest of NVIDIA's, for the interpreter."""
    return _arch(device.index or 0) if device.type == "cuda" else "sm_80"


@cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of a GPU; 4 elsewhere, for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
