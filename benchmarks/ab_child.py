"""Runs a module as a side of `fasttune bench ab` does, after saying what it imports from where.

    python -m benchmarks.ab_child MODULE [ARGUMENTS]

The parent compares the first line with the tree that it meant: an install of the project, or a
forgotten path, would otherwise be measured in its place, without a sign.
"""

import importlib.util
import json
import runpy
import sys

ORIGINS = "origins: "
"""Marks the line with the files of the packages."""

TURN = "turn"
"""The line of a process whose step is done and which waits for a line before the next."""

PACKAGES = ("fasttune", "fasttune_kernels", "benchmarks")


def origins() -> dict[str, str | None]:
    """Package -> its `__init__.py`; None if there is no such package."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: spec.origin if spec is not None else None for name, spec in specs.items()}


def main() -> None:
    print(ORIGINS + json.dumps(origins()), flush=True)
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
