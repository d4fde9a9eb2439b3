"""Compiles kernels in parallel and keeps what they take on disk, so that nothing is compiled twice."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.static.targets import Resources
from fasttune_kernels.launch import CudaLaunch, Launch


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel for one target."""

    case: str
    launch: Launch | CudaLaunch
    target: str
    identity: str
    """Hash of all that the result depends on: the name of its file."""
    compile: Callable[[], Resources]


Results = dict[str, Resources | str]
"""Case -> what the kernel takes, or why it does not compile."""


def results_of(
    jobs: Sequence[Job],
    cache: Path,
    workers: int,
    known: Mapping[str, Resources] = MappingProxyType({}),
) -> tuple[Results, int]:
    """The results, and how many of them were neither `known` nor in the folder `cache` and had to be
    compiled. Failures are not kept: another try may have more memory."""
    results: Results = {job.case: known[job.case] for job in jobs if job.case in known}
    for job in (job for job in jobs if job.case not in results):
        kept = _read(cache / f"{job.identity}.json")
        if kept is not None:
            results[job.case] = kept
    todo = [job for job in jobs if job.case not in results]
    for job, result in _compile_all(todo, workers):  # each is kept at once: it may be stopped
        results[job.case] = result
        if isinstance(result, Resources):
            _write(cache / f"{job.identity}.json", job.case, result)
    return results, len(todo)


def _compile_all(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Resources | str]]:
    """In processes of their own, as an assertion in a compiler ends its process."""
    if not jobs:
        return
    broken: list[Job] = []
    with _pool(jobs, min(workers, len(jobs))) as pool:
        futures = [pool.submit(_compile, index) for index in range(len(jobs))]
        for job, future in zip(jobs, futures, strict=True):
            try:
                result = future.result()
            except BrokenProcessPool:  # takes all that were waiting along
                broken.append(job)
            else:
                yield job, result
    for job in broken:
        yield job, _compile_alone(job)


def _compile_alone(job: Job) -> Resources | str:
    with _pool([job], 1) as pool:
        try:
            return pool.submit(_compile, 0).result()
        except BrokenProcessPool:
            return "the compiler ended its process"


def _pool(jobs: Sequence[Job], workers: int) -> ProcessPoolExecutor:
    """Forked: jobs hold functions, which cannot be pickled."""
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, fork, initializer=_take, initargs=(jobs,))


_jobs: Sequence[Job] = ()
"""In a worker: what it was forked with."""


def _take(jobs: Sequence[Job]) -> None:
    global _jobs
    _jobs = jobs


def _compile(index: int) -> Resources | str:
    """Whatever a compiler raises is a result, and fails the gate."""
    try:
        return _jobs[index].compile()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Between the first line and what is wrong, compilers quote source.
        wrong = [line for line in lines if "error" in line.lower()][:2] or lines[-1:]
        said = " ... ".join(dict.fromkeys([*lines[:1], *wrong]))
        return f"{type(error).__name__}: {said[:500]}"


def _read(path: Path) -> Resources | None:
    """None for a file that is absent or damaged."""
    try:
        return Resources(**json.loads(path.read_text(encoding="utf-8"))["resources"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, case: str, resources: Resources) -> None:
    """Whole or not at all. The case is for people who look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"case": case, "resources": asdict(resources)})
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.replace(file.name, path)
