"""Training steps at full size, on random weights and a synthetic batch: time, memory and loss.

`python -m benchmarks.gpu.steps --case NAME [--steps N]` measures one case in this process and prints its
row; `--list` names the cases. What does not fit into the memory is a result: a row with `fits` false.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.gpu import loss_curves
from benchmarks.gpu.bucket_sweep import compiled_graphs, swept
from benchmarks.gpu.card import device_for, is_out_of_memory, state, synchronize
from benchmarks.gpu.step_cases import StepCase, cases, folder_of, make_plain, parse, side_of
from benchmarks.gpu.step_plan import planned, read_plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fasttune.rehearsal import Rehearsal

STARTED = time.perf_counter()
"""Of the process, but for the interpreter's own start."""
GIB = 2**30
STEPS = 20
WARM_UP = 3
"""Steps that are not timed: the first compiles and makes the optimizer's state."""
FEWEST = 5
"""Timed steps that are taken even if they outlast `--seconds`."""
_LARGEST_CONTEXT = GIB
_RUN_AHEAD = 2
"""Steps that the host may be ahead of the device: enough that it never waits, few enough that time
is kept."""

TakeStep = Callable[[], "Tensor"]


def measure(
    case: StepCase, *, steps: int, seconds: float, smoke: bool
) -> tuple[harness.Row, list[float]]:
    """The row of a case, and its losses; none over buckets."""
    import torch

    device = device_for(smoke=smoke)
    row: harness.Row = {"fits": True}
    if device.type == "cuda" and case.cap_gib is not None:
        row["context_gib"] = _cap(case.cap_gib)
    losses: list[float] = []
    with out_of_memory_is_a_result(row, device), folder_of(case, smoke) as folder:
        rehearsal = rehearsed(case, folder, device, smoke)
        if case.buckets:
            row |= swept(rehearsal, folder, seconds=seconds, smoke=smoke)
        else:
            take_step, count = rehearsal.take_step, case.batch_size
            losses = timed_steps(take_step, count, device, row, steps=steps, seconds=seconds)
        if case.compiled:
            row["graphs"] = compiled_graphs()
    row |= {"host_peak_gib": host_peak_gib(), **tf32(case)}
    if device.type == "cuda":
        row["gpu"] = torch.cuda.get_device_name(device)
    return row, losses


def rehearsed(case: StepCase, folder: Path, device: "torch.device", smoke: bool) -> "Rehearsal":
    """The run of a case, compiled if it says so; the smoke run does without a C++ compiler."""
    from benchmarks.static.compiled import compile_blocks
    from fasttune.build import placement_for
    from fasttune.memory.activations import policy_of
    from fasttune.models.compiled import Compiler
    from fasttune.models.formulas import FORMULAS
    from fasttune.models.fused import fuse
    from fasttune.rehearsal import rehearse

    config = case.config(device.type)
    side = side_of(case, smoke)
    rehearsal = rehearse(config, folder, placement=placement_for(config), size=(side, side))
    backend = "aot_eager" if smoke else "inductor"
    if not case.fused:
        make_plain(rehearsal.denoiser, case.activations)
        if case.compiled:
            compile_blocks(rehearsal.denoiser, backend=backend)
    elif case.compiled:
        policy = policy_of(config.memory.activations)
        compiler, dtype = Compiler(backend=backend), rehearsal.placement.compute_dtype
        fuse(rehearsal.denoiser, FORMULAS, policy=policy, compile=compiler, dtype=dtype)
    return rehearsal


def timed_steps(
    take_step: TakeStep,
    batch_size: int,
    device: "torch.device",
    row: harness.Row,
    *,
    steps: int,
    seconds: float,
) -> list[float]:
    """Takes up to `steps` steps, puts what they took into `row`, and returns their losses.

    The timed ones end early after `seconds`. They run as in training, nothing waits between them;
    on a GPU their times are those between events on its stream.
    """
    losses = [take_step()]
    losses[0].item()
    row["first_step_s"] = round(time.perf_counter() - STARTED, 3)
    row |= memory_peaks(device, "first_step_")
    losses += [take_step() for _ in range(min(WARM_UP, steps) - 1)]
    compiled_before = compiled_graphs()
    reset_peaks(device)
    marks = [_mark(device)]
    began = time.perf_counter()
    while len(losses) < steps:
        if len(marks) > FEWEST and time.perf_counter() - began > seconds:
            break
        losses.append(take_step())
        marks.append(_mark(device))
        if len(marks) > _RUN_AHEAD and device.type == "cuda":
            marks[-1 - _RUN_AHEAD].synchronize()
    now = state()  # while the device is at the last steps: idle, it would clock and cool down
    times = _between(marks, device)
    row["steps"] = len(losses)
    if times:
        median = statistics.median(times)
        row["step_ms"] = round(median, 3)
        row["images_per_s"] = round(1000 * batch_size / median, 4)
        row["recompiles"] = compiled_graphs() - compiled_before
        row |= memory_peaks(device)
        row |= now
        row["samples"] = {"step_ms": [round(value, 3) for value in times]}
    return [float(loss) for loss in losses]


