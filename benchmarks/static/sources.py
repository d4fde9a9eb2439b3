"""Which state of the tree the gates' numbers are of."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Collection
from importlib.metadata import distributions

from benchmarks.harness import ROOT
from benchmarks.static import expected as e
from fasttune import environment

SOURCES = ("fasttune", "kernels", "csrc", "configs", "pyproject.toml")
SOURCES += tuple(
    f"benchmarks/{name}"
    for name in (
        "__init__.py",
        "__main__.py",
        "command.py",
        "gpus.toml",
        "harness.py",
        "models",
        "roofline.py",
        "static",
    )
)
IGNORED = {"__pycache__"}
KINDS = {".py", ".toml", ".json", ".cu", ".cuh", ".h", ".cpp"}
BUILT = {".so"}


def of_sources(kinds: Collection[str] = KINDS) -> str:
    """Of every file that the gates run or read, the same in all copies of the tree."""
    digest = hashlib.blake2b(digest_size=12)
    for name in SOURCES:
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            inside = path.relative_to(ROOT)
            if path.suffix in kinds and path.is_file() and not IGNORED & set(inside.parts):
                digest.update(f"{inside}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    allowed = e.EXPECTED.with_name("codegen_allowed.toml")
    digest.update(allowed.read_bytes() if allowed.is_file() else b"")
    return digest.hexdigest()


def of_environment() -> dict[str, str]:
    """Variables that say to torch and Triton what to compile, but for those that fasttune sets itself."""
    inherited = os.environ  # noqa: TID251  # compilers read some of it
    own = {*environment.CACHES, environment.AOTRITON}
    return {
        k: v for k, v in inherited.items() if k.startswith(("TORCH", "TRITON")) and k not in own
    }


def of_machine() -> str:
    """Of those files and what was built of them, and of all that they run on here."""
    packages = sorted(f"{d.name} {d.version}" for d in distributions())
    runs_on = [packages, of_environment(), sys.version, platform.machine()]
    text = json.dumps([of_sources(KINDS | BUILT), runs_on])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
