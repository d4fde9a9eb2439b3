"""The GPUs that kernels are compiled for, and what a block of threads may take there.

Compilers do not refuse what cannot launch: too much shared memory shows itself at the first launch,
on that GPU alone. Sources: NVIDIA, CUDA C++ Programming Guide, technical specifications per compute
capability; AMD, LLVM's AMDGPU backend (AMDGPUBaseInfo.cpp: addressable local memory, number and
allocation granule of VGPRs) and the CDNA 3, CDNA 4, RDNA 3 and RDNA 4 instruction set guides.
"""

from dataclasses import dataclass

MAX_THREADS = 1024
"""In a block, on all of them."""
PARTITIONS = 4
"""Of a multiprocessor (NVIDIA), compute unit (CDNA) or workgroup processor (RDNA): each has a
register file of its own and takes every fourth warp of a block."""


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    backend: str
    """"cuda" or "hip"."""
    arch: int | str
    """As triton has it."""
    warp_size: int
    shared_bytes: int
    """Largest for one block, where the launch opts in."""
    matrix: str
    """Class of the fastest matrix instruction."""
    registers: int = 512
    """Of 32 bits, in the file of a partition, for one lane: 512 are 65536 for a multiprocessor."""
    granule: int = 8
    """Registers are given out in multiples of it."""
    tensor_memory: int = 0
    """Columns."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166912, "mma.sync"),
        Target("sm_86", "cuda", 86, 32, 101376, "mma.sync"),
        Target("sm_89", "cuda", 89, 32, 101376, "mma.sync"),
        Target("sm_90", "cuda", 90, 32, 232448, "wgmma"),
        Target("sm_100", "cuda", 100, 32, 232448, "tcgen05", tensor_memory=512),
        Target("sm_120", "cuda", 120, 32, 101376, "mma.sync"),
        Target("gfx942", "hip", "gfx942", 64, 65536, "mfma"),
        Target("gfx950", "hip", "gfx950", 64, 163840, "mfma"),
        Target("gfx1100", "hip", "gfx1100", 32, 65536, "wmma", registers=1536, granule=24),
        Target("gfx1201", "hip", "gfx1201", 32, 65536, "wmma", registers=1536, granule=24),
    )
}


def target_of(name: str) -> Target:
    """The target; "sm_90a" is sm_90 with the instructions that no later one has."""
    return TARGETS[name.removesuffix("a")]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int
    """Of a thread. On AMD vector registers, accumulation registers included."""
    spill_bytes: int
    """Of a thread, in memory instead of registers: spills, and arrays indexed at run time."""
    spilled_registers: int
    """AMD's count, which has those that went into other registers, too. 0 on NVIDIA."""
    shared_bytes: int
    """Of a block, static and dynamic."""
    tensor_memory: int
    """Columns of a block (sm_100)."""
    threads: int
    """Of a block."""
    matrix: str
    """Classes of its matrix instructions, joined by "+", or "none"."""
    instructions: int
    """In its machine code, padding excepted."""


def problems(used: Resources, target: Target, *, matrix: bool) -> dict[str, str]:
    """Kind -> what is wrong: what cannot launch on this target, and what is slow there. `matrix`
    says that the target's matrix instruction is expected."""
    found = {}
    if used.spill_bytes or used.spilled_registers:
        found["spill"] = f"{used.spill_bytes} bytes a thread in memory"
        if used.spilled_registers:
            found["spill"] += f", {used.spilled_registers} registers"
    if used.shared_bytes > target.shared_bytes:
        found["shared"] = f"{used.shared_bytes} bytes a block of {target.shared_bytes}"
    if used.threads > MAX_THREADS:
        found["threads"] = f"{used.threads} a block of {MAX_THREADS}"
    # A warp has its registers in one partition, so for 9 warps each partition must hold 3. For
    # multiples of 4 warps this is registers x threads <= 65536 on NVIDIA.
    warps = -(-used.threads // target.warp_size)
    lanes = -(-warps // PARTITIONS) * -(-used.registers // target.granule) * target.granule
    if lanes > target.registers:
        found["registers"] = (
            f"{used.registers} for each of {used.threads} threads: {lanes} a lane of "
            f"{target.registers}"
        )
    if used.tensor_memory > target.tensor_memory:
        found["tensor_memory"] = f"{used.tensor_memory} columns of {target.tensor_memory}"
    if matrix and used.matrix != target.matrix:
        found["matrix"] = f"{used.matrix} where {target.matrix} is expected"
    return found
