"""Gate: what every kernel that ships takes on every GPU it ships for, compiled without one.

Kernels ship as their files list them, for all targets, and as steps of shipped configs launch them,
for some cards (recorded_launches.py). Registers, memory used in their place, shared memory, the
matrix instruction and the number of instructions are compared with the expectation like all
numbers. What did not change since they were recorded is not compiled again (lock.py). Some states
fail even where they are expected: a spill, a lost matrix instruction, and more than the hardware
has, which compilers do not refuse. Exceptions are in expected/codegen_allowed.toml, each with its
reason.

    python -m benchmarks.static.codegen --only norm --target sm_89 --target gfx1100

prints a table for whoever writes a kernel, and below it what launches of steps are specialised on.
Results are kept on disk under a hash of all that they depend on.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from benchmarks.harness import ROOT, Row, emit, table
from benchmarks.static import (
    expected,
    lock,
    machine_code,
    nvrtc_offline,
    targets,
    triton_offline,
)
from benchmarks.static.compile_jobs import Job, results_of
from benchmarks.static.recorded_launches import described, launches_in_steps
from benchmarks.static.targets import Resources
from benchmarks.static.unlisted import entry_kernels
from fasttune.errors import FasttuneError
from fasttune_kernels.launch import CudaLaunch, Launch, launches

VERSIONS = ("torch", "triton")
OP_FILES = ROOT / "kernels" / "fasttune_kernels"
CUDA_FILES = ROOT / "csrc" / "cuda"
CACHE = ROOT / ".cache" / "codegen"
ALLOWED = ROOT / "benchmarks" / "expected" / "codegen_allowed.toml"

Exceptions = Mapping[tuple[str, str], str]
"""(case, kind of problem) -> reason."""


def rows(jobs: int = 2) -> Iterator[Row]:
    """One row a kernel and target, and one that counts them; so many compilers at a time."""
    return _all_rows(lock.read(), CACHE, jobs)


def fresh_rows(jobs: int = 2) -> Iterator[Row]:
    """The same, all compiled."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _all_rows({}, Path(folder), jobs)


def _all_rows(locked: Mapping[str, str], cache: Path, jobs: int) -> Iterator[Row]:
    listed = launches()
    return inspect(
        listed,
        in_steps=launches_in_steps(listed),
        op_files=sorted(OP_FILES.rglob("*.py")),
        cuda_files=CUDA_FILES,
        allowed=read_allowed(ALLOWED),
        cache=cache,
        workers=jobs,
        locked=locked,
        recorded=expected.read().gates.get("codegen", {}),
    )


def inspect(
    listed: Sequence[Launch | CudaLaunch],
    *,
    in_steps: Sequence[Launch] = (),
    op_files: Sequence[Path],
    cuda_files: Path,
    allowed: Exceptions,
    cache: Path,
    workers: int = 2,
    locked: Mapping[str, str] = MappingProxyType({}),
    recorded: Mapping[str, Row] = MappingProxyType({}),
    tell: Callable[[int, int], None] = lambda compiled, kept: None,
) -> Iterator[Row]:
    """Compiles what neither the folder `cache` has nor the digests `locked` vouch for in the rows
    `recorded`, and yields the rows. `op_files` and the folder `cuda_files` are searched for kernels
    without a listed launch. `tell` gets how many were compiled and how many results were kept."""
    sources = sorted(cuda_files.glob("*.cu"))
    shipped = [*listed, *in_steps]
    missing = _missing_compilers(shipped)
    yield {
        "case": "kernels",
        "launches": sum(isinstance(launch, Launch) for launch in listed),
        "launches_in_steps": len(in_steps),
        "cuda_launches": sum(isinstance(launch, CudaLaunch) for launch in listed),
        "cuda_files": len(sources),
        "problem": _text(_unlisted(listed, op_files, sources) | missing),
    }
    jobs, failures = _jobs([k for k in shipped if _compiler(k) not in missing], cuda_files)
    yield from ({"case": case, "problem": text} for case, text in failures.items())
    known = lock.known({job.case: job.identity for job in jobs}, locked, recorded)
    results, compiled = results_of(jobs, cache, workers, known)
    tell(compiled, len(jobs) - compiled)
    unused = set(allowed)
    for job in jobs:
        result = results[job.case]
        if isinstance(result, str):
            yield {"case": job.case, "problem": f"compile: {result}"}
            continue
        target = targets.target_of(job.target)
        found = targets.problems(result, target, matrix=job.launch.matrix)
        excused = {kind: allowed[job.case, kind] for kind in found if (job.case, kind) in allowed}
        unused -= {(job.case, kind) for kind in excused}
        left = {kind: text for kind, text in found.items() if kind not in excused}
        yield {**_values(job, result), "allowed": _text(excused), "problem": _text(left)}
    for case, kind in sorted(unused) if not missing else []:
        text = f"{ALLOWED.name} excuses a problem that is not there; remove the entry"
        yield {"case": f"allowed: {case}, {kind}", "problem": text}


