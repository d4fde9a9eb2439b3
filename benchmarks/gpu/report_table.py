"""The end of a run: tables that fit a terminal, and what is missing from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.names import COMPILED, EAGER, OURS
from benchmarks.gpu.parts import Said
from benchmarks.harness import Row, table

_SHOWN_CONTENDERS = (EAGER, COMPILED, OURS)


def summary(rows: Sequence[Row], said: Said, left: Mapping[str, Sequence[str]]) -> str:
    """Everything that is shown at the end."""
    blocks = [_ceilings(rows), _kernels(rows), _losing(rows), _ways(rows)]
    blocks += [_steps(rows), _sweeps(rows), _targets(rows), _checks(rows)]
    blocks += [_lines("note", said.notes), _lines("absent", said.absent)]
    blocks += [
        f"not run: budget: {part}: {len(names)}: {'; '.join(names)}"
        for part, names in left.items()
        if names
    ]
    blocks += [_lines("failed", [f"{item}: {why}" for item, why in said.failed])]
    return "\n\n".join(block for block in ["", *blocks] if block)


def _lines(kind: str, texts: Sequence[str]) -> str:
    return "\n".join(f"{kind}: {text}" for text in texts)


def _ceilings(rows: Sequence[Row]) -> str:
    found = []
    for row in rows:
        if row["measurement"] == "ceiling":
            unit = "gb_per_s" if "gb_per_s" in row else "tflop_per_s"
            found.append(f"{row['case']} {row[unit]} {unit}")
    return f"ceilings: {', '.join(found)}" if found else ""


def _by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Case -> contender -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["measurement"] == "kernel":
            case = row["case"].removesuffix(f", {row['contender']}")
            found.setdefault(case, {})[row["contender"]] = row
    return found


def _kernels(rows: Sequence[Row]) -> str:
    """A line a case: microseconds of each contender, and how near the best of them is to the ceiling."""
    by_case = _by_case(rows)
    if not by_case:
        return ""
    lines = [("kernel, us", *_SHOWN_CONTENDERS, "best other", "best of ceiling")]
    for case, found in by_case.items():
        others = {name: row for name, row in found.items() if name not in _SHOWN_CONTENDERS}
        best = min(others, key=lambda name: others[name]["us"], default=None)
        library = "-" if best is None else f"{others[best]['us']:.1f} {best}"
        shown = [_number(found.get(name), "us", ".1f") for name in _SHOWN_CONTENDERS]
        fraction = max(row["fraction_of_ceiling"] for row in found.values())
        lines.append((case, *shown, library, f"{fraction:.0%}"))
    return table(lines)


def _losing(rows: Sequence[Row]) -> str:
    """Our kernels that torch.compile of the definition is faster than: to be removed, or kept for the
    bytes they save."""
    lines = []
    for case, found in _by_case(rows).items():
        ours, compiled = found.get(OURS), found.get(COMPILED)
        if ours is None or compiled is None or ours["us"] <= compiled["us"]:
            continue
        kept = [row.get("kept_mib") for row in (ours, compiled, found.get(EAGER, {}))]
        saved = "-" if kept[0] is None or kept[1] is None else f"{kept[1] - kept[0]:.2f}"
        shown = ["-" if value is None else f"{value:.2f}" for value in kept]
        times = (f"{ours['us']:.1f}", f"{compiled['us']:.1f}", f"{ours['us'] / compiled['us']:.2f}")
        lines.append((case, *times, *shown, saved))
    if not lines:
        return ""
    head = ("kernels that lose", "ours us", "compile us", "times", "kept MiB", "compile keeps")
    return table([(*head, "eager keeps", "saved MiB"), *lines])


def _ways(rows: Sequence[Row]) -> str:
    """Where we have several ways of one operation, the fastest first: the default is "ours"."""
    lines: list[tuple[str, ...]] = [("ways of ours, us", "fastest first")]
    for case, found in _by_case(rows).items():
        ways = [name for name in found if name.startswith(OURS)]
        if len(ways) > 1:
            ways.sort(key=lambda name: found[name]["us"])
            shown = (f"{name} {found[name]['us']:.1f}" for name in ways)
            lines.append((case, ", ".join(shown)))
    return table(lines) if len(lines) > 1 else ""


def _targets(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["measurement"] == "target"]
    lines = [("target", "measured", "wanted", "reached")]
    for row in found:
        value = next(row[unit] for unit in ("times", "share", "ms") if unit in row)
        reached = "yes" if row["reached"] else "no"
        lines.append((row["case"], f"{value:.2f}", f"{row['target']:.2f}", reached))
    return table(lines) if found else ""


_STEP_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("images/s", "images_per_s", ".3f"),
    ("step ms", "step_ms", ".1f"),
    ("MFU", "mfu", ".1%"),
    ("peak GiB", "peak_gib", ".2f"),
    ("predicted", "predicted_peak_gib", ".2f"),
    ("reserved", "reserved_gib", ".2f"),
    ("first s", "first_step_s", ".1f"),
    ("cold s", "first_step_cold_s", ".1f"),
    ("loss", "loss_at_20", ".4f"),
)


def _steps(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["measurement"] in ("training step", "contender step")]
    if not found:
        return ""
    lines = [("training step", *(head for head, _, _ in _STEP_COLUMNS))]
    for row in found:
        name = row["case"] if row["fits"] else f"{row['case']}: does not fit"
        lines.append((name, *(_number(row, key, form) for _, key, form in _STEP_COLUMNS)))
    return table(lines)


def _sweeps(rows: Sequence[Row]) -> str:
    """Steps over a list of buckets."""
    found = [row for row in rows if row["measurement"] == "bucket sweep"]
    lines = [("over buckets", "buckets", "graphs", "recompiles", "first round s", "second s")]
    for row in found:
        keys = ("buckets", "graphs", "recompiles", "first_round_s", "second_round_s")
        lines.append((row["case"], *(str(row.get(key, "-")) for key in keys)))
    return table(lines) if found else ""


def _number(row: Mapping[str, Any] | None, key: str, form: str) -> str:
    value = None if row is None else row.get(key)
    return "-" if value is None else format(value, form)


def _checks(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["measurement"] == "correctness"]
    if not found:
        return ""
    kernels = {row["operation"] for row in found if row["own_kernel"]}
    others = {row["operation"] for row in found} - kernels
    passed = sum(row["passed"] for row in found)
    return (
        f"checked: {len(kernels)} kernels, {len(others)} model operations without one; "
        f"{passed} of {len(found)} checks passed"
    )
