"""What the static gates expect, in sections of the results' page."""

import math
from collections.abc import Mapping

from markupsafe import Markup

from benchmarks.harness import Row
from benchmarks.report_page import Cell, Section, Table, case_table, exact
from benchmarks.report_plots import (
    Mark,
    Part,
    PlotRow,
    rows_plot,
)
from benchmarks.report_rows import Odd, number

Cases = Mapping[str, Row]

CARD_SIZES = (8, 12, 16, 24, 32)
"""GB printed on the box, which are GiB in the card."""
_PARTS = tuple("weights adapters gradients optimizer ema saved recomputed inputs transient".split())
_PART_NAMES = {
    "ema": "EMA",
    "saved": "saved activations",
    "recomputed": "recomputed activations",
}
_KINDS = ("gemm", "attention", "custom", "pointwise", "copy")
_BLOCKS = (
    ("saved_u", "fasttune"),
    ("min_cut_u", "min-cut partitioner"),
    ("plain_u", "plain PyTorch"),
)
_STATIC = "Nothing is recorded yet: run fasttune bench static --write."


def memory(cases: Cases, odd: list[Odd]) -> Section:
    """Stacked peaks."""
    rows, used = [], {}
    for case, row in sorted(
        cases.items(), key=lambda item: -(number(item[1].get("peak_gib")) or 0)
    ):
        peak = number(row.get("peak_gib"))
        parts = [
            (key.removesuffix("_gib"), number(row[key])) for key in row if key.endswith("_gib")
        ]
        known = {name: size for name, size in parts if name != "peak" and size is not None}
        if peak is None:
            odd.append(Odd(f"memory / {case}", "has no peak_gib"))
            continue
        if any(size < 0 for size in known.values()) or sum(known.values()) > peak * 1.001 + 1e-3:
            odd.append(Odd(f"memory / {case}", f"parts do not fit into the peak: {known}"))
            continue
        # Parts without a place of their own share the last colour with what no part explains.
        order = [name for name in _PARTS if name in known]
        rest = peak - sum(known[name] for name in order)
        sizes = [(_PARTS.index(name), known[name]) for name in order]
        if rest > 1e-3 * peak:
            sizes.append((len(_PARTS), rest))
        start, bar = 0.0, []
        for colour, size in sizes:
            name = _part_name(colour)
            if size > 0:
                used[colour] = name
                text = f"{case}: {name} {size:.2f} GiB of {peak:.2f}"
                bar.append(Part(colour, start, start + size, text))
            start += size
        rows.append(PlotRow(case, [bar], f"{peak:.2f}"))
    chart = rows_plot(
        "Peak of one training step",
        rows,
        unit="GiB",
        legend=sorted(used.items()),
        marks=[Mark(float(size), f"{size} GB") for size in CARD_SIZES],
    )
    return Section(
        "memory",
        "Memory of a training step",
        "Counted over fake tensors at the model's real size: forward, backward, optimizer and EMA, with "
        "sizes rounded as the CUDA caching allocator rounds. CUDA's context, workspaces of libraries and "
        "fragmentation come on top.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: memory", cases, first="config")] if cases else [],
    )


def _part_name(colour: int) -> str:
    name = _PARTS[colour] if colour < len(_PARTS) else "other"
    return _PART_NAMES.get(name, name)


def blocks(cases: Cases) -> Section:
    """Bars of what a block keeps."""
    rows = []
    for case, row in cases.items():
        bars, texts = [], []
        for colour, (key, name) in enumerate(_BLOCKS):
            size = number(row.get(key))
            if size is not None and size >= 0:
                bars.append([Part(colour, 0.0, size, f"{case}, {name}: {size:.4g} u")])
                texts.append(f"{size:.4g}")
        rows.append(PlotRow(case, bars, "\n".join(texts)))
    chart = rows_plot(
        "Kept for the backward",
        rows,
        unit="u",
        legend=[(colour, name) for colour, (_, name) in enumerate(_BLOCKS)],
    )
    numbers = {c: {k: row[k] for k in row if k != "tensors"} for c, row in cases.items()}
    kept = Table(
        "Tensors that are kept",
        ["block", "count, shape, dtype, u of each, operation"],
        [[Cell(case), Cell(line)] for case, row in cases.items() for line in _lines(row)],
    )
    return Section(
        "blocks",
        "Saved bytes per block",
        "What one block keeps from its forward for its backward; 1 u is tokens x hidden in bf16. Min-cut is "
        "what torch.compile's partitioner would keep of the same block, plain what eager PyTorch keeps.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: blocks", numbers, first="block"), kept] if cases else [],
    )


