"""Reads what a compiled kernel takes out of its machine code: cubin, or the text for AMD GPUs."""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.static.targets import Resources

RESERVED_SHARED = 1024
"""Bytes that cubins for sm_90 and later count for the system, in kernels that use shared memory; the
limits are without them."""

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", re.MULTILINE)
AMD_OPCODE = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)

MATRIX = {
    "tcgen05": re.compile(r"UTC\w*MMA"),
    "wgmma": re.compile(r"[A-Z]GMMA"),
    "mma.sync": re.compile(r"[A-Z]MMA"),
    "mfma": re.compile(r"v_(mfma|smfmac)_\w+"),
    "wmma": re.compile(r"v_(wmma|swmmac)_\w+"),
}
"""Class -> opcode in the machine code, without modifiers."""


def read_cubin(
    cubin: bytes, entry: str, *, threads: int, dynamic_shared: int, tensor_memory: int = 0
) -> Resources:
    """`entry` is the kernel's mangled name; what it calls without inlining is in its numbers.
    RuntimeError if the cubin has no such kernel, or a tool is missing or fails."""
    usage = re.search(
        rf"^ *Function {re.escape(entry)}:\s+(REG:.+)",
        _cuobjdump("-res-usage", cubin),
        re.MULTILINE,
    )
    sass = _cuobjdump("-sass", cubin)
    arch = re.search(r"code for sm_(\d+)", sass)
    code = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    functions = dict(zip(code[1::2], code[2::2], strict=True))
    if usage is None or arch is None or entry not in functions:
        raise RuntimeError(f"no kernel {entry} in the cubin; it has {', '.join(functions)}")
    counts = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[1])}
    reserved = RESERVED_SHARED if int(arch[1]) >= 90 else 0
    opcodes = OPCODE.findall(functions[entry])
    return Resources(
        registers=counts["REG"],
        spill_bytes=counts["STACK"] + counts["LOCAL"],
        spilled_registers=0,
        shared_bytes=max(counts["SHARED"] - reserved, 0) + dynamic_shared,
        tensor_memory=tensor_memory,
        threads=threads,
        matrix=matrix_class(opcodes),
        instructions=sum(opcode != "NOP" for opcode in opcodes),
    )


def read_amdgcn(text: str, *, threads: int, shared_bytes: int) -> Resources:
    """From the assembly of one kernel, whose metadata come at its end. RuntimeError without."""

    def count(name: str, default: int | None = None) -> int:
        found = re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        if not found and default is None:
            raise RuntimeError(f"no .{name} in the assembly")
        return int(found[-1]) if found else int(default or 0)

    opcodes = AMD_OPCODE.findall(text)
    return Resources(
        registers=count("vgpr_count"),
        spill_bytes=count("private_segment_fixed_size"),
        spilled_registers=count("vgpr_spill_count") + count("sgpr_spill_count"),
        shared_bytes=max(shared_bytes, count("group_segment_fixed_size")),
        tensor_memory=0,
        threads=threads,
        matrix=matrix_class(opcodes),
        instructions=sum(opcode not in ("s_nop", "s_code_end") for opcode in opcodes),
    )


def matrix_class(opcodes: Iterable[str]) -> str:
    """Classes of MATRIX that are among the opcodes, joined by "+", or "none"."""
    distinct = set(opcodes)
    found = [
        name
        for name, pattern in MATRIX.items()
        if any(pattern.fullmatch(code) for code in distinct)
    ]
    return "+".join(found) or "none"


def _cuobjdump(option: str, cubin: bytes) -> str:
    """The tool comes with triton, and nvdisasm, which it calls, beside it."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("triton is not installed, and cuobjdump, which reads cubins, is in it")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), option, file.name]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout
