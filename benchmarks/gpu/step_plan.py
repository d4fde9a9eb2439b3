"""What is known of a training step without taking it: its FLOPs and the peak that the trace predicts.

Fake tensors need neither the GPU nor its memory, so this runs beside the timing of kernels, in a process
of its own: `python -m benchmarks.gpu.step_plan FILE --case NAME ...` writes FILE after every case.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.step_cases import StepCase, folder_of, make_plain, parse, side_of

if TYPE_CHECKING:
    from fasttune.rehearsal import Rehearsal

Plan = dict[str, dict[str, Any]]
"""Case -> {"tflop", "predicted_peak_gib"} as far as they are known, or "no_prediction" with the reason."""
GIB = 2**30


def planned(case: StepCase, *, smoke: bool = False) -> dict[str, Any]:
    """The entry of one case."""
    entry: dict[str, Any] = {}
    _add_tflop(entry, case, {}, smoke)
    _add_peak(entry, case, {}, smoke)
    return entry


def _add_tflop(entry: dict[str, Any], case: StepCase, known: dict[str, float], smoke: bool) -> None:
    """FLOPs of the network alone, nothing computed twice, as MFU has them. `known` is for cases that
    differ in the batch or in the memory alone."""
    plain = StepCase(
        model=case.model, train=case.train, activations="save", size=case.size, fused=False
    )
    with _said_in(entry):
        if plain.name not in known:
            known[plain.name] = _tflop(plain, smoke)
        entry["tflop"] = round(known[plain.name] * case.batch_size, 6)


def _add_peak(entry: dict[str, Any], case: StepCase, known: dict[str, float], smoke: bool) -> None:
    """Of eager PyTorch: a compiled block keeps other tensors than the trace sees."""
    if case.compiled:
        return
    uncapped = replace(case, cap_gib=None)
    with _said_in(entry):
        if uncapped.name not in known:
            known[uncapped.name] = _peak_gib(uncapped, smoke)
        entry["predicted_peak_gib"] = known[uncapped.name]


@contextmanager
def _said_in(entry: dict[str, Any]) -> Iterator[None]:
    """A prediction that fails must not lose the measurement that it would stand beside."""
    try:
        yield
    except Exception as error:
        entry["no_prediction"] = f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _faked(case: StepCase, smoke: bool) -> Iterator["Rehearsal"]:
    """The case's run on fake tensors, in a GPU's dtypes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fasttune.rehearsal import gpu_placement, rehearse

    config, side = case.config(), side_of(case, smoke)
    with FakeTensorMode(), folder_of(case, smoke) as folder:
        rehearsal = rehearse(
            config,
            folder,
            placement=gpu_placement(config),
            device_type="cuda",
            size=(side, side),
        )
        if not case.fused:
            make_plain(rehearsal.denoiser, case.activations)
        yield rehearsal


def _tflop(case: StepCase, smoke: bool) -> float:
    from benchmarks.static.costs import CountCosts

    with _faked(case, smoke) as rehearsal, CountCosts() as counted:
        rehearsal.take_step()
    return counted.costs.flops / 1e12


def _peak_gib(case: StepCase, smoke: bool) -> float:
    from benchmarks.static.step_memory import trace_rehearsal

    with _faked(case, smoke) as rehearsal:
        return round(trace_rehearsal(rehearsal).peak_bytes / GIB, 4)


def read_plan(path: Path | None) -> Plan:
    """What has been written so far; empty without a file."""
    if path is None or not path.is_file():
        return {}
    plan: Plan = json.loads(path.read_text(encoding="utf-8"))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--smoke", action="store_true", help="of shrunk networks")
    parser.add_argument("--case", action="append", required=True, help="of benchmarks.gpu.steps")
    args = parser.parse_args()
    plan: Plan = {name: {} for name in args.case}
    for add in (_add_tflop, _add_peak):  # FLOPs of all first: MFU needs them
        known: dict[str, float] = {}
        for name in args.case:
            add(plan[name], parse(name), known, args.smoke)
            part = args.file.with_suffix(".part")
            part.write_text(json.dumps(plan), encoding="utf-8")
            os.replace(part, args.file)  # a reader finds the old file or the new one


if __name__ == "__main__":
    main()