def _mark(device: "torch.device") -> Any:
    """A point in time: an event on the device's stream, or the host's clock after the step."""
    import torch

    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    synchronize(device)
    return time.perf_counter()


def _between(marks: list[Any], device: "torch.device") -> list[float]:
    """Milliseconds from each mark to the next."""
    if device.type != "cuda":
        return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


@contextmanager
def out_of_memory_is_a_result(row: harness.Row, device: "torch.device") -> Iterator[None]:
    """Puts `fits` false and where it ended into `row` instead of raising."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["fits"] = False
        row["ended_in"] = "a step" if "first_step_s" in row else "the first step or before it"
        row |= memory_peaks(device)


def _cap(gib: int) -> float:
    """Lets this process have as much as a card of `gib` would; GiB that the CUDA context takes of
    it, which the allocator does not see."""
    import torch

    torch.zeros(1, device="cuda")  # the context
    free, total = torch.cuda.mem_get_info()
    # At most, because what other processes have on the card is no part of it.
    context = min(_LARGEST_CONTEXT, total - free - torch.cuda.memory_reserved())
    fraction = max(0.0, gib * GIB - context) / total
    if fraction < 1.0:
        torch.cuda.set_per_process_memory_fraction(fraction)
    return round(context / GIB, 3)


def memory_peaks(device: "torch.device", prefix: str = "") -> harness.Row:
    """Of the allocator since `reset_peaks`, GiB: allocated and reserved. Empty without one."""
    import torch

    if device.type != "cuda":
        return {}
    return {
        f"{prefix}peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 4),
        f"{prefix}reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 4),
    }


def reset_peaks(device: "torch.device") -> None:
    """Begins the peaks anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def host_peak_gib() -> float | None:
    """The most memory of the host that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((peak if sys.platform == "darwin" else peak * 1024) / GIB, 3)


def tf32(case: StepCase) -> dict[str, bool]:
    """For a row in float32, whether products and convolutions may be TF32: cuDNN's are by default. MFU
    of such a row is a share of the float32 rate even so, and may pass 1."""
    import torch

    if case.compute_dtype != "fp32":
        return {}
    return {
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def with_plan(row: harness.Row, case: StepCase, plan: Path | None, *, smoke: bool) -> None:
    """Adds FLOPs, MFU and the predicted peak: from the plan's file, or worked out now."""
    from benchmarks.roofline import card_named, mfu

    entry = planned(case, smoke=smoke) if plan is None else read_plan(plan).get(case.name, {})
    row |= {"tflop": None, "predicted_peak_gib": None, **entry, "mfu": None}
    card = card_named(row["gpu"]) if row.get("gpu") else None
    if card is None or not row["tflop"] or "step_ms" not in row:
        return
    if case.compute_dtype in card.rates:
        flops = row["tflop"] * 1e12
        row["mfu"] = round(mfu(flops, row["step_ms"] / 1000, card, case.compute_dtype), 4)


def _place(row: harness.Row) -> str | None:
    import torch

    return loss_curves.place(row["gpu"], torch.__version__) if row.get("gpu") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", help="a name that --list gives")
    parser.add_argument("--list", action="store_true", help="names of the cases, in their order")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help=f"after which steps end, past {FEWEST}"
    )
    parser.add_argument("--plan", type=Path, help="file of benchmarks.gpu.step_plan")
    parser.add_argument(
        "--curves", type=Path, default=loss_curves.FILE, help="file of recorded losses"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    if args.list or args.case is None:
        print("\n".join(case.name for case in cases()))
        return
    case = parse(args.case)
    row, losses = measure(case, steps=args.steps, seconds=args.seconds, smoke=args.smoke)
    if case.buckets:
        harness.emit("bucket sweep", case=case.name, **row)
        return
    with_plan(row, case, args.plan, smoke=args.smoke)
    recorded = loss_curves.read(args.curves)
    row |= loss_curves.compared(case.name, _place(row), losses, recorded)
    harness.emit("training step", case=case.name, **row)


if __name__ == "__main__":
    main()
