"""Batches of cached samples, as a pure function of (seed, micro-batch index).

`BatchPlan.batch(i)` says which samples micro-batch `i` has, without having made those before it;
`Reader.read` turns indices into tensors; `load` does both ahead of the loop in one thread. There is no
loader state to save: a resumed run asks for the micro-batch it stopped at.
"""

import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fasttune.data.buckets import CropPlan, size_conditions
from fasttune.data.cache import Space
from fasttune.data.samples import Sample
from fasttune.data.storage import stack, unpack
from fasttune.seeds import derive_seed, dropped

MergeText = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class CachedSample:
    """A sample, its crop and where its tensors are in the cache."""

    sample: Sample
    plan: CropPlan
    latents_key: bytes
    text_key: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. All samples have the same bucket."""

    latent_mean: Tensor
    """(B, C, h, w) float32."""
    latent_std: Tensor | None
    """(B, C, h, w) float32; None if the cache holds a sample or pixels."""
    conditions: dict[str, Tensor]
    """Batch first, in the cache's storage dtype; empty for families without text."""
    sizes: Tensor
    """(B, 6) float32: original h, w; crop top, left; target h, w in pixels."""
    paths: list[str]
    micro_batch: int

    def draw_latents(self, generator: torch.Generator) -> Tensor:
        """(B, C, h, w) float32: a draw from N(mean, std^2), or the mean where there is no std.

        `generator` must be on the batch's device.
        """
        if self.latent_std is None:
            return self.latent_mean
        mean = self.latent_mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + self.latent_std * noise


