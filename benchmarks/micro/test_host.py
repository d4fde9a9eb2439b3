"""What the host does around the network: data, cache, checkpoints and a short run. Host's clock."""

import itertools
from pathlib import Path
from typing import Any

from benchmarks.cpu import cached_data
from benchmarks.cpu.checkpoints import STEP, state_of_a_run
from benchmarks.foundation.loop_overhead import emptied
from benchmarks.tiny_run import config, write_inputs
from fasttune.checkpoint import load_checkpoint, save_checkpoint
from fasttune.data.cache import Cache
from fasttune.train import train

IMAGES = 8
WRITES = 10
"""Rounds of what needs an empty folder each time."""


def test_loader_epoch(benchmark: Any, tmp_path: Path) -> None:
    data = cached_data.fill_cache(tmp_path, IMAGES)
    batches = benchmark(data.epoch)
    data.cache.close()
    assert batches == IMAGES / cached_data.BATCH_SIZE


def test_cache_write(benchmark: Any, tmp_path: Path) -> None:
    items = cached_data.image_items(IMAGES)
    with Cache(tmp_path) as cache:
        numbers = itertools.count()

        def empty_space() -> Any:
            return (cache.space("latents", str(next(numbers))), items), {}

        benchmark.pedantic(cached_data.add, setup=empty_space, rounds=WRITES, warmup_rounds=1)


def test_cache_read(benchmark: Any, tmp_path: Path) -> None:
    items = cached_data.image_items(IMAGES)
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "vae")
        cached_data.add(space, items)
        benchmark(lambda: [[t.clone() for t in space.read(key).values()] for key, _ in items])


def test_checkpoint_write(benchmark: Any, tmp_path: Path) -> None:
    groups = state_of_a_run(quick=True)
    steps = itertools.count(1)

    def next_step() -> Any:
        return (tmp_path, next(steps), groups, {}), {}

    benchmark.pedantic(save_checkpoint, setup=next_step, rounds=WRITES, warmup_rounds=1)


def test_checkpoint_read(benchmark: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, STEP, state_of_a_run(quick=True), {})
    assert benchmark(load_checkpoint, path).step == STEP


def test_train_twenty_steps(benchmark: Any, tmp_path: Path) -> None:
    """`fasttune train` from the cached data to the report, with an empty network."""
    write_inputs(tmp_path)
    with emptied():
        status = benchmark.pedantic(
            train, (config(tmp_path, steps=20, name="short"),), rounds=5, warmup_rounds=1
        )
    assert status == 0
