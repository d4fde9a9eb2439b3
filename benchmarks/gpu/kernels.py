"""Time of each operation: eager, compiled, the libraries that have it, and our kernel.

`python -m benchmarks.gpu.kernels [operation ...]` prints a row for each case and contender: microseconds,
bytes and FLOPs a second, and the fraction of the least time that the ceilings of the same run allow
for the bytes that must be moved (every input read once, every output written once, and in the
backward what the operation says of its own) and the products that must be computed. Rows of a forward
with its backward also have the bytes that are kept between the two.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu import optimizer_step
from benchmarks.gpu.card import device_for, is_out_of_memory, state
from benchmarks.gpu.kept import kept_bytes
from benchmarks.gpu.libraries import Bind, Inputs, outputs_of, why_not
from benchmarks.gpu.names import BOTH, COMPILED, EAGER, FORWARD, OURS
from benchmarks.gpu.operation import Draw, Operation, Sizes, bound
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.timing import (
    Call,
    CaptureError,
    Ceilings,
    Flush,
    copies_needed,
    measure_ceilings,
    timers_for,
)
from benchmarks.ratios import abba, quantiles

CEILINGS = "ceilings"
BATCHES = (1, 4)
ROUNDS = 10
NO_GRAPHS = "--no-graphs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One case: what is called, and what the call moves and computes at least."""

    case: str
    calls: dict[str, Call]
    copies: int
    moved: int
    flops: int
    interleaved: bool = True
    """False where the contenders are cases of their own, because not all states fit at once."""
    kept: Mapping[str, int | None] = field(default_factory=dict)
    """Contender -> bytes kept for the backward, where there is one."""
    facts: harness.Row = field(default_factory=dict)
    """Further fields of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how everything is timed."""

    device: torch.device
    dtype: torch.dtype
    flush: Flush
    ceilings: Ceilings
    rounds: int
    smoke: bool
    with_libraries: bool
    graphs: bool = True

    @property
    def dtype_name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]


def items(*, smoke: bool) -> list[str]:
    """What can be asked for, most important first: all operations at batch 1, then at batch 4."""
    names = [operation.name for operation in OPERATIONS if operation.sizes]
    first = [f"{name} b1" for name in names]
    rest = [f"{name} b{batch}" for batch in BATCHES[1:] for name in (names[:1] if smoke else names)]
    return [CEILINGS, *first, optimizer_step.NAME, *rest]


def operation_of(item: str) -> str:
    """The operation that an item times."""
    return item if item in (CEILINGS, optimizer_step.NAME) else item.rpartition(" b")[0]


def timed(item: str, setting: Setting) -> Iterator[Timed]:
    """The cases of one item."""
    if item == optimizer_step.NAME:
        yield from _optimizer_cases(setting)
        return
    operation = next(o for o in OPERATIONS if o.name == operation_of(item))
    batch = item.rpartition(" b")[2]
    sizes = operation.odd[:1] if setting.smoke else operation.sizes
    for size in sizes:
        yield from _cases(operation, (int(batch), *size[1:]), setting)


def _cases(operation: Operation, sizes: Sizes, setting: Setting) -> Iterator[Timed]:
    draw = Draw(torch.Generator(setting.device).manual_seed(0), setting.dtype)

    def inputs() -> Inputs:
        made = operation.make(sizes, draw)
        return {n: t.detach().requires_grad_(n in operation.trained) for n, t in made.items()}

    first = inputs()
    copies = copies_needed(sum(t.nbytes for t in first.values()), setting.device)
    sets = [first, *(inputs() for _ in range(copies - 1))]
    outputs = outputs_of((operation.eager or operation.plain)(**first))
    incoming = [draw(*t.shape).to(t.dtype) for t in outputs] if operation.trained else []
    expected = [*outputs, *_gradients(outputs, first, operation.trained)]
    moved = operation.moved(first, outputs, operation.trained)
    flops = operation.flops(sizes)
    bindings = _bindings(operation, first, expected, setting)
    del outputs, expected
    name = f"{operation.name} {'x'.join(map(str, sizes))} {setting.dtype_name}"
    facts = {"operation": operation.name, "batch": sizes[0]}
    functions = {k: [bind(**s) for s in sets] for k, bind in bindings.items()}

    def forward(of: list[Callable[[], Any]], i: int) -> Any:
        return of[i]()

    yield Timed(
        case=f"{name} {FORWARD}",
        calls={k: partial(forward, of) for k, of in functions.items()},
        copies=copies,
        moved=moved[0],
        flops=flops,
        facts={**facts, "direction": FORWARD},
    )
    if not operation.trained:
        return
    incoming_of = {k: laid_out_as(of[0](), incoming) for k, of in functions.items()}

    def both(of: list[Callable[[], Any]], given: list[Tensor], i: int) -> Any:
        leaves = [sets[i][n] for n in operation.trained]
        return torch.autograd.grad(outputs_of(of[i]()), leaves, given)

    yield Timed(
        case=f"{name} {BOTH}",
        calls={k: partial(both, of, incoming_of[k]) for k, of in functions.items()},
        copies=copies,
        moved=sum(moved),
        flops=int(flops * (1 + operation.backward_flops)),
        kept=_kept(functions, first, setting),
        facts={**facts, "direction": BOTH},
    )


