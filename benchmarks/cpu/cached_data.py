"""Loader and cache beside one safetensors file a sample, which is what many trainers keep.

The samples are those of SDXL at 1024 pixels: mean and std of the latents in float16, embeddings of two
text encoders and a pooled vector in bfloat16. All files are in the page cache.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cpu.contest import Contender, Contest, after_sync, timed
from fasttune.data.buckets import CropPlan, size_conditions
from fasttune.data.cache import Cache, Space, make_key
from fasttune.data.loader import BatchPlan, CachedSample, Reader, load
from fasttune.data.samples import Sample
from fasttune.data.storage import stack, tensor_bytes
from fasttune.models.text_encoders import merge_sdxl
from fasttune.seeds import generator_for

BATCH_SIZE = 4
SIDE = 1024
SEED = 0
TOKENS = 77

Item = tuple[bytes, dict[str, Tensor]]


def num_samples(quick: bool) -> int:
    return 8 if quick else 64


def image_items(count: int) -> list[Item]:
    """(key, latents) of `count` images."""
    shape = (4, SIDE // 8, SIDE // 8)
    items = []
    for index in range(count):
        g = generator_for(SEED, "image", index)
        mean, std = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
        items.append((make_key("image", index), {"mean": mean.half(), "std": std.half()}))
    return items


def text_items(count: int) -> tuple[list[Item], list[Item]]:
    """(key, embeddings) of `count` captions, as SDXL's first and second encoder make them."""
    first, second = [], []
    for index in range(count):
        g = generator_for(SEED, "text", index)
        narrow, wide = (torch.randn(TOKENS, w, generator=g).bfloat16() for w in (768, 1280))
        pooled = torch.randn(1280, generator=g).bfloat16()
        key = make_key("text", index)
        first.append((key, {"text_embeddings": narrow}))
        second.append((key, {"text_embeddings": wide, "pooled_text_embeddings": pooled}))
    return first, second


