"""report.html: one page about a run, made of what its folder holds.

Everything is inside the file (styles, script, pictures), nothing is fetched, and the page forbids
itself to. Each part is left out if its file is missing, so that an interrupted run has a report as
well. The template is report.html.jinja, its style report.css.jinja, the curves are in charts.py,
pictures and text in report_files.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fasttune.charts import Line, format_number, histogram, line_chart, share_bar
from fasttune.metrics import read_metrics
from fasttune.progress import format_duration, format_step_time
from fasttune.report_files import (
    file_lists,
    highlight_toml,
    parse_config,
    read_json,
    read_text,
    sample_grids,
    weight_files,
)
from fasttune.run_folder import write_text

LOG_LINES = 60
"""Lines of run.log shown."""

MAX_WEIGHT_FILES = 40
"""Exported files listed; a diffusers folder has many small ones."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str = ""
    trend: str = ""
    """"better" or "worse" where the number has a good direction."""


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html and return its path. StorageError if it cannot be written."""
    path = run_dir / "report.html"
    write_text(path, render_report(run_dir))
    return path


def render_report(run_dir: Path) -> str:
    """The page as text."""
    records = read_metrics(run_dir / "metrics.jsonl")
    summary = read_json(run_dir / "summary.json", dict) or {}
    config_text = read_text(run_dir / "config.toml")
    config = parse_config(config_text)
    lines = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    steps = int(summary.get("steps") or max((record["step"] for record in records), default=0))
    total_steps = int(summary.get("total_steps") or _get(config, "train", "steps") or steps)
    grids, num_grids, unreadable = sample_grids(run_dir)
    weights = weight_files(run_dir)
    span = (0.0, float(max(steps, 1)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=_get(config, "run", "name") or run_dir.name,
        subtitle=_subtitle(config),
        status=_status(steps, total_steps),
        finished=steps >= total_steps > 0,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        run_dir=str(run_dir.resolve()),
        tiles=_tiles(lines, held_out, summary, config, steps),
        grids=grids,
        num_grids=num_grids,
        unreadable_grids=unreadable,
        prompts=_get(config, "validation", "prompts") or [],
        loss_charts=_present(_loss_chart(lines, span), _held_out_chart(held_out, span)),
        noise_level_charts=_noise_level_charts(held_out, span),
        optimizer_charts=_present(
            line_chart("Learning rate", [Line(name="lr", points=_points(lines, "lr"))], steps=span),
            line_chart(
                "Gradient norm",
                [Line(name="gradient norm", points=_points(lines, "grad_norm"))],
                note="before clipping",
                steps=span,
                from_zero=True,
            ),
        ),
        speed_charts=_speed_charts(lines, span),
        phases=_phases(summary),
        memory_phases=_memory_phases(summary),
        weights=weights[:MAX_WEIGHT_FILES],
        num_weights=len(weights),
        file_lists=file_lists(run_dir),
        config=highlight_toml(config_text),
        log="\n".join(read_text(run_dir / "run.log").splitlines()[-LOG_LINES:]),
        start_step=summary.get("start_step") or 0,
        machine=_machine(summary),
    )


def _get(config: Mapping[str, Any], section: str, key: str) -> Any:
    table = config.get(section)
    return table.get(key) if isinstance(table, dict) else None


def _points(records: Records, key: str) -> list[tuple[float, float]]:
    return [
        (float(record["step"]), float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float)
    ]


def _present(*charts: Markup | None) -> list[Markup]:
    return [chart for chart in charts if chart is not None]


# Headline


def _subtitle(config: Mapping[str, Any]) -> str:
    parts: list[str] = []
    family, path = _get(config, "model", "family"), _get(config, "model", "path")
    if family:
        parts.append(f"{family} from {path}" if path else str(family))
    if _get(config, "adapter", "type") == "lora":
        rank = _get(config, "adapter", "rank")
        parts.append(f"LoRA of rank {rank}" if rank else "LoRA")
    elif _get(config, "adapter", "type") == "none":
        parts.append("all weights trained")
    sources = config.get("data")
    if isinstance(sources, list):
        parts += [str(s["path"]) for s in sources if isinstance(s, dict) and "path" in s]
    return " · ".join(parts)


def _status(steps: int, total_steps: int) -> str:
    if not steps:
        return "no step made"
    return "finished" if steps >= total_steps else f"stopped at step {steps:,} of {total_steps:,}"


def _change(first: float | None, last: float | None) -> tuple[str, str]:
    """("from 0.500, −20 %", "better") for a quantity that should fall."""
    if first is None or last is None or not first:
        return "", ""
    change = (last - first) / abs(first)
    sign = "−" if change < 0 else "+"
    trend = "better" if change < -0.0005 else "worse" if change > 0.0005 else ""
    return f"from {format_number(first)}, {sign}{abs(change):.1%}", trend


def _tiles(
    lines: Records,
    held_out: Records,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    steps: int,
) -> list[Tile]:
    newest = lines[-1] if lines else {}
    images = summary.get("images_seen")
    if images is None:
        batch = _get(config, "train", "batch_size") or 1
        images = steps * batch * (_get(config, "train", "gradient_accumulation") or 1)
    epoch = newest.get("epoch")
    detail = f"{images:,} images" + (f", {format_number(epoch)} epochs" if epoch else "")
    tiles = [Tile(label="Steps", value=f"{steps:,}", detail=detail)]
    if losses := _points(lines, "loss_smoothed"):
        detail, trend = _change(losses[0][1], losses[-1][1])
        value = format_number(losses[-1][1])
        tiles.append(Tile(label="Loss, smoothed", value=value, detail=detail, trend=trend))
    if points := _points(held_out, "held_out_loss"):
        detail, trend = _change(points[0][1], points[-1][1]) if len(points) > 1 else ("", "")
        value = format_number(points[-1][1])
        tiles.append(Tile(label="Held-out loss", value=value, detail=detail, trend=trend))
    step_ms = summary.get("step_ms") or newest.get("step_ms")
    if step_ms:
        p10, p90 = summary.get("step_ms_p10"), summary.get("step_ms_p90")
        spread = ""
        if p10 and p90:
            spread = f"80% within {format_number(p10)} to {format_number(p90)} ms"
        tiles.append(Tile(label="Step time", value=format_step_time(step_ms), detail=spread))
    rate = summary.get("images_per_s") or newest.get("images_per_s")
    if rate:
        tiles.append(Tile(label="Throughput", value=format_number(rate), detail="images/s"))
    peak = summary.get("peak_gib") or newest.get("peak_gib")
    if peak:
        tiles.append(
            Tile(label="Peak memory", value=f"{format_number(peak)} GiB", detail="training")
        )
    wait = summary.get("data_wait_share", newest.get("data_wait_share"))
    if wait is not None:
        tiles.append(Tile(label="Data wait", value=f"{wait:.1%}", detail="of the step time"))
    elapsed = summary.get("elapsed_s") or newest.get("elapsed_s")
    if elapsed:
        tiles.append(Tile(label="Time", value=format_duration(elapsed), detail="with validation"))
    if first := summary.get("first_step_s"):
        detail = _compiled(summary.get("compiled")) or "from the start, with preparation"
        tiles.append(Tile(label="First step", value=format_duration(first), detail=detail))
    return tiles


def _compiled(found: Mapping[str, Any] | None) -> str:
    """12 graphs compiled in 41 s, 12 cached"""
    if not found:
        return ""
    if not found["graphs"]:
        return "blocks did not compile and ran eagerly" if found["given_up"] else ""
    cached = f", {found['from_cache']} cached" if found["from_cache"] else ""
    rest = ", further ones eager" if found["given_up"] else ""
    return f"{found['graphs']} graphs compiled in {format_duration(found['seconds'])}{cached}{rest}"


# Curves


def _loss_chart(lines: Records, span: tuple[float, float]) -> Markup | None:
    raw, smooth = _points(lines, "loss"), _points(lines, "loss_smoothed")
    return line_chart(
        "Loss",
        [
            Line(name="of a step", points=raw, style="raw"),
            Line(name="smoothed", points=smooth),
        ],
        steps=span,
    )


def _held_out_chart(held_out: Records, span: tuple[float, float]) -> Markup | None:
    points = _points(held_out, "held_out_loss")
    note = "same images, noise and noise levels each time"
    line = Line(name="held-out loss", points=points, markers=len(points) <= 60)
    return line_chart("Held-out loss", [line], note=note, steps=span)


def _noise_level_charts(held_out: Records, span: tuple[float, float]) -> list[Markup]:
    """One small chart a noise level, least noise first."""
    measured = [r for r in held_out if isinstance(r.get("held_out_per_timestep"), list)]
    if not measured:
        return []
    count = len(measured[-1]["held_out_per_timestep"])
    measured = [r for r in measured if len(r["held_out_per_timestep"]) == count]
    levels: list[float] = measured[-1].get("held_out_timesteps") or []
    named = len(levels) == count
    order = sorted(range(count), key=lambda i: levels[i]) if named else list(range(count))
    charts: list[Markup | None] = []
    for index in order:
        values = [(r["step"], r["held_out_per_timestep"][index]) for r in measured]
        points = [(float(step), float(value)) for step, value in values if value is not None]
        title = (
            f"noise level {levels[index]:.4g}" if named else f"noise level {index + 1} of {count}"
        )
        note = _change(points[0][1], points[-1][1])[0].split(", ")[-1] if len(points) > 1 else ""
        line = Line(name="held-out loss", points=points, markers=len(points) <= 20)
        charts.append(line_chart(title, [line], note=note, steps=span, compact=True))
    return _present(*charts)


def _speed_charts(lines: Records, span: tuple[float, float]) -> list[Markup]:
    waits = [(step, 100 * share) for step, share in _points(lines, "data_wait_share")]
    step_times = _points(lines, "step_ms")

    def chart(title: str, points: list[tuple[float, float]], unit: str) -> Markup | None:
        line = Line(name=title.lower(), points=points)
        return line_chart(title, [line], unit=unit, steps=span, from_zero=True)

    return _present(
        chart("Step time", step_times, "ms"),
        histogram("Step times", [ms for _, ms in step_times], unit="ms", counted="logging windows"),
        chart("Throughput", _points(lines, "images_per_s"), "images/s"),
        chart("Data wait", waits, "% of the step time"),
        chart("Peak memory", _points(lines, "peak_gib"), "GiB"),
    )


def _phases(summary: Mapping[str, Any]) -> Markup | None:
    seconds = summary.get("seconds")
    if not isinstance(seconds, dict):
        return None
    usual = ("preparation", "loading", "training", "validation", "checkpoint", "export")
    names = [n for n in usual if n in seconds] + [n for n in seconds if n not in usual]
    parts = [(name, float(seconds[name] or 0.0)) for name in names]
    return share_bar([(name, value, format_duration(value)) for name, value in parts])


def _machine(summary: Mapping[str, Any]) -> str:
    """Device, dtypes and torch's version, as far as the summary names them."""
    parts = [str(summary["placement"])] if summary.get("placement") else []
    if summary.get("torch"):
        parts.append(f"torch {summary['torch']}")
    return " · ".join(parts)


def _memory_phases(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    peaks = summary.get("peak_gib_by_phase")
    if not isinstance(peaks, dict) or len(peaks) < 2:
        return []
    return [(name, f"{peak:.2f} GiB") for name, peak in peaks.items()]
