"""Rows of kernels: bytes, contenders, what is kept, and targets that are judged by them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu import correctness, kernels, optimizer_step, targets, timing
from benchmarks.gpu.kept import kept_bytes
from benchmarks.gpu.libraries import outputs_of
from benchmarks.gpu.operation import Draw, bound
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.parts import Said
from benchmarks.gpu.report_table import summary

CPU = torch.device("cpu")
BY_NAME = {operation.name: operation for operation in OPERATIONS}


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
    # the backward reads dout, y and gate and writes dy and dgate: dx is dout
    assert both.moved == forward.moved + (x + x + gate) + (x + gate)
    rows = list(kernels.rows_of(both, setting))
    assert [row["contender"] for row in rows] == ["eager", "compile", "ours"]
    assert [row.get("kept_mib") for row in rows] == [0.0, None, 0.0]
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
    for together in list(kernels.timed(optimizer_step.NAME, setting)):
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
    storages = optimizer_step.CONTENDERS
    expected = [
        (storage, name)
        for storage in storages
        for name in ("eager", "ours", "ours triton", "ours cuda c++")
        if name in storages[storage]
    ]
    assert names == [name for _, name in expected]
    assert not any(row["interleaved"] for row in rows)
    assert [row["case"] for row in rows] == [
        f"{optimizer_step.NAME} tiny {storage}, {name}" for storage, name in expected
    ]


def test_flops() -> None:
    attention, lora = BY_NAME["attention"], BY_NAME["lora linear"]
    assert attention.flops((1, 10, 20, 3, 4)) == 2 * 2 * 10 * 20 * 3 * 4
    assert lora.flops((2, 5, 32, 64)) == 2 * 10 * (32 * 64 + 16 * 96)
    joint, split = BY_NAME["lora linear, three targets"], BY_NAME["lora linear, two buffers"]
    assert joint.flops((2, 5, 32, 96, 3)) == 2 * 10 * (32 * 96 + 48 * 32 + 16 * 96)
    assert split.flops((2, 5, 20, 12, 64)) == lora.flops((2, 5, 32, 64))


def test_batch_one_comes_first() -> None:
    names = kernels.items(smoke=False)
    first_of_four = next(i for i, name in enumerate(names) if name.endswith(" b4"))
    assert all(name.endswith(" b4") for name in names[first_of_four:])
    assert kernels.operation_of("qk norm rope b4") == "qk norm rope"
    assert len(names) == 2 + 2 * sum(1 for operation in OPERATIONS if operation.sizes)


def _bytes_of(name: str, sizes: tuple[int, ...]) -> tuple[int, int]:
    operation = BY_NAME[name]
    inputs = operation.make(sizes, Draw(torch.Generator().manual_seed(0), torch.bfloat16))
    outputs = outputs_of(operation.plain(**inputs))
    return operation.moved(inputs, outputs, operation.trained)


def test_bytes_that_must_be_moved() -> None:
    """By hand, in units of a token row; vectors beside."""
    row, vector = 2 * 64 * 32, 2 * 32
    assert _bytes_of("norm modulate", (1, 64, 32)) == (2 * row + 2 * vector, 3 * row + 3 * vector)
    forward, backward = _bytes_of("gated residual norm", (1, 64, 32))
    assert forward == 4 * row + 3 * vector
    # dout, dnormed, out, y read; dx, dy written; gate and scale read, three vectors written
    assert backward == 6 * row + 5 * vector
    assert _bytes_of("geglu", (1, 64, 32)) == (row + row // 2, row // 2 + 2 * row)
    rope, table = 2 * 64 * 32, 2 * 4 * 64 * 16
    forward, backward = _bytes_of("qk norm rope", (1, 64, 1, 32))
    assert forward == 4 * rope + table + 2 * vector  # q and k read and written
    assert backward == 8 * rope + table + 2 * vector  # dq, dk, dv, q, k read; dqkv written
    forward, backward = _bytes_of("qk norm rope with text", (1, 16, 48, 1, 32))
    assert forward == 6 * rope + table + 4 * vector
    assert backward == 8 * rope + table + 4 * vector


def test_kept_bytes_are_beside_inputs_and_outputs() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16)

    def call() -> Tensor:
        hidden = torch.nn.functional.relu(x @ weight)  # keeps its output, 512 bytes
        return hidden * x

    assert kept_bytes(call, [x, weight], CPU) == 8 * 16 * 4
    assert kept_bytes(lambda: x * x, [x], CPU) == 0


def _kernel_row(case: str, contender: str, us: float, **others: Any) -> harness.Row:
    return {
        "measurement": "kernel",
        "case": f"{case}, {contender}",
        "contender": contender,
        "us": us,
        "gb_per_s": 900.0,
        "ceiling_gb_per_s": 1000.0,
        "fraction_of_ceiling": 0.9,
        "batch": 1,
        "direction": "forward+backward",
        **others,
    }


def test_targets_are_judged_by_what_was_measured() -> None:
    composite = {"operation": "qk norm rope attention"}
    cross = {"operation": "cross attention"}
    norm = {"operation": "group norm silu channels last"}
    rows = [
        _kernel_row("a", "eager", 1.0, **composite),  # faster, but not what it is held to
        _kernel_row("a", "compile", 126.0, **composite),
        _kernel_row("a", "ours", 100.0, **composite),
        _kernel_row("b", "eager", 149.0, **cross),
        _kernel_row("b", "cudnn", 10.0, **cross),
        _kernel_row("b", "ours", 100.0, **cross),
        _kernel_row("c", "ours", 100.0, operation="gelu tanh"),
        _kernel_row("d", "ours", 100.0, operation="gelu tanh", gb_per_s=800.0),
        _kernel_row("e", "eager", 300.0, **norm),
        _kernel_row("e", "apex", 140.0, **norm),
        _kernel_row("e", "ours", 100.0, **norm),
        _kernel_row("f", "eager", 300.0, **{**norm, "batch": 4}),
        _kernel_row("f", "ours", 100.0, **{**norm, "batch": 4}),
        _kernel_row("g", "ours", 100.0, operation="geglu", direction="forward"),
        _kernel_row("h", "compile", 100.0, operation="norm modulate"),
    ]
    found = {row["case"]: row for row in targets.rows_of(rows)}
    assert {case: row["reached"] for case, row in found.items()} == {
        "a: times as fast as compile": True,
        "b: times as fast as eager": False,
        "c: share of the copy's bandwidth": True,
        "d: share of the copy's bandwidth": False,
        "e: times as fast as apex": False,
        "g: share of the copy's bandwidth": True,
    }
    assert found["a: times as fast as compile"]["times"] == 1.26
    assert found["d: share of the copy's bandwidth"]["target"] == 0.85
    assert targets.unjudged(rows, list(found.values())) == ["norm modulate"]


def test_the_optimizer_is_held_to_milliseconds() -> None:
    of = {"operation": optimizer_step.NAME, "direction": None}
    rows = [
        _kernel_row("sdxl fp32", "eager", 1.0, **of, set="sdxl"),
        _kernel_row("sdxl fp32", "ours", 10_001.0, **of, set="sdxl"),
        _kernel_row("sdxl fp32", "ours triton", 9_999.0, **of, set="sdxl"),
        _kernel_row("sdxl lora fp32", "ours", 1.0, **of, set="sdxl lora"),
    ]
    assert [(row["ms"], row["reached"]) for row in targets.rows_of(rows)] == [
        (10.001, False),
        (9.999, True),
    ]


@pytest.mark.parametrize(
    ("step_ms", "peak", "reached"),
    [(80.0, 30.0, [True, True]), (80.1, 40.0, [False, False])],
)
def test_steps_are_held_to_the_compiled_step_of_diffusers(
    step_ms: float, peak: float, reached: list[bool]
) -> None:
    ours = {"measurement": "training step", "case": "flux lora bf16 save b1 1024 compile"}
    theirs = {
        "measurement": "contender step",
        "case": "flux lora bf16 save b1 1024, diffusers peft compile",
    }
    rows = [{**ours, "step_ms": step_ms, "peak_gib": peak}]
    assert targets.rows_of(rows) == []
    assert targets.unjudged(rows, []) == [ours["case"]]
    rows.append({**theirs, "step_ms": 100.0, "peak_gib": 40.0})
    assert [row["reached"] for row in targets.rows_of(rows)] == reached


def test_kernels_that_lose_are_shown_with_what_they_save() -> None:
    rows = [
        _kernel_row("slow", "eager", 300.0, kept_mib=30.0),
        _kernel_row("slow", "compile", 100.0, kept_mib=20.0),
        _kernel_row("slow", "ours", 150.0, kept_mib=12.0),
        _kernel_row("fast", "compile", 100.0),
        _kernel_row("fast", "ours", 99.0),
    ]
    text = summary(rows, Said(), {})
    table = text[text.index("kernels that lose") :].splitlines()
    assert table[2].split() == ["slow", "150.0", "100.0", "1.50", "12.00", "20.00", "30.00", "8.00"]
    assert "fast" not in "".join(table[2:])
    assert "kernels that lose" not in summary(rows[3:], Said(), {})
    assert "ways of ours" not in text


def test_ways_of_ours_are_shown_by_time() -> None:
    rows = [_kernel_row("a", name, us) for name, us in (("ours", 3.0), ("ours x", 2.0), ("z", 1.0))]
    text = summary(rows, Said(), {})
    assert "ours x 2.0, ours 3.0" in text[text.index("ways of ours") :]
