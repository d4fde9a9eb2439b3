"""Gates memory, flops and launches: one training step of every config in configs/ at its real size.

The step runs on fake tensors, so nothing is allocated and no GPU is needed, in the dtypes of a GPU with
bf16. Memory is traced over two steps, as the first one makes the optimizer's state; FLOPs, bytes and
launches are counted in a third. Images have the size of the run's largest bucket, so that no batch of
the run takes more. A step of several micro-batches is traced with two, which is where
the peak is: the second finds the gradients of the first in place; costs are those of all.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import Row
from benchmarks.roofline import load_cards, step_ms
from benchmarks.static.costs import Costs, CountCosts
from benchmarks.static.gpu_operations import as_on_gpu
from benchmarks.static.models import shipped_configs, with_lora
from benchmarks.static.step_memory import trace_rehearsal
from fasttune.config import Config
from fasttune.rehearsal import Rehearsal, gpu_placement, rehearse

VERSIONS = ("torch",)
GIB = 2**30


def rows() -> Iterator[Row]:
    for name, config, folder in shipped_configs():
        yield from rows_of(name, config, folder)
    yield from rows_of(*_uncheckpointed(), size=(1024, 1024), memory_alone=True)


def _uncheckpointed() -> tuple[str, Config, Path]:
    """What a Flux LoRA takes that keeps its activations: what fused blocks are to bring down."""
    name, config, folder = next(c for c in shipped_configs() if c[0].startswith("flux-lora"))
    config = with_lora(config, "attention")
    memory = replace(config.memory, activations="save")
    return f"{name}, activations saved", replace(config, memory=memory), folder


def rows_of(
    name: str,
    config: Config,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    memory_alone: bool = False,
) -> Iterator[Row]:
    """The rows of one run, at its largest bucket unless a (width, height) in pixels is given."""
    with rehearsed(config, folder, micro_batches=2, size=size) as rehearsal:
        yield memory_row(name, rehearsal)
        if not memory_alone:
            costs = costs_of_a_step(rehearsal, config.train.gradient_accumulation)
            yield flops_row(name, rehearsal, costs)
            yield launches_row(name, costs)


@contextmanager
def rehearsed(
    config: Config, folder: Path, *, micro_batches: int, size: tuple[int, int] | None = None
) -> Iterator[Rehearsal]:
    """A rehearsal on fake tensors, with at most so many micro-batches a step; `size` as `rehearse`."""
    count = min(config.train.gradient_accumulation, micro_batches)
    short = replace(config, train=replace(config.train, gradient_accumulation=count))
    kind = "cpu" if config.run.device == "cpu" else "cuda"
    with FakeTensorMode():
        placement = gpu_placement(config)
        rehearsal = rehearse(short, folder, placement=placement, device_type=kind, size=size)
        with as_on_gpu(rehearsal.denoiser) if kind == "cuda" else nullcontext():
            yield rehearsal


def memory_row(name: str, rehearsal: Rehearsal) -> Row:
    """The peak and what it consists of, in GiB."""
    found = trace_rehearsal(rehearsal, steps=2)
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
    """Of a step with so many micro-batches."""
    with CountCosts() as first:
        rehearsal.micro_batch()
    with CountCosts() as last:
        rehearsal.update()
    return first.costs.times(micro_batches) + last.costs


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
