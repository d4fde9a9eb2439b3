"""Tables of launches over many tensors, and what of them a CUDA graph goes on reading."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fasttune_kernels import arena_tables


def test_what_a_captured_step_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that are those of the step before take no new buffer: the old one has to stay."""
    weights, grads, others = ([torch.zeros(5)] for _ in range(3))
    kept: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(arena_tables, "_captured", kept)
    arena_tables.tables_of((weights, grads), [0], 4)
    assert not kept
    with monkeypatch.context() as capture:
        capture.setattr(arena_tables, "_is_capturing", lambda device: True)
        captured = arena_tables.tables_of((weights, grads), [0], 4)
        read = [weakref.ref(x) for x in (captured.layout, captured.chunks, captured.pointers)]
    arena_tables.tables_of((weights, others), [0], 4)
    assert captured.pointers is not read[2]()
    del captured
    arena_tables._tables.cache_clear()
    gc.collect()
    assert all(x() is not None for x in read)
