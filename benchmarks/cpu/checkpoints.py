"""Resume state beside bare safetensors files.

What ours does beside: a CRC-32 of every byte, fsync of files and folders, a rename at the end, and on
reading the comparison of every byte with its CRC. So a checkpoint is whole or absent whenever the
machine stops, and a byte that the disk has lost is an error and not a bad training.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cpu.contest import Contender, Contest, after_sync, timed
from benchmarks.cpu.weights import adapter_weights
from fasttune.checkpoint import checkpoint_name, load_checkpoint, save_checkpoint
from fasttune.data.storage import tensor_bytes

STEP = 100
Groups = dict[str, dict[str, Tensor]]


def state_of_a_run(quick: bool) -> Groups:
    """Weights, AdamW's moments and the average of a LoRA on SDXL's attention."""
    weights = {name: p.detach() for name, p in adapter_weights(quick)}
    moments = {
        f"{m}/{name}": w.clone() for m in ("exp_avg", "exp_avg_sq") for name, w in weights.items()
    }
    average = {name: w.clone() for name, w in weights.items()}
    return {"trainable": weights, "optimizer": moments, "ema": average}


def checkpoint_write(folder: Path, *, quick: bool) -> Iterator[Contest]:
    groups = state_of_a_run(quick)

    def ours() -> float:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        begin = time.perf_counter()
        save_checkpoint(folder / "ours", STEP, groups, {})
        return time.perf_counter() - begin

    def theirs(sync: bool) -> Callable[[], float]:
        def measure() -> float:
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            begin = time.perf_counter()
            save_files(folder / "theirs", groups, sync=sync)
            return time.perf_counter() - begin

        return after_sync(measure)

    ours(), theirs(True)()
    _check_same(load_checkpoint(folder / "ours" / checkpoint_name(STEP)).groups, groups)
    _check_same(load_files(folder / "theirs"), groups)
    yield Contest(
        what="checkpoint write, LoRA",
        ours=after_sync(ours),
        theirs={
            "save_file": Contender(
                measure=theirs(False),
                package="safetensors",
                differs="no fsync, checksum or rename: a crash leaves files that are cut off or empty, "
                "under their final names",
            ),
            "save_file and fsync": Contender(
                measure=theirs(True),
                package="safetensors",
                differs="no checksum or rename: a kill in the middle leaves part of the files, and what "
                "the disk loses goes unseen",
            ),
        },
        facts=_facts(groups),
    )


def checkpoint_read(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """From the page cache into tensors that are there, as a resumed run does."""
    groups = state_of_a_run(quick)
    path = save_checkpoint(folder / "ours", STEP, groups, {})
    save_files(folder / "theirs", groups, sync=False)
    into = {
        group: {n: torch.empty_like(t) for n, t in tensors.items()}
        for group, tensors in groups.items()
    }

    def read(load: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        for group, tensors in load().items():
            for name, tensor in tensors.items():
                into[group][name].copy_(tensor)

    def ours() -> None:
        read(lambda: load_checkpoint(path).groups)

    def theirs() -> None:
        read(lambda: load_files(folder / "theirs"))

    for way in (ours, theirs):
        for tensors in into.values():
            torch._foreach_zero_(list(tensors.values()))
        way()
        _check_same(into, groups)
    yield Contest(
        what="checkpoint read, LoRA",
        ours=timed(ours, quick=quick),
        theirs={
            "load_file": Contender(
                measure=timed(theirs, quick=quick),
                package="safetensors",
                differs="checks no byte, where ours reads all of them once more for their CRC-32",
            )
        },
        facts=_facts(groups),
    )


def save_files(folder: Path, groups: Groups, *, sync: bool) -> None:
    """One file a group, as a trainer without further care writes them."""
    folder.mkdir()
    for name, tensors in groups.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def load_files(folder: Path) -> Groups:
    return {path.stem: load_file(path) for path in folder.iterdir()}


def _check_same(found: Mapping[str, Mapping[str, Tensor]], groups: Groups) -> None:
    assert found.keys() == groups.keys()
    for name, tensors in groups.items():
        torch.testing.assert_close(dict(found[name]), tensors, rtol=0, atol=0)


def _facts(groups: Groups) -> dict[str, float]:
    every = [tensor for tensors in groups.values() for tensor in tensors.values()]
    return {"tensors": len(every), "mib": round(tensor_bytes(every) / 2**20, 2)}
