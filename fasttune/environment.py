"""The process's environment, as the libraries that read it are to find it.

Settings of fasttune are in the config, never here. But torch, triton and ROCm's attention know some
settings by variables alone, and read them when they are imported or first used: `prepare` sets those
before anything imports torch. A variable that the user has set stays as it is.
"""

import os
import sys
from pathlib import Path

AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
"""With 1, PyTorch's flash and memory-efficient attention run on RDNA, too; otherwise that is plain math
there: 486 ms and 8.55 GiB against 41 ms and 0.52 GiB on an RX 9060 XT (unsloth#8821)."""
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Folders of compiled graphs and kernels. Inductor's own default is in /tmp, which a restart empties:
every block would be compiled again."""


def prepare() -> None:
    """Sets what is not set yet. Takes microseconds and makes no folder."""
    variables = os.environ  # the one place that sets them
    if sys.platform != "darwin":  # where no torch is built for ROCm; other builds never read it
        variables.setdefault(AOTRITON, "1")
    folder = cache_folder()
    for variable, name in CACHES.items():
        # Not where the home is read-only or unknown: torch's defaults work there.
        if folder.is_absolute() and _can_be_written(folder / name):
            variables.setdefault(variable, str(folder / name))


def value_of(variable: str) -> str | None:
    """What the environment has for a variable of this module."""
    return os.environ.get(variable)


def cache_folder() -> Path:
    """Where fasttune keeps what any run may use again: in $XDG_CACHE_HOME, or else in ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative paths are to be ignored, says the XDG Base Directory Specification.
    parent = given if given.is_absolute() else Path(os.path.expanduser("~")) / ".cache"
    return parent / "fasttune"


def _can_be_written(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and takes files."""
    there = next((p for p in (folder, *folder.parents) if p.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