def _lines(row: Row) -> list[str]:
    tensors = row.get("tensors")
    return [str(line) for line in tensors] if isinstance(tensors, list) else []


def roofline_times(cases: Cases, peaks: Cases, memory_gib: Mapping[str, float]) -> Section:
    """A table of step times, shaded by their size.

    peaks: rows of the memory gate, which say what does not fit. memory_gib: of each card.
    """
    prefix = "step_ms "
    cards = list(dict.fromkeys(k for row in cases.values() for k in row if k.startswith(prefix)))
    times = [number(row.get(card)) for row in cases.values() for card in cards]
    logs = [math.log(time) for time in times if time is not None and time > 0]
    low, high = min(logs, default=0.0), max(logs, default=1.0)

    def cell(case: str, row: Row, card: str) -> Cell:
        time = number(row.get(card))
        if time is None or time <= 0:
            return exact(row.get(card))
        peak = number(peaks.get(case, {}).get("peak_gib"))
        size = memory_gib.get(card.removeprefix(prefix))
        if peak is not None and size is not None and peak > size:
            return Cell(_milliseconds(time), is_number=True, is_over=True)
        heat = 6 + round(34 * (math.log(time) - low) / (high - low or 1.0))
        return Cell(_milliseconds(time), is_number=True, heat=heat)

    tables = []
    if cards:
        rows = [[Cell(c), *(cell(c, row, card) for card in cards)] for c, row in cases.items()]
        tables.append(
            Table(
                "Step time at full rate in ms",
                ["config", *(card.removeprefix(prefix) for card in cards)],
                rows,
                is_open=True,
                note="Milliseconds. Struck out where the counted peak above is larger than the card's "
                "memory. The stronger the colour, the slower.",
            )
        )
    if cases:
        rest = {
            case: {k: v for k, v in row.items() if not k.startswith(prefix)}
            for case, row in cases.items()
        }
        tables.append(case_table("Numbers: work of a step", rest, first="config"))
    return Section(
        "roofline",
        "Roofline step time",
        "The eager step on each card if nothing stayed in a cache and every operation ran at the full rate "
        "or bandwidth of the data sheet, whichever takes longer. Not a measurement and no bound: fused "
        "kernels and caches can beat it, launches and inefficiency make it slower. Convolutions in fp32 "
        "are taken at the fp32 rate; cuDNN runs them in TF32 by default, which is faster.",
        _STATIC,
        tables=tables,
    )


def _milliseconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def launches(cases: Cases) -> Section:
    """A bar a config: operations of the eager step."""
    chart = _by_kind("Operations of one eager training step", "operations", cases)
    return Section(
        "launches",
        "Launches of the eager step",
        "Operations of PyTorch that start work on the device, by kind. An operation counts once, "
        "however many kernels it takes.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: launches", cases, first="case")] if cases else [],
    )


def compiled_launches(cases: Cases) -> Section:
    """A bar a config: kernels of the step with compiled blocks."""
    chart = _by_kind("Kernels of one training step, blocks compiled", "kernels", cases)
    return Section(
        "compiled-launches",
        "Launches with compiled blocks",
        "Kernels that Inductor schedules for the blocks, by kind, and operations around them. A kernel "
        "may hold many operations, and an operation take several kernels: these are not the units of "
        "the eager step's launches, and the difference of the two is no saving.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: compiled launches", cases, first="case")] if cases else [],
    )


def _by_kind(title: str, unit: str, cases: Cases) -> Markup | None:
    """Stacked bars of launches."""
    rows, used = [], {}
    for case, row in cases.items():
        start, bar = 0.0, []
        for colour, kind in enumerate(_KINDS):
            count = number(row.get(kind))
            if count is not None and count > 0:
                used[colour] = kind
                text = f"{case}: {count:,.0f} {kind}"
                bar.append(Part(colour, start, start + count, text))
                start += count
        rows.append(PlotRow(case, [bar] if bar else [], f"{start:,.0f}" if bar else ""))
    return rows_plot(title, rows, unit=unit, legend=sorted(used.items()))


def other_gates(gates: Mapping[str, Cases], versions: Mapping[str, str]) -> Section:
    """Tables of the gates that have no plot."""
    plotted = {"memory", "blocks", "flops", "launches", "compiled_launches"}
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Section(
        "gates",
        "Other gates",
        "Every number that a commit is held to" + (f"; recorded with {made}." if made else "."),
        _STATIC,
        tables=[
            case_table(f"{name.replace('_', ' ')}: {len(cases)} cases", cases, first="case")
            for name, cases in gates.items()
            if name not in plotted and cases
        ],
    )
