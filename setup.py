"""The optional library of csrc/cpu; all else is in pyproject.toml.

It is plain C to its caller (ctypes), so it needs neither the headers of PyTorch nor those of Python, and
one file serves every version of Python. Where it cannot be built, what it does is done by PyTorch.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ("csrc/cpu/optimizer_step.cpp", "csrc/cpu/tile.h", "csrc/cpu/moments_8bit.h")

# Without contraction, sums come out the same for all compilers. The other two are about errno and floating
# point exceptions, which nobody reads, and without them roots and selections are vectorised.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]


class BuildLibrary(build_ext):
    """Calls a C++ compiler; one line of warning where there is none, or where it fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            problem = self.build(target)
            if problem:
                target.unlink(missing_ok=True)  # of an earlier build
                self.warn(
                    f"the library of csrc/cpu is not built ({problem}); fasttune works without it,"
                    " with PyTorch in its place, and optimizer steps on the CPU are slower"
                )

    def build(self, target: Path) -> str | None:
        """Why it did not work; None if it did."""
        named = shlex.split(os.environ.get("CXX", ""))  # noqa: TID251, as every build reads it
        found = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        compiler = named or ([found] if found else [])
        if not compiler:
            return "no C++ compiler: neither g++ nor clang++ nor c++ is there"
        digest = hashlib.sha256(b"".join(Path(name).read_bytes() for name in SOURCES)).hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        command = [*compiler, *FLAGS, f'-DFASTTUNE_SOURCES="{digest}"', SOURCES[0], "-o", str(new)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{compiler[0]}: {error}"
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return next((line for line in lines if "error" in line), lines[0])
        new.replace(target)  # a process that has the old one open keeps it
        return None


setup(
    ext_modules=[
        Extension(
            "fasttune_kernels._cpu", list(SOURCES[:1]), depends=list(SOURCES[1:]), optional=True
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
