"""Charts as HTML with inline SVG, for report.html.

The lines are SVG stretched to the box, the labels HTML placed by percentages: text keeps its size
from phone to desktop, colours follow the page's theme, and nothing is loaded. A page of ten charts
is some 100 KB; plotly would add 4 MB of script to every report, Matplotlib a dependency and
pictures that know one theme only.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

MAX_POINTS = 600
"""A line is thinned to about this many points, more than a screen shows."""

WIDTH, HEIGHT = 1000, 400
"""Units of a chart's drawing, whatever its size on the page."""

_NOTHING = Markup()

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve: `raw` is drawn faint, and its outliers do not set the axis."""

    name: str
    points: Sequence[Point]
    style: Literal["main", "raw"] = "main"
    markers: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Range and ticks of one axis."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, *, num_ticks: int = 5, round_out: bool = True) -> Axis:
    """Ticks at 1, 2, 2.5 or 5 times a power of ten; `round_out` extends the range to them."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    interval = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = low / interval, high / interval
    if round_out:
        start, end = math.floor(first + 1e-9), math.ceil(last - 1e-9)
        low, high = start * interval, end * interval
    else:
        start, end = math.ceil(first - 1e-9), math.floor(last + 1e-9)
    return Axis(low, high, tuple(index * interval for index in range(start, end + 1)))


def format_number(value: float, *, digits: int = 3) -> str:
    """A number to read: 1,234,567, 1,235, 12.3, 0.0123, 1.2e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1 - math.floor(math.log10(size))
    return f"{value:.{decimals}f}"


def _format_ticks(ticks: Sequence[float]) -> list[str]:
    """All ticks of an axis with the same number of decimals."""
    interval = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if 0 < largest < 1e-2:
        return [format_number(tick) if abs(tick) > interval / 2 else "0" for tick in ticks]
    if largest >= 1e6:
        return [f"{tick / 1e6:g}M" for tick in ticks]
    decimals = 0
    while decimals < 6 and abs(round(interval, decimals) - interval) > interval * 1e-6:
        decimals += 1
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points that keep every stretch's lowest and highest value."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = [points[0]]
    for start in range(1, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    kept.append(points[-1])
    return kept


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _y_axis(lines: Sequence[Line], *, from_zero: bool, num_ticks: int) -> Axis:
    values: list[float] = []
    for line in lines:
        ordered = sorted(y for _, y in line.points)
        if line.style == "raw" and len(ordered) >= 20 and len(lines) > 1:
            values += [_quantile(ordered, 0.02), _quantile(ordered, 0.98)]
        else:
            values += [ordered[0], ordered[-1]]
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    return nice_axis(low, high, num_ticks=num_ticks)


def line_path(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    def place(point: Point) -> str:
        # A bound, far outside the box, keeps browsers from choking on huge coordinates.
        y = min(max(1 - y_axis.share(point[1]), -50.0), 50.0)
        return f"{x_axis.share(point[0]) * WIDTH:.1f} {y * HEIGHT:.1f}"

    return "M" + "L".join(place(point) for point in points)


def dots_path(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Lines of no length with round ends: dots that stay round in a stretched drawing."""
    return "".join(line_path([point], x_axis, y_axis) + "h0" for point in points)


def _describe(title: str, line: Line, unit: str) -> str:
    (first_x, first), (last_x, last) = line.points[0], line.points[-1]
    suffix = f" {unit}" if unit else ""
    lowest_x, lowest = min(line.points, key=lambda point: point[1])
    if len(line.points) == 1:
        return f"{title}: {format_number(first, digits=4)}{suffix} at step {first_x:,.0f}."
    return (
        f"{title}, {line.name}: {format_number(first, digits=4)}{suffix} at step {first_x:,.0f}, "
        f"{format_number(last, digits=4)}{suffix} at step {last_x:,.0f}; "
        f"lowest {format_number(lowest, digits=4)}{suffix} at step {lowest_x:,.0f}."
    )


