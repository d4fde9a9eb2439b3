"""Compiles one Triton kernel for one target, on a machine without a GPU, and reads what it takes.

What is compiled is what the launch of the same arguments would compile: triton's own specialisation
of pointers and integers, its own options. Needs triton, but neither torch nor a driver.
"""

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.static.machine_code import read_amdgcn, read_cubin
from benchmarks.static.targets import Resources, Target
from fasttune_kernels.launch import Launch


def compile_kernel(launch: Launch, target: Target) -> Resources:
    """Takes about a second. ValueError for a launch that does not fit its kernel or target; triton's
    own errors for what does not compile."""
    import triton
    from triton import knobs

    source, gpu, options = _prepare(launch, target)
    # Triton's own cache would keep all intermediate code in the home folder.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        made = triton.compile(source, target=gpu, options=options)
        threads = made.metadata.num_warps * target.warp_size
        if target.backend == "cuda":
            return read_cubin(
                made.asm["cubin"],
                made.metadata.name,
                threads=threads,
                dynamic_shared=made.metadata.shared,
                tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
            )
        return read_amdgcn(made.asm["amdgcn"], threads=threads, shared_bytes=made.metadata.shared)


def identity(launch: Launch, target: Target) -> str:
    """All that the result depends on, this file's folder excepted: the source of the kernel with
    all it calls, the specialisation, the options, the target and triton. Errors as above."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend

    source, gpu, options = _prepare(launch, target)
    return json.dumps(
        {
            "kernel": source.fn.cache_key,
            "signature": source.signature,
            "constants": sorted((index, repr(value)) for index, value in source.constants.items()),
            "attributes": sorted((index, value) for index, value in source.attrs.items()),
            "options": _described(make_backend(gpu).parse_options(dict(options))),
            "target": target.name,
            "triton": triton.__version__,
            "environment": sorted(get_cache_invalidating_env_vars().items()),
        }
    )


def _described(options: Any) -> str:
    """triton's options, its own libraries by what is in them and not by where they are."""
    values = dict(vars(options))
    libraries = dict(values.pop("extern_libs", None) or ())
    contents = {name: _digest(path) for name, path in libraries.items()}
    return f"{sorted(values.items())} {sorted(contents.items())}"


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def kernel_of(launch: Launch) -> Any:
    """Its @triton.jit function. ValueError if it is something else."""
    from triton.runtime.jit import JITFunction

    kernel = launch.kernel()
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            f"{launch.name}: kernel() returned {type(kernel).__name__}, not a @triton.jit function"
            " (with TRITON_INTERPRET set there are none, and no autotuner ships)"
        )
    return kernel


def _prepare(launch: Launch, target: Target) -> tuple[Any, Any, dict[str, Any]]:
    """triton's (ASTSource, GPUTarget, options)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    kernel = kernel_of(launch)
    names: list[str] = kernel.arg_names
    given = {*launch.signature, *launch.constants}
    if given != set(names):
        raise ValueError(
            f"signature and constants lack {sorted(set(names) - given)} and have "
            f"{sorted(given - set(names))}, which {kernel.__name__} does not take"
        )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    options = launch.keywords()
    unknown = set(options) - set(vars(backend.parse_options(dict(options))))
    if unknown:
        raise ValueError(f"{target.name} has no options {sorted(unknown)}")

    # D: divisible by 16. S: in 32-bit reach, which triton finds out on AMD alone.
    attributes = {}
    for index, name in enumerate(names):
        is_pointer = launch.signature.get(name, "").startswith("*")
        near = target.backend == "hip" and is_pointer and name not in launch.over_2_gib
        described = backend.parse_attr("D" * (name in launch.aligned) + "S" * near)
        if described:
            attributes[(index,)] = described
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    return ASTSource(kernel, signature, constants, attributes), gpu, options
