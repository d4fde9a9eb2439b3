"""Losses of the rehearsed runs, beside those that were recorded.

Weights, batch and noise of a rehearsal are functions of the seed, the kind of device and torch's version
(2.11 and 2.13 draw other bf16 numbers on the CPU), so the losses of a case repeat where these are
the same, but for the rounding of atomics; a kernel that is wrong bends the curve.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.step_cases import StepCase, parse
from benchmarks.harness import ROOT

FILE = ROOT / "benchmarks" / "expected" / "loss_curves.json"
AT_STEP = 20
TOLERANCE = 0.01
"""Relative: at step 20 of a recorded curve, at every step within a run. Chosen, not measured: to be narrowed when curves of several runs are there."""

Curves = dict[str, dict[str, list[float]]]
"""`place` -> case -> losses from step 1."""


def place(gpu: str, torch_version: str) -> str:
    """Where a curve holds: "NVIDIA H200, torch 2.11"."""
    return f"{gpu}, torch {'.'.join(torch_version.split('.')[:2])}"


def read(path: Path = FILE) -> Curves:
    """The recorded curves; none where there is no file yet."""
    if not path.is_file():
        return {}
    curves: Curves = json.loads(path.read_text(encoding="utf-8"))
    return curves


def compared(
    case: str, where: str | None, losses: list[float], recorded: Curves | None = None
) -> dict[str, Any]:
    """For the row: the losses, the one at step 20 if the run came so far, and what was recorded.
    `where` is a `place`, None off a GPU. `loss_curve` is "new" where nothing was recorded, else says
    whether it agrees."""
    found: dict[str, Any] = {"losses": [round(loss, 6) for loss in losses]}
    expected = (read() if recorded is None else recorded).get(where or "", {}).get(case)
    if len(losses) >= AT_STEP:
        found["loss_at_20"] = round(losses[AT_STEP - 1], 6)
    if expected is None:
        return {**found, "loss_curve": "new"}
    step = min(len(losses), len(expected), AT_STEP)
    if step == 0:
        return {**found, "loss_curve": "none"}
    found["expected_loss"] = expected[step - 1]
    off = abs(losses[step - 1] - expected[step - 1]) / abs(expected[step - 1])
    # not <=, so that NaN differs
    return {**found, "loss_curve": "as recorded" if off <= TOLERANCE else "differs"}


def is_new(row: dict[str, Any]) -> bool:
    """Whether `record` would take the row's curve."""
    return row.get("loss_curve") == "new" and bool(row.get("gpu")) and "loss_at_20" in row


def differing(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(case, the one before it) where losses of the same weights, batch and noise are apart at some
    step: eager and compiled steps, fused and plain blocks, saved, recomputed and offloaded activations,
    with and without a memory cap differ by rounding alone. Those in int8 are compared with each other."""
    first: dict[StepCase, dict[str, Any]] = {}
    found = []
    for row in rows:
        if row["measurement"] != "training step" or not row.get("losses"):
            continue
        case = parse(row["case"])
        kept = "int8" if case.activations == "int8" else "recompute"
        alike = replace(case, activations=kept, compiled=False, fused=True, cap_gib=None)
        other = first.setdefault(alike, row)
        pairs = zip(row["losses"], other["losses"], strict=False)
        # not >, so that NaN differs
        if not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in pairs):
            found.append((row["case"], other["case"]))
    return found


def record(rows: list[dict[str, Any]], path: Path) -> list[str]:
    """Adds the curves that are new to the file, for later runs to be held to; their cases."""
    curves = read(path)
    added = []
    for row in rows:
        if is_new(row):
            known = curves.setdefault(place(row["gpu"], row["torch"]), {})
            if row["case"] not in known:
                known[row["case"]] = row["losses"][:AT_STEP]
                added.append(row["case"])
    if added:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(curves, indent=1, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return added