def cached_samples(count: int) -> list[CachedSample]:
    """Square images of one bucket."""
    plan = CropPlan(SIDE, SIDE, 0, 0, SIDE, SIDE)
    return [
        CachedSample(
            sample=Sample(
                path=f"/images/{index}.png",
                name=f"{index}.png",
                file_size=1,
                mtime_ns=1,
                source=0,
                repeat=0,
                caption="",
                width=SIDE,
                height=SIDE,
                held_out=False,
                real_path=f"/images/{index}.png",
            ),
            plan=plan,
            latents_key=make_key("image", index),
            text_key=make_key("text", index),
        )
        for index in range(count)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedData:
    """Samples in a cache, and what reads them."""

    cache: Cache
    samples: list[CachedSample]
    reader: Reader
    plan: BatchPlan

    def epoch(self) -> int:
        """Loads every sample once; the number of batches."""
        stop = self.plan.batches_per_epoch
        with load(self.samples, self.plan, self.reader, seed=SEED, stop=stop) as batches:
            return sum(1 for _ in batches)


def fill_cache(folder: Path, count: int) -> CachedData:
    """A cache of `count` samples in `folder`."""
    cache = Cache(folder)
    spaces = [cache.space("latents", "vae"), *(cache.space("text", f"clip {i}") for i in (1, 2))]
    for space, items in zip(spaces, (image_items(count), *text_items(count)), strict=True):
        add(space, items)
    samples = cached_samples(count)
    return CachedData(
        cache=cache,
        samples=samples,
        reader=Reader(
            latents=spaces[0],
            text=(spaces[1], spaces[2]),
            merge_text=merge_sdxl,
            empty_key=make_key("text", 0),
            empty_caption_is_zero=False,
        ),
        plan=BatchPlan([s.plan.bucket for s in samples], batch_size=BATCH_SIZE, seed=SEED),
    )


def add(space: Space, items: list[Item]) -> None:
    """Writes items as `prepare` does, a batch at a time."""
    with space.writer() as writer:
        for begin in range(0, len(items), BATCH_SIZE):
            writer.add(items[begin : begin + BATCH_SIZE])


class FileDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One safetensors file a sample; what the sizes of an image are is in it, too."""

    def __init__(self, folder: Path, data: CachedData) -> None:
        folder.mkdir()
        self._paths = []
        for index, cached in enumerate(data.samples):
            text = [space.read(cached.text_key) for space in data.reader.text]
            merged = data.reader.merge_text([stack([part]) for part in text])
            size = size_conditions(cached.sample.width, cached.sample.height, cached.plan)
            self._paths.append(folder / f"{index}.safetensors")
            tensors = data.reader.latents.read(cached.latents_key)
            tensors |= {name: tensor[0] for name, tensor in merged.items()}
            tensors["sizes"] = torch.tensor(size, dtype=torch.float32)
            save_file({name: t.contiguous() for name, t in tensors.items()}, self._paths[-1])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return load_file(self._paths[index])


def loader(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """An epoch of batches of four, in the same order, with latents in float32."""
    data = fill_cache(folder / "cache", num_samples(quick))
    dataset = FileDataset(folder / "files", data)
    batches = [data.plan.batch(i) for i in range(data.plan.batches_per_epoch)]

    def epochs(workers: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
        made = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

        def epoch() -> Iterator[dict[str, Tensor]]:
            for batch in made:
                yield batch | {key: batch[key].float() for key in ("mean", "std")}

        return epoch

    theirs = {f"torch DataLoader ({n} workers)": epochs(n) for n in (0, 2)}
    for epoch in theirs.values():
        with load(data.samples, data.plan, data.reader, seed=SEED, stop=len(batches)) as own:
            for mine, other in zip(own, epoch(), strict=True):
                for name in ("mean", "std"):
                    torch.testing.assert_close(getattr(mine, f"latent_{name}"), other[name])
                torch.testing.assert_close(mine.sizes, other["sizes"])
                for name, tensor in mine.conditions.items():
                    torch.testing.assert_close(tensor, other[name])
    yield Contest(
        what="loader, SDXL samples",
        ours=timed(data.epoch, quick=quick),
        theirs={
            name: Contender(
                measure=timed(lambda e=epoch: sum(1 for _ in e()), quick=quick),  # type: ignore[misc]
                differs="the embeddings of the two encoders are stored joined; without workers the "
                "training loop itself would wait for all of it",
            )
            for name, epoch in theirs.items()
        },
        facts={"batches": len(batches), "images": len(dataset)},
    )
    data.cache.close()


def cache_write(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """Latents of all samples, each time into an empty folder."""
    items = image_items(num_samples(quick))

    def ours() -> float:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with Cache(folder / "cache") as cache:
            space = cache.space("latents", "vae")
            begin = time.perf_counter()
            add(space, items)
            return time.perf_counter() - begin

    def theirs(sync: bool) -> Callable[[], float]:
        def measure() -> float:
            shutil.rmtree(folder / "files", ignore_errors=True)
            (folder / "files").mkdir()
            begin = time.perf_counter()
            for key, tensors in items:
                path = folder / "files" / f"{key.hex()}.safetensors"
                save_file(tensors, path)
                if sync:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            return time.perf_counter() - begin

        return after_sync(measure)

    ours(), theirs(False)()
    with Cache(folder / "cache") as cache:
        space = cache.space("latents", "vae")
        for key, _ in items:
            found = load_file(folder / "files" / f"{key.hex()}.safetensors")
            torch.testing.assert_close(space.read(key), found)
    yield Contest(
        what="cache write, SDXL latents",
        ours=after_sync(ours),
        theirs={
            "save_file a sample": Contender(
                measure=theirs(False),
                package="safetensors",
                differs="no fsync, no rename, no index: after a crash files may be missing, empty or "
                "cut off, and each has to be opened to know",
            ),
            "save_file and fsync a sample": Contender(
                measure=theirs(True),
                package="safetensors",
                differs="no rename, no index: a file cut off by a kill has its final name",
            ),
        },
        facts={"images": len(items), "mib": _mib(items)},
    )


def cache_read(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """Latents of all samples in shuffled order, copied out of the mapped files."""
    items = image_items(num_samples(quick))
    cache = Cache(folder / "cache")
    space = cache.space("latents", "vae")
    add(space, items)
    (folder / "files").mkdir()
    paths = {key: folder / "files" / f"{key.hex()}.safetensors" for key, _ in items}
    for key, tensors in items:
        save_file(tensors, paths[key])
    order = torch.randperm(len(items), generator=generator_for(SEED, "order")).tolist()
    keys = [items[index][0] for index in order]

    def theirs(key: bytes) -> dict[str, Tensor]:
        with safe_open(paths[key], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    def all_of(read: Callable[[bytes], Mapping[str, Tensor]]) -> Callable[[], Any]:
        return lambda: [[tensor.clone() for tensor in read(key).values()] for key in keys]

    for key in keys:
        torch.testing.assert_close(space.read(key), theirs(key))
    yield Contest(
        what="cache read, SDXL latents",
        ours=timed(all_of(space.read), quick=quick),
        theirs={
            "safe_open a sample": Contender(
                measure=timed(all_of(theirs), quick=quick),
                package="safetensors",
                differs="opens a file for every sample, where ours keeps its shards open",
            )
        },
        facts={"images": len(items), "mib": _mib(items)},
    )
    cache.close()


def _mib(items: list[Item]) -> float:
    return sum(tensor_bytes(fields.values()) for _, fields in items) / 2**20