_COLUMNS = ("case", "registers", "spill_bytes", "spilled_registers", "shared_bytes", "shared_limit")
_COLUMNS += ("tensor_memory", "matrix", "instructions")


def _values(job: Job, result: Resources) -> Row:
    row: Row = {
        "case": job.case,
        "registers": result.registers,
        "spill_bytes": result.spill_bytes,
        "spilled_registers": result.spilled_registers,
        "shared_bytes": result.shared_bytes,
        "shared_limit": targets.target_of(job.target).shared_bytes,
        "tensor_memory": result.tensor_memory,
        "threads": result.threads,
        "matrix": result.matrix,
        "instructions": result.instructions,
        lock.KEY: lock.digest(job.identity, result),
    }
    if isinstance(job.launch, CudaLaunch):  # triton's version is that of the expectation
        row["compiler"] = f"nvrtc {nvrtc_offline.nvrtc_version()}"
    return row


def _text(problems: Mapping[str, str]) -> str:
    return "; ".join(f"{kind}: {text}" for kind, text in problems.items())


def _unlisted(
    listed: Sequence[Launch | CudaLaunch], op_files: Sequence[Path], sources: Sequence[Path]
) -> dict[str, str]:
    named = {launch.source for launch in listed if isinstance(launch, CudaLaunch)}
    names = [source.name for source in sources if source.name not in named]
    kernels = entry_kernels(op_files)
    if kernels and importlib.util.find_spec("triton"):
        for launch in listed:
            with suppress(ValueError):  # no kernel; its own rows say so
                if isinstance(launch, Launch):
                    kernel = triton_offline.kernel_of(launch)
                    kernels.discard((kernel.__module__.rpartition(".")[2], kernel.__name__))
    names += [f"{file}.{name}" for file, name in sorted(kernels)]
    return {"unlisted": f"no launch for {', '.join(names)}"} if names else {}


def _compiler(launch: Launch | CudaLaunch) -> str:
    return "nvrtc" if isinstance(launch, CudaLaunch) else "triton"


def _missing_compilers(shipped: Sequence[Launch | CudaLaunch]) -> dict[str, str]:
    """Compiler -> why it cannot be used, of those that are needed."""
    needed = {_compiler(launch) for launch in shipped}
    if needed and importlib.util.find_spec("triton") is None:
        return dict.fromkeys(sorted(needed), "pip install triton")
    if "nvrtc" in needed:
        try:
            nvrtc_offline.nvrtc_version()
        except RuntimeError as error:
            return {"nvrtc": str(error)}
    return {}


def _jobs(
    shipped: Sequence[Launch | CudaLaunch], cuda_files: Path
) -> tuple[list[Job], dict[str, str]]:
    """What is to be compiled; and case -> why, for what cannot even be tried."""
    jobs: dict[str, Job] = {}
    failures: dict[str, str] = {}
    readers = _readers()
    for launch in shipped:
        for target in launch.targets:
            case = f"{launch.name} / {target}"
            if case in jobs or case in failures:
                failures[f"{case}, again"] = "name: another launch has this name and target"
                continue
            try:
                identity, make = _identity(launch, target, cuda_files)
            except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
                failures[case] = f"launch: {error}"
                continue
            digest = hashlib.sha256(f"{readers} {identity}".encode()).hexdigest()
            jobs[case] = Job(case, launch, target, digest, make)
    return list(jobs.values()), failures


