"""What a run of the GPU suite consists of: the items of each part, and those that were asked for."""

import argparse
from dataclasses import replace

from benchmarks import harness
from benchmarks.gpu.parts import Said
from benchmarks.gpu.step_cases import CAPS_GIB, StepCase, cases
from fasttune.errors import FasttuneError

PARTS = ("correctness", "kernels", "steps", "contenders")


def asked(args: argparse.Namespace, facts: harness.Row, said: Said) -> dict[str, list[str]]:
    """Part -> what it runs, with the checks of all that is timed. FasttuneError if that is nothing."""
    from benchmarks.gpu.kernels import operation_of

    parts = [part for part in PARTS if part in (args.part or PARTS)]
    known = {
        "correctness": _checks(),
        "kernels": _kernels(smoke=args.smoke),
        "steps": _small_steps() if args.smoke else steps_of(facts, said),
        "contenders": _contenders(smoke=args.smoke),
    }
    found = {part: [name for name in known[part] if args.only in name] for part in parts}
    if not any(found.values()):
        names = "; ".join(dict.fromkeys(name for part in parts for name in known[part]))
        raise FasttuneError(
            f'--only "{args.only}": nothing of {", ".join(parts)} has this in its name; there are: '
            f"{names}"
        )
    wanted = {*found.get("correctness", ()), *map(operation_of, found.get("kernels", ()))}
    wanted |= own_kernels() if found.get("steps") else set()
    checks = [name for name in known["correctness"] if name in wanted]
    return {"correctness": checks, **{p: found[p] for p in parts if p != "correctness"}}


def own_kernels() -> set[str]:
    """Operations that training steps have kernels of ours for, and that can be checked anywhere."""
    from benchmarks.gpu import optimizer_step
    from benchmarks.gpu.operations import OPERATIONS

    names = {o.name for o in OPERATIONS if o.has_kernel and not o.needs_triton}
    return {*names, optimizer_step.NAME}


def steps_of(facts: harness.Row, said: Said) -> list[str]:
    """The training steps, but for memory caps that are no caps on this card, which is said."""
    memory = facts.get("memory_gib")
    too_large = [cap for cap in CAPS_GIB if memory is None or cap >= memory]
    said.absent += [f"cap{cap}: the card has {memory} GiB" for cap in too_large]
    return [case.name for case in cases() if case.cap_gib not in too_large]


def _small_steps() -> list[str]:
    """One of each way."""
    case = StepCase(model="flux", activations="save")
    ways = (
        replace(case, compiled=True),
        replace(case, fused=False),
        replace(case, activations="offload", cap_gib=12),
        replace(case, compiled=True, buckets=True),
    )
    return [way.name for way in ways]


def _checks() -> list[str]:
    from benchmarks.gpu import correctness

    return list(dict.fromkeys(check.operation for check in correctness.checks()))


def _kernels(*, smoke: bool) -> list[str]:
    from benchmarks.gpu import kernels

    return kernels.items(smoke=smoke)


def _contenders(*, smoke: bool) -> list[str]:
    from benchmarks.gpu import contenders

    pairs = contenders.items()[: 1 if smoke else None]
    return [f"{name} | {case.name}" for name, case in pairs]
