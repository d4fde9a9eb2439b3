"""The GPU suite without a GPU: what it compares, how it times, and what it does about crashes.

CUDA's events, graphs and allocator are played by stand-ins that keep the host's time and given
sizes: they show that the code around them runs and counts right, not what a GPU would say.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu import (
    card,
    chosen_items,
    correctness,
    kernels,
    loss_curves,
    optimizer_step,
    parts,
    planning,
    step_cases,
    steps,
    suite,
    timing,
)
from benchmarks.gpu.chosen_items import asked
from benchmarks.gpu.libraries import outputs_of, why_not
from benchmarks.gpu.operation import Draw, Operation, bound
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.report_table import summary
from benchmarks.gpu.step_cases import StepCase
from fasttune.errors import ConfigError, FasttuneError, HardwareError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def draw(dtype: torch.dtype = torch.float32) -> Draw:
    return Draw(torch.Generator().manual_seed(1), dtype)


# --- operations


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_eager_is_what_the_models_compute(operation: Operation) -> None:
    """Bit by bit: until there is a kernel, the baseline rows are those of the models' own code."""
    inputs = operation.make(operation.odd[0], draw(torch.bfloat16))
    eager = operation.eager or operation.plain
    for ours, plain in zip(
        outputs_of(operation.ours(**inputs)()), outputs_of(eager(**inputs)), strict=True
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_shapes(operation: Operation) -> None:
    for sizes in (*operation.sizes, *operation.odd):
        assert len(sizes) == len(operation.sizes[0])
    assert all(sizes[0] == 1 for sizes in operation.sizes)
    assert set(operation.trained) <= set(operation.make(operation.odd[0], draw()))


@pytest.mark.parametrize("name", ["modulated norm", "attention", "lora linear"])
def test_correct_operations_pass(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        errors = correctness.errors_of(BY_NAME[name], BY_NAME[name].odd[0], dtype, device=CPU)
        assert max(error.worst for error in errors) <= 1


def _wrong(name: str, change: Callable[..., Any]) -> Operation:
    operation = BY_NAME[name]
    plain = operation.plain
    return replace(operation, ours=bound(lambda **inputs: change(plain, inputs)))


def _off_by_an_ulp(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
    return plain(**inputs) * (1 + torch.finfo(torch.bfloat16).eps)


def _one_element_unwritten(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
    mask = torch.ones_like(inputs["x"])
    mask[0, -1, -1] = float("nan")
    return plain(**inputs) * mask


def _wrong_gradient(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
    return plain(**{**inputs, "scale": inputs["scale"].detach() + 0 * inputs["scale"]})


@pytest.mark.parametrize("change", [_off_by_an_ulp, _one_element_unwritten, _wrong_gradient])
def test_wrong_kernels_fail(change: Callable[..., Any]) -> None:
    operation = _wrong("modulated norm", change)
    errors = correctness.errors_of(operation, (3, 65, 3072), torch.bfloat16, device=CPU)
    assert max(error.worst for error in errors) > 1


def test_a_wrong_optimizer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for shapes in optimizer_step.ODD.values():
        errors = correctness._optimizer_errors(CPU, shapes)
        assert max(error.worst for error in errors) <= 1
    right = optimizer_step.ours

    def other_decay(weights: list[Any]) -> Any:
        with monkeypatch.context() as changed:
            changed.setattr(optimizer_step, "_DECAY", 0.02)
            return right(weights)

    monkeypatch.setattr(optimizer_step, "ours", other_decay)
    errors = correctness._optimizer_errors(CPU, optimizer_step.ODD["one number"])
    assert max(error.worst for error in errors) > 1


def test_a_failed_check_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = correctness.Check(
        operation="x",
        case="x 1",
        run=lambda device: [correctness.Error(of="output 0", norm=2.0, largest=0.1)],
    )
    monkeypatch.setattr(correctness, "checks", lambda: iter([wrong]))
    monkeypatch.setattr(sys, "argv", ["correctness", "--smoke"])
    assert correctness.main() == 1
    assert "failed: x: x 1: 2 times the error allowed, output 0" in capsys.readouterr().out


def test_libraries_count_by_what_they_compute() -> None:
    operation = BY_NAME["geglu"]
    inputs = {"x": operation.make((1, 3, 8), draw())["x"].requires_grad_()}
    outputs = outputs_of(operation.plain(**inputs))
    expected = [*outputs, *kernels._gradients(outputs, inputs, ("x",))]
    assert why_not(bound(operation.plain), inputs, ("x",), expected) is None
    reason = why_not(bound(lambda x: 2 * operation.plain(x)), inputs, ("x",), expected)
    assert reason is not None and "computes something else" in reason

    def absent(x: Tensor) -> Any:
        import no_such_library  # noqa: F401

    assert "not installed" in str(why_not(absent, inputs, ("x",), expected))


# --- timing, on stand-ins for CUDA


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return max(1000 * (end.at - self.at), 1e-6)


class _Graph:
    """Remembers that it was captured, and replays in no time."""

    replays = 0

    def replay(self) -> None:
        _Graph.replays += 1


class _Cuda(SimpleNamespace):
    """What was asked of the stand-in."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    asked = _Cuda(captures=0, fractions=[], fail_capture=False, free=70 * 2**30, total=80 * 2**30)

    @contextmanager
    def graph(captured: Any, *, stream: Any = None) -> Iterator[None]:
        assert stream is not None
        asked.captures += 1
        if asked.fail_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    @contextmanager
    def stream_of(stream: Any) -> Iterator[None]:
        yield

    properties = SimpleNamespace(L2_cache_size=1024, total_memory=asked.total)
    for name, value in {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": graph,
        "stream": stream_of,
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: None,
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "mem_get_info": lambda device=None: (asked.free, asked.total),
        "memory_reserved": lambda: 2**30,
        "get_device_properties": lambda device=None: properties,
        "set_per_process_memory_fraction": asked.fractions.append,
        "max_memory_allocated": lambda: 3 * 2**30,
        "max_memory_reserved": lambda: 4 * 2**30,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


class _NoFlush:
    def __call__(self) -> None:
        pass


def _timers(*, copies: int = 1, graphs: bool = True, **calls: Any) -> dict[str, timing.Timer]:
    timers, too_large = timing.timers_for(
        calls,
        copies=copies,
        device=CUDA,
        flush=_NoFlush(),  # type: ignore[arg-type]
        graphs=graphs,
    )
    assert not too_large
    return timers


def test_long_calls_are_timed_by_events(cuda: _Cuda) -> None:
    timer = _timers(a=lambda i: time.sleep(0.002))["a"]
    assert timer.method == "events" and cuda.captures == 0
    assert 1500 < timer() < 100_000


def test_short_calls_are_timed_by_a_graph_of_many(cuda: _Cuda) -> None:
    calls: list[int] = []
    timer = _timers(copies=3, a=calls.append)["a"]
    assert timer.method == "graph" and cuda.captures == 1
    captured = calls[-21:]
    assert captured == [0, 1, 2] * 7  # 20 at least, all copies alike
    before = _Graph.replays
    assert timer() > 0 and _Graph.replays > before + 1


def _nothing(i: int) -> None:
    pass


def test_contenders_of_a_case_are_timed_alike(cuda: _Cuda) -> None:
    timers = _timers(short=_nothing, long=lambda i: time.sleep(0.001))
    assert [timer.method for timer in timers.values()] == ["graph", "graph"]
    timers = _timers(short=_nothing, long=lambda i: time.sleep(0.001), graphs=False)
    assert [timer.method for timer in timers.values()] == ["events", "events"]
    assert all("cannot be captured" in str(timer.note) for timer in timers.values())


def test_after_a_failed_capture_nothing_is_timed_in_the_process(cuda: _Cuda) -> None:
    cuda.fail_capture = True
    with pytest.raises(timing.CaptureError, match="a cannot be captured: operation not permitted"):
        _timers(a=_nothing)


def test_what_does_not_fit_has_no_timer(cuda: _Cuda) -> None:
    def large(i: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timers, too_large = timing.timers_for(
        {"large": large, "long": lambda i: time.sleep(0.001)},
        copies=1,
        device=CUDA,
        flush=_NoFlush(),  # type: ignore[arg-type]
    )
    assert list(timers) == ["long"] and too_large == ["large"]


def test_copies_are_more_than_the_cache_holds(cuda: _Cuda) -> None:
    for size in (1, 100, 1000, 5000):
        copies = timing.copies_needed(size, CUDA)
        assert copies == 64 or copies * size > 2 * 1024
    cuda.free = 4000
    assert timing.copies_needed(1000, CUDA) == 1


def test_ceilings() -> None:
    ceilings, samples = timing.measure_ceilings(CPU, timing.Flush(CPU), small=True)
    assert ceilings.gb_per_s > 0 and len(samples["tflop_per_s"]) == 2
    exact = timing.Ceilings(gb_per_s=1000.0, tflop_per_s=100.0)
    assert exact.floor_us(moved=10**9, flops=0) == pytest.approx(1000)
    assert exact.floor_us(moved=10**6, flops=10**12) == pytest.approx(10_000)


# --- kernels


def test_rows_of_a_kernel() -> None:
    """Bytes against a count by hand; the fraction against the floor."""
    setting = kernels.Setting(
        device=CPU,
        dtype=torch.float32,
        flush=timing.Flush(CPU),
        ceilings=timing.Ceilings(gb_per_s=1000.0, tflop_per_s=100.0),
        rounds=2,
        smoke=True,
        with_libraries=False,
    )
    forward, both = kernels.timed("gated residual b4", setting)
    x, gate = 4 * 7 * 33 * 4, 4 * 33 * 4
    assert forward.moved == 2 * x + gate + x
    assert both.moved == forward.moved + (x + 2 * x + gate) + (2 * x + gate)
    rows = list(kernels.rows_of(both, setting))
    assert [row["case"].rpartition(", ")[2] for row in rows] == ["eager", "compile"]
    for row in rows:
        assert row["case"].startswith("gated residual 4x7x33 fp32 forward+backward")
        assert len(row["samples"]["us"]) == row["rounds"] == 2
        floor = both.moved / 1000.0 / 1e3
        assert row["fraction_of_ceiling"] == pytest.approx(floor / row["us"], abs=1e-4)


def test_incoming_gradients_have_the_layout_of_their_outputs() -> None:
    values = torch.randn(2, 3, 4, 5)
    output = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    (given,) = kernels.laid_out_as(output, [values])
    assert given.stride() == output.stride() and given.dtype == output.dtype
    assert torch.equal(given, values.bfloat16())
    assert kernels.laid_out_as(torch.zeros_like(values), [values])[0] is values
    seen: list[tuple[int, ...]] = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            seen.append(grads[0].stride())
            return grads[0]

    def scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return Identity.apply(x * weight[:, None, None] + bias[:, None, None])  # type: ignore[no-untyped-call]

    channels_last = BY_NAME["group norm silu channels last"]
    operation = replace(channels_last, plain=scaled, ours=bound(scaled))
    correctness.errors_of(operation, (2, 32, 4, 5), torch.float32, device=CPU)
    assert set(seen) == {(640, 1, 160, 32)}


def test_large_optimizers_are_alone_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = kernels.Setting(
        device=CPU,
        dtype=torch.float32,
        flush=timing.Flush(CPU),
        ceilings=timing.Ceilings(gb_per_s=1000.0, tflop_per_s=100.0),
        rounds=2,
        smoke=True,
        with_libraries=False,
    )
    (together,) = kernels.timed(optimizer_step.NAME, setting)
    assert together.interleaved and list(together.calls) == []  # ended: its states are free
    monkeypatch.setattr(optimizer_step, "ALONE", 1)
    alive: list[Any] = []
    names: list[str] = []
    rows: list[harness.Row] = []
    for case in kernels.timed(optimizer_step.NAME, setting):
        assert not any(earlier.calls for earlier in alive)
        alive.append(case)
        names += case.calls
        rows += kernels.rows_of(case, setting)
    assert names == ["eager", "ours"]
    assert [row["interleaved"] for row in rows] == [False, False]
    assert [row["case"] for row in rows] == [
        f"{optimizer_step.NAME} tiny fp32, {name}" for name in names
    ]


def test_flops() -> None:
    attention, lora = BY_NAME["attention"], BY_NAME["lora linear"]
    assert attention.flops((1, 10, 20, 3, 4)) == 2 * 2 * 10 * 20 * 3 * 4
    assert lora.flops((2, 5, 32, 64)) == 2 * 10 * (32 * 64 + 16 * 96)


def test_batch_one_comes_first() -> None:
    names = kernels.items(smoke=False)
    first_of_four = next(i for i, name in enumerate(names) if name.endswith(" b4"))
    assert all(name.endswith(" b4") for name in names[first_of_four:])
    assert kernels.operation_of("qk norm rope b4") == "qk norm rope"
    assert len(names) == 2 + 2 * len(OPERATIONS)


# --- training steps


def test_step_cases() -> None:
    cases = step_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert step_cases.parse(case.name) == case
        config = case.config()
        assert config.memory.activations == case.activations
        assert (config.adapter.type == "lora") == (case.train == "lora")
    assert {case.cap_gib for case in cases} == {None, 12, 16, 24}
    assert names[0] == "flux lora bf16 recompute b1 1024 eager"


@pytest.mark.parametrize(
    "name", ["", "flux", "flux lora bf16 recompute b1 1024 slow", "a b c d b1 2 eager"]
)
def test_unknown_step_cases(name: str) -> None:
    with pytest.raises(ConfigError, match="--list"):
        step_cases.parse(name)


def test_steps_are_timed_one_by_one() -> None:
    taken: list[int] = []

    def take_step() -> Tensor:
        taken.append(1)
        time.sleep(0.001)
        return torch.tensor(float(len(taken)))

    row: harness.Row = {}
    losses = steps.timed_steps(take_step, 4, CPU, row, steps=8, seconds=60.0)
    assert losses == [float(i) for i in range(1, 9)]
    assert row["steps"] == 8 and len(row["samples"]["step_ms"]) == 8 - steps.WARM_UP
    assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"], rel=1e-3)
    row = {}
    steps.timed_steps(take_step, 1, CPU, row, steps=100, seconds=0.0)
    assert row["steps"] == steps.WARM_UP + steps.FEWEST
    row = {}
    assert len(steps.timed_steps(take_step, 1, CPU, row, steps=1, seconds=0.0)) == 1
    assert "step_ms" not in row and "first_step_s" in row


def test_steps_on_events(cuda: _Cuda) -> None:
    row: harness.Row = {}
    steps.timed_steps(lambda: torch.tensor(1.0), 1, CUDA, row, steps=7, seconds=60.0)
    assert len(row["samples"]["step_ms"]) == 4
    assert row["peak_gib"] == 3.0 and row["reserved_gib"] == 4.0


def test_out_of_memory_is_a_result() -> None:
    row: harness.Row = {"fits": True}
    with steps.out_of_memory_is_a_result(row, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert row["fits"] is False and row["ended_in"] == "the first step or before it"
    with (
        pytest.raises(RuntimeError, match="shapes"),
        steps.out_of_memory_is_a_result({}, CPU),
    ):
        raise RuntimeError("shapes do not match")


def test_a_cap_leaves_out_the_context(cuda: _Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: None)
    cuda.free = 78.5 * 2**30
    assert steps._cap(24) == 0.5  # 80 - 78.5 - 1 reserved
    assert cuda.fractions.pop() == pytest.approx((24 - 0.5) / 80)
    cuda.free = 40 * 2**30  # another process has as much
    assert steps._cap(24) == 1.0
    assert cuda.fractions == [pytest.approx((24 - 1) / 80)]
    steps._cap(200)
    assert len(cuda.fractions) == 1  # more than there is: no cap


def test_mfu_and_prediction_stand_in_the_row(tmp_path: Path) -> None:
    case = StepCase()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({case.name: {"tflop": 98.9, "predicted_peak_gib": 24.7}}))
    row: harness.Row = {"gpu": "NVIDIA H200", "step_ms": 500.0}
    steps.with_plan(row, case, plan, smoke=False)
    assert row["predicted_peak_gib"] == 24.7
    # 197.8 TFLOP/s of H200's 989 or so, whatever the table says to the last digit
    assert row["mfu"] == pytest.approx(0.2, abs=0.003)
    row = {"gpu": "No Such Card", "step_ms": 500.0}
    steps.with_plan(row, case, plan, smoke=False)
    assert row["mfu"] is None and row["tflop"] == 98.9
    row = {"gpu": "NVIDIA H200"}
    steps.with_plan(row, case, tmp_path / "none.json", smoke=False)
    assert row["mfu"] is None and row["tflop"] is None


def test_loss_curves(tmp_path: Path) -> None:
    here = loss_curves.place("G", "2.11.0+cu130")
    assert here == "G, torch 2.11"
    losses = [round(1.0 - i / 100, 2) for i in range(20)]
    new = loss_curves.compared("c", here, losses, {})
    assert new["loss_curve"] == "new" and new["loss_at_20"] == 0.81
    rows = [{"case": "c", "gpu": gpu, "torch": "2.11.1", **new} for gpu in ("G", None)]
    file = tmp_path / "curves.json"
    assert loss_curves.record(rows, file) == ["c"]
    assert loss_curves.record(rows, file) == []
    recorded = loss_curves.read(file)
    assert recorded == {here: {"c": losses}}
    assert loss_curves.compared("c", here, losses, recorded)["loss_curve"] == "as recorded"
    for bad in (0.79, float("nan")):
        bent = [*losses[:-1], bad]
        assert loss_curves.compared("c", here, bent, recorded)["loss_curve"] == "differs"
    assert loss_curves.compared("c", "other", losses, recorded)["loss_curve"] == "new"


def test_a_small_step_end_to_end() -> None:
    row, losses = steps.measure(StepCase(model="flux"), steps=5, seconds=60, smoke=True)
    assert row["fits"] and len(losses) == 5 and row["step_ms"] > 0
    assert all(0 < loss < 10 for loss in losses)
    again, same = steps.measure(StepCase(model="flux"), steps=2, seconds=60, smoke=True)
    assert same == losses[:2]  # a function of the seed


# --- parts and suite

_PART = """
import json, os, sys, time
names = [a for a in sys.argv[1:] if not a.startswith("--")]
for name in names:
    print("begin: " + name, flush=True)
    print("row: " + json.dumps({"measurement": "m", "case": name}), flush=True)
    if name == "crash": os.abort()
    if name == "once" and "--safe" not in sys.argv: sys.exit("a library broke")
    if name == "graph" and "--no-graphs" not in sys.argv:
        print("retry: --no-graphs", flush=True)
        sys.exit("cannot be captured")
    if name == "slow": time.sleep(60)
    print("absent: thing: why", flush=True)
    print("end: " + name, flush=True)
"""


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "part_of_a_test.py").write_text(_PART)
    environment = harness.environment()
    monkeypatch.setattr(
        harness, "environment", lambda: {**environment, "PYTHONPATH": str(tmp_path)}
    )
    monkeypatch.setattr(parts, "LEAST_S", 0.1)
    return "part_of_a_test"


def _run(part: str, items: list[str], seconds: float = 30, **options: Any) -> Any:
    said, rows = parts.Said(), []
    left = parts.run_items(
        part,
        items,
        deadline=time.monotonic() + seconds,
        said=said,
        on_row=lambda row: rows.append(row["case"]),
        **options,
    )
    return left, rows, said


def test_a_crash_loses_only_its_item(part: str) -> None:
    left, rows, said = _run(part, ["a", "crash", "b"])
    assert (left, rows) == ([], ["a", "b"])
    assert said.failed == [("crash", "killed by SIGABRT")]
    assert said.absent == ["thing: why"]


def test_a_crashed_item_is_tried_again_without_libraries(part: str) -> None:
    left, rows, said = _run(part, ["once", "b"], on_crash=("--safe",))
    assert (left, rows, said.failed) == ([], ["once", "b"], [])
    assert said.notes == ["once: a library broke; tried again with --safe"]


def test_an_item_may_ask_for_a_new_process(part: str) -> None:
    left, rows, said = _run(part, ["graph", "once"], on_crash=("--safe",))
    assert (left, rows, said.failed) == ([], ["graph", "once"], [])
    assert said.notes[0] == "graph: cannot be captured; tried again with --no-graphs"


def test_the_deadline_ends_a_part(part: str) -> None:
    left, rows, said = _run(part, ["a", "slow", "b"], seconds=2)
    assert left == ["slow", "b"]
    assert rows == ["a", "slow"] and not said.failed  # its rows until then count


def test_a_part_that_does_not_start_fails(part: str) -> None:
    left, rows, said = _run("no_such_module", ["a", "b"])
    assert (left, rows) == ([], [])
    assert [item for item, _ in said.failed] == ["a", "b"]
    assert "no_such_module" in said.failed[0][1]


def _arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(given)


def test_no_gpu_is_said() -> None:
    with pytest.raises(HardwareError, match="--smoke"):
        card.device_for(smoke=False)


def test_smoke_rows_are_no_results() -> None:
    args = _arguments("--smoke", "--out", str(harness.RESULTS))
    with pytest.raises(FasttuneError, match="no results"):
        suite._results_file(args, {"gpu": None, "cpu": "x", "cores": 1})


def _suite(folder: Path, *given: str, **left: list[str]) -> suite.Run:
    run = suite.Run(
        args=_arguments(*given), facts={}, path=folder / "rows.jsonl", began=time.monotonic()
    )
    run.left = left
    return run


def _no_planner(folder: Path) -> planning.Planner:
    return planning.Planner([], folder / "plan.json", {}, smoke=True)


def _check(operation: str, passed: bool) -> harness.Row:
    return {
        "measurement": "correctness",
        "case": f"{operation} 1",
        "operation": operation,
        "own_kernel": operation == "attention",
        "passed": passed,
    }


def test_wrong_kernels_are_not_timed(tmp_path: Path) -> None:
    names = ["ceilings", "geglu b1", "attention b1", "qk norm rope attention b1"]
    run = _suite(tmp_path, correctness=[], kernels=names, steps=["s"], contenders=["c | s"])
    run.add(_check("attention", False))
    suite._leave_out_failed(run)
    assert run.left["kernels"] == ["ceilings", "geglu b1", "qk norm rope attention b1"]
    for name in ("steps", "contenders"):
        suite._run_part(run, name, 1.0, _no_planner(tmp_path), tmp_path)
        assert run.left[name] == []
    assert any("steps were not run" in note for note in run.said.notes)


def test_what_is_not_checked_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ceilings", "geglu b1", "attention b1", "gelu tanh b1"]
    run = _suite(tmp_path, correctness=["attention"], kernels=names, steps=["s"])
    for operation in ("geglu", "attention"):  # the first check of several
        run.add(_check(operation, True))
    timed: list[str] = []

    def run_items(module: str, items: list[str], **options: Any) -> list[str]:
        timed.extend(items)
        return []

    monkeypatch.setattr(suite, "run_items", run_items)
    suite._run_part(run, "kernels", 1.0, _no_planner(tmp_path), tmp_path)
    assert timed == ["ceilings", "geglu b1"]
    assert run.left["kernels"] == ["attention b1", "gelu tanh b1"]
    suite._run_part(run, "steps", 1.0, _no_planner(tmp_path), tmp_path)
    assert run.left["steps"] == ["s"]  # until attention is checked to the end


def test_a_crash_in_a_check_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _suite(tmp_path, correctness=["attention"], kernels=["attention b1"], steps=["s"])

    def run_items(module: str, items: list[str], **options: Any) -> list[str]:
        options["said"].failed.append(("attention", "killed by SIGSEGV"))
        return []

    monkeypatch.setattr(suite, "run_items", run_items)
    suite._run_part(run, "correctness", 1.0, _no_planner(tmp_path), tmp_path)
    (row,) = run.rows
    assert row["operation"] == "attention" and row["passed"] is False and row["own_kernel"]
    suite._leave_out_failed(run)
    assert run.left["kernels"] == []
    assert "checked: 1 kernels, 0 model operations without one; 0 of 1" in summary(
        run.rows, run.said, run.left
    )


@pytest.mark.parametrize(
    ("given", "checks", "others"),
    [
        (("--part", "kernels", "--only", "geglu"), ["geglu"], {"kernels"}),
        (("--part", "steps"), ["attention"], {"steps"}),
        (("--part", "contenders"), [], {"contenders"}),
        (("--only", "sdxl lora fp16"), ["attention"], {"steps"}),
        (("--only", "gelu tanh b4"), ["gelu tanh"], {"kernels"}),
    ],
)
def test_checks_of_what_is_timed_are_run(
    given: tuple[str, ...], checks: list[str], others: set[str]
) -> None:
    found = asked(_arguments(*given), {"memory_gib": 80.0}, parts.Said())
    assert found.pop("correctness") == checks
    assert {part for part, names in found.items() if names} == others


def test_nothing_of_the_name_is_a_mistake() -> None:
    with pytest.raises(FasttuneError, match='--only "typo".*geglu b1.*sdxl lora bf16'):
        asked(_arguments("--only", "typo"), {"memory_gib": 80.0}, parts.Said())


def test_what_is_not_run_is_named(tmp_path: Path) -> None:
    run = _suite(tmp_path, "--minutes", "0", **{part: ["x"] for part in suite.PARTS})
    for name in suite.PARTS:
        suite._run_part(run, name, 1.0, _no_planner(tmp_path), tmp_path)
    text = summary(run.rows, run.said, run.left)
    assert text.count("not run: budget:") == 4


def test_caps_of_larger_cards_are_left_out() -> None:
    said = parts.Said()
    names = chosen_items.steps_of({"memory_gib": 15.9}, said)
    assert any(name.endswith("cap12") for name in names)
    assert not any(name.endswith(("cap16", "cap24")) for name in names)
    assert said.absent == [f"cap{cap}: the card has 15.9 GiB" for cap in (16, 24)]


def test_predictions_complete_rows_that_were_written_without(tmp_path: Path) -> None:
    run = _suite(tmp_path)
    step, case = "flux lora bf16 recompute b1 1024", StepCase()
    late = {"gpu": "NVIDIA H200", "step_ms": 500.0, "tflop": None, "mfu": None}
    run.path.write_text('{"measurement": "of an earlier run"}\n')
    run.add({"measurement": "training step", "case": case.name, **late})
    run.add({"measurement": "contender step", "case": f"{step}, diffusers peft", **late})
    run.add({"measurement": "kernel", "case": "x"})
    assert planning.case_of(run.rows[0]) == planning.case_of(run.rows[1]) == case
    plan = tmp_path / "plan.json"
    planning.complete(run.rows, run.path, plan)  # nothing is predicted
    assert run.rows[0]["mfu"] is None
    plan.write_text(json.dumps({case.name: {"tflop": 98.9, "predicted_peak_gib": 24.7}}))
    planning.complete(run.rows, run.path, plan)
    first, *written = (json.loads(line) for line in run.path.read_text().splitlines())
    assert first == {"measurement": "of an earlier run"} and written == run.rows
    assert [row["mfu"] for row in written[:2]] == [pytest.approx(0.2, abs=0.003)] * 2
    assert [row["predicted_peak_gib"] for row in written[:2]] == [24.7, None]


def test_the_planner_stands_still_while_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Popen:
        signals: ClassVar[list[int]] = []

        def __init__(self, command: list[str], **options: Any) -> None:
            assert command.count("--case") == 2

        def poll(self) -> None:
            return None

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

    monkeypatch.setattr(planning.subprocess, "Popen", Popen)
    planner = planning.Planner(["a", "b", "a"], tmp_path / "plan.json", {}, smoke=True)
    with planner.standing_still():
        assert Popen.signals == [signal.SIGSTOP]
    assert Popen.signals == [signal.SIGSTOP, signal.SIGCONT]
    began = time.monotonic()
    planner.wait_for_flops(began + 0.3)
    assert time.monotonic() - began >= 0.3
    planner.file.write_text(json.dumps({"a": {"tflop": 1.0}, "b": {"no_prediction": "why"}}))
    planner.wait_for_flops(time.monotonic() + 60)


def _step_row(name: str, losses: list[float]) -> harness.Row:
    return {
        "measurement": "training step",
        "case": name,
        "gpu": "G",
        "torch": "2.11.0",
        "loss_curve": "new",
        "losses": losses,
        "loss_at_20": losses[-1],
    }


def test_curves_of_the_same_weights_and_noise_agree() -> None:
    eager, losses = StepCase(), [1.0] * 20
    rows = [
        _step_row(eager.name, losses),
        _step_row(replace(eager, activations="save", compiled=True).name, [1.009] * 20),
        _step_row(replace(eager, size=512).name, [2.0] * 20),
        _step_row(replace(eager, cap_gib=24).name, [*losses[:5], 1.02, *losses[6:]]),
        _step_row(replace(eager, compiled=True).name, [*losses[:-1], float("nan")]),
    ]
    assert loss_curves.differing(rows) == [
        (rows[3]["case"], eager.name),
        (rows[4]["case"], eager.name),
    ]


@pytest.mark.parametrize(
    ("changed_files", "checked", "losses", "recorded"),
    [
        (0, True, 1.0, 2),
        (1, True, 1.0, 0),
        (None, True, 1.0, 0),
        (0, False, 1.0, 0),
        (0, True, 2.0, 0),
    ],
)
def test_only_a_run_that_can_be_trusted_records_curves(
    tmp_path: Path, changed_files: int | None, checked: bool, losses: float, recorded: int
) -> None:
    run = _suite(tmp_path, "--out", str(tmp_path), correctness=[])
    run.facts["changed_files"] = changed_files
    if checked:
        run.add(_check("attention", True))
    run.rows += [
        _step_row(StepCase().name, [1.0] * 20),
        _step_row(StepCase(compiled=True).name, [losses] * 20),
    ]
    suite._judge_curves(run)
    found = loss_curves.read(tmp_path / "loss_curves.json").get("G, torch 2.11", {})
    assert len(found) == recorded
    assert bool(run.said.failed) == (losses != 1.0)


def test_compiled_contenders_start_with_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _suite(tmp_path)
    children: list[tuple[str, str]] = []

    def run_child(module: str, options: list[str], **others: Any) -> parts.Ended:
        count = options[options.index("--steps") + 1]
        children.append((count, others["environment"].get("TORCHINDUCTOR_CACHE_DIR", "")))
        row = {"measurement": "contender step", "case": "c", "first_step_s": float(count)}
        others["on_row"](row)
        return parts.Ended(status=0, in_time=True, begun=None, done=[], error="")

    monkeypatch.setattr(suite, "run_child", run_child)
    item, plan = "diffusers peft compile | " + StepCase().name, tmp_path / "plan.json"
    assert suite._contender(run, item, time.monotonic() + 60, plan, tmp_path)
    (cold, first), (warm, second) = children
    assert (cold, warm) == ("1", "20") and first == second != ""
    assert len(run.rows) == 1 and run.rows[0]["first_step_cold_s"] == 1.0
    suite._contender(run, item.replace(" compile", ""), time.monotonic() + 60, plan, tmp_path)
    assert children[2:] == [("20", "")]


def test_wheels_are_for_the_children(tmp_path: Path) -> None:
    with pytest.raises(FasttuneError, match="no wheels"):
        suite._unpacked(tmp_path, tmp_path / "site")
    with zipfile.ZipFile(tmp_path / "a_contender-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_contender.py", "x = 1\n")
    environment = suite._unpacked(tmp_path, tmp_path / "site")
    assert str(tmp_path / "site") in environment["PYTHONPATH"].split(os.pathsep)
    assert (tmp_path / "site" / "a_contender.py").is_file()


# --- the card


def test_the_driver_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_uuid", lambda: None)
    done = SimpleNamespace(stdout="550.120, 1980, 2619, 41, [N/A]\n", returncode=0)
    monkeypatch.setattr(card.subprocess, "run", lambda *a, **k: done)
    found = card._smi()
    assert found["driver"] == "550.120" and found["clock_mhz"] == 1980
    assert found["power_w"] is None


def test_old_pynvml_wants_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_uuid(uuid: bytes) -> str:
        if not isinstance(uuid, bytes):
            raise TypeError("bytes or integer address expected instead of str instance")
        return uuid.decode()

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlSystemGetDriverVersion=lambda: b"550.120",
        nvmlDeviceGetClockInfo=lambda card, which: 1980,
        nvmlDeviceGetTemperature=lambda card, which: 41,
        nvmlDeviceGetPowerUsage=lambda card: 300_000,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(card, "_uuid", lambda: "GPU-1")
    assert card._nvml()["driver"] == "550.120"


def test_the_state_is_read_before_the_device_is_waited_for(
    cuda: _Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    between = steps._between

    def state() -> dict[str, int]:
        events.append("state")
        return {"clock_mhz": 1980}

    def wait(*given: Any) -> list[float]:
        events.append("wait")
        return between(*given)

    monkeypatch.setattr(steps, "state", state)
    monkeypatch.setattr(steps, "_between", wait)
    row: harness.Row = {}
    steps.timed_steps(lambda: torch.tensor(1.0), 1, CUDA, row, steps=7, seconds=60.0)
    assert events == ["state", "wait"] and row["clock_mhz"] == 1980


# --- the script

SCRIPT = harness.ROOT / "benchmarks" / "gpu" / "run.sh"


def test_the_script_names_what_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"  # without site-packages
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", str(SCRIPT)],
        env={"PYTHON": str(python), "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "lacks torch, numpy, safetensors, Pillow, tqdm: install" in done.stderr


@pytest.mark.slow
def test_sigterm_ends_the_children(tmp_path: Path) -> None:
    script = subprocess.Popen(
        ["sh", str(SCRIPT), "--smoke", "--part", "steps", "--out", "rows"],
        env={**harness.environment(), "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    started, deadline = set[int](), time.monotonic() + 120
    while not started and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        started = {p for p in _children(script.pid) if _is_module(p, "benchmarks.gpu.step")}
    assert started
    script.terminate()
    assert script.wait(60) == 130
    assert not any(_is_module(process, "benchmarks.gpu") for process in started)
    assert not list(tmp_path.glob("fasttune-bench-*/plan*"))


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _is_module(pid: int, module: str) -> bool:
    try:
        return module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_the_whole_suite_in_miniature(tmp_path: Path) -> None:
    results = {path: path.stat().st_mtime for path in harness.RESULTS.iterdir()}
    done = subprocess.run(
        ["sh", str(SCRIPT), "--smoke"],
        env={**harness.environment(), "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed:" not in done.stdout and "not run" not in done.stdout
    assert "diffusers peft: " not in done.stdout  # as absent
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    measured = {row["measurement"] for row in rows}
    assert measured == {"correctness", "ceiling", "kernel", "training step", "contender step"}
    assert len({(row["measurement"], row["case"]) for row in rows}) == len(rows)
    for row in rows:
        assert {"time", "commit", "torch", "triton", "driver", "gpu"} <= set(row)
    compiled = next(r for r in rows if r["case"] == "flux lora bf16 recompute b1 1024 compile")
    assert compiled["first_step_cold_s"] > 0 and compiled["graphs"] > 0
    assert compiled["recompiles"] == 0 and compiled["tflop"] > 0
    assert {path: path.stat().st_mtime for path in harness.RESULTS.iterdir()} == results
