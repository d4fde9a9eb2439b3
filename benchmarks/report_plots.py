"""Plots of the results' page, beside those of fasttune/charts.py: bars and intervals in rows with a
name each, points on logarithmic axes, a value over commits.

As there, drawings are SVG stretched to their box and labels are HTML, so that text keeps its size on
every screen. Each mark carries its numbers as `<title>`, which browsers show under the pointer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fasttune.charts import (
    WIDTH,
    Axis,
    dots_path,
    figure,
    format_number,
    line_path,
    nice_axis,
)

MAX_COLOURS = 10
"""Classes fill-0 to fill-9 of the page's style; further ones begin anew."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a bar."""

    colour: int
    start: float
    end: float
    text: str
    """Shown under the pointer."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its bounds: a dot on a line."""

    colour: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, slots=True)
class PlotRow:
    """A name, what is drawn beside it (one bar below the other), and its number as text."""

    name: str
    bars: Sequence[Sequence[Part | Interval]]
    value: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line through all rows, named above them."""

    value: float
    name: str


def log_axis(low: float, high: float) -> tuple[Axis, list[str]]:
    """Axis over the decimal exponents of a positive range with a margin, and the ticks' texts: 1, 2
    and 5 times the powers of ten, of many powers those alone."""
    low, high = math.log10(low) - 0.08, math.log10(high) + 0.08
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    every = math.ceil(len(powers) / 8)
    values = [f * 10.0**power for power in powers[::every] for f in factors]
    shown = [value for value in values if low <= math.log10(value) <= high]
    return Axis(low, high, tuple(math.log10(v) for v in shown)), [f"{v:,g}" for v in shown]


def rows_plot(
    title: str,
    rows: Sequence[PlotRow],
    *,
    unit: str,
    legend: Sequence[tuple[int, str]] = (),
    marks: Sequence[Mark] = (),
    note: str = "",
    ratio: bool = False,
) -> Markup | None:
    """Horizontal bars or intervals, a row each; None if there is nothing to draw. A row without bars
    shows its text.

    legend: colour and name. ratio: a logarithmic axis around 1, which half and double are equally far
    from; values must then be positive.
    """
    rows = [row for row in rows if any(row.bars) or row.value]
    if not any(any(row.bars) for row in rows):
        return None
    values = [v for row in rows for bar in row.bars for item in bar for v in _ends(item)]
    shown: list[Mark] = [*marks]
    if ratio:
        values = [math.log2(v) for v in [*values, 1.0]]
        axis = nice_axis(min(values), max(values), num_ticks=4)
        ticks = [f"{2**tick:.3g}" for tick in axis.ticks]
        shown.append(Mark(1.0, "equal"))
    else:
        axis = nice_axis(min(0.0, *values), max(values), num_ticks=5)
        shown = [mark for mark in marks if mark.value <= axis.high]
        ticks = [f"{tick:,.6g}" for tick in axis.ticks]

    def place(value: float) -> float:
        return axis.share(math.log2(value) if ratio else value)

    lines = Markup().join(_vertical("grid", axis.share(tick)) for tick in axis.ticks) + Markup(
        ""
    ).join(_vertical("mark", place(mark.value)) for mark in shown)

    def strip(items: Sequence[Part | Interval], style: str = "") -> Markup:
        return Markup(
            '<svg viewBox="0 0 {w} 10" preserveAspectRatio="none" aria-hidden="true"{style}>'
            "{lines}{drawn}</svg>"
        ).format(
            w=WIDTH,
            style=Markup(' class="{}"').format(style) if style else "",
            lines=lines,
            drawn=Markup().join(_draw(item, place) for item in items),
        )

    drawn = Markup().join(
        Markup(
            '<div class="name">{name}</div><div class="bars">{bars}</div>'
            '<div class="value">{value}</div>'
        ).format(
            name=row.name,
            value=row.value,
            # Between groups of bars a strip of nothing but lines.
            bars=Markup().join(map(strip, row.bars or [[]]))
            + (strip([], "gap") if len(row.bars) > 1 else ""),
        )
        for row in rows
    )
    keys = Markup().join(
        Markup('<li><i class="key fill-{c}"></i>{name}</li>').format(c=c % MAX_COLOURS, name=name)
        for c, name in legend
    )
    label = f"{title}, in {unit}. " + "; ".join(f"{row.name}: {row.value}" for row in rows)
    return Markup(
        '<figure class="chart"><figcaption><b>{title}</b><span class="unit">{unit}</span>{note}{legend}'
        '</figcaption><div class="rows" role="img" aria-label="{label}">'
        "{over}{drawn}"
        '<div class="under" aria-hidden="true">{ticks}</div></div></figure>'
    ).format(
        title=title,
        unit=unit,
        note=Markup('<span class="note">{}</span>').format(note) if note else "",
        legend=Markup('<ul class="legend">{}</ul>').format(keys) if legend else "",
        label=label,
        over=Markup('<div class="over" aria-hidden="true">{}</div>').format(
            Markup().join(_at(place(mark.value), mark.name) for mark in shown)
        )
        if shown
        else "",
        drawn=drawn,
        ticks=Markup().join(
            _at(axis.share(tick), text) for tick, text in zip(axis.ticks, ticks, strict=True)
        ),
    )


def _ends(item: Part | Interval) -> tuple[float, float]:
    return (item.start, item.end) if isinstance(item, Part) else (item.low, item.high)


def _vertical(style: str, share: float) -> Markup:
    return Markup('<path class="{style}" d="M{x:.1f} 0v10"/>').format(style=style, x=share * WIDTH)


def _at(share: float, text: str) -> Markup:
    end = Markup(' class="end"') if share > 0.97 else ""
    return Markup('<span{end} style="left:{at:.2f}%">{text}</span>').format(
        end=end, at=100 * share, text=text
    )


def _draw(item: Part | Interval, place: Callable[[float], float]) -> Markup:
    colour = item.colour % MAX_COLOURS
    if isinstance(item, Part):
        start, end = (place(value) * WIDTH for value in (item.start, item.end))
        return Markup(
            '<rect class="fill-{c}" x="{x:.1f}" y="1" width="{w:.1f}" height="8">'
            "<title>{text}</title></rect>"
        ).format(c=colour, x=start, w=max(end - start, 0.0), text=item.text)
    low, value, high = (place(v) * WIDTH for v in (item.low, item.value, item.high))
    return Markup(
        '<g><title>{text}</title><path class="range line-{c}" d="M{low:.1f} 5H{high:.1f}"/>'
        '<path class="dots line-{c}" d="M{value:.1f} 5h0"/></g>'
    ).format(c=colour, low=low, high=high, value=value, text=item.text)


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter plot; both coordinates positive."""

    x: float
    y: float
    series: int
    """Index into the plot's names; also the colour."""
    text: str
    tag: str = ""
    """Written beside the dot, if there is room."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A roofline: the slope is a bandwidth, the plateau a peak rate."""

    name: str
    rate: float
    """TFLOP/s."""
    bandwidth: float
    """TB/s."""
    measured: bool = False

    def at(self, intensity: float) -> float:
        """TFLOP/s that `intensity` FLOPs a byte can reach."""
        return min(self.rate, self.bandwidth * intensity)


