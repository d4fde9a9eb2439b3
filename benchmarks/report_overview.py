"""The page's head in a few numbers, and its end: what could not be used."""

from collections.abc import Mapping, Sequence

from benchmarks.report_gates import Cases
from benchmarks.report_page import Cell, Section, Table, Tile
from benchmarks.report_rows import Odd, Result, number


def tiles(results: Sequence[Result], gates: Mapping[str, Cases]) -> list[Tile]:
    """The page in four numbers."""
    found = []
    peaks = {case: number(row.get("peak_gib")) for case, row in gates.get("memory", {}).items()}
    known = {case: peak for case, peak in peaks.items() if peak is not None}
    if known:
        most = max(known, key=lambda case: known[case])
        detail = f"largest peak {known[most]:.1f} GiB, {most}"
        found.append(Tile("Training steps counted", str(len(known)), detail))
    rows = [row for cases in gates.values() for row in cases.values()]
    if rows:
        bad = sum(bool(row.get("problem")) for row in rows)
        detail = f"{bad} with a problem" if bad else f"{sum(map(len, rows)):,} values held exact"
        found.append(Tile("Exact gates", f"{len(rows):,} cases", detail, "worse" if bad else ""))
    if results:
        machines = len({result.machine for result in results})
        last = max(result.time for result in results)[:10]
        detail = f"on {machines} machine{'s' if machines > 1 else ''}; the last {last}"
        found.append(Tile("Rows measured", f"{len(results):,}", detail))
    gpus = sorted({str(result.row["gpu"]) for result in results if result.row.get("gpu")})
    detail = ", ".join(gpus) if gpus else "run benchmarks/gpu/run.sh"
    found.append(Tile("GPUs measured", str(len(gpus)) if gpus else "none yet", detail))
    return found


def oddities(odd: Sequence[Odd]) -> Section | None:
    """What could not be used."""
    if not odd:
        return None
    return Section(
        "odd",
        "Rows that could not be used",
        "",
        "",
        tables=[
            Table(
                "Odd rows",
                ["place", "reason"],
                [[Cell(o.place), Cell(o.reason)] for o in odd],
                True,
            )
        ],
    )