def _identity(
    launch: Launch | CudaLaunch, target: str, cuda_files: Path
) -> tuple[str, Callable[[], Resources]]:
    """All that the result depends on but for _readers, and what compiles it."""
    if isinstance(launch, CudaLaunch):
        identity = nvrtc_offline.identity(launch, target, cuda_files)
        return identity, partial(nvrtc_offline.compile_kernel, launch, target, cuda_files)
    known = targets.target_of(target)
    identity = triton_offline.identity(launch, known)
    return identity, partial(triton_offline.compile_kernel, launch, known)


def _readers() -> str:
    """Changes with the code that compiles and reads, so that its old results are not used."""
    modules = (machine_code, targets, triton_offline, nvrtc_offline)
    read = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(read).hexdigest()


def read_allowed(path: Path) -> dict[tuple[str, str], str]:
    """The exceptions. FasttuneError for what is no TOML, and for an entry without its reason."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FasttuneError(f"{path}: no TOML: {error}") from error
    entries = content.get("allowed", [])
    if content.keys() - {"allowed"} or not isinstance(entries, list):
        raise FasttuneError(f"{path}: expected [[allowed]] tables alone; found {content}")
    found = {}
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or set(entry) != {"case", "kind", "reason"}
            or not all(isinstance(value, str) and value for value in entry.values())
        ):
            raise FasttuneError(
                f"{path}: an entry has case, kind and reason, all of them text; this one is {entry}"
            )
        found[entry["case"], entry["kind"]] = entry["reason"]
    return found


def _launches_in(path: Path) -> tuple[Launch | CudaLaunch, ...]:
    """LAUNCHES of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.LAUNCHES)


_L = TypeVar("_L", bound=Launch | CudaLaunch)


def _chosen(found: Sequence[_L], part: str, names: Sequence[str] | None) -> list[_L]:
    """Those with this part in their name, for the targets with these names, or for all of theirs."""
    wanted = [
        (launch, tuple(t for t in launch.targets if names is None or t in names))
        for launch in found
        if part in launch.name
    ]
    return [dataclasses.replace(launch, targets=chosen) for launch, chosen in wanted if chosen]


def main() -> None:
    """Prints what the chosen launches take."""
    parser = argparse.ArgumentParser(description="What kernels take on each GPU, without a GPU.")
    parser.add_argument("--only", default="", help="part of the launches' names")
    parser.add_argument("--target", action="append", help="repeat for several; default: all")
    parser.add_argument("--launches", type=Path, help="a file with LAUNCHES of its own")
    parser.add_argument("--cuda-files", type=Path, default=CUDA_FILES)
    parser.add_argument("--allowed", type=Path, default=ALLOWED)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--rows", action="store_true", help="JSON rows instead of a table")
    args = parser.parse_args()
    listed = _launches_in(args.launches) if args.launches else launches()
    in_steps = [] if args.launches else launches_in_steps(listed)
    chosen = _chosen(listed, args.only, args.target)
    chosen_steps = _chosen(in_steps, args.only, args.target)
    both = [*chosen, *chosen_steps]
    cases = {f"{launch.name} / {target}" for launch in both for target in launch.targets}
    allowed = {
        place: reason
        for place, reason in read_allowed(args.allowed).items()
        if place[0] in cases or not (args.only or args.target)
    }
    counts: list[int] = []
    found = list(
        inspect(
            chosen,
            in_steps=chosen_steps,
            op_files=[args.launches] if args.launches else sorted(OP_FILES.rglob("*.py")),
            cuda_files=args.cuda_files,
            allowed=allowed,
            cache=args.cache,
            tell=lambda *found: counts.extend(found),
        )
    )
    if args.only or args.target:  # kernels that were not chosen are no problem
        found = found[1:]
    if args.rows:
        for row in found:
            emit("codegen", **row)
        emit("cache", compiled=counts[0], kept=counts[1])
        return
    columns = [*_COLUMNS, "allowed", "problem"]
    cells = [[str(row.get(key, "")) for key in columns] for row in found]
    print(table([[key.replace("_", " ") for key in columns], *cells]))
    for launch in chosen_steps if args.only else []:
        print(f"\n{launch.name}: {described(launch)}")


if __name__ == "__main__":
    main()