def roofline_plot(
    title: str, dots: Sequence[Dot], ceilings: Sequence[Ceiling], *, series: Sequence[str]
) -> Markup | None:
    """Rate over arithmetic intensity, both logarithmic, under the ceilings; None without dots."""
    dots = [dot for dot in dots if dot.x > 0 and dot.y > 0]
    if not dots:
        return None
    ridges = [c.rate / c.bandwidth for c in ceilings if c.bandwidth > 0]
    xs = [dot.x for dot in dots] + ridges
    x_axis, x_ticks = log_axis(min(xs) / 2, max(xs) * 2)
    ys = [dot.y for dot in dots] + [c.rate for c in ceilings]
    y_axis, y_ticks = log_axis(min(ys), max(ys))

    def logs(x: float, y: float) -> tuple[float, float]:
        return math.log10(x), math.log10(y)

    drawing = Markup()
    for ceiling in ceilings:
        corners = [10**x_axis.low, ceiling.rate / ceiling.bandwidth, 10**x_axis.high]
        points = [logs(x, ceiling.at(x)) for x in corners]
        drawing += Markup(
            '<path class="ceiling{kind}" d="{d}"><title>{name}</title></path>'
        ).format(
            kind=" measured" if ceiling.measured else "",
            d=line_path(points, x_axis, y_axis),
            name=f"{ceiling.name}: {format_number(ceiling.rate)} TFLOP/s, "
            f"{format_number(1000 * ceiling.bandwidth)} GB/s",
        )
    for dot in dots:
        drawing += Markup(
            '<path class="dots line-{c}" d="{d}"><title>{text}</title></path>'
        ).format(
            c=dot.series % MAX_COLOURS,
            d=dots_path([logs(dot.x, dot.y)], x_axis, y_axis),
            text=dot.text,
        )
    used = sorted({dot.series for dot in dots})
    legend = [(f"fill-{index % MAX_COLOURS}", series[index]) for index in used]
    if any(not c.measured for c in ceilings):
        legend.append(("ceiling", "data sheet"))
    if any(c.measured for c in ceilings):
        legend.append(("ceiling measured", "measured ceiling"))
    best = max(dots, key=lambda dot: dot.y)
    return figure(
        title=title,
        note="",
        legend=legend,
        label=f"{title}: {len(dots)} points; the fastest is {best.text}.",
        x_axis=x_axis,
        y_axis=y_axis,
        x_unit="FLOP per byte",
        unit="TFLOP/s",
        drawing=drawing,
        data=None,
        clipped=True,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        overlay=_tags(dots, x_axis, y_axis),
    )


