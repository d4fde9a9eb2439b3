"""The way from the command line to the benchmarks, which are in the source tree and not installed."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import fasttune
from fasttune.errors import FasttuneError


def main(arguments: Sequence[str]) -> int:
    """`fasttune bench`. FasttuneError where only the wheel is installed."""
    root = Path(fasttune.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "command.py").is_file():
        raise FasttuneError(
            f"the benchmarks are not in {root}: they come with the source tree, not with the wheel. "
            "Clone the repository, `pip install -e .` there, and run `fasttune bench` again"
        )
    # First, because other packages bring a `benchmarks`, too.
    sys.path.insert(0, str(root))
    status: int = importlib.import_module("benchmarks.command").main(arguments)
    return status
