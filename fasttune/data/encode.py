"""Filling the cache: captions through each text encoder, images through the autoencoder.

An encoder is opened only if something is missing, alone, and freed before the next. While the
autoencoder works, threads decode the images ahead of it.
"""

import gc
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune.data.budget import PixelBudget
from fasttune.data.cache import Space, make_key
from fasttune.data.images import BadImageError, crop_and_resize, load_image
from fasttune.data.loader import CachedSample, MergeText
from fasttune.data.progress import Progress
from fasttune.data.room import check_room
from fasttune.data.samples import Sample
from fasttune.data.storage import Storage, pack, split, tensor_bytes
from fasttune.errors import HardwareError, ModelError
from fasttune.seeds import generator_for

log = logging.getLogger(__name__)

EncodeText = Callable[[list[str]], dict[str, Tensor]]
"""Captions -> tensors, batch first. It may have `truncated`, a dict of the captions that its last call
cut and what it says about each, which is kept in the cache."""
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) uint8 -> mean and std (B, C, h, w)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """The frozen parts of a model, unopened."""

    image_identity: str
    text_identity: str
    open_autoencoder: Callable[[], EncodeImages] | None
    """None for the family "autoencoder", which trains on pixels."""
    open_text: tuple[Callable[[], EncodeText], ...]
    merge_text: MergeText
    empty_caption_is_zero: bool
    text_storage: Storage
    latents_per_pixel: float | None = None
    """Values that the autoencoder's mean has per pixel, if known before it is opened."""


def text_key(caption: str) -> bytes:
    """Key of a caption in a text space."""
    return make_key(caption.strip())


def encode_text(
    captions: Sequence[str],
    spaces: Sequence[Space],
    encoders: Encoders,
    batch_size: int,
    hidden: bool,
    latents_bytes: float = 0.0,
) -> int:
    """Encodes missing captions with each text encoder in turn; how many lacked something.

    `latents_bytes` are to be written later. Raises StorageError after an encoder's first batch if
    what is left to write does not fit the disk.
    """
    keys = {text_key(caption): caption for caption in captions}
    encoded: set[bytes] = set()
    for number, (space, opener) in enumerate(zip(spaces, encoders.open_text, strict=True)):
        missing = set(space.missing(keys))
        if not missing:
            continue
        encoded |= missing
        label = f"text encoder {number + 1} of {len(spaces)}"
        log.info("%s: %d captions to encode", label, len(missing))
        with _freed(), Progress(label, len(missing), "caption", hidden=hidden) as bar:
            encode = opener()
            with space.writer() as writer:
                for chunk in _chunks(list(keys), missing, batch_size):
                    with _out_of_memory("lower cache.batch_size"):
                        tensors = encode([keys[key] for key in chunk])
                    rows = split(pack(tensors, encoders.text_storage))
                    _check_finite(tensors.values(), [keys[key] for key in chunk])
                    if bar.count == 0:
                        text_bytes = len(missing) * tensor_bytes(rows[0].values())
                        needed = {"text embeddings": text_bytes, "latents": latents_bytes}
                        check_room(space.folder, needed)
                    truncated: Mapping[str, str] = getattr(encode, "truncated", {})
                    remarks = {text_key(caption): what for caption, what in truncated.items()}
                    writer.add(list(zip(chunk, rows, strict=True)), remarks)
                    bar.update(len(chunk))
            del encode
    return len(encoded)


def _chunks(keys: Sequence[bytes], missing: set[bytes], size: int) -> Iterator[list[bytes]]:
    """The missing ones of each `size` keys in a row.

    Cut over all keys, not over the missing ones, so that a resumed run encodes the batches the
    first would have, and gets the same bits.
    """
    for start in range(0, len(keys), size):
        chunk = [key for key in keys[start : start + size] if key in missing]
        if chunk:
            yield chunk


def latents_bytes(
    samples: Sequence[CachedSample], space: Space, encoders: Encoders, storage: str
) -> float:
    """Bytes of the latents that `space` lacks; 0 while their shape is unknown."""
    if encoders.latents_per_pixel is None:
        return 0.0
    areas = {cached.latents_key: _area(cached) for cached in samples}
    pixels = sum(areas[key] for key in space.missing(areas))
    # uint8 pixels, or float16 numbers
    per_value = {"pixels": 1, "sample": 2, "moments": 4}[storage]
    return pixels * encoders.latents_per_pixel * per_value


