"""What `prepare` found and did, for people."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fasttune.data.buckets import is_upscaled
from fasttune.data.cache import Space
from fasttune.data.loader import CachedSample
from fasttune.data.samples import BadFile

log = logging.getLogger(__name__)

MAX_VISITS = 1.5
"""More visits a sample and epoch than this are worth a warning."""
SHOWN = 10
"""Buckets, files and captions listed one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Counts of one `prepare`; `str` gives the text shown at its end."""

    images_per_source: tuple[tuple[str, int], ...]
    """(path, image files used) of each source, held-out ones included."""
    num_train: int
    """Samples of an epoch, repeats counted."""
    num_held_out: int
    buckets: dict[tuple[int, int], int]
    """(width, height) -> samples."""
    filled: dict[tuple[int, int], int]
    """(width, height) -> places in an epoch's last batch of this bucket that are filled up with
    samples of the bucket a second time; buckets without are not listed."""
    tokens: tuple[int, ...]
    """The different sequence lengths of the buckets, of one token per `multiple` pixels a side."""
    num_captions: int
    """Different captions."""
    num_empty_captions: int
    num_upscaled: int
    """Image files smaller than their bucket."""
    num_truncated: int
    """Image files whose caption is longer than a text encoder reads."""
    num_dropped: int
    """Image files of the sources that lie in the folder of held-out images."""
    other_files: dict[str, int]
    """Ending -> files that are neither images nor text."""
    bad_files: tuple[BadFile, ...]
    warnings: tuple[BadFile, ...]
    """Captions that are not used."""
    bad_files_path: str
    """Where all of them are listed."""
    num_encoded_images: int
    """Encoded now; the others were in the cache."""
    num_encoded_captions: int
    cache_dir: str
    seconds: float

    def __str__(self) -> str:
        count = sum(n for _, n in self.images_per_source)
        lines = [f"{count} images, {self.num_train} samples an epoch, {self.num_held_out} held out"]
        if len(self.images_per_source) > 1:
            lines += [f"  {path}: {n}" for path, n in self.images_per_source]
        ordered = sorted(self.buckets.items(), key=lambda item: (-item[1], item[0]))
        named = [
            f"{size[0]}x{size[1]}: {n}" + (f" (+{fill} to fill the batch)" if fill else "")
            for size, n in ordered[:SHOWN]
            for fill in [self.filled.get(size, 0)]
        ]
        more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
        lines.append(f"buckets {', '.join(named)}{more}")
        lines.append(f"sequence lengths {', '.join(map(str, self.tokens))}")
        empty = f", {self.num_empty_captions} images with an empty one"
        lines.append(f"{self.num_captions} captions{empty if self.num_empty_captions else ''}")
        if self.num_upscaled:
            lines.append(f"{self.num_upscaled} images are smaller than their bucket and enlarged")
        if self.num_dropped:
            lines.append(f"{self.num_dropped} images are in the held-out folder and not trained on")
        if self.num_truncated:
            lines.append(
                f"{self.num_truncated} images have captions longer than a text encoder reads, listed "
                f"in {self.bad_files_path}"
            )
        if self.other_files:
            endings = sorted(self.other_files.items(), key=lambda item: (-item[1], item[0]))
            kinds = ", ".join(f"{ending or 'no ending'}: {n}" for ending, n in endings[:SHOWN])
            total = sum(self.other_files.values())
            lines.append(f"{total} other files, no images by their ending, not read ({kinds})")
        lines += self._listed(self.bad_files, "file skipped", "files skipped")
        lines += self._listed(self.warnings, "caption not used", "captions not used")
        lines.append(
            f"encoded {self.num_encoded_images} images and {self.num_encoded_captions} captions in "
            f"{self.seconds:.1f} s; cache in {self.cache_dir}"
        )
        return "\n".join(lines)

    def _listed(self, files: Sequence[BadFile], one: str, several: str) -> list[str]:
        if not files:
            return []
        lines = [f"{len(files)} {one if len(files) == 1 else several}:"]
        lines += [f"  {file.path!r}: {file.reason}" for file in files[:SHOWN]]
        more = f"  and {len(files) - SHOWN} more, all" if len(files) > SHOWN else "  listed"
        return [*lines, f"{more} in {self.bad_files_path}"]


def count_samples(
    samples: Sequence[CachedSample], multiple: int, batch_size: int
) -> dict[str, object]:
    """The fields of Summary that follow from the samples."""
    first = [s for s in samples if s.sample.repeat == 0]
    buckets = Counter(s.plan.bucket for s in samples)
    trained = Counter(s.plan.bucket for s in samples if not s.sample.held_out)
    return {
        "num_train": sum(not s.sample.held_out for s in samples),
        "num_held_out": sum(s.sample.held_out for s in samples),
        "buckets": dict(buckets),
        "filled": {size: -n % batch_size for size, n in trained.items() if n % batch_size},
        "tokens": tuple(sorted({width * height // multiple**2 for width, height in buckets})),
        "num_captions": len({s.sample.caption for s in first}),
        "num_empty_captions": sum(not s.sample.caption for s in first),
        "num_upscaled": sum(is_upscaled(s.sample.width, s.sample.height, s.plan) for s in first),
    }


def warn_of_visits(samples: Sequence[CachedSample], batch_size: int) -> None:
    """Logs the buckets whose samples an epoch visits far more than once, to fill a batch.

    `samples` are those trained on; see BatchPlan. They weigh that much more in the training.
    """
    counts = Counter(s.plan.bucket for s in samples)
    visits = {size: -(-n // batch_size) * batch_size / n for size, n in counts.items()}
    often = sorted((s for s in visits if visits[s] > MAX_VISITS), key=lambda s: (-visits[s], s))
    if often:
        named = [f"{w}x{h}: {counts[w, h]} samples, {visits[w, h]:.1f} times" for w, h in often]
        log.warning(
            "samples of %d buckets are visited more than %s times an epoch to fill batches of %d "
            "(%s%s); they weigh more than the others. Lower train.batch_size or data.max_aspect, or "
            "set data.aspect_buckets = false",
            len(often),
            MAX_VISITS,
            batch_size,
            "; ".join(named[:SHOWN]),
            "; ..." if len(often) > SHOWN else "",
        )


def truncated_captions(samples: Sequence[CachedSample], text: Sequence[Space]) -> list[BadFile]:
    """The image files whose caption an encoder cuts, a line for each file and encoder."""
    first = {s.sample.path: s for s in samples if s.sample.repeat == 0}
    return [
        BadFile(path, f"its caption is too long: {space.remarks[cached.text_key]}, the end is lost")
        for path, cached in first.items()
        for space in text
        if cached.text_key in space.remarks
    ]
