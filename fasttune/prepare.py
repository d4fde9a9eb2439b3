"""`fasttune prepare`: scan the images, encode what the cache lacks, hand the loop all it needs.

Text first, then images; each encoder is opened when something is missing, alone, and freed before
the next. While one encodes, threads decode the images ahead. The cache is whole at any moment:
whatever stops this, the next start goes on from the last shard.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from torch import Tensor

from fasttune.build import placement_for
from fasttune.config import Config, Data
from fasttune.data import buckets as aspect
from fasttune.data.cache import Cache, make_key
from fasttune.data.encode import (
    EncodeImages,
    Encoders,
    encode_images,
    encode_text,
    latents_bytes,
    text_key,
)
from fasttune.data.identity import folder_identity
from fasttune.data.images import ENCODING_VERSION, BadImageError
from fasttune.data.loader import CachedSample, Reader
from fasttune.data.progress import Progress
from fasttune.data.room import check_room
from fasttune.data.samples import BadFile, ImageFile, Sample, Scan, scan
from fasttune.data.split import join_splits
from fasttune.data.storage import INT8_GROUP
from fasttune.data.summary import Summary, count_samples, truncated_captions, warn_of_visits
from fasttune.device import pick_device, short
from fasttune.errors import DatasetError, StorageError
from fasttune.models import MODELS
from fasttune.models.autoencoder import downscale, encode_moments, load_autoencoder
from fasttune.models.weights import component_patterns, read_config, resolve_model
from fasttune.run_folder import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Everything the loop needs of data and cache."""

    folder: Path
    """The model's folder."""
    train: list[CachedSample]
    held_out: list[CachedSample]
    reader: Reader
    summary: Summary
    bad_files: list[BadFile]
    warnings: list[BadFile]
    cache: Cache

    def conditions(
        self, prompts: Sequence[str], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Conditions of captions, validation prompts or the negative prompt, batch first."""
        return self.reader.conditions([text_key(prompt) for prompt in prompts], device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The frozen parts of the config's model, found and identified but not loaded."""

    folder: Path
    multiple: int
    """Images are brought to multiples of this many pixels."""
    encoders: Encoders


def open_model(config: Config) -> Model:
    """Finds the model (a hub id is downloaded). Raises ModelError."""
    spec = MODELS[config.model.family]
    placement = placement_for(config)
    device, compute = placement.device, placement.compute_dtype
    pixels = spec.objective == "reconstruction"
    frozen = () if pixels else ("vae", "text_encoder*", "tokenizer*", "scheduler")
    patterns = component_patterns(spec.denoiser_folder, *frozen)
    folder = resolve_model(config.model.path, config.model.revision, patterns)
    latent_multiple = spec.latent_multiple(read_config(folder, spec.denoiser_folder))

    def open_autoencoder() -> EncodeImages:
        # float32: the reference pipelines upcast SDXL's, and encoding happens once.
        vae = load_autoencoder(folder, device=device, dtype=torch.float32)
        return lambda images: encode_moments(vae, images)

    storage = config.cache.text_storage
    openers = spec.open_text_encoders(folder, device, compute)
    text_files = ("text_encoder*", "tokenizer*", f"{spec.denoiser_folder}/config.json")
    # The cache remembers the hashes of files that are long to read.
    with Cache(config.cache.dir) as cache:
        image_identity, text_identity = "pixels", ""
        if not pixels:
            image_identity = folder_identity(folder, ("vae",), "fp32", cache=cache)
        if openers:
            parts = (spec.family, short(compute))
            text_identity = folder_identity(folder, text_files, *parts, cache=cache)
    latents_per_pixel = 3.0
    if not pixels:
        vae_config = read_config(folder, "vae")
        latents_per_pixel = vae_config.get("latent_channels", 4) / downscale(vae_config) ** 2
    encoders = Encoders(
        image_identity=image_identity,
        text_identity=text_identity,
        open_autoencoder=None if pixels else open_autoencoder,
        open_text=tuple(openers),
        merge_text=spec.merge_text,
        empty_caption_is_zero=spec.empty_caption_is_zero,
        text_storage=short(compute) if storage == "auto" else storage,  # type: ignore[arg-type]
        latents_per_pixel=latents_per_pixel,
    )
    multiple = latent_multiple * (1 if pixels else downscale(read_config(folder, "vae")))
    return Model(folder=folder, multiple=multiple, encoders=encoders)


def prepare(
    config: Config, *, progress: bool | None = None, model: Model | None = None
) -> Prepared:
    """Scans, encodes what is missing and opens the cache.

    `progress` None shows bars when stderr is a terminal. `model` takes the place of the
    config's own. Raises DatasetError for data that cannot be used (with on_bad_file = "fail" for
    the first bad file), StorageError for a full disk, ModelError for the model.
    """
    started = time.perf_counter()
    model = model or open_model(config)
    encoders = model.encoders
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    workers = config.cache.workers or os.cpu_count() or 1
    # An encoder on the CPU has all cores at work: more threads that decode beside it only take turns.
    decoders = 1 if pick_device(config.run.device).type == "cpu" else os.cpu_count() or 1
    decoders = config.cache.workers or decoders
    batch_size = config.cache.batch_size
    cache = Cache(config.cache.dir)
    listing = cache.folder / "bad_files.json"
    bad_files: list[BadFile] = []
    warnings: list[BadFile] = []
    try:
        sources = _sources(config)
        scans: list[Scan] = []
        for found in _scan_all(sources, len(config.data), cache, workers, hidden):
            scans.append(found)
            bad_files = list(dict.fromkeys([*bad_files, *found.bad_files]))
            warnings = list(dict.fromkeys([*warnings, *found.warnings]))
        _write_list(listing, bad_files, warnings)
        scans, num_dropped = join_splits(scans, config.validation.held_out_path)
        if num_dropped:
            log.info(
                "%d images of the sources lie in validation.held_out_path and are not trained on",
                num_dropped,
            )
        samples = [
            cached
            for source, found in zip(sources, scans, strict=True)
            for cached in _plan_source(source, found.samples, config.run.seed, model.multiple)
        ]
        _stop_if_unusable(config, sources, bad_files, samples, listing, num_dropped)

        stored = encoders.text_storage
        stored_name = f"int8x{INT8_GROUP}" if stored == "int8" else stored
        texts = [
            cache.space("text", f"{encoders.text_identity}-{number}-{stored_name}")
            for number in range(len(encoders.open_text))
        ]
        storage = "pixels" if encoders.open_autoencoder is None else config.cache.latents
        space = cache.space(
            "latents", f"{encoders.image_identity}-{ENCODING_VERSION}-{storage}-fp16"
        )
        to_write = latents_bytes(samples, space, encoders, storage)
        if to_write:
            check_room(cache.folder, {"latents": to_write})
        prompts = [*config.validation.prompts, config.validation.negative_prompt]
        captions = ["", *(p.strip() for p in prompts), *(s.sample.caption for s in samples)]
        num_captions = encode_text(
            list(dict.fromkeys(captions)), texts, encoders, batch_size, hidden, to_write
        )
        num_images, failures = encode_images(
            samples, space, encoders, storage, batch_size, decoders, hidden
        )
        _remember(cache, failures)
        failed = [BadFile(error.path, error.reason) for _, error in failures]
        gone = {file.path for file in failed}
        samples = [cached for cached in samples if cached.sample.path not in gone]
        unused = tuple(warnings)
        truncated = truncated_captions(samples, texts)
        warnings += truncated
        earlier, bad_files = bad_files, [*bad_files, *failed]
        _write_list(listing, bad_files, warnings)
        _stop_if_unusable(config, sources, failed, samples, listing, num_dropped, earlier)
    except BaseException as error:
        if isinstance(error, DatasetError) and (bad_files or warnings):  # in the scan, perhaps
            with contextlib.suppress(StorageError):  # the reason to stop matters more
                _write_list(listing, bad_files, warnings)
        cache.close()
        raise
    summary = Summary(
        images_per_source=tuple(
            (source.path, len({c.sample.path for c in samples if c.sample.source == number}))
            for number, source in enumerate(sources)
        ),
        **count_samples(samples, model.multiple, config.train.batch_size),  # type: ignore[arg-type]
        num_truncated=len({file.path for file in truncated}),
        num_dropped=num_dropped,
        other_files=dict(sum((Counter(found.other_files) for found in scans), Counter())),
        bad_files=tuple(bad_files),
        warnings=unused,
        bad_files_path=str(listing),
        num_encoded_images=num_images,
        num_encoded_captions=num_captions,
        cache_dir=str(cache.folder),
        seconds=time.perf_counter() - started,
    )
    log.info("%s", summary)
    warn_of_visits([c for c in samples if not c.sample.held_out], config.train.batch_size)
    reader = Reader(
        latents=space,
        text=tuple(texts),
        merge_text=encoders.merge_text,
        empty_key=text_key(""),
        empty_caption_is_zero=encoders.empty_caption_is_zero,
    )
    return Prepared(
        folder=model.folder,
        train=[cached for cached in samples if not cached.sample.held_out],
        held_out=[cached for cached in samples if cached.sample.held_out],
        reader=reader,
        summary=summary,
        bad_files=bad_files,
        warnings=warnings,
        cache=cache,
    )


def write_bad_files(path: Path, prepared: Prepared) -> None:
    """JSON with the skipped files, and the captions that are cut or fit no image, with reasons."""
    _write_list(path, prepared.bad_files, prepared.warnings)


def _write_list(path: Path, bad_files: Sequence[BadFile], warnings: Sequence[BadFile]) -> None:
    content = {
        "bad_files": [dataclasses.asdict(file) for file in bad_files],
        "warnings": [dataclasses.asdict(file) for file in warnings],
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _sources(config: Config) -> list[Data]:
    """The sources of the config; the held-out folder is one of which everything is held out."""
    sources = list(config.data)
    if config.validation.held_out_path is not None:
        path = config.validation.held_out_path
        sources.append(dataclasses.replace(sources[0], path=path, held_out=1.0, crop="center"))
    return sources


def _scan_all(
    sources: Sequence[Data], num_data: int, cache: Cache, workers: int, hidden: bool
) -> Iterator[Scan]:
    known = cache.image_files(PIL.__version__)
    roots = [os.path.realpath(source.path) for source in sources[:num_data]]
    for number, source in enumerate(sources):
        with Progress(f"scan {source.path}", None, "file", hidden=hidden) as bar:
            found = scan(
                number,
                source.path,
                key="data.path" if number < num_data else "validation.held_out_path",
                roots=roots,
                captions=source.captions,
                caption=source.caption,
                caption_file=source.caption_file,
                image_column=source.image_column,
                caption_column=source.caption_column,
                repeats=source.repeats,
                held_out=source.held_out,
                known=known,
                workers=workers,
                on_measured=bar.update,
            )
        if found.measured:
            cache.remember_image_files(found.measured, PIL.__version__)
            known.update(found.measured)
        yield found


def _plan_source(
    source: Data, samples: Sequence[Sample], seed: int, multiple: int
) -> Iterator[CachedSample]:
    sizes = aspect.make_buckets(
        resolution=source.resolution,
        resolution_type=source.resolution_type,
        multiple=multiple,
        max_aspect=source.max_aspect,
        aspect_buckets=source.aspect_buckets,
    )
    plans: dict[tuple[int, int], tuple[aspect.CropPlan, str]] = {}
    for sample in samples:
        size = (sample.width, sample.height)
        planned = plans.get(size)
        if planned is None:
            # held-out images keep one crop, so that their loss can be compared
            crop = "center" if source.crop == "random" and sample.held_out else source.crop
            p = aspect.plan(
                *size,
                buckets=sizes,
                crop=crop,
                seed=seed,
                name=sample.name,
                repeat=sample.repeat,
            )
            scaled = f"{p.resize_width} {p.resize_height} {p.left} {p.top}"
            planned = (p, f"{scaled} {p.target_width} {p.target_height}")
            if source.crop != "random":
                plans[size] = planned
        crop_plan, numbers = planned
        key = make_key(sample.path, sample.file_size, sample.mtime_ns, numbers)
        yield CachedSample(sample, crop_plan, key, text_key(sample.caption))


def _stop_if_unusable(
    config: Config,
    sources: Sequence[Data],
    bad_files: Sequence[BadFile],
    samples: Sequence[CachedSample],
    listing: Path,
    num_dropped: int,
    earlier: Sequence[BadFile] = (),
) -> None:
    if bad_files and any(source.on_bad_file == "fail" for source in config.data):
        strict = [s.on_bad_file == "fail" for s in sources]
        roots = [
            os.path.abspath(s.path) + "/" for s, fails in zip(sources, strict, strict=True) if fails
        ]
        for bad in bad_files:
            if bad.path.startswith(tuple(roots)):
                raise DatasetError(
                    f"{bad.path}: {bad.reason}. Mend or remove it, or set "
                    'data.on_bad_file = "skip" to go on without it. All such files are listed in '
                    f"{listing}"
                )
    if any(not cached.sample.held_out for cached in samples):
        return
    paths = ", ".join(source.path for source in config.data)
    reasons = [*earlier, *bad_files]
    listed = "".join(f"\n  {bad.path}: {bad.reason}" for bad in reasons[:10])
    listed += f"\nAll are listed in {listing}" if len(reasons) > 10 else ""
    if num_dropped:
        raise DatasetError(
            f"{paths}: nothing is left to train on, because {num_dropped} images lie in "
            f"validation.held_out_path = {config.validation.held_out_path!r}; name a folder of "
            f"other images, or set data.held_out to a fraction instead{listed}"
        )
    if samples:
        raise DatasetError(
            f"{paths}: all {len(samples)} usable images are held out; lower data.held_out{listed}"
        )
    raise DatasetError(f"{paths}: no image can be used; the first reasons are:{listed}")


def _remember(cache: Cache, failures: Sequence[tuple[Sample, BadImageError]]) -> None:
    """Files that turned out damaged are not decoded again until they change."""
    files = {
        sample.path: ImageFile(sample.file_size, sample.mtime_ns, 0, 0, error.reason)
        for sample, error in failures
        if error.lasting
    }
    if files:
        cache.remember_image_files(files, PIL.__version__)