def figure(
    *,
    title: str,
    note: str,
    legend: Sequence[tuple[str, str]],
    label: str,
    x_axis: Axis,
    y_axis: Axis,
    x_unit: str,
    unit: str,
    drawing: Markup,
    data: object,
    compact: bool = False,
    clipped: bool = False,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    overlay: Markup = _NOTHING,
) -> Markup:
    """`drawing` (SVG in a box of 1000 x 400, y downwards) between two axes, with title and legend.

    legend: CSS class and name of each key. label: the chart in words, for those who do not see it.
    data: for the page's script. clipped: nothing leaves the box. x_ticks, y_ticks: the ticks' texts
    where they are not the numbers themselves. overlay: HTML over the drawing, placed in percent.
    """
    grid = Markup("").join(
        Markup('<path class="grid" d="M0 {y:.1f}h{w}"/>').format(
            y=(1 - y_axis.share(tick)) * HEIGHT, w=WIDTH
        )
        for tick in y_axis.ticks
    )
    y_labels = Markup("").join(
        Markup('<span style="bottom:{at:.2f}%">{text}</span>').format(
            at=100 * y_axis.share(tick), text=text
        )
        for tick, text in zip(y_axis.ticks, y_ticks or _format_ticks(y_axis.ticks), strict=True)
    )
    x_labels = Markup("").join(
        Markup('<span{end} style="left:{at:.2f}%">{text}</span>').format(
            # A label under the right edge would hang over it.
            end=Markup(' class="end"') if x_axis.share(tick) > 0.97 else "",
            at=100 * x_axis.share(tick),
            text=text,
        )
        for tick, text in zip(x_axis.ticks, x_ticks or _format_ticks(x_axis.ticks), strict=True)
    )
    keys = Markup("").join(
        Markup('<li><i class="key {style}"></i>{name}</li>').format(style=style, name=name)
        for style, name in legend
    )
    return Markup(
        '<figure class="chart{compact}">'
        "<figcaption><b>{title}</b>{unit}{note}{legend}</figcaption>"
        '<div class="plot" role="img" aria-label="{label}" data-chart="{data}">'
        '<div class="y" aria-hidden="true">{y_labels}</div>'
        '<div class="box{clipped}"><svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">'
        "{grid}{drawing}</svg>{overlay}</div>"
        '<div class="x" aria-hidden="true">{x_labels}</div>'
        '<div class="x-unit" aria-hidden="true">{x_unit}</div>'
        "</div></figure>"
    ).format(
        compact=" compact" if compact else "",
        title=title,
        unit=Markup('<span class="unit">{}</span>').format(unit) if unit else "",
        note=Markup('<span class="note">{}</span>').format(note) if note else "",
        legend=Markup('<ul class="legend">{}</ul>').format(keys) if legend else "",
        label=label,
        clipped=" clipped" if clipped else "",
        data=json.dumps(data, separators=(",", ":")),
        y_labels=y_labels,
        x_labels=x_labels,
        x_unit=x_unit,
        w=WIDTH,
        h=HEIGHT,
        grid=grid,
        drawing=drawing,
        overlay=overlay,
    )


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    note: str = "",
    steps: tuple[float, float] | None = None,
    from_zero: bool = False,
    compact: bool = False,
) -> Markup | None:
    """Curves over the steps; None if no line has a point.

    unit: of the values. note: beside the title. steps: range of the x axis, so that charts of one
    run line up. from_zero: the y axis includes 0. compact: for small multiples.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = steps if steps is not None else (min(xs), max(xs))
    x_axis = nice_axis(x_low, x_high, num_ticks=3 if compact else 6, round_out=False)
    y_axis = _y_axis(lines, from_zero=from_zero, num_ticks=3 if compact else 5)
    parts: list[Markup] = []
    shown = [(line, thin(line.points)) for line in lines]
    for line, points in shown:
        parts.append(
            Markup('<path class="line {style}" d="{d}"/>').format(
                style=line.style, d=line_path(points, x_axis, y_axis)
            )
        )
        if line.markers or len(points) == 1:
            parts.append(
                Markup('<path class="dots {style}" d="{d}"/>').format(
                    style=line.style, d=dots_path(points, x_axis, y_axis)
                )
            )
    main = next((line for line in lines if line.style == "main"), lines[0])
    return figure(
        title=title,
        note=note,
        legend=[(line.style, line.name) for line in lines] if len(lines) > 1 else [],
        label=_describe(title, main, unit),
        x_axis=x_axis,
        y_axis=y_axis,
        x_unit="" if compact else "step",
        unit=unit,
        drawing=Markup("").join(parts),
        data={
            "x": [x_axis.low, x_axis.high],
            "y": [y_axis.low, y_axis.high],
            "lines": [
                {"name": line.name, "points": [[x, float(f"{y:.6g}")] for x, y in points]}
                for line, points in shown
            ],
        },
        compact=compact,
        # A curve whose outliers are cut must not leave the box; dots at its edge should.
        clipped=any(line.style == "raw" for line in lines),
    )


def histogram(
    title: str, values: Sequence[float], *, unit: str, counted: str, num_bins: int = 24
) -> Markup | None:
    """How often each value occurs; None for fewer than 5. `counted` names what is counted.

    The highest 2% share the last bar if they lie far out, so that one slow step does not squeeze
    the rest into the first bar.
    """
    if len(values) < 5:
        return None
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    median = statistics.median(ordered)
    usual_high = _quantile(ordered, 0.98)
    cut = high > low + 2 * (usual_high - low) and usual_high > low
    if cut:
        high = usual_high
    x_axis = nice_axis(low, high, num_ticks=5)
    width = (x_axis.high - x_axis.low) / num_bins
    counts = [0] * num_bins
    for value in ordered:
        counts[min(int((value - x_axis.low) / width), num_bins - 1)] += 1
    y_axis = nice_axis(0.0, float(max(counts)), num_ticks=4)
    bars = Markup("").join(
        Markup(
            '<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"/>'
        ).format(
            x=index * WIDTH / num_bins + 1,
            y=(1 - y_axis.share(count)) * HEIGHT,
            w=WIDTH / num_bins - 2,
            h=y_axis.share(count) * HEIGHT,
        )
        for index, count in enumerate(counts)
        if count
    )
    beyond = sum(value > x_axis.high for value in ordered)
    note = f"median {format_number(median, digits=4)} {unit}"
    if beyond:
        note += f"; the last bar includes {beyond} up to {format_number(ordered[-1])} {unit}"
    return figure(
        title=title,
        note=note,
        legend=[],
        label=(
            f"{title}: {len(values)} {counted} from {format_number(ordered[0], digits=4)} to "
            f"{format_number(ordered[-1], digits=4)} {unit}, {note}."
        ),
        x_axis=x_axis,
        y_axis=y_axis,
        x_unit=unit,
        unit=counted,
        drawing=bars,
        data=None,
        compact=False,
    )


def share_bar(parts: Sequence[tuple[str, float, str]]) -> Markup | None:
    """One bar divided by (name, value, text), each part with a key; None if all are 0."""
    total = sum(value for _, value, _ in parts)
    if total <= 0:
        return None
    segments = Markup("").join(
        Markup('<i class="part-{index}" style="flex-grow:{grow:.4f}"></i>').format(
            index=index % 6, grow=value / total
        )
        for index, (_, value, _) in enumerate(parts)
    )
    keys = Markup("").join(
        Markup(
            '<li><i class="key part-{index}"></i>{name}: {text} <span>{share:.0f}%</span></li>'
        ).format(index=index % 6, name=name, text=text, share=100 * value / total)
        for index, (name, value, text) in enumerate(parts)
    )
    label = "; ".join(f"{name} {text}" for name, _, text in parts)
    return Markup(
        '<div class="shares" role="img" aria-label="{label}">{segments}</div>'
        '<ul class="legend">{keys}</ul>'
    ).format(label=label, segments=segments, keys=keys)
