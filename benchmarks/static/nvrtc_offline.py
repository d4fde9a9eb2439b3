"""Compiles one CUDA C++ kernel for one target by NVRTC, without a GPU or a CUDA toolkit, as its first
launch would, and reads what it takes.

Needs the wheels cuda-core, cuda-bindings, nvidia-cuda-nvrtc and, for headers such as cuda_bf16.h,
nvidia-cuda-runtime; and triton for the tool that reads cubins.
"""

from pathlib import Path

from benchmarks.static.machine_code import read_cubin
from benchmarks.static.targets import Resources
from fasttune_kernels.cuda_source import compile_cubin, identity, nvrtc_version
from fasttune_kernels.launch import CudaLaunch

__all__ = ["compile_kernel", "identity", "nvrtc_version"]


def compile_kernel(launch: CudaLaunch, target: str, folder: Path) -> Resources:
    """`folder` has the sources and their own headers. CudaSourceError, with the compiler's log, for
    what does not compile."""
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    made = compile_cubin(launch, target, folder, include=[headers] if headers else [])
    return read_cubin(
        made.code, made.symbol, threads=launch.threads, dynamic_shared=launch.dynamic_shared
    )
