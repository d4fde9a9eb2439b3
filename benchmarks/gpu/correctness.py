"""Every kernel against the truth, before anything is timed.

The truth is the operation's definition in float64, on the same numbers. What we run may be twice as far
from it as the definition computed in the same dtype, and one rounding of the result more: two right
programs of one formula differ by their order of operations, which is of that size (flash attention
tests itself so; torch's own on the CPU needs 1.25 in float32). Both the distance in the 2-norm and the largest error are held to it, for outputs and for gradients, at shapes that
are no multiples of anything, and for inputs that are not contiguous.

`python -m benchmarks.gpu.correctness` prints one row a check and ends with 1 if one fails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu import optimizer_step
from benchmarks.gpu.card import device_for
from benchmarks.gpu.libraries import Inputs, outputs_of
from benchmarks.gpu.operation import Draw, Operation, Sizes
from benchmarks.gpu.operations import OPERATIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """Of one output or gradient, as multiples of what is allowed: right up to 1."""

    of: str
    norm: float
    largest: float

    @property
    def worst(self) -> float:
        return max(self.norm, self.largest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison. `run` gives the errors; an operation may have many checks."""

    operation: str
    case: str
    run: Callable[[torch.device], list[Error]]
    own_kernel: bool = False
    """Whether it checks a kernel of ours, or what the models write in PyTorch."""


def checks() -> Iterator[Check]:
    """All of them, in the order of the operations."""
    for operation in OPERATIONS:
        for sizes in operation.odd:
            for short in DTYPES:
                yield _check(operation, sizes, short, strided=False)
            yield _check(operation, sizes, "bf16", strided=True)
    for label, shapes in optimizer_step.ODD.items():
        yield Check(
            operation=optimizer_step.NAME,
            case=f"{optimizer_step.NAME} {label}",
            run=partial(_optimizer_errors, shapes=shapes),
        )


def _check(operation: Operation, sizes: Sizes, short: str, *, strided: bool) -> Check:
    shape = "x".join(map(str, sizes))
    return Check(
        operation=operation.name,
        case=f"{operation.name} {shape} {short}{', strided' if strided else ''}",
        own_kernel=operation.has_kernel,
        run=lambda device: errors_of(
            operation, sizes, DTYPES[short], device=device, strided=strided
        ),
    )


def errors_of(
    operation: Operation,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    device: torch.device,
    strided: bool = False,
    seed: int = 0,
) -> list[Error]:
    """What we run beside the definition in `dtype`, both against the definition in float64."""
    draw = Draw(torch.Generator(device).manual_seed(seed), dtype)
    inputs = operation.make(sizes, draw)
    if strided:
        inputs = {name: _strided(t) for name, t in inputs.items()}
    exact = {name: t.to(_exact_device(device)).double() for name, t in inputs.items()}
    truth, weights = _run(lambda **i: operation.plain(**i), exact, operation.trained, draw, None)
    plain, _ = _run(lambda **i: operation.plain(**i), inputs, operation.trained, draw, weights)
    _poison(plain.values())
    ours, _ = _run(
        lambda **i: operation.ours(**i)(), inputs, operation.trained, draw, weights, strided=strided
    )
    return [_error(name, ours[name], plain[name], truth[name], dtype, device) for name in truth]


def _run(
    function: Callable[..., Any],
    inputs: Inputs,
    trained: Sequence[str],
    draw: Draw,
    weights: list[Tensor] | None,
    *,
    strided: bool = False,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the gradients of the outputs, drawn where None."""
    leaves = {n: t.detach().requires_grad_(n in trained) for n, t in inputs.items()}
    outputs = outputs_of(function(**leaves))
    if weights is None:
        weights = [draw(*t.shape) for t in outputs]
    # in each output's own layout, as the layer after it gives them
    incoming = [
        torch.empty_like(t).copy_(w)
        for w, t in zip(weights, map(Tensor.detach, outputs), strict=True)
    ]
    if strided:
        incoming = [_strided(w) for w in incoming]
    grads = torch.autograd.grad(outputs, [leaves[n] for n in trained], incoming)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"gradient of {n}": g for n, g in zip(trained, grads, strict=True)}
    return found, weights


def _strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them; what is no matrix stays."""
    if x.ndim < 2:
        return x
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def _exact_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _poison(like: Any) -> None:
    """Leaves NaN in the allocator's free blocks of these sizes: the next `empty` finds them, and an
    element that is never written shows."""
    for block in [torch.full_like(t, float("nan")) for t in like]:
        del block


def _error(
    of: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, device: torch.device
) -> Error:
    """`dtype` is what is computed in; a float32 gradient of bf16 numbers is no better than bf16."""
    ours, plain, truth = (t.to(_exact_device(device)).double() for t in (ours, plain, truth))
    if ours.shape != truth.shape or not ours.isfinite().all():
        return Error(of=of, norm=float("inf"), largest=float("inf"))
    rounding = (truth.to(dtype).double() - truth).norm()
    allowed_norm = 2 * (plain - truth).norm() + rounding
    # Which element is unlucky differs; an ulp is of the largest value.
    largest = 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    error = ours - truth
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        of=of,
        norm=float(error.norm() / (allowed_norm + tiny)),
        largest=float(error.abs().max() / (largest + tiny)),
    )


def _optimizer_errors(device: torch.device, shapes: optimizer_step.Shapes) -> list[Error]:
    return [
        _error(name, ours, plain, truth, torch.float32, device)
        for name, (ours, plain, truth) in optimizer_step.three_steps(device, shapes).items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("items", nargs="*", help="names of operations; default: all")
    parser.add_argument("--list", action="store_true", help="names of the operations")
    parser.add_argument("--smoke", action="store_true", help="the CPU stands in for the GPU")
    args = parser.parse_args()
    if args.list:
        print("\n".join(dict.fromkeys(check.operation for check in checks())))
        return 0
    device = device_for(smoke=args.smoke)
    by_operation: dict[str, list[Check]] = {}
    for check in checks():
        by_operation.setdefault(check.operation, []).append(check)
    failed = False
    for name in args.items or by_operation:
        print(f"begin: {name}", flush=True)
        for check in by_operation[name]:
            errors = check.run(device)
            worst = max(errors, key=lambda e: e.worst)
            right = worst.worst <= 1
            harness.emit(
                "correctness",
                case=check.case,
                operation=name,
                own_kernel=check.own_kernel,
                passed=right,
                worst_of_allowed=round(worst.worst, 4),
                worst=worst.of,
            )
            if not right:
                failed = True
                text = f"{worst.worst:.3g} times the error allowed, {worst.of}"
                print(f"failed: {name}: {check.case}: {text}", flush=True)
        print(f"end: {name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
