"""The library of csrc/cpu: the optimizer step and the norm of gradients on a processor's cores.

A plain C library, opened by ctypes, that `pip install` builds where there is a C++ compiler. It takes
addresses, so everything it is told is checked here first. One pass over memory does what PyTorch needs
several for; bytes are in csrc/cpu/optimizer_step.cpp. It works with as many threads as PyTorch, and on
PyTorch's own OpenMP threads where their runtime can be found in the process.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.arena import QUANTUM, arena_offsets, is_dense
from fasttune_kernels.blockwise import dynamic_map

FILE = Path(__file__).parent / "_cpu.so"
VERSION = 1
"""Of the functions' arguments, as fasttune_cpu_version() has it."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


class _Step(ctypes.Structure):
    """As `struct Step` of csrc/cpu/optimizer_step.cpp."""

    _fields_ = (
        ("num_tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weights", "grads", "sizes", "offsets", "groups")),
        *((name, ctypes.c_void_p) for name in ("weight_dtypes", "grad_dtypes")),
        *((name, ctypes.c_void_p) for name in ("m", "v", "m_absmax", "v_absmax", "ema")),
        *((name, ctypes.c_void_p) for name in ("compensation", "hyper", "scalars", "seed")),
        *((name, ctypes.c_void_p) for name in ("m_map", "v_map")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
        *((name, ctypes.c_int32) for name in ("state_dtype", "ema_dtype", "rounding")),
    )


@dataclass(frozen=True, slots=True)
class _Library:
    functions: Any
    level: int
    """Instruction set: the highest of the processor's."""
    threads: ctypes.c_void_p | None
    """OpenMP's entry for parallel regions, in the runtime that PyTorch has loaded."""


def available() -> bool:
    """Whether the library is built and opens."""
    return isinstance(_open(), _Library)


def reason() -> str:
    """Why it is not available; empty if it is."""
    found = _open()
    return found if isinstance(found, str) else ""


def levels() -> tuple[str, ...]:
    """The instruction sets that the library has code for and this processor can run, lowest first."""
    library = _library()
    names = map(library.functions.fasttune_cpu_level_name, range(library.level + 1))
    return tuple(name.decode() for name in names)


def sources() -> str:
    """SHA-256 of the sources that the library was built from."""
    return _library().functions.fasttune_cpu_sources().decode()


