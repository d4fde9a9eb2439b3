"""The arguments of `fasttune bench`, which is also `python -m benchmarks`."""

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "static": ("benchmarks.static.gates", "exact gates without a GPU: memory, graphs, registers"),
    "cpu": ("benchmarks.cpu.suite", "time on this CPU, as ratios against named contenders"),
    "gpu": ("benchmarks.gpu.suite", "kernels, training steps and contenders on this GPU"),
    "compare": ("benchmarks.compare", "two result files as a Markdown table, with limits"),
    "ab": ("benchmarks.ab", "the working tree against another revision, interleaved"),
    "report": ("benchmarks.report", "all results on one HTML page"),
}
"""Name -> module with `add_arguments(parser)` and `run(args) -> int`, and what it does."""


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit status. Raises FasttuneError for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="fasttune bench",
        description="Measure fasttune, hold a change to its numbers, and show them.",
        epilog="`fasttune bench COMMAND --help` says more; benchmarks/README.md has the protocol.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(module=module)
        if arguments and arguments[0] == name:  # the others need not be imported
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(arguments)
    status: int = importlib.import_module(args.module).run(args)
    return status
