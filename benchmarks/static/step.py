"""Gates memory, flops and launches: one training step of every config in configs/ at its real size.

The step runs on fake tensors, so nothing is allocated and no GPU is needed, in the dtypes of a GPU with
bf16. Images have the size of the run's largest bucket, so that no batch of the run takes more. What the
first step makes for all others is there before it. Of several micro-batches the second is traced, which
finds gradients in place, so that the peak is there; costs are those of all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import Row
from benchmarks.roofline import load_cards, step_ms
from benchmarks.static.blocks import MIXED
from benchmarks.static.costs import Costs, CountCosts
from benchmarks.static.gpu_operations import as_on_gpu
from benchmarks.static.models import shipped_configs, with_lora
from benchmarks.static.step_memory import NOTHING, trace_rehearsal
from benchmarks.static.versions import CPU_LIBRARY
from fasttune.build import set_blocks
from fasttune.config import Config
from fasttune.memory.activations import Choice
from fasttune.models.fused import unfuse
from fasttune.rehearsal import Rehearsal, gpu_placement, rehearse

VERSIONS = ("torch", "triton", CPU_LIBRARY)
GIB = 2**30

Activations = Choice | Mapping[Any, Choice]


def rows() -> Iterator[Row]:
    for name, config, folder in shipped_configs():
        yield from rows_of(name, config, folder)
    for family in ("flux", "sdxl"):
        yield from activation_rows(family)


KEPT: dict[str, tuple[Activations, ...]] = {
    "flux": ("save", "int8", "offload"),
    "sdxl": ("save", "int8", "offload", MIXED.choices),
}
"""Family -> what becomes of activations, with none of its blocks recomputed."""


def activation_rows(family: str) -> Iterator[Row]:
    """Memory of a LoRA on the attention's projections at 1024 x 1024 pixels that keeps its activations: of
    plain blocks, of fused ones by what these do with them, and in percent how much of plain blocks'
    is held at the peak."""
    name, config, folder = next(c for c in shipped_configs() if c[0].startswith(f"{family}-lora"))
    config = with_lora(config, "attention")
    config = replace(config, memory=replace(config.memory, activations="save"))
    with rehearsed(config, folder, size=(1024, 1024)) as rehearsal:
        warm_up(rehearsal)
        unfuse(rehearsal.denoiser)
        plain = memory_row(f"{name}, activations saved, plain blocks", rehearsal)
        yield plain
        for kept in KEPT[family]:
            memory = replace(config.memory, activations=kept)
            set_blocks(
                replace(config, memory=memory),
                rehearsal.denoiser,
                rehearsal.placement,
                device_type=rehearsal.device_type,
            )
            row = memory_row(f"{name}, activations {_said(kept)}", rehearsal)
            percent = round(100 * row["saved_gib"] / plain["saved_gib"])
            yield {**row, "saved_percent_of_plain": percent}


def _said(kept: Activations) -> str:
    if isinstance(kept, str):
        return {"save": "saved", "offload": "offloaded"}.get(kept, kept)
    return ", ".join(f"{name} {how}" for name, how in kept.items())


def rows_of(name: str, config: Config, folder: Path) -> Iterator[Row]:
    """The rows of one run, at its largest bucket."""
    count = config.train.gradient_accumulation
    with rehearsed(config, folder) as rehearsal:
        warm_up(rehearsal)
        *earlier, last, update = (CountCosts() for _ in range(min(count, 2) + 1))
        for counted in earlier:
            with counted:
                rehearsal.micro_batch()
        yield memory_row(name, rehearsal, (last, update))
        costs = _step_costs([*earlier, last], update, count)
        yield flops_row(name, rehearsal, costs)
        yield launches_row(name, costs)


@contextmanager
def rehearsed(
    config: Config, folder: Path, *, size: tuple[int, int] | None = None
) -> Iterator[Rehearsal]:
    """A rehearsal on fake tensors, with one micro-batch a step; at its largest bucket unless a
    (width, height) in pixels is given."""
    short = replace(config, train=replace(config.train, gradient_accumulation=1))
    kind = "cpu" if config.run.device == "cpu" else "cuda"
    with FakeTensorMode():
        placement = gpu_placement(config)
        rehearsal = rehearse(short, folder, placement=placement, device_type=kind, size=size)
        with as_on_gpu(rehearsal.denoiser) if kind == "cuda" else nullcontext():
            yield rehearsal


def warm_up(rehearsal: Rehearsal) -> None:
    """Makes what a first step leaves behind: the forward's tables, and in an update the optimizer's
    state."""
    with torch.no_grad():
        rehearsal.forward.loss(rehearsal.batch, torch.Generator())
    for p in rehearsal.trained.parameters.values():
        p.grad = torch.zeros_like(p)
    rehearsal.update()


def memory_row(
    name: str, rehearsal: Rehearsal, counts: tuple[CountCosts, CountCosts] | None = None
) -> Row:
    """The peak of a step and what it consists of, in GiB. `counts` gets the costs of the micro-batch
    and those of the update."""
    found = trace_rehearsal(rehearsal, steps=1, within=counts or NOTHING)
    parts = {f"{part}_gib": gib(size) for part, size in found.breakdown.items()}
    return {
        "gate": "memory",
        "case": name,
        **_size(rehearsal),
        "peak_gib": gib(found.peak_bytes),
        **parts,
        "module": found.module,
        "phase": found.phase,
    }


def costs_of_a_step(rehearsal: Rehearsal, micro_batches: int) -> Costs:
    """Of a step with so many micro-batches, two at most of which are taken."""
    for p in rehearsal.trained.parameters.values():
        p.grad = None
    counts = [CountCosts() for _ in range(min(micro_batches, 2))]
    for counted in counts:
        with counted:
            rehearsal.micro_batch()
    with CountCosts() as update:
        rehearsal.update()
    return _step_costs(counts, update, micro_batches)


def _step_costs(counts: Sequence[CountCosts], update: CountCosts, micro_batches: int) -> Costs:
    """From the first micro-batch, the second if there are several, which as all others adds its gradients
    to those in place, and the update."""
    first, last = counts[0].costs, counts[-1].costs
    return first + last.times(micro_batches - 1) + update.costs


def flops_row(name: str, rehearsal: Rehearsal, costs: Costs) -> Row:
    """Work of a step, and the time each card would take for it in eager PyTorch if nothing stayed in a
    cache and every op ran at full rate."""
    fp32 = rehearsal.placement.compute_dtype.itemsize == 4
    cards = {
        f"step_ms {name}": _digits(step_ms(costs.ops, card, "fp32" if fp32 else "bf16"))
        for name, card in load_cards().items()
    }
    return {
        "gate": "flops",
        "case": name,
        **_size(rehearsal),
        "tflop": _digits(costs.flops / 1e12, 8),
        "moved_gib": gib(costs.bytes),
        **cards,
    }


def launches_row(name: str, costs: Costs) -> Row:
    """Operations of a step in eager PyTorch that launch something, by kind."""
    kinds = {kind: costs.launches[kind] for kind in ("gemm", "attention", "custom")}
    kinds |= {kind: costs.launches[kind] for kind in ("pointwise", "copy")}
    total = costs.launches.total()
    assert total == sum(kinds.values())
    return {"gate": "launches", "case": f"{name}, eager", "launches": total, **kinds}


def _size(rehearsal: Rehearsal) -> Row:
    width, height = rehearsal.size
    return {"width": width, "height": height}


def gib(size: int) -> float:
    """GiB, to a KiB."""
    return round(size / GIB, 6)


def _digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")
