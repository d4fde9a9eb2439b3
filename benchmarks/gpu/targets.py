"""What the kernels and steps of a run were to reach on an H200, and what they did, as rows.

A target is judged only where both sides of it were measured in the same run; the others are named.
"""

from collections.abc import Iterator, Sequence

from benchmarks.gpu import optimizer_step
from benchmarks.gpu.names import COMPILED, EAGER, OURS
from benchmarks.gpu.operation import Operation, Target
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.step_cases import StepCase
from benchmarks.harness import Row

STEPS = tuple(StepCase(model=m, activations="save", compiled=True) for m in ("flux", "sdxl"))
"""LoRA in bf16 without checkpointing. Flux's was the one to be reached; SDXL's is held to the same."""
RIVAL = "diffusers peft compile"
FASTER = 1.25


def rows_of(rows: Sequence[Row]) -> list[Row]:
    """One for each target that can be judged: what was measured, the target, and whether it is reached."""
    return [*_kernels(rows), *_optimizer(rows), *_steps(rows)]


def unjudged(rows: Sequence[Row], judged: Sequence[Row]) -> list[str]:
    """Targets of which something was measured, and not what they are judged by."""
    seen = {row["of"] for row in judged}
    measured = {row.get("operation") for row in rows if row["measurement"] == "kernel"}
    wanted = [o.name for o in OPERATIONS if o.targets and o.name in measured]
    steps = {row["case"] for row in rows if row["measurement"] == "training step"}
    wanted += [case.name for case in STEPS if case.name in steps]
    return [name for name in wanted if name not in seen]


def _row(of: str, case: str, value: float, target: float, *, least: bool, unit: str) -> Row:
    reached = value >= target if least else value <= target
    return {
        "measurement": "target",
        "case": case,
        "of": of,
        unit: round(value, 4),
        "target": target,
        "reached": bool(reached),
    }


def _kernels(rows: Sequence[Row]) -> Iterator[Row]:
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["measurement"] == "kernel" and "contender" in row:
            case = row["case"].removesuffix(f", {row['contender']}")
            by_case.setdefault(case, {})[row["contender"]] = row
    known = {operation.name: operation for operation in OPERATIONS}
    for case, found in by_case.items():
        some = next(iter(found.values()))
        operation = known.get(some["operation"])
        if operation is not None and OURS in found:
            yield from _judged(case, found, operation)


def _judged(case: str, found: dict[str, Row], operation: Operation) -> Iterator[Row]:
    ours = found[OURS]
    for target in operation.targets:
        if target.direction != ours["direction"] or target.batch not in (None, ours["batch"]):
            continue
        if target.against == "copy":
            share = ours["gb_per_s"] / ours["ceiling_gb_per_s"]
            what = f"{case}: share of the copy's bandwidth"
            yield _row(operation.name, what, share, target.at_least, least=True, unit="share")
            continue
        if (rival := _rival(target, found)) is not None:
            times = rival["us"] / ours["us"]
            what = f"{case}: times as fast as {rival['contender']}"
            yield _row(operation.name, what, times, target.at_least, least=True, unit="times")


def _rival(target: Target, found: dict[str, Row]) -> Row | None:
    if target.against in (EAGER, COMPILED):
        return found.get(target.against)
    others = [row for name, row in found.items() if not name.startswith(OURS)]
    return min(others, key=lambda row: row["us"], default=None)


def _optimizer(rows: Sequence[Row]) -> Iterator[Row]:
    """Each way of ours, on all of SDXL's U-Net."""
    for row in rows:
        if (
            row["measurement"] == "kernel"
            and row.get("set") == optimizer_step.TARGET_SET
            and row["contender"].startswith(OURS)
        ):
            what, ms = f"{row['case']}: ms", row["us"] / 1000
            name, most = optimizer_step.NAME, optimizer_step.TARGET_MS
            yield _row(name, what, ms, most, least=False, unit="ms")


def _steps(rows: Sequence[Row]) -> Iterator[Row]:
    """LoRA without checkpointing beside the compiled step of diffusers and PEFT."""
    named = {row["case"]: row for row in rows if row["measurement"].endswith(" step")}
    for case in STEPS:
        name = case.name
        ours = named.get(name, {})
        theirs = named.get(f"{name.removesuffix(' compile')}, {RIVAL}", {})
        if "step_ms" in ours and "step_ms" in theirs:
            times = theirs["step_ms"] / ours["step_ms"]
            what = f"{name}: times as fast as {RIVAL}"
            yield _row(name, what, times, FASTER, least=True, unit="times")
        if "peak_gib" in ours and "peak_gib" in theirs:
            share = ours["peak_gib"] / theirs["peak_gib"]
            what = f"{name}: share of the peak of {RIVAL}"
            row = _row(name, what, share, 1.0, least=False, unit="share")
            yield {**row, "reached": share < 1.0}
