"""The sections of the results' page: what the static gates expect, and what was measured."""

import math
import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from benchmarks.harness import Row
from benchmarks.report_page import Cell, Section, Table, Tile, case_table, exact
from benchmarks.report_plots import (
    Interval,
    Mark,
    Moment,
    Part,
    PlotRow,
    history_plot,
    rows_plot,
)
from benchmarks.report_rows import History, Odd, Result, newest, number
from fasttune.charts import format_number

Cases = Mapping[str, Row]

CARD_SIZES = (8, 12, 16, 24, 32)
"""GB printed on the box, which are GiB in the card."""
MAX_HISTORIES = 240
"""Charts on the page; the pages' size is what grows."""

_PARTS = ("weights", "adapters", "gradients", "optimizer", "ema", "saved", "inputs", "transient")
_PART_NAMES = {"ema": "EMA", "saved": "saved activations"}
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
    return Section(
        "blocks",
        "Saved bytes per block",
        "What one block keeps from its forward for its backward; 1 u is tokens x hidden in bf16. Min-cut is "
        "what torch.compile's partitioner would keep of the same block, plain what eager PyTorch keeps.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: blocks", cases, first="block")] if cases else [],
    )


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
            return Cell(f"{time:,.1f}", is_number=True, is_over=True)
        heat = 6 + round(34 * (math.log(time) - low) / (high - low or 1.0))
        return Cell(f"{time:,.1f}", is_number=True, heat=heat)

    tables = []
    if cards:
        rows = [[Cell(c), *(cell(c, row, card) for card in cards)] for c, row in cases.items()]
        tables.append(
            Table(
                "Least step time in ms",
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
        "The least time a training step can take on each card: every operation at the card's peak rate or "
        "bandwidth, whichever is slower, as eager PyTorch moves the bytes. A bound from data sheets, not a "
        "measurement; real steps are slower.",
        _STATIC,
        tables=tables,
    )


def launches(cases: Cases) -> Section:
    """Two bars a config."""
    pairs: dict[str, dict[str, Row]] = {}
    for case, row in cases.items():
        config, _, mode = case.rpartition(", ")
        pairs.setdefault(config or case, {})[mode if config else ""] = row
    rows, used = [], {}
    for config, modes in pairs.items():
        bars, texts = [], []
        for mode, row in sorted(modes.items(), key=lambda item: item[0] != "eager"):
            start, bar = 0.0, []
            for colour, kind in enumerate(_KINDS):
                count = number(row.get(kind))
                if count is not None and count > 0:
                    used[colour] = kind
                    text = f"{config}, {mode}: {count:,.0f} {kind}"
                    bar.append(Part(colour, start, start + count, text))
                    start += count
            if bar:
                bars.append(bar)
                texts.append(f"{start:,.0f} {mode}".strip())
        rows.append(PlotRow(config, bars, "\n".join(texts)))
    chart = rows_plot(
        "Launches of one training step", rows, unit="launches", legend=sorted(used.items())
    )
    return Section(
        "launches",
        "Launches",
        "Operations that start work on the device, by kind; of each config the eager step is above the "
        "compiled one.",
        _STATIC,
        charts=[chart] if chart else [],
        tables=[case_table("Numbers: launches", cases, first="case")] if cases else [],
    )


def other_gates(gates: Mapping[str, Cases], versions: Mapping[str, str]) -> Section:
    """Tables of the gates that have no plot."""
    plotted = {"memory", "blocks", "flops", "launches"}
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


def ratios(results: Sequence[Result]) -> Section:
    """Dots with intervals around 1."""
    rows, table = [], []
    for result in newest(results):
        for name, value, low, high in _ratios(result.row):
            bounds = (number(low), number(high))
            known = number(value)
            if known is None or known <= 0:
                continue
            label = f"{result.title}, {name}" if name else result.title
            # Bounds of a single round are 0 and huge: the line ends at an eighth and eightfold.
            less, more = (
                known if bound is None else min(max(bound, known / 8), known * 8)
                for bound in bounds
            )
            text = f"{label}: {known:.3f}, {less:.3f} to {more:.3f}"
            shown = f"{known:.3f}"
            rows.append(PlotRow(label, [[Interval(0, known, less, more, text)]], shown))
            table.append(
                [
                    Cell(label),
                    *map(exact, (known, *bounds, result.row.get("rounds"))),
                    *map(Cell, (result.machine, result.commit, result.time[:10])),
                    exact(result.row.get("differs")),
                ]
            )
    chart = rows_plot("Time beside the contender", rows, unit="ratio", ratio=True)
    head = ["measurement", "ratio", "low", "high", "rounds", "machine", "commit", "date"]
    head.append("other work")
    return Section(
        "cpu",
        "Ratios on the CPU",
        "Time of fasttune's way over a named contender's, measured in turns in one run: left of 1 is "
        "faster. The line holds 95 % of the bootstrap.",
        "No ratios yet: run fasttune bench cpu.",
        charts=[chart] if chart else [],
        tables=[Table("Numbers: ratios", head, table)] if table else [],
    )


def _ratios(row: Row) -> list[tuple[str, object, object, object]]:
    """(name, value, low, high) of what a row has under "ratio" or "<name>_ratio", with bounds."""
    found = []
    for key in row:
        match = re.fullmatch(r"(?:(\w+)_)?ratio", key)
        if match and f"{key}_low" in row and f"{key}_high" in row:
            found.append((match[1] or "", row[key], row[f"{key}_low"], row[f"{key}_high"]))
    return found


def history(found: Sequence[History]) -> list[Section]:
    """A section a machine, so that its name is a heading; one that is empty if there is nothing."""
    lead = "Metrics that were measured at more than one commit, oldest left; the band holds the middle 60 % "
    lead += "of the rounds. Commits are under the pointer and in the table."
    empty = "No metric has rows of two commits yet."
    if not found:
        return [Section("history", "History", "", empty)]
    machines: dict[str, list[History]] = {}
    for item in found:
        machines.setdefault(item.machine, []).append(item)
    sections = []
    left = MAX_HISTORIES
    for index, (machine, items) in enumerate(machines.items()):
        more = len(items) - left
        tail = (
            f" The first {left} of {len(items)} are drawn; the table has all." if more > 0 else ""
        )
        sections.append(
            Section(
                f"history-{index}" if index else "history",
                f"History on {machine}",
                lead + tail,
                empty,
                charts=[_history_chart(item) for item in items[:left]],
                tables=[_history_table(items)],
                is_small=True,
            )
        )
        left = max(left - len(items), 0)
    return sections


def _history_chart(item: History) -> Markup:
    first, last = item.points[0].value, item.points[-1].value
    change = f"{last / first - 1:+.1%}".replace("-", "−") if first else ""
    unit = item.metric.replace("_", " ")
    return history_plot(
        item.title,
        [
            Moment(
                p.value,
                p.low,
                p.high,
                p.result.time[:10] or "undated",
                f"{p.result.commit}, {p.result.time[:16]}: {format_number(p.value, digits=4)}"
                + (f", torch {p.result.row['torch']}" if p.result.row.get("torch") else ""),
            )
            for p in item.points
        ],
        unit=unit,
        note=change,
    )


def _history_table(items: Sequence[History]) -> Table:
    return Table(
        "Numbers: history",
        ["measurement", "metric", "value", "20 %", "80 %", "commit", "time", "torch"],
        [
            [
                Cell(item.title),
                Cell(item.metric),
                *map(exact, (p.value, p.low, p.high)),
                *map(Cell, (p.result.commit, p.result.time, str(p.result.row.get("torch") or ""))),
            ]
            for item in items
            for p in item.points
        ],
    )


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
