"""CUDA C++ kernels of csrc/cuda, compiled by NVRTC when they are first launched: no toolkit, no build step.

Machine code is kept in ~/.cache/fasttune/cuda under a hash of all that it depends on. Needs the wheels
cuda-core, cuda-bindings and nvidia-cuda-nvrtc, of which PyTorch for CUDA brings the last.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fasttune_kernels.dispatch import arch
from fasttune_kernels.launch import CudaLaunch


def source_folder(package: Path) -> Path:
    """Where a folder of this package has its CUDA C++: in itself where it was installed, as pyproject.toml
    puts csrc/cuda there, else in the source tree around it."""
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parents[1] / "csrc" / "cuda"


SOURCES = source_folder(Path(__file__).parent)
WHEELS = "cuda-core, cuda-bindings, nvidia-cuda-nvrtc"


class CudaSourceError(RuntimeError):
    """NVRTC is not there, or does not compile a kernel."""


@dataclass(frozen=True, slots=True)
class Cubin:
    code: bytes
    symbol: str
    """The kernel's name in it."""


def nvrtc_version() -> str:
    """ "13.5". CudaSourceError that says what to install, if it cannot be used."""
    try:
        import cuda.core  # noqa: F401  # its absence is what is asked
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CudaSourceError(f"NVRTC cannot be used ({error}): pip install {WHEELS}") from error
    return f"{major}.{minor}"


def identity(launch: CudaLaunch, target: str, folder: Path) -> str:
    """All that the machine code depends on: this source and all headers of the folder, entry and
    macros, options, the target and NVRTC. Text."""
    headers = (p for p in folder.rglob("*") if p.suffix in (".cuh", ".h"))
    return json.dumps(
        {
            "files": {
                path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted([folder / launch.source, *headers])
            },
            "launch": asdict(launch) | {"name": "", "targets": []},
            "options": _options(launch, target, []),
            "nvrtc": nvrtc_version(),
        },
        sort_keys=True,
    )


def compile_cubin(
    launch: CudaLaunch, target: str, folder: Path = SOURCES, *, include: Sequence[str] = ()
) -> Cubin:
    """For a GPU such as "sm_89". `folder` has the sources and their own headers; `include` are more
    folders. CudaSourceError with the compiler's log for what does not compile."""
    nvrtc_version()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(**_options(launch, target, [str(folder), *include]))
    try:
        program = Program((folder / launch.source).read_text(encoding="utf-8"), "c++", options)
        try:
            made = program.compile("cubin", name_expressions=(launch.entry,))
        finally:
            program.close()
    except Exception as error:  # NVRTCError, which has no public name, or OSError
        raise CudaSourceError(f"{launch.entry} of {launch.source}, {target}: {error}") from error
    symbol = made.symbol_mapping[launch.entry]
    return Cubin(made.code, symbol.decode() if isinstance(symbol, bytes) else symbol)


def _options(launch: CudaLaunch, target: str, include: list[str]) -> dict[str, Any]:
    return {
        "name": launch.source,
        "arch": target,
        "std": "c++17",
        "define_macro": list(launch.defines.items()) or None,
        "include_path": include or None,
        "use_fast_math": launch.fast_math,
    }


def cached_cubin(
    launch: CudaLaunch, target: str, folder: Path = SOURCES, *, kept_in: Path | None = None
) -> Cubin:
    """Compiles what is not kept from before. A cache that cannot be read or written is no error."""
    kept_in = kept_in or Path.home() / ".cache" / "fasttune" / "cuda"
    digest = hashlib.sha256(identity(launch, target, folder).encode()).hexdigest()
    path = kept_in / f"{Path(launch.source).stem}-{target}-{digest[:32]}.cubin"
    with suppress(OSError, ValueError, UnicodeDecodeError):
        symbol, code = path.read_bytes().split(b"\n", 1)
        return Cubin(code, symbol.decode())
    made = compile_cubin(launch, target, folder)
    with suppress(OSError):
        kept_in.mkdir(parents=True, exist_ok=True)
        # Another process never sees half of a file.
        handle, name = tempfile.mkstemp(dir=kept_in, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(made.symbol.encode() + b"\n" + made.code)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    return made


def run(launch: CudaLaunch, grid: int, device: torch.device, *arguments: Any) -> None:
    """Launches on torch's current stream: tensors and None as pointers, other arguments as ctypes."""
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as start

    with torch.cuda.device(device):
        kernel = load(launch, device.index or 0)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = LaunchConfig(grid=grid, block=launch.threads, shmem_size=launch.dynamic_shared)
        start(stream, config, kernel, *map(_argument, arguments))


def _argument(value: Any) -> Any:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def load(launch: CudaLaunch, index: int) -> Any:
    """The kernel on this GPU, compiled if it was not. CudaSourceError where it cannot be, OSError where
    the source is not there."""
    return _loaded(json.dumps(asdict(launch), sort_keys=True), launch.source, index)


@cache
def _loaded(launch: str, source: str, index: int) -> Any:
    """Of one launch on one GPU. By text, as macros are a dict."""
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    described = CudaLaunch(**json.loads(launch))
    made = cached_cubin(described, arch(torch.device("cuda", index)))
    code = ObjectCode.from_cubin(made.code, symbol_mapping={described.entry: made.symbol})
    return code.get_kernel(described.entry)
