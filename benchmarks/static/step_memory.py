"""Memory of a rehearsed training step: what is resting, and the peak with its breakdown."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.static.gpu_operations import as_on_gpu
from benchmarks.static.own_launches import scratch_of
from fasttune.memory.tensors import tensors_in
from fasttune.memory.trace import MemoryTrace, cuda_size
from fasttune.models.fused import adapter_copy
from fasttune.rehearsal import Rehearsal


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryResult:
    """Of the steps that were traced."""

    peak_bytes: int
    """The most that was held in any of them."""
    breakdown: dict[str, int]
    """Bytes at the peak by `fasttune.memory.trace.CATEGORIES`; they add up to `peak_bytes`."""
    module: str
    """Where the peak falls; empty outside of all modules."""
    phase: str
    """When: forward, backward or update."""
    resting_bytes: int
    """Held between steps, once the optimizer has its state."""
    resting: dict[str, int]
    """The same by category."""


Within = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Entered for the micro-batches of a step, and for its update: a mode that counts something."""
NOTHING: Within = nullcontext(), nullcontext()


def trace_rehearsal(
    rehearsal: Rehearsal, *, steps: int = 2, within: Within = NOTHING
) -> MemoryResult:
    """Takes `steps` steps, two or more if no update was made before: the first makes the optimizer's
    state, so that the peak can fall in it or after. Fake tensors need their mode to be on.

    Python's cycle collection is off meanwhile: when it runs depends on all else in the process. What
    would wait for it is held, and shows.
    """
    stands_for_gpu = rehearsal.device_type == "cuda" and rehearsal.placement.device.type == "cpu"
    scratch = scratch_of(cuda_size) if stands_for_gpu else None
    trace = MemoryTrace(rehearsal.denoiser, scratch=scratch)
    operations = as_on_gpu(rehearsal.denoiser) if stands_for_gpu else nullcontext()
    with _without_collection(), operations, trace:
        label_rehearsal(trace, rehearsal)
        trace.reset_peak()
        for step in range(steps):
            if step == steps - 1:
                resting = trace.breakdown()
            take_step(trace, rehearsal, within)
            label_rehearsal(trace, rehearsal)
    peak = trace.peak
    return MemoryResult(
        peak_bytes=peak.bytes,
        breakdown=peak.breakdown,
        module=peak.module,
        phase=peak.phase,
        resting_bytes=sum(resting.values()),
        resting=resting,
    )


def take_step(trace: MemoryTrace, rehearsal: Rehearsal, within: Within = NOTHING) -> Tensor:
    """`rehearsal.take_step()` with the update as a phase of its own."""
    in_micro_batches, in_update = within
    rehearsal.trained.set_lr(rehearsal.step)
    count = rehearsal.config.train.gradient_accumulation
    with in_micro_batches:
        losses = [rehearsal.micro_batch() for _ in range(count)]
    with trace.phase("update"), in_update:
        rehearsal.update()
    return torch.stack(losses).sum()


def label_rehearsal(trace: MemoryTrace, rehearsal: Rehearsal) -> None:
    """Says what the tensors are that live from step to step. Again after an update: the first makes
    the optimizer's state."""
    trained, batch = rehearsal.trained, rehearsal.batch
    named = list(rehearsal.denoiser.named_parameters())
    is_adapter = {name: name.endswith((".lora_A", ".lora_B")) for name, _ in named}
    trace.label("weights", [p.data for name, p in named if not is_adapter[name]])
    for (
        module
    ) in rehearsal.denoiser.modules():  # buffers, and tables that are kept without being one
        kept = [value for name, value in vars(module).items() if name != "_parameters"]
        trace.label("weights", tensors_in(kept))
    trace.label("adapters", [p.data for name, p in named if is_adapter[name]])
    copy = adapter_copy(rehearsal.denoiser)
    trace.label("adapters", [] if copy is None else [copy.copy])
    if trained._ema is not None:
        trace.label("ema", trained._ema.shadow)
    trace.label("optimizer", _state(trained._optimizer))
    if trained._scaler is not None:
        trace.label("optimizer", trained._scaler.state_tensors().values())
    objective = rehearsal.forward.objective
    tables = [getattr(objective, field.name) for field in fields(objective)]
    given = [batch.latent_mean, batch.latent_std, batch.sizes, batch.conditions]
    trace.label("inputs", tensors_in([*given, rehearsal.forward.guidance, tables]))


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Tensors that the optimizer keeps, its learning rates included."""
    for state in [vars(optimizer), *optimizer.state.values(), *optimizer.param_groups]:
        for value in state.values():
            if isinstance(value, Tensor):
                yield value


@contextmanager
def _without_collection() -> Iterator[None]:
    """Cycles are collected before, and not within."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
