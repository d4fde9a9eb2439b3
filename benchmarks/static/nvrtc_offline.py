"""Compiles one CUDA C++ kernel for one target by NVRTC, without a GPU or a CUDA toolkit.

Needs the wheels cuda-core, cuda-bindings, nvidia-cuda-nvrtc and, for headers such as cuda_bf16.h,
nvidia-cuda-runtime; and triton for the tool that reads cubins.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.static.machine_code import read_cubin
from benchmarks.static.targets import Resources
from fasttune_kernels.launch import CudaLaunch

WHEELS = "cuda-core, cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-runtime"


def compile_kernel(launch: CudaLaunch, target: str, folder: Path) -> Resources:
    """`folder` has the sources and their own headers. cuda.core's NVRTCError, with the compiler's
    log, for what does not compile."""
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    options = ProgramOptions(
        name=launch.source,
        arch=target,
        std="c++17",
        define_macro=list(launch.defines.items()) or None,
        include_path=[str(folder), *([headers] if headers else [])],
        use_fast_math=launch.fast_math,
    )
    program = Program((folder / launch.source).read_text(encoding="utf-8"), "c++", options)
    try:
        made = program.compile("cubin", name_expressions=(launch.entry,))
    finally:
        program.close()
    mangled = made.symbol_mapping[launch.entry]
    return read_cubin(
        made.code,
        mangled.decode() if isinstance(mangled, bytes) else mangled,
        threads=launch.threads,
        dynamic_shared=launch.dynamic_shared,
    )


def identity(launch: CudaLaunch, target: str, folder: Path) -> str:
    """All that the result depends on: this source and all headers of the folder, the launch, the
    target and NVRTC."""
    files = [folder / launch.source, *(p for p in folder.rglob("*") if p.suffix in (".cuh", ".h"))]
    return json.dumps(
        {
            "files": {
                path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(files)
            },
            "launch": asdict(launch) | {"name": "", "targets": []},
            "target": target,
            "nvrtc": nvrtc_version(),
        },
        sort_keys=True,
    )


def nvrtc_version() -> str:
    """ "13.5". RuntimeError that says what to install, if it cannot be used."""
    try:
        import cuda.core  # noqa: F401  # its absence is what is asked
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"NVRTC cannot be used ({error}): pip install {WHEELS}") from error
    return f"{major}.{minor}"