def _tags(dots: Sequence[Dot], x_axis: Axis, y_axis: Axis) -> Markup:
    """Tags beside their dots; one that would cover another is left out."""
    placed: list[tuple[float, float]] = []
    tags = Markup()
    for dot in dots:
        x, y = x_axis.share(math.log10(dot.x)), y_axis.share(math.log10(dot.y))
        if not dot.tag or any(abs(x - a) < 0.03 and abs(y - b) < 0.06 for a, b in placed):
            continue
        placed.append((x, y))
        tags += Markup(
            '<span class="tag" aria-hidden="true" style="left:{x:.2f}%;bottom:{y:.2f}%">{tag}</span>'
        ).format(x=100 * x, y=100 * y, tag=dot.tag)
    return tags


@dataclass(frozen=True, slots=True)
class Moment:
    """A value at one commit, its band, and its text under the pointer."""

    value: float
    low: float | None
    high: float | None
    date: str
    text: str


def history_plot(title: str, moments: Sequence[Moment], *, unit: str, note: str) -> Markup:
    """Values in the order given, equally far apart, with the band where each moment has one."""
    values = [m.value for m in moments]
    lows = [m.value if m.low is None else m.low for m in moments]
    highs = [m.value if m.high is None else m.high for m in moments]
    last = len(moments) - 1
    x_axis = Axis(0.0, float(max(last, 1)), (0.0, float(last)) if last else (0.0,))
    y_axis = nice_axis(min(*values, *lows), max(*values, *highs), num_ticks=3)
    drawing = Markup()
    if any(m.low is not None for m in moments):
        around = [*enumerate(highs), *reversed([*enumerate(lows)])]
        drawing += Markup('<path class="band" d="{}Z"/>').format(line_path(around, x_axis, y_axis))
    drawing += Markup('<path class="line" d="{}"/>').format(
        line_path([*enumerate(values)], x_axis, y_axis)
    )
    for index, moment in enumerate(moments):
        drawing += Markup('<path class="dots" d="{d}"><title>{text}</title></path>').format(
            d=dots_path([(index, moment.value)], x_axis, y_axis), text=moment.text
        )
    first, final = moments[0], moments[-1]
    return figure(
        title=title,
        note=note,
        legend=[],
        label=f"{title}, {unit}: {format_number(first.value, digits=4)} at first, "
        f"{format_number(final.value, digits=4)} now, {len(moments)} measurements.",
        x_axis=x_axis,
        y_axis=y_axis,
        x_unit="",
        unit=unit,
        drawing=drawing,
        data=None,
        compact=True,
        x_ticks=[first.date, final.date] if last else [first.date],
    )