class BatchPlan:
    """Which samples each micro-batch has; the same for the same buckets, batch_size and seed.

    An epoch visits every sample. Each bucket is shuffled and cut into batches of one bucket; the
    last one is filled up from the bucket's start, so that no sample is lost and no shape is odd.
    Then the batches of all buckets are shuffled.
    """

    def __init__(self, buckets: Sequence[Hashable], *, batch_size: int, seed: int) -> None:
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._members = [np.array(indices) for indices in members.values()]
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty((0, batch_size), dtype=np.int64))
        self.batches_per_epoch = sum(-(-len(m) // batch_size) for m in self._members)
        """Micro-batches in an epoch."""

    def batch(self, micro_batch: int) -> list[int]:
        """Indices of the samples of a micro-batch, counted from 0 over all epochs."""
        epoch, position = divmod(micro_batch, self.batches_per_epoch)
        cached, batches = self._epoch
        if cached != epoch:
            batches = self._shuffle(epoch)
            self._epoch = (epoch, batches)  # one assignment: threads may share a plan
        return batches[position].tolist()

    def _shuffle(self, epoch: int) -> np.ndarray:
        batches = []
        for number, members in enumerate(self._members):
            order = members[_permutation(len(members), self._seed, "order", epoch, number)]
            padded = -(-len(order) // self._batch_size) * self._batch_size
            batches.append(np.resize(order, padded).reshape(-1, self._batch_size))
        together = np.concatenate(batches)
        return together[_permutation(len(together), self._seed, "batches", epoch)]


def _permutation(count: int, seed: int, *parts: int | str) -> np.ndarray:
    """Sorts raw 64-bit draws: unlike Generator.permutation these stay the same in every numpy."""
    draws = np.random.PCG64(derive_seed(seed, *parts)).random_raw(count)
    return np.argsort(draws, kind="stable")


def fixed_batches(samples: Sequence[CachedSample], batch_size: int) -> list[list[int]]:
    """Every sample once, in order within its bucket, the last batch of a bucket short."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, cached in enumerate(samples):
        members.setdefault(cached.plan.bucket, []).append(index)
    return [m[i : i + batch_size] for m in members.values() for i in range(0, len(m), batch_size)]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads samples of one model from the cache."""

    latents: Space
    text: tuple[Space, ...]
    """One space a text encoder; empty for families without text."""
    merge_text: MergeText
    empty_key: bytes
    """Key of the empty caption."""
    empty_caption_is_zero: bool
    """The empty caption is zeros instead of the encoding of ""."""

    def read(
        self,
        samples: Sequence[CachedSample],
        *,
        micro_batch: int = -1,
        without_caption: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """A batch on `device`; where `without_caption` is true with the empty caption."""
        batch = self._collate(samples, micro_batch, without_caption)
        return _finish(_move(batch, torch.device(device), non_blocking=False), self.merge_text)

    def conditions(
        self, text_keys: Sequence[bytes], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Conditions of captions or prompts, batch first."""
        parts = [
            {name: tensor.to(device) for name, tensor in part.items()}
            for part in self._text_parts(text_keys)
        ]
        return self.merge_text([unpack(part) for part in parts]) if parts else {}

    def _collate(
        self,
        samples: Sequence[CachedSample],
        micro_batch: int,
        without_caption: Sequence[bool] | None,
    ) -> "_Stored":
        drop = without_caption or [False] * len(samples)
        sizes = [size_conditions(s.sample.width, s.sample.height, s.plan) for s in samples]
        keys = [self.empty_key if d else s.text_key for s, d in zip(samples, drop, strict=True)]
        return _Stored(
            latents=stack([self.latents.read(s.latents_key) for s in samples]),
            text=self._text_parts(keys),
            sizes=torch.tensor(sizes, dtype=torch.float32),
            paths=[s.sample.path for s in samples],
            micro_batch=micro_batch,
        )

    def _text_parts(self, keys: Sequence[bytes]) -> list[dict[str, Tensor]]:
        parts = []
        for space in self.text:
            rows = []
            for key in keys:
                row = space.read(key)
                if self.empty_caption_is_zero and key == self.empty_key:
                    # A mask stays that of "": attention over no token at all is undefined.
                    row = {
                        name: tensor if tensor.dtype == torch.bool else torch.zeros_like(tensor)
                        for name, tensor in row.items()
                    }
                rows.append(row)
            parts.append(stack(rows))
        return parts


@dataclass(frozen=True, slots=True)
class _Stored:
    """A batch as the cache stores it: small, so this is what crosses to the device."""

    latents: dict[str, Tensor]
    text: list[dict[str, Tensor]]
    sizes: Tensor
    paths: list[str]
    micro_batch: int


def _move(stored: _Stored, device: torch.device, *, non_blocking: bool) -> _Stored:
    if device.type == "cpu":
        return stored

    def to(tensor: Tensor) -> Tensor:
        source = tensor.pin_memory() if non_blocking else tensor
        return source.to(device, non_blocking=non_blocking)

    return replace(
        stored,
        latents={name: to(tensor) for name, tensor in stored.latents.items()},
        text=[{name: to(tensor) for name, tensor in part.items()} for part in stored.text],
        sizes=to(stored.sizes),
    )


def _finish(stored: _Stored, merge_text: MergeText) -> Batch:
    latents = unpack(stored.latents)
    std = latents.get("std")
    return Batch(
        latent_mean=latents["mean"].to(torch.float32),
        latent_std=None if std is None else std.to(torch.float32),
        conditions=merge_text([unpack(part) for part in stored.text]) if stored.text else {},
        sizes=stored.sizes,
        paths=stored.paths,
        micro_batch=stored.micro_batch,
    )


class Loader:
    """Iterates over batches that a thread prepares. Use as a context, or call `close`."""

    def __init__(
        self, make: Callable[[int], Batch], start: int, stop: int | None, depth: int
    ) -> None:
        self._make = make
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self.wait_seconds = 0.0
        """Time the consumer has waited for data so far."""
        self._thread = threading.Thread(
            target=self._run, args=(start, stop), name="fasttune-loader", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises what the thread raised."""
        if self._closed.is_set():
            raise StopIteration
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(item, Batch):
            _hand_over(item)
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and drops what it has prepared. May be called more than once."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # frees a thread that waits for room
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _run(self, start: int, stop: int | None) -> None:
        micro_batch = start
        try:
            while not self._closed.is_set() and (stop is None or micro_batch < stop):
                self._queue.put(self._make(micro_batch))
                micro_batch += 1
            self._queue.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._queue.put(error)


def load(
    samples: Sequence[CachedSample],
    plan: BatchPlan,
    reader: Reader,
    *,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    caption_dropout: float = 0.0,
    device: torch.device | str = "cpu",
    prefetch: int = 4,
) -> Loader:
    """Micro-batches `start`, `start` + 1, ... (before `stop`) on `device`.

    With CUDA the copies run on a stream of their own, from pinned memory.
    """
    target = torch.device(device)
    stream = torch.cuda.Stream(target) if target.type == "cuda" else None

    def make(micro_batch: int) -> Batch:
        chosen = [samples[index] for index in plan.batch(micro_batch)]
        without = dropped(seed, micro_batch, len(chosen), caption_dropout).tolist()
        stored = reader._collate(chosen, micro_batch, without)
        if stream is None:
            return _finish(_move(stored, target, non_blocking=False), reader.merge_text)
        with torch.cuda.stream(stream):
            batch = _finish(_move(stored, target, non_blocking=True), reader.merge_text)
        # This thread may wait for the copy; the loop then never has to.
        stream.synchronize()
        return batch

    return Loader(make, start, stop, prefetch)


def _hand_over(batch: Batch) -> None:
    """Tells the allocator that memory of the copying stream is now used by the loop's."""
    if batch.latent_mean.device.type != "cuda":
        return
    stream = torch.cuda.current_stream(batch.latent_mean.device)
    for tensor in (batch.latent_mean, batch.latent_std, batch.sizes, *batch.conditions.values()):
        if tensor is not None:
            tensor.record_stream(stream)
