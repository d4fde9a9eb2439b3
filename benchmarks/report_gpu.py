"""What was measured on GPUs, in sections of the results' page: training steps, and kernels under
the ceilings of their run.

Kernels whose products count lie on a roofline. Most kernels have none: they move bytes, and what tells how
good they are is the share of the least time that the ceilings of the same run allow.
"""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.report_page import Cell, Section, Table, case_table, exact
from benchmarks.report_plots import (
    Ceiling,
    Dot,
    Interval,
    Mark,
    Part,
    PlotRow,
    roofline_plot,
    rows_plot,
)
from benchmarks.report_rows import Odd, Result, newest, number, point
from benchmarks.roofline import card_named

_ORDER = ("ours", "eager", "compile")
"""Contenders with colours of their own; libraries follow."""
_LEAD = (
    "Each kernel beside its contenders, cold caches, timed on the device. The share is that of the "
    "least time the same run's ceilings (a large copy, a large matrix product) allow for the bytes that "
    "must be moved and the products that must be computed. Products are on the roofline as well."
)
_KERNEL_ROWS = ("kernel", "ceiling", "correctness")
_PEAKS = ("measured", "counted on fake tensors")
_BESIDE = frozenset(
    "measurement case samples cpu cores threads python gpu load_average time losses".split()
)
"""Keys of a row that a table of steps does without."""
_EMPTY = "No GPU rows yet: run benchmarks/gpu/run.sh."


def steps(results: Sequence[Result]) -> list[Section]:
    """Training steps, a section a GPU; one that is empty if there is none."""
    machines: dict[str, list[Result]] = {}
    for result in newest(results):
        took = number(result.row.get("step_ms")) or 0.0
        if result.row.get("gpu") and (took > 0 or result.row.get("fits") is False):
            machines.setdefault(result.machine, []).append(result)
    sections = [
        _steps_section(gpu, found, f"steps-{index}" if index else "steps")
        for index, (gpu, found) in enumerate(machines.items())
    ]
    return sections or [Section("steps", "Training steps", "", _EMPTY)]


def _steps_section(gpu: str, results: Sequence[Result], name: str) -> Section:
    times, peaks, cases = [], [], {}
    for result in results:
        row = result.row
        label = result.case or result.measurement
        if label in cases:
            label = f"{result.measurement}: {label}"
        cases[label] = {key: row[key] for key in row if key not in _BESIDE}
        if row.get("fits") is False:
            times.append(PlotRow(label, [], "does not fit"))
        elif took := point(result, "step_ms"):
            text = f"{label}: {took.value:,.1f} ms"
            if took.low is not None and took.high is not None:
                text += f", 60 % of the steps within {took.low:,.1f} to {took.high:,.1f}"
            bar = Part(0, 0.0, took.value, f"{text}, at {result.commit}")
            times.append(PlotRow(label, [[bar]], f"{took.value:,.0f}"))
        measured, counted = number(row.get("peak_gib")), number(row.get("predicted_peak_gib"))
        bars = [
            [Part(colour, 0.0, peak, f"{label}, {kind}: {peak:.2f} GiB")]
            for colour, (kind, peak) in enumerate(zip(_PEAKS, (measured, counted), strict=True))
            if peak is not None and peak >= 0
        ]
        if measured is not None:
            known = [peak for peak in (measured, counted) if peak is not None]
            peaks.append(PlotRow(label, bars, "\n".join(f"{peak:.2f}" for peak in known)))
    charts = [
        rows_plot("Step time", times, unit="ms", note="left is better"),
        rows_plot("Peak memory", peaks, unit="GiB", legend=list(enumerate(_PEAKS))),
    ]
    return Section(
        name,
        f"Training steps on {gpu}",
        "Forward, backward and update at full size, with random weights and synthetic data. A name says "
        "model, what is trained, precision, activations, batch size, side of the images in pixels, and "
        "the memory cap if there was one.",
        _EMPTY,
        charts=[chart for chart in charts if chart is not None],
        tables=[case_table("Numbers: training steps", cases, first="case")],
    )


def kernels(results: Sequence[Result], odd: list[Odd]) -> list[Section]:
    """A section a GPU; one that is empty if there is none."""
    machines: dict[str, list[Result]] = {}
    for result in newest(results):
        if result.row.get("gpu") and result.measurement in _KERNEL_ROWS:
            machines.setdefault(result.machine, []).append(result)
    sections = [
        _section(gpu, found, odd, f"kernels-{index}" if index else "kernels")
        for index, (gpu, found) in enumerate(machines.items())
    ]
    return sections or [Section("kernels", "Kernels", "", _EMPTY)]


