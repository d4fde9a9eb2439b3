"""Bytes that an operation keeps for its backward, beside its inputs and outputs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.libraries import outputs_of


def kept_bytes(
    call: Callable[[], Any], inputs: Iterable[Tensor], device: torch.device
) -> int | None:
    """What the call leaves alive, by CUDA's allocator; elsewhere by what autograd is given to save,
    or None where a compiled graph does not tell."""
    if device.type == "cuda":
        call()  # workspaces of libraries are made once
        before = torch.cuda.memory_allocated()
        outputs = outputs_of(call())
        kept = torch.cuda.memory_allocated() - before
        given = {t.untyped_storage().data_ptr() for t in inputs}
        return max(0, kept - sum(_storages(outputs, given).values()))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved.update(_storages([t], set()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = outputs_of(call())
    known = {t.untyped_storage().data_ptr() for t in (*inputs, *outputs)}
    return sum(size for at, size in saved.items() if at not in known)


def _storages(tensors: Iterable[Tensor], without: set[int]) -> dict[int, int]:
    """Address -> bytes, each once."""
    storages = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in without}
