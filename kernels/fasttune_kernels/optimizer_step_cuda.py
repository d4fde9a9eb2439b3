"""The optimizer step in CUDA C++, csrc/cuda/optimizer_step.cu: for bf16 and float32 weights, float32 and
8-bit state. What it lacks (fp16, Kahan, bf16 state) the Triton kernel has."""

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fasttune_kernels import cuda_source
from fasttune_kernels.arena_tables import ChunkConfig, tables_of
from fasttune_kernels.blockwise import dynamic_map, middles
from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.launch import CudaLaunch

DEFAULT_ON: frozenset[str] = frozenset()
"""GPUs, as "sm_90", on which this is taken and not Triton's: those where it was measured to be faster.
Not measured yet, so none. A lane executes about 55 instructions an element of 8-bit state here and 150
in Triton; at 16 bytes an element, 95 are what the bandwidth of an H200 leaves time for, and 650 that of
an RTX 4090."""

THREADS = 256
BLOCKS_PER_PROCESSOR = 2
"""By registers (128): 16 warps, of which each loads 8 elements a lane at a time."""

CELLS_PER_OCTAVE, OCTAVES = 128, 23
NUM_CELLS = CELLS_PER_OCTAVE * OCTAVES + 1
"""From 2^-23, where all is rounded to zero, to 1."""

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.uint8: "u8", None: "NoAverage"}
_PAIRS = {
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
}


def launch_of(
    weight: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    ema: torch.dtype | None,
    rounding: str,
) -> CudaLaunch:
    """The specialisation for one launch."""
    stochastic = "true" if rounding == "stochastic" and weight == torch.bfloat16 else "false"
    types = ", ".join(_NAMES[dtype] for dtype in (weight, grad, state, ema))
    return CudaLaunch(
        name=f"optimizer_step_cuda {types}{' stochastic' if stochastic == 'true' else ''}",
        source="optimizer_step.cu",
        entry=f"optimizer_step<{types}, {stochastic}>",
        threads=THREADS,
    )


def takes(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: torch.dtype,
    ema: torch.dtype | None,
    rounding: str,
) -> bool:
    """Whether there is a kernel for these dtypes."""
    return (
        state in (torch.float32, torch.uint8)
        and ema in (None, torch.float32, torch.bfloat16)
        and rounding != "kahan"
        and {(w.dtype, g.dtype) for w, g in zip(weights, grads, strict=True)} <= _PAIRS
    )


def is_default(device: torch.device) -> bool:
    """Whether this is the faster one there, and can be had: else Triton's is taken."""
    return device.type == "cuda" and arch(device) in DEFAULT_ON and _can_run(device.index or 0)


@cache
def _can_run(index: int) -> bool:
    """By compiling and loading one specialisation. A RuntimeWarning says why not, once a GPU."""
    try:
        cuda_source.load(LAUNCHES[0], index)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # NVRTC, cuda-core or the source is absent, or a driver refuses
        warnings.warn(
            f"the optimizer step in CUDA C++ cannot be used on GPU {index}, Triton's runs: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def lookup_tables(device: torch.device) -> Tensor:
    """The words of `struct Tables`, int32: for each cell of a float's 7 highest mantissa bits the border
    between two codes that may be in it, with the code below it in its lowest 8 bits, which are 3e-5 of
    it; and the values. Of m (by magnitude) and of v."""
    cpu = torch.device("cpu")
    first = (127 - OCTAVES) * CELLS_PER_OCTAVE
    starts = ((torch.arange(NUM_CELLS, dtype=torch.int32) + first) << 16).view(torch.float32)
    encode = []
    for borders in (middles(True, cpu)[127:], middles(False, cpu)):
        code = torch.bucketize(starts, borders, right=True).int()
        border = torch.cat([borders, torch.tensor([torch.inf])])[code].view(torch.int32)
        encode.append((border & ~0xFF) | code)
    decode = [dynamic_map(signed, cpu).view(torch.int32) for signed in (True, False)]
    return torch.cat([*encode, *decode]).to(device)


def launch_cuda(
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
) -> None:
    """One launch for each pair of dtypes, as `optimizer_step_`, of what `takes` is true for.
    CudaSourceError where NVRTC is not there."""
    config = ChunkConfig.of(m, m.numel())
    tables = tables_of((weights, grads), groups, config.tiles)
    average = None if ema is None else ema.dtype
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, eps)
    warps = THREADS // 32
    for part in tables.ranges:
        chunks = part.end - part.begin
        launch = launch_of(
            weights[part.first].dtype, grads[part.first].dtype, m.dtype, average, rounding
        )
        grid = min(-(-chunks // warps), BLOCKS_PER_PROCESSOR * num_processors(m.device))
        cuda_source.run(
            launch,
            grid,
            m.device,
            *(tables.chunks[part.begin :], ctypes.c_int(chunks), ctypes.c_int(config.tiles)),
            *(tables.layout, tables.pointers, ctypes.c_int(len(weights))),
            *(ctypes.c_int(tables.aligned), m, v, m_absmax, v_absmax, ema, hyper, scalars, seed),
            *(lookup_tables(m.device), *map(ctypes.c_float, factors)),
        )


_BF16, _FP32, _U8 = torch.bfloat16, torch.float32, torch.uint8
LAUNCHES = (
    launch_of(_FP32, _FP32, _FP32, _FP32, "nearest"),
    launch_of(_BF16, _BF16, _FP32, _FP32, "stochastic"),
    launch_of(_BF16, _BF16, _U8, _BF16, "stochastic"),
)
