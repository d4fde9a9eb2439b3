"""`fasttune bench report`: all that was measured, and all that the gates expect, on one page.

The page is one file without a byte from elsewhere, for a browser, a phone or paper. What it shows is
in report_gates.py, report_gpu.py and report_measured.py, how in report_plots.py and
report.html.jinja.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.report_rows import Reading, read_results
from fasttune.errors import FasttuneError

OUT = ROOT / "benchmarks" / "report.html"
SUBTITLE = (
    "What a training step takes, counted without a GPU and held exact at every commit, and what was "
    "measured on the machines that were at hand."
)
MOST_ODD = 10
"""Lines on the terminal about what could not be used."""
EXPECTED = ROOT / "benchmarks" / "expected" / "static.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=OUT, help="default benchmarks/report.html")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[RESULTS],
        metavar="FILE_OR_FOLDER",
        help="rows; default benchmarks/results",
    )
    parser.add_argument(
        "--expected",
        type=Path,
        default=EXPECTED,
        metavar="FILE",
        help="what the static gates expect; default benchmarks/expected/static.json",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page, prints its path and what could not be used; 1 if there are no rows at all.
    FasttuneError for results that are absent, and for a page that cannot be written."""
    from fasttune.run_folder import write_text

    if args.out.is_dir():
        raise FasttuneError(f"--out {args.out} is a folder: name a file, as {args.out / OUT.name}")
    reading = read_results(args.results)
    page = page_of(reading, args.results, args.expected)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, page)
    for odd in reading.odd[:MOST_ODD]:
        print(f"not used: {odd.place} {odd.reason}", file=sys.stderr)
    if len(reading.odd) > MOST_ODD:
        print(f"and {len(reading.odd) - MOST_ODD} more, at the end of the page", file=sys.stderr)
    if not reading.results:
        names = ", ".join(map(str, args.results))
        print(f"--results {names}: no rows that can be used", file=sys.stderr)
    print(args.out)
    return 0 if reading.results else 1


def render(results: Sequence[Path], expected: Path) -> str:
    """The page as text."""
    return page_of(read_results(results), results, expected)


def page_of(reading: Reading, results: Sequence[Path], expected: Path) -> str:
    """The page of these rows, which come from these files. What is odd in the expectation joins what
    is odd in the rows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import fasttune
    from benchmarks import report_gates as recorded
    from benchmarks import report_measured as measured
    from benchmarks.report_gpu import kernels, steps
    from benchmarks.report_overview import oddities, tiles
    from benchmarks.report_rows import histories, read_expected, shortened
    from benchmarks.roofline import load_cards

    odd = reading.odd
    versions, gates = read_expected(expected, odd)
    cards = load_cards()
    peaks = gates.get("memory", {})
    sizes = {name: card.memory_gib for name, card in cards.items()}
    found = [
        recorded.memory(peaks, odd),
        recorded.roofline_times(gates.get("flops", {}), peaks, sizes),
        recorded.blocks(gates.get("blocks", {})),
        recorded.launches(gates.get("launches", {})),
        recorded.compiled_launches(gates.get("compiled_launches", {})),
        *steps(reading.results),
        *kernels(reading.results, odd),
        measured.ratios(reading.results),
        *measured.history(histories(reading.results)),
        recorded.other_gates(gates, versions),
        oddities(odd),
    ]
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(fasttune.__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        subtitle=SUBTITLE,
        tiles=tiles(reading.results, gates),
        sections=[section for section in found if section is not None],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        files=[shortened(path) for path in [*results, expected] if path.exists()],
    )