def encode_images(
    samples: Sequence[CachedSample],
    space: Space,
    encoders: Encoders,
    storage: str,
    batch_size: int,
    workers: int,
    hidden: bool,
) -> tuple[int, list[tuple[Sample, BadImageError]]]:
    """Encodes missing latents bucket by bucket; how many, and which files cannot be decoded.

    Raises StorageError after the first batch if all of them do not fit the disk.
    """
    by_key = {cached.latents_key: cached for cached in samples}
    missing = set(space.missing(by_key))
    if not missing:
        return 0, []
    log.info("autoencoder: %d images to encode", len(missing))
    buckets: dict[tuple[int, int], list[bytes]] = {}
    for key, cached in by_key.items():
        buckets.setdefault(cached.plan.bucket, []).append(key)
    chunks = (
        [by_key[key] for key in chunk]
        for keys in buckets.values()
        for chunk in _chunks(keys, missing, batch_size)
    )
    failures: list[tuple[Sample, BadImageError]] = []
    count = 0
    with _freed(), Progress("latents", len(missing), "image", hidden=hidden) as bar:
        encode = encoders.open_autoencoder() if encoders.open_autoencoder else None
        halving = _Halving(encode) if encode else None
        ahead = _decode_ahead(chunks, workers, ahead=2 * (batch_size + workers))
        with space.writer() as writer, closing(ahead):
            for decoded in ahead:
                good = [
                    (cached, pixels) for cached, pixels in decoded if isinstance(pixels, Tensor)
                ]
                for cached, error in decoded:
                    if isinstance(error, BadImageError):
                        failures.append((cached.sample, error))
                if good:
                    images = torch.stack([pixels for _, pixels in good])
                    tensors = _latents(halving, images, [cached for cached, _ in good], storage)
                    rows = split(pack(tensors, "fp16"))
                    if count == 0:
                        pixels = sum(_area(by_key[key]) for key in missing)
                        per_pixel = tensor_bytes(rows[0].values()) / _area(good[0][0])
                        check_room(space.folder, {"latents": pixels * per_pixel})
                    keys = [cached.latents_key for cached, _ in good]
                    writer.add(list(zip(keys, rows, strict=True)))
                    count += len(good)
                bar.update(len(decoded))
        del encode, halving
    return count, failures


def _area(cached: CachedSample) -> int:
    return cached.plan.target_width * cached.plan.target_height


class _Halving:
    """The autoencoder on as many images at once as fit: half as many after running out of memory."""

    def __init__(self, encode: EncodeImages) -> None:
        self._encode = encode
        self._limit: int | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        while True:
            try:
                limit = self._limit or len(images)
                parts = [self._encode(part) for part in images.split(limit)]
                mean, std = zip(*parts, strict=True)
                return torch.cat(mean), torch.cat(std)
            except torch.OutOfMemoryError as error:
                largest = min(limit, len(images))
                if largest == 1:
                    raise HardwareError(
                        f"out of memory while encoding one image of {images.shape[3]} x "
                        f"{images.shape[2]} pixels ({error}); close other programs on the device, "
                        'lower data.resolution or set run.device = "cpu"; what is encoded is kept'
                    ) from error
                if self._limit is None:
                    log.warning(
                        "out of memory while encoding %d images at once: going on with fewer "
                        "(cache.batch_size)",
                        largest,
                    )
                self._limit = largest // 2
            # Not within `except`: there the traceback still holds the tensors.
            _free()


def _latents(
    encode: EncodeImages | None, images: Tensor, cached: Sequence[CachedSample], storage: str
) -> dict[str, Tensor]:
    if encode is None:
        return {"mean": images}
    mean, std = encode(images)
    _check_finite((mean, std), [c.sample.path for c in cached])
    if storage == "moments":
        return {"mean": mean, "std": std}
    # One draw, a function of the entry alone, so that all runs can share it.
    noise = torch.stack(
        [
            torch.randn(mean.shape[1:], generator=generator_for(0, "latents", c.latents_key.hex()))
            for c in cached
        ]
    )
    return {"mean": mean + std * noise.to(mean.device)}


def _check_finite(tensors: Iterable[Tensor], what: Sequence[str]) -> None:
    if all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
        return
    raise ModelError(
        f"the encoder gave values that are not finite for one of {', '.join(map(repr, what[:10]))}; "
        "try precision.compute=fp32"
    )


def _decode_ahead(
    chunks: Iterable[list[CachedSample]], workers: int, ahead: int
) -> Generator[list[tuple[CachedSample, Tensor | BadImageError]], None, None]:
    """Decoded crops, chunk by chunk in order; threads are at most `ahead` images ahead."""
    budget = PixelBudget()

    def decode(cached: CachedSample) -> Tensor | BadImageError:
        sample = cached.sample
        with budget.hold(sample.width * sample.height):
            try:
                return crop_and_resize(load_image(sample.path), cached.plan)
            except BadImageError as error:
                return error

    pending: deque[list[tuple[CachedSample, Future[Tensor | BadImageError]]]] = deque()
    remaining = iter(chunks)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="fasttune-decode")
    try:
        while True:
            while not pending or sum(map(len, pending)) < ahead:
                chunk = next(remaining, None)
                if chunk is None:
                    break
                pending.append([(cached, pool.submit(decode, cached)) for cached in chunk])
            if not pending:
                return
            yield [(cached, future.result()) for cached, future in pending.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _freed() -> Iterator[None]:
    """Returns the memory of an encoder that was opened within, before the next one is."""
    try:
        yield
    finally:
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _out_of_memory(remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            f"out of memory while encoding ({error}); {remedy}, what is encoded is kept"
        ) from error
