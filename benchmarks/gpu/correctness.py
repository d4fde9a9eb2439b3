"""Every kernel against the truth, before anything is timed.

The truth is the operation's definition in float64, on the same numbers. What we run may be twice as far
from it as the definition computed in the same dtype, and one rounding of the result more: two right
programs of one formula differ by their order of operations, which is of that size (flash attention
tests itself so; torch's own on the CPU needs 1.25 in float32). The distance in the 2-norm is held to it, and the largest
error to three times that of the same dtype, for outputs and for all gradients, at shapes that are no multiples of
anything, and for inputs that have gaps between their numbers or their rows. Each case runs twice and has
to give the same bits, which the interpreter, a program after another, cannot show; attention is excepted
where it may be a vendor's, whose backward adds with atomics.

Where Triton interprets its kernels (TRITON_INTERPRET=1, as `--smoke` of the suite has it), they are
checked in float16 beside the PyTorch path: its bf16 products are wrong.

`python -m benchmarks.gpu.correctness` prints one row a check and ends with 1 if one fails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from fasttune_kernels.cuda_source import CudaSourceError, nvrtc_version
from fasttune_kernels.dispatch import forced, runs_triton
from fasttune_kernels.jit import triton

_TWICE = ", run twice"
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


def _everywhere(device: torch.device) -> bool:
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison. `run` gives the errors; an operation may have many checks."""

    operation: str
    case: str
    run: Callable[[torch.device], list[Error]]
    own_kernel: bool = False
    """Whether it checks a kernel of ours, or what the models write in PyTorch."""
    can_run: Callable[[torch.device], bool] = _everywhere
    """Whether what it checks is there on a device."""
    runs_twice: bool = True
    """Whether a second run has to give the same bits."""


def checks(*, interpreted: bool = False) -> Iterator[Check]:
    """All of them, in the order of the operations; `interpreted` ones only where Triton interprets."""
    for operation in OPERATIONS:
        for i, sizes in enumerate(operation.odd):
            for short in operation.dtypes:
                yield _check(operation, sizes, short)
            yield _check(operation, sizes, "bf16", _GAPS[i % len(_GAPS)])
        if interpreted:
            first = _check(operation, operation.odd[0], "fp16")
            yield replace(
                first,
                case=f"{first.case}, interpreted",
                run=partial(_interpreted, first),
                can_run=_everywhere,
            )
    for label, shapes in optimizer_step.ODD.items():
        for name, three_steps in optimizer_step.CHECKED.items():
            yield Check(
                operation=optimizer_step.NAME,
                case=f"{optimizer_step.NAME} {label}, {name}",
                own_kernel=True,
                run=partial(_optimizer_errors, shapes=shapes, three_steps=three_steps),
                can_run=_has_nvrtc if name in optimizer_step.IN_CUDA else _everywhere,
            )


def _has_triton(device: torch.device) -> bool:
    return runs_triton(torch.empty(0, device=device))


