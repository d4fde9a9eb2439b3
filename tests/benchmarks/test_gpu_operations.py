"""Operations: what is compared with what, and that wrong kernels fail."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import arena_updates, correctness, kernels, optimizer_step
from benchmarks.gpu.libraries import outputs_of, why_not
from benchmarks.gpu.operation import Draw, Operation, bound
from benchmarks.gpu.operations import OPERATIONS

CPU = torch.device("cpu")
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def draw(dtype: torch.dtype = torch.float32) -> Draw:
    return Draw(torch.Generator().manual_seed(1), dtype)


NEED_NO_TRITON = [operation for operation in OPERATIONS if not operation.needs_triton]


def test_every_operation_of_the_library_is_here() -> None:
    calls = {"norm modulate", "gated residual", "gated residual norm", "qk norm rope", "attention"}
    calls |= {
        "cross attention",
        "geglu",
        "gelu tanh",
        "group norm silu",
        "lora linear",
        "flow loss",
    }
    calls |= {"quantize rows", "dequantize rows", "qk norm rope attention", "flash attention"}
    assert calls <= set(BY_NAME)
    assert all(operation.has_kernel for operation in OPERATIONS)


@pytest.mark.parametrize("operation", NEED_NO_TRITON, ids=lambda o: o.name)
def test_ours_is_right_in_every_layout(operation: Operation) -> None:
    for i, sizes in enumerate(operation.odd[:2]):
        layout = correctness._GAPS[i % 2]
        errors = correctness.errors_of(operation, sizes, torch.bfloat16, device=CPU, layout=layout)
        assert max(error.worst for error in errors) <= 1, (sizes, layout, errors)
        assert len(errors) > len(operation.trained) + len(operation.checked)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_shapes(operation: Operation) -> None:
    for sizes in (*operation.sizes, *operation.odd):
        assert len(sizes) == len(operation.odd[0])
    assert all(sizes[0] == 1 for sizes in operation.sizes)
    assert all(name.startswith("ours ") for name in operation.variants)
    inputs = operation.make(operation.odd[0], draw())
    assert {*operation.trained, *operation.checked, *operation.contiguous} <= set(inputs)
    floats = {name for name, t in inputs.items() if t.is_floating_point()}
    if operation.trained:  # all that can get a gradient is checked
        constants = {"cos", "sin", "clean", "noise", "clean_factor", "noise_factor"}
        constants |= {"weight", "mask"} if operation.name == "masked huber loss" else set()
        assert {*operation.trained, *operation.checked} == floats - constants


def test_layouts_hold_the_same_numbers() -> None:
    x, mask = torch.randn(2, 3, 5), torch.tensor([[True, False, True], [True] * 3])
    for layout in (correctness._strided, correctness._sliced):
        assert torch.equal(layout(x), x) and not layout(x).is_contiguous()
        assert torch.equal(layout(mask), mask) and not layout(mask).is_contiguous()
        assert layout(x[0, 0]) is not None and layout(x[0, 0]).is_contiguous()


@pytest.mark.parametrize("name", ["norm modulate", "cross attention", "lora linear"])
def test_correct_operations_pass(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        errors = correctness.errors_of(BY_NAME[name], BY_NAME[name].odd[0], dtype, device=CPU)
        assert max(error.worst for error in errors) <= 1


def test_triton_is_checked_in_its_interpreter() -> None:
    assert correctness.interprets()
    found = {c.operation: c for c in correctness.checks(interpreted=True) if "interp" in c.case}
    assert set(found) == set(BY_NAME)
    errors = found["gelu tanh"].run(CPU)
    assert {error.of for error in errors} == {"output 0", "gradient of x"}
    assert max(error.worst for error in errors) <= 1


def test_what_needs_triton_is_left_out_without(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [c for c in correctness.checks() if c.operation == "flash attention"]
    assert checks and not any(check.can_run(CPU) for check in checks)
    in_cuda = [c for c in correctness.checks() if c.case.endswith("CUDA C++")]
    assert len(in_cuda) == 2 * len(optimizer_step.ODD)
    assert not any(check.can_run(CPU) for check in in_cuda)


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
    operation = _wrong("norm modulate", change)
    errors = correctness.errors_of(operation, (3, 65, 3072), torch.bfloat16, device=CPU)
    assert max(error.worst for error in errors) > 1


def test_what_does_not_repeat_bit_by_bit_fails() -> None:
    """An addition in another order, as atomics make it, is within the error and still a failure."""
    last_bit = 2**-24
    signs = itertools.cycle([1.0, 1.0 + 2 * last_bit])

    def in_any_order(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
        return plain(**inputs) * next(signs)

    def run(**changes: Any) -> list[correctness.Error]:
        operation = replace(_wrong("gelu tanh", in_any_order), **changes)
        return correctness.errors_of(operation, operation.odd[0], torch.float32, device=CPU)

    found = [error for error in run() if error.worst > 1]
    assert {error.of for error in found} == {
        "output 0, run twice",
        "gradient of x, run twice",
    }
    assert max(error.worst for error in run(may_be_vendors=True)) <= 1


@pytest.mark.parametrize(
    ("name", "decay"), [("trainer", 0.02), ("arena fp32", 0.02), ("arena bf16 8-bit", 500.0)]
)
def test_a_wrong_optimizer_fails(name: str, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, check = optimizer_step.ODD["small"], optimizer_step.CHECKED[name]
    assert isinstance(check, partial)
    assert _worst_of_update(check, shapes) <= 1

    def with_another_decay(weights: list[Any]) -> Any:
        with monkeypatch.context() as changed:
            for module in (optimizer_step, arena_updates):
                changed.setattr(module, "DECAY", decay)
            return check.keywords["make"](weights)

    assert _worst_of_update(partial(check, make=with_another_decay), shapes) > 1


def _worst_of_update(three_steps: Any, shapes: optimizer_step.Shapes) -> float:
    return max(e.worst for e in correctness._optimizer_errors(CPU, shapes, three_steps))


def test_a_failed_check_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = correctness.Check(
        operation="x",
        case="x 1",
        run=lambda device: [correctness.Error(of="output 0", norm=2.0, largest=0.1)],
    )
    monkeypatch.setattr(correctness, "checks", lambda interpreted: iter([wrong]))
    monkeypatch.setattr(sys, "argv", ["correctness", "--smoke"])
    assert correctness.main() == 1
    assert "failed: x: x 1: 2 times the error allowed, output 0" in capsys.readouterr().out


def test_libraries_count_by_what_they_compute() -> None:
    operation = BY_NAME["geglu"]
    name = "projected"
    inputs = {name: operation.make((1, 3, 8), draw())[name].requires_grad_()}
    outputs = outputs_of(operation.plain(**inputs))
    expected = [*outputs, *kernels._gradients(outputs, inputs, (name,))]
    assert why_not(bound(operation.plain), inputs, (name,), expected) is None
    reason = why_not(
        bound(lambda projected: 2 * operation.plain(projected)), inputs, (name,), expected
    )
    assert reason is not None and "computes something else" in reason

    def absent(projected: Tensor) -> Any:
        import no_such_library  # noqa: F401

    assert "not installed" in str(why_not(absent, inputs, (name,), expected))