def _kept(
    functions: Mapping[str, list[Callable[[], Any]]], inputs: Inputs, setting: Setting
) -> dict[str, int | None]:
    """Only CUDA's allocator tells of a compiled graph."""
    silent = () if setting.device.type == "cuda" else (COMPILED,)
    return {
        name: None if name in silent else kept_bytes(of[0], inputs.values(), setting.device)
        for name, of in functions.items()
    }


def laid_out_as(outputs: Any, values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of these values in the layout of the outputs they belong to, as the layer after would
    give them: one in another layout adds a copy to the backward that training does not have."""
    found = []
    for output, value in zip(outputs_of(outputs), values, strict=True):
        alike = output.stride() == value.stride() and output.dtype == value.dtype
        found.append(value if alike else torch.empty_like(output.detach()).copy_(value))
    return found


def _gradients(outputs: list[Tensor], inputs: Inputs, trained: Sequence[str]) -> list[Tensor]:
    """Of the sum of the outputs."""
    if not trained:
        return []
    ones = [torch.ones_like(t) for t in outputs]
    return list(torch.autograd.grad(outputs, [inputs[n] for n in trained], ones))


def _bindings(
    operation: Operation, first: Inputs, expected: list[Tensor], setting: Setting
) -> dict[str, Bind]:
    """The contenders that work here, by name."""
    eager = operation.eager or operation.plain
    found: dict[str, Bind] = {EAGER: bound(eager)}
    others: dict[str, Bind] = {COMPILED: bound(compiled(eager, smoke=setting.smoke))}
    if operation.has_kernel:
        others |= {OURS: operation.ours, **operation.variants}
    if setting.with_libraries:
        others |= operation.libraries
    for name, bind in others.items():
        reason = why_not(bind, first, operation.trained, expected)
        if reason is None:
            found[name] = bind
        else:
            print(f"absent: {operation.name}: {name}: {reason}", flush=True)
    return found


def compiled(function: Callable[..., Any], *, smoke: bool) -> Callable[..., Any]:
    """Compiled for one shape; a graph break is an error. The smoke run does without a C++ compiler."""
    torch._dynamo.reset()  # beyond eight shapes of one function it would fall back to eager
    if smoke:
        return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    return torch.compile(function, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


def _optimizer_cases(setting: Setting) -> Iterator[Timed]:
    sets = optimizer_step.parameter_sets(small=setting.smoke)
    for label, shapes in sets.items():
        for storage in optimizer_step.CONTENDERS:
            yield from _updates_of(label, shapes(), storage, setting)


def _updates_of(
    label: str, sizes: optimizer_step.Shapes, storage: str, setting: Setting
) -> Iterator[Timed]:
    names = _optimizers(storage, setting)
    count = sum(torch.Size(s).numel() for s in sizes)
    together = count < optimizer_step.ALONE
    for group in [names] if together else [[name] for name in names]:
        calls = _updates(storage, group, sizes, setting.device)
        if calls is None:
            what = label if together else f"{label}: {group[0]}"
            print(f"absent: {optimizer_step.NAME} {what}: does not fit into memory", flush=True)
            continue
        yield Timed(
            case=f"{optimizer_step.NAME} {label} {storage}",
            calls=calls,
            copies=1,
            moved=count * optimizer_step.STORAGES[storage].bytes_a_weight,
            flops=0,
            interleaved=together,
            facts={"operation": optimizer_step.NAME, "set": label},
        )
        calls.clear()  # whoever still has the case: its states make room for the next


def _optimizers(storage: str, setting: Setting) -> list[str]:
    """Those that work here."""
    names = []
    for name in optimizer_step.CONTENDERS[storage]:
        if not (setting.with_libraries or name == EAGER or name.startswith(OURS)):
            continue
        reason = optimizer_step.why_not(storage, name, setting.device)
        if reason is None:
            names.append(name)
        else:
            print(f"absent: {optimizer_step.NAME} {storage}: {name}: {reason}", flush=True)
    return names


def _updates(
    storage: str, names: Sequence[str], sizes: optimizer_step.Shapes, device: torch.device
) -> dict[str, Call] | None:
    """Optimizers that share weights and gradients, each with its own state; None out of memory."""
    dtype, known = optimizer_step.STORAGES[storage].weights, optimizer_step.CONTENDERS[storage]
    try:
        weights = optimizer_step.weights_like(sizes, device, dtype)
        updates = {name: known[name](weights) for name in names}
        for update in updates.values():
            update()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return {name: _ignoring_copy(update) for name, update in updates.items()}


def _ignoring_copy(update: Callable[[], object]) -> Call:
    return lambda i: update()


def rows_of(case: Timed, setting: Setting) -> Iterator[harness.Row]:
    """Times the contenders of a case in turns."""
    timers, too_large = timers_for(
        case.calls,
        copies=case.copies,
        device=setting.device,
        flush=setting.flush,
        graphs=setting.graphs,
    )
    for name in too_large:
        print(f"absent: {case.case}: {name}: does not fit into memory", flush=True)
    samples = abba(timers, setting.rounds)
    now = state() if setting.device.type == "cuda" else {}
    floor = setting.ceilings.floor_us(case.moved, case.flops)
    for name, timer in timers.items():
        q = quantiles(samples[name])
        us = q["median"]
        row: harness.Row = {
            "measurement": "kernel",
            "case": f"{case.case}, {name}",
            "us": round(us, 3),
            "us_p20": round(q["p20"], 3),
            "us_p80": round(q["p80"], 3),
            "rounds": int(q["rounds"]),
            "gb_per_s": round(case.moved / us / 1e3, 2),
            "tflop_per_s": round(case.flops / us / 1e6, 3),
            "fraction_of_ceiling": round(floor / us, 4),
            "timed_by": timer.method,
            "interleaved": case.interleaved,
            **case.facts,
            "contender": name,
            # a process that goes on after a crash has measured its own
            "ceiling_gb_per_s": round(setting.ceilings.gb_per_s, 2),
            "ceiling_tflop_per_s": round(setting.ceilings.tflop_per_s, 2),
            "samples": {"us": [round(value, 4) for value in samples[name]]},
            **now,
        }
        if (kept := case.kept.get(name)) is not None:
            row["kept_mib"] = round(kept / 2**20, 3)
        if timer.note is not None:
            row["note"] = timer.note
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("items", nargs="*", help="see --list; default: all")
    parser.add_argument("--list", action="store_true", help="names of the items, in their order")
    parser.add_argument("--smoke", action="store_true", help="the CPU stands in for the GPU")
    parser.add_argument("--no-libraries", action="store_true", help="eager, compile and ours alone")
    parser.add_argument(NO_GRAPHS, action="store_true", help="short calls are timed by events, too")
    args = parser.parse_args()
    if args.list:
        print("\n".join(items(smoke=args.smoke)))
        return
    device = device_for(smoke=args.smoke)
    flush = Flush(device)
    ceilings, samples = measure_ceilings(device, flush, small=args.smoke)
    setting = Setting(
        device=device,
        dtype=torch.float32 if args.smoke else torch.bfloat16,
        flush=flush,
        ceilings=ceilings,
        rounds=2 if args.smoke else ROUNDS,
        smoke=args.smoke,
        with_libraries=not args.no_libraries,
        graphs=not args.no_graphs,
    )
    for item in args.items or items(smoke=args.smoke):
        print(f"begin: {item}", flush=True)
        if item == CEILINGS:
            _emit_ceilings(ceilings, samples)
        else:
            try:
                for case in timed(item, setting):
                    for row in rows_of(case, setting):
                        harness.emit(row.pop("measurement"), **row)
            except CaptureError:
                print(f"retry: {NO_GRAPHS}", flush=True)
                raise
        print(f"end: {item}", flush=True)


def _emit_ceilings(ceilings: Ceilings, samples: dict[str, list[float]]) -> None:
    for name, case in (("gb_per_s", "copy"), ("tflop_per_s", "matmul bf16")):
        value = round(getattr(ceilings, name), 2)
        kept = {name: [round(x, 3) for x in samples[name]]}
        harness.emit("ceiling", case=case, samples=kept, **{name: value}, **state())


if __name__ == "__main__":
    main()