def _has_nvrtc(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        nvrtc_version()
    except CudaSourceError:  # what the kernels' contender of that name is absent for, too
        return False
    return True


def interprets() -> bool:
    """Whether Triton's kernels run in its interpreter in this process."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _interpreted(check: Check, device: torch.device) -> list[Error]:
    with forced("triton"):
        return check.run(device)


def _check(operation: Operation, sizes: Sizes, short: str, layout: str | None = None) -> Check:
    shape = "x".join(map(str, sizes))
    return Check(
        operation=operation.name,
        case=f"{operation.name} {shape} {short}{'' if layout is None else f', {layout}'}",
        own_kernel=operation.has_kernel,
        runs_twice=not operation.may_be_vendors,
        can_run=_has_triton if operation.needs_triton else _everywhere,
        run=lambda device: errors_of(operation, sizes, DTYPES[short], device=device, layout=layout),
    )


def errors_of(
    operation: Operation,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    device: torch.device,
    layout: str | None = None,
    seed: int = 0,
) -> list[Error]:
    """What we run beside the definition in `dtype`, both against the definition in float64."""
    draw = Draw(torch.Generator(device).manual_seed(seed), dtype)
    inputs = operation.make(sizes, draw)
    if layout is not None:
        inputs = {
            name: t if name in operation.contiguous else _LAYOUTS[layout](t)
            for name, t in inputs.items()
        }
    exact = {name: _exact(t, device) for name, t in inputs.items()}
    leaves = (*operation.trained, *operation.checked)
    truth, weights = _run(lambda **i: operation.plain(**i), exact, leaves, draw, None)
    plain, _ = _run(lambda **i: operation.plain(**i), inputs, leaves, draw, weights)
    _poison(plain.values())
    run = partial(_run, lambda **i: operation.ours(**i)(), inputs, leaves, draw, weights, layout)
    ours, _ = run()
    errors = [_error(name, ours[name], plain[name], truth[name], dtype, device) for name in truth]
    return errors if operation.may_be_vendors else [*errors, *_differing(ours, run()[0])]


def _differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[Error]:
    """What has other bits in the second run of two. A NaN is found wrong elsewhere, and here differs."""
    unequal = (name for name in first if not torch.equal(first[name], second[name]))
    return [
        Error(of=f"{name}{_TWICE}", norm=float("inf"), largest=float("inf")) for name in unequal
    ]


def _exact(t: Tensor, device: torch.device) -> Tensor:
    t = t.to(_exact_device(device))
    return t.double() if t.is_floating_point() else t


def _run(
    function: Callable[..., Any],
    inputs: Inputs,
    leaves: Sequence[str],
    draw: Draw,
    weights: list[Tensor] | None,
    layout: str | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients of the leaves by name, and the gradients of the outputs, drawn where None."""
    given = {n: t.detach().requires_grad_(n in leaves) for n, t in inputs.items()}
    outputs = outputs_of(function(**given))
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if not leaves:
        return found, []
    if weights is None:
        weights = [draw(*t.shape) for t in outputs]
    # in each output's own layout, as the layer after it gives them
    incoming = [
        torch.empty_like(t).copy_(w)
        for w, t in zip(weights, map(Tensor.detach, outputs), strict=True)
    ]
    if layout is not None:
        incoming = [_LAYOUTS[layout](w) for w in incoming]
    grads = torch.autograd.grad(outputs, [given[n] for n in leaves], incoming)
    found |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return found, weights


def _strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them; what is no matrix stays."""
    if x.ndim < 2:
        return x
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), _hole(x))
    wide[..., ::2] = x
    return wide[..., ::2]


def _sliced(x: Tensor) -> Tensor:
    """The same numbers as columns of a wider tensor, as of a projection that several share."""
    if x.ndim < 2:
        return x
    gap = 8  # of 16 bytes in half precision, so that what needs aligned rows is tried, too
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + gap), _hole(x))
    wide[..., gap:] = x
    return wide[..., gap:]


def _hole(x: Tensor) -> float:
    return float("nan") if x.is_floating_point() else 1


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"strided": _strided, "sliced": _sliced}
_GAPS = tuple(_LAYOUTS)


def _exact_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _poison(like: Any) -> None:
    """Leaves NaN in the allocator's free blocks of these sizes: the next `empty` finds them, and an
    element that is never written shows."""
    for block in [torch.full_like(t, float("nan")) for t in like if t.is_floating_point()]:
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
    # Which element is unlucky differs, and by how much: over hundreds of checks twice is too few. An ulp
    # is of the largest value.
    largest = 3 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    error = ours - truth
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        of=of,
        norm=float(error.norm() / (allowed_norm + tiny)),
        largest=float(error.abs().max() / (largest + tiny)),
    )


def _optimizer_errors(
    device: torch.device, shapes: optimizer_step.Shapes, three_steps: optimizer_step.ThreeSteps
) -> list[Error]:
    found, again = (three_steps(device, shapes) for _ in range(2))
    errors = [
        _error(name, ours, plain, truth, ours.dtype, device)
        for name, (ours, plain, truth) in found.items()
    ]
    return errors + _differing(*({name: x[0] for name, x in run.items()} for run in (found, again)))


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
    for check in checks(interpreted=args.smoke and interprets()):
        of_it = by_operation.setdefault(check.operation, [])
        if check.can_run(device):
            of_it.append(check)
    failed = False
    for name in args.items or by_operation:
        print(f"begin: {name}", flush=True)
        if not by_operation[name]:
            print(f"absent: {name}: it runs in Triton alone, and there is none here", flush=True)
        for check in by_operation[name]:
            failed |= not _is_right(check, device)
        print(f"end: {name}", flush=True)
    return 1 if failed else 0


def _is_right(check: Check, device: torch.device) -> bool:
    """Runs a check and emits its row."""
    errors = check.run(device)
    worst = max(errors, key=lambda e: e.worst)
    right = worst.worst <= 1
    harness.emit(
        "correctness",
        case=check.case,
        operation=check.operation,
        own_kernel=check.own_kernel,
        passed=right,
        repeats=not any(e.of.endswith(_TWICE) for e in errors) if check.runs_twice else None,
        worst_of_allowed=round(worst.worst, 4),
        worst=worst.of,
    )
    if not right:
        text = f"{worst.worst:.3g} times the error allowed, {worst.of}"
        print(f"failed: {check.operation}: {check.case}: {text}", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
