"""Times over commits and beside contenders, in sections of the results' page."""

from collections.abc import Sequence

from markupsafe import Markup

from benchmarks.report_page import Cell, Section, Table, exact
from benchmarks.report_plots import Interval, Moment, PlotRow, history_plot, rows_plot
from benchmarks.report_rows import History, Result, newest, number, numbers
from fasttune.charts import format_number

MAX_HISTORIES = 240
"""Charts on the page; the page's size is what grows."""


def ratios(results: Sequence[Result]) -> Section:
    """Dots with intervals around 1."""
    rows, table = [], []
    for result in newest(results):
        ratio = number(result.row.get("ratio"))
        if ratio is None or ratio <= 0:
            continue
        bounds = numbers(result.row.get("bounds_95"))
        low, high = (bounds[0], bounds[1]) if len(bounds) == 2 else (ratio, ratio)
        # An interval of few rounds would squeeze the others: drawn are an eighth and eightfold at most.
        low, high = max(low, ratio / 8), min(high, ratio * 8)
        text = f"{result.title}: {ratio:.3f}"
        if bounds:
            text += f", {low:.3f} to {high:.3f}"
        rows.append(PlotRow(result.title, [[Interval(0, ratio, low, high, text)]], f"{ratio:.3f}"))
        table.append(
            [
                Cell(result.title),
                exact(ratio),
                exact(bounds),
                *(exact(result.row.get(k)) for k in ("ours_ms", "theirs_ms", "rounds")),
                *map(Cell, (result.machine, result.commit, result.time[:10])),
                exact(result.row.get("differs")),
            ]
        )
    chart = rows_plot("Time beside the contender", rows, unit="ratio", ratio=True)
    head = ["measurement", "ratio", "95 %", "ours ms", "theirs ms", "rounds"]
    head += ["machine", "commit", "date", "other work"]
    return Section(
        "cpu",
        "Ratios on the CPU",
        "Time of fasttune's way over a named contender's, measured in turns in one run: left of 1 is "
        "faster. The line is the interval of 95 %.",
        "No ratios yet: run fasttune bench cpu.",
        charts=[chart] if chart else [],
        tables=[Table("Numbers: ratios", head, table)] if table else [],
    )


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