def _section(gpu: str, results: Sequence[Result], odd: list[Odd], name: str) -> Section:
    timed = [result for result in results if result.measurement == "kernel"]
    contenders = sorted({_split(r)[1] for r in timed}, key=lambda c: (_rank(c), c))
    cases: dict[str, dict[str, Result]] = {}
    for result in timed:
        case, contender = _split(result)
        if number(result.row.get("us")) is None:
            odd.append(Odd(result.place, "a kernel without us"))
            continue
        cases.setdefault(case, {})[contender] = result
    numbered = {case: str(index) for index, case in enumerate(cases, start=1)}
    dots, rows, table = [], [], []
    for case, by_contender in cases.items():
        shares, found = [], []
        for contender, result in sorted(
            by_contender.items(), key=lambda item: -contenders.index(item[0])
        ):
            colour = contenders.index(contender)
            share = number(result.row.get("fraction_of_ceiling"))
            if share is not None and share >= 0:
                text = f"{case}, {contender}: {100 * share:.1f} % of the ceiling, {result.row['us']} us"
                shares.append(Interval(colour, 100 * share, 100 * share, 100 * share, text))
            if dot := _dot(result, case, contender, colour, numbered[case]):
                found.append(dot)
        found.sort(key=lambda dot: dot.y)
        dots += [*found[:-1], *(replace(dot, tag=numbered[case]) for dot in found[-1:])]
        best = max(shares, key=lambda item: item.value, default=None)
        value = f"{best.value:.0f} % {contenders[best.colour]}" if best else ""
        rows.append(PlotRow(case, [shares] if shares else [], value))
        table += [
            _cells(by_contender[contender], case, contender, numbered[case])
            for contender in sorted(by_contender, key=contenders.index)
        ]
    charts = [
        roofline_plot(f"Roofline of {gpu}", dots, _ceilings(results), series=contenders),
        rows_plot(
            "Share of the ceiling",
            rows,
            unit="%",
            legend=list(enumerate(contenders)),
            marks=[Mark(100.0, "ceiling")],
            note="right is better; the number is the best one's",
        ),
    ]
    head = ["case", "no.", "contender", "us", "20 %", "80 %", "GB/s", "TFLOP/s", "of the ceiling"]
    head += ["timed by", "clock MHz", "temperature C", "commit", "date"]
    return Section(
        name,
        f"Kernels on {gpu}",
        _LEAD,
        _EMPTY,
        charts=[chart for chart in charts if chart is not None],
        tables=[*_checks(results), *([Table("Numbers: kernels", head, table)] if table else [])],
    )


def _checks(results: Sequence[Result]) -> list[Table]:
    """Errors against float64; shown at once if one is too large."""
    checked = [result for result in results if result.measurement == "correctness"]
    wrong = sum(result.row.get("passed") is not True for result in checked)
    title = f"Correctness: {len(checked)} checks, {wrong or 'none'} failed"
    keys = ("passed", "worst_of_allowed", "worst")
    rows = [[Cell(r.case), *(exact(r.row.get(k)) for k in keys), Cell(r.commit)] for r in checked]
    head = ["case", "passed", "error / allowed", "worst", "commit"]
    return [Table(title, head, rows, is_open=wrong > 0)] if checked else []


def _split(result: Result) -> tuple[str, str]:
    """("rms_norm 1x4608x3072 bf16 forward", "eager")."""
    case, _, contender = result.case.rpartition(", ")
    return (case, contender) if case else (contender, "")


def _rank(contender: str) -> int:
    return _ORDER.index(contender) if contender in _ORDER else len(_ORDER)


def _dot(result: Result, case: str, contender: str, colour: int, tag: str) -> Dot | None:
    """None where products do not count. FLOPs a byte are the ratio of the two rates."""
    flops = number(result.row.get("tflop_per_s"))
    moved = number(result.row.get("gb_per_s"))
    if flops is None or moved is None or flops <= 0 or moved <= 0:
        return None
    text = (
        f"{tag}. {case}, {contender}: {flops:.4g} TFLOP/s at {1000 * flops / moved:.3g} FLOP/byte"
    )
    return Dot(1000 * flops / moved, flops, colour, text)


def _ceilings(results: Sequence[Result]) -> list[Ceiling]:
    """The data sheet's, where the card is known, and the measured ones."""
    row = results[0].row
    found = []
    card = card_named(str(row["gpu"]), number(row.get("memory_gib")))
    if card is not None and "bf16" in card.rates:
        rate, bandwidth = card.rate("bf16"), card.bandwidth_gb_per_s / 1000
        found.append(Ceiling(f"{card.name}, data sheet, bf16", rate, bandwidth))
    measured = [result.row for result in results if result.measurement == "ceiling"]
    moved = [number(r.get("gb_per_s")) for r in measured if r.get("case") == "copy"]
    flops = [number(r.get("tflop_per_s")) for r in measured if r.get("case") == "matmul bf16"]
    if moved and flops and moved[0] and flops[0] and min(moved[0], flops[0]) > 0:
        found.append(Ceiling("measured, bf16", flops[0], moved[0] / 1000, measured=True))
    return found


def _cells(result: Result, case: str, contender: str, tag: str) -> list[Cell]:
    row = result.row
    keys = (
        "us us_p20 us_p80 gb_per_s tflop_per_s fraction_of_ceiling timed_by clock_mhz temperature_c"
    )
    values = [exact(row.get(key)) for key in keys.split()]
    return [
        Cell(case),
        Cell(tag),
        Cell(contender),
        *values,
        Cell(result.commit),
        Cell(result.time[:10]),
    ]
