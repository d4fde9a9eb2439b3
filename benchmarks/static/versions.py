"""What the gates' numbers are a function of beside the sources: packages, Python, and csrc/cpu.

Where they are others than those of the expectation, a gate that depends on them is not compared.
"""

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from benchmarks.harness import environment

CONSTRAINTS = "benchmarks/expected/constraints.txt"
CPU_LIBRARY = "cpu library"
"""Among the versions: "built" or "absent". Its optimizer step is another path of Python: 1850
instructions of a step of the loop where it is built, 1248 where it is not."""


def installed_versions() -> dict[str, str]:
    """torch, triton and python, without what names a build, and whether csrc/cpu is built."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), CPU_LIBRARY: _cpu_library()}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _cpu_library() -> str:
    """As the processes of the gates find it: this one may lack kernels/ on its path."""
    code = "from fasttune_kernels import cpu_library; print(cpu_library.available())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        env=environment(),
        check=False,
    )
    return "built" if done.stdout.strip() == "True" else "absent"


def differing(
    names: Iterable[str], expected: Mapping[str, str], installed: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Name -> (expected, installed), of those that are not the same. What one side does not mention,
    as older expectations do not mention csrc/cpu, is taken to be the same."""
    both = [name for name in names if name in expected and name in installed]
    return {n: (expected[n], installed[n]) for n in both if expected[n] != installed[n]}


def advice(other: Mapping[str, tuple[str, str]]) -> str:
    """What to do to get the versions that are expected."""
    packages = sorted(set(other) - {"python", CPU_LIBRARY})
    steps = [f"pip install -c {CONSTRAINTS} {' '.join(packages)}"] if packages else []
    if "python" in other:
        steps.append(f"use Python {other['python'][0]}")
    if CPU_LIBRARY in other:
        built = other[CPU_LIBRARY][0] == "built"
        steps.append(
            "pip install -e . where there is a C++ compiler"
            if built
            else "remove kernels/fasttune_kernels/_cpu.so"
        )
    return "; ".join(steps)
