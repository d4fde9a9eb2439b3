"""Steps over buckets: what each shape compiles when it first comes, and that it compiles nothing again."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.card import synchronize
from benchmarks.harness import Row

if TYPE_CHECKING:
    from fasttune.rehearsal import Rehearsal

Size = tuple[int, int]
"""(width, height) in pixels."""
MOST = 9
"""Buckets: more than torch's default limit of 8 graphs, past which it falls back to eager mode."""
_SMOKE_SIZES: tuple[Size, ...] = ((64, 64), (64, 96), (96, 64))


def swept(rehearsal: "Rehearsal", folder: Path, *, seconds: float, smoke: bool) -> Row:
    """Two rounds of one step in each bucket, the second over those that the first had time for."""
    from fasttune.models import MODELS
    from fasttune.rehearsal import bucket_sizes

    config = rehearsal.config
    every = _SMOKE_SIZES
    if not smoke:
        every = bucket_sizes(config, MODELS[config.model.family], folder)
    sizes, began = list[Size](), time.perf_counter()
    for size in spread(every, MOST):
        if sizes and time.perf_counter() - began > seconds:
            break
        _step_in(rehearsal, folder, size)
        sizes.append(size)
    first = time.perf_counter()
    warm = compiled_graphs()
    times = {size: _step_in(rehearsal, folder, size) for size in sizes}
    return {
        "buckets": len(sizes),
        "all_buckets": len(every),
        "first_round_s": round(first - began, 3),
        "second_round_s": round(time.perf_counter() - first, 3),
        "recompiles": compiled_graphs() - warm,
        "step_ms_by_bucket": {f"{w}x{h}": round(ms, 3) for (w, h), ms in times.items()},
    }


def spread(sizes: Sequence[Size], most: int) -> list[Size]:
    """At most so many of them, at equal distances, the first and the last among them."""
    if len(sizes) <= most:
        return list(sizes)
    return [sizes[round(i * (len(sizes) - 1) / (most - 1))] for i in range(most)]


def _step_in(rehearsal: "Rehearsal", folder: Path, size: Size) -> float:
    """Milliseconds of a step on a random batch of this bucket."""
    from fasttune.models import MODELS
    from fasttune.rehearsal import random_batch

    spec, placement = MODELS[rehearsal.config.model.family], rehearsal.placement
    rehearsal.batch = random_batch(rehearsal.config, spec, folder, placement, size)
    synchronize(placement.device)
    began = time.perf_counter()
    rehearsal.take_step()
    synchronize(placement.device)
    return 1000 * (time.perf_counter() - began)


def compiled_graphs() -> int:
    """Graphs that were compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