def optimizer_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    groups: Sequence[int],
    hyper: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    rounding: str,
    seed: Tensor,
    *,
    level: str | None = None,
    on_torch_threads: bool = True,
) -> None:
    """`fasttune_kernels.optimizer_step.optimizer_step_` on CPU tensors, with the same random bits.
    ValueError for what does not fit, RuntimeError where the library is not available.

    A gradient has the strides of its weight. `level`, of `levels()`, and threads of its own instead of
    PyTorch's are for tests.
    """
    library = _library()
    if not len(weights) == len(grads) == len(groups):
        raise ValueError(
            f"{len(weights)} weights, {len(grads)} gradients and {len(groups)} groups; as many of each"
        )
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding {rounding!r}; allowed are {', '.join(_ROUNDINGS)}")
    sizes = [w.numel() for w in weights]
    offsets, total = arena_offsets(sizes)
    _check_weights(weights, grads, rounding)
    _check_state(total, m, v, m_absmax, v_absmax, ema, compensation, rounding)
    _check("hyper", hyper, hyper.numel() // 2 * 2, torch.float32)
    _check("scalars", scalars, 6, torch.float32)
    _check("seed", seed, 1, torch.int64)
    if groups and not 0 <= min(groups) <= max(groups) < hyper.numel() // 2:
        raise ValueError(f"groups {min(groups)} to {max(groups)}; hyper has {hyper.numel() // 2}")
    eight = m.dtype == torch.uint8
    arrays = [
        array("q", [t.data_ptr() for t in weights]),
        array("q", [t.data_ptr() for t in grads]),
        array("q", sizes),
        array("q", offsets),
        array("q", groups),
        array("B", [_DTYPES[t.dtype] for t in weights]),
        array("B", [_DTYPES[t.dtype] for t in grads]),
    ]
    tensors = (m, v, m_absmax, v_absmax, ema, compensation, hyper, scalars, seed)
    maps = (dynamic_map(True, m.device), dynamic_map(False, m.device)) if eight else (None, None)
    step = _Step(
        len(weights),
        *(a.buffer_info()[0] for a in arrays),
        *(None if t is None else t.data_ptr() for t in chain(tensors, maps)),
        *(beta1, beta2, eps),
        *(_DTYPES[m.dtype], 0 if ema is None else _DTYPES[ema.dtype], _ROUNDINGS[rounding]),
    )
    if library.functions.fasttune_cpu_optimizer_step(
        ctypes.byref(step), *_run_by(library, level, on_torch_threads)
    ):
        raise RuntimeError("the values of 8-bit state are not what csrc/cpu is written for")


def gradient_norm(
    grads: Sequence[Tensor], *, level: str | None = None, on_torch_threads: bool = True
) -> Tensor:
    """2-norm of all gradients together, () float32: summed in float64, the same whatever the number of
    threads; 0 of none. `grads`: dense float32, bf16 or fp16 CPU tensors, else ValueError. RuntimeError
    where the library is not available."""
    library = _library()
    for index, g in enumerate(grads):
        if g.dtype not in _GRADIENTS or g.device.type != "cpu" or not is_dense(g):
            raise ValueError(
                f"gradient {index} is {g.dtype} on {g.device} with strides {g.stride()}; gradients are"
                " dense float32, bf16 or fp16 tensors on the CPU"
            )
    addresses = array("q", [g.data_ptr() for g in grads])
    sizes = array("q", [g.numel() for g in grads])
    dtypes = array("B", [_DTYPES[g.dtype] for g in grads])
    norm = library.functions.fasttune_cpu_gradient_norm(
        len(grads),
        *(a.buffer_info()[0] for a in (addresses, sizes, dtypes)),
        *_run_by(library, level, on_torch_threads),
    )
    return torch.tensor(norm, dtype=torch.float32)


def _check_weights(weights: Sequence[Tensor], grads: Sequence[Tensor], rounding: str) -> None:
    for index, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if w.dtype not in _GRADIENTS or w.device.type != "cpu" or not is_dense(w):
            raise ValueError(
                f"weight {index} is {w.dtype} on {w.device} with strides {w.stride()}; weights are dense"
                " float32, bf16 or fp16 tensors on the CPU"
            )
        if g.dtype not in (w.dtype, torch.float32) or g.device.type != "cpu":
            raise ValueError(
                f"gradient {index} is {g.dtype} on {g.device}; its weight is {w.dtype} on the CPU, and a"
                " gradient has its dtype or float32"
            )
        if g.shape != w.shape or g.stride() != w.stride():
            raise ValueError(
                f"gradient {index} has shape {tuple(g.shape)} and strides {g.stride()}; those of its"
                f" weight are {tuple(w.shape)} and {w.stride()}"
            )
        if w.dtype == torch.float16 and rounding == "stochastic":
            raise ValueError(
                'fp16 weights are rounded to the "nearest" or with "kahan", not "stochastic"'
            )


def _check_state(
    total: int,
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    rounding: str,
) -> None:
    if m.dtype not in (torch.float32, torch.bfloat16, torch.uint8):
        raise ValueError(f"m is {m.dtype}; allowed are float32, bf16 and uint8")
    _check("m", m, total, m.dtype)
    _check("v", v, total, m.dtype)
    for name, absmax in (("m_absmax", m_absmax), ("v_absmax", v_absmax)):
        if (absmax is not None) != (m.dtype == torch.uint8):
            raise ValueError(f"{name} belongs to 8-bit state; m is {m.dtype}")
        if absmax is not None:
            _check(name, absmax, total // QUANTUM, torch.float32)
    if ema is not None:
        if ema.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"ema is {ema.dtype}; allowed are float32 and bf16")
        _check("ema", ema, total, ema.dtype)
    if (compensation is not None) != (rounding == "kahan"):
        raise ValueError(f'compensation belongs to rounding = "kahan"; this is {rounding!r}')
    if compensation is not None:
        _check("compensation", compensation, total, torch.bfloat16)


def _check(name: str, x: Tensor, numel: int, dtype: torch.dtype) -> None:
    right = x.dtype == dtype and x.numel() == numel and x.device.type == "cpu"
    if not right or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} of {x.numel()} elements on {x.device}, strides {x.stride()}; expected"
            f" {numel} contiguous {dtype} elements on the CPU"
        )


def _run_by(
    library: _Library, level: str | None, on_torch_threads: bool
) -> tuple[int, int, ctypes.c_void_p | None]:
    """(instruction set, number of threads, OpenMP's entry)"""
    return (
        library.level if level is None else levels().index(level),
        torch.get_num_threads(),
        library.threads if on_torch_threads else None,
    )


def _library() -> _Library:
    found = _open()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache
def _open() -> _Library | str:
    """The library, or why there is none."""
    if not FILE.exists():
        return f"{FILE.name} is not built: install fasttune where there is a C++ compiler (g++ or clang++)"
    try:
        functions = ctypes.CDLL(str(FILE))
        version = functions.fasttune_cpu_version()
    except (OSError, AttributeError) as error:
        return f"{FILE.name} does not open: {error}"
    if version != VERSION:
        return (
            f"{FILE.name} is of another version ({version}, not {VERSION}); install fasttune again"
        )
    pointer = ctypes.c_void_p
    functions.fasttune_cpu_level_name.restype = ctypes.c_char_p
    functions.fasttune_cpu_sources.restype = ctypes.c_char_p
    by: list[Any] = [ctypes.c_int, ctypes.c_int, pointer]
    norm: list[Any] = [ctypes.c_int64, pointer, pointer, pointer, *by]
    functions.fasttune_cpu_optimizer_step.argtypes = [pointer, *by]
    functions.fasttune_cpu_gradient_norm.argtypes = norm
    functions.fasttune_cpu_gradient_norm.restype = ctypes.c_float
    return _Library(functions, functions.fasttune_cpu_highest_level(), _openmp())


def _openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel, which compilers call for a parallel region, if the process has it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no such handle
        return None
