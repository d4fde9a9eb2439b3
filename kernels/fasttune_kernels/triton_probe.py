"""Whether Triton's kernels can be launched on a GPU: the smallest one is tried, once.

Triton may be installed and of no use: there is no C compiler for the code around a launch, or the GPU is
one that it makes nothing for. Then operations run by PyTorch, and it can be said why.
"""

from functools import cache

import torch

from fasttune_kernels.jit import HAS_TRITON, jit, tl
from fasttune_kernels.launch import Launch


@jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def why_no_triton(device: torch.device) -> str | None:
    """Why its kernels cannot be launched on a GPU; None if they can, or if the device is none."""
    if not HAS_TRITON:
        return "Triton is not installed"
    return _problem(device.index or 0) if device.type == "cuda" else None


@cache
def _problem(index: int) -> str | None:
    """Half a second, if the kernel is not in Triton's cache."""
    try:
        with torch.cuda.device(index):
            _probe_kernel[(1,)](
                torch.empty(1, device=torch.device("cuda", index)), **LAUNCHES[0].keywords()
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver can raise
        said = next(filter(None, map(str.strip, str(error).splitlines())), "")
        return f"{type(error).__name__}: {said}".removesuffix(": ")
    return None


LAUNCHES = (
    Launch(
        name="triton_probe",
        kernel=lambda: _probe_kernel,
        signature={"x_ptr": "*fp32"},
        aligned=("x_ptr",),
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=True,
    ),
)
