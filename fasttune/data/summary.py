"""What `prepare` found and did, for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fasttune.data.buckets import is_upscaled
from fasttune.data.loader import CachedSample
from fasttune.data.samples import BadFile

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
    tokens: tuple[int, ...]
    """The different sequence lengths of the buckets, of one token per `multiple` pixels a side."""
    num_captions: int
    """Different captions."""
    num_empty_captions: int
    num_upscaled: int
    """Image files smaller than their bucket."""
    bad_files: tuple[BadFile, ...]
    warnings: tuple[BadFile, ...]
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
        named = [f"{width}x{height}: {n}" for (width, height), n in ordered[:SHOWN]]
        more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
        lines.append(f"buckets {', '.join(named)}{more}")
        lines.append(f"sequence lengths {', '.join(map(str, self.tokens))}")
        empty = f", {self.num_empty_captions} images with an empty one"
        lines.append(f"{self.num_captions} captions{empty if self.num_empty_captions else ''}")
        if self.num_upscaled:
            lines.append(f"{self.num_upscaled} images are smaller than their bucket and enlarged")
        lines += _listed(self.bad_files, "file skipped", "files skipped")
        lines += _listed(self.warnings, "caption not used", "captions not used")
        lines.append(
            f"encoded {self.num_encoded_images} images and {self.num_encoded_captions} captions in "
            f"{self.seconds:.1f} s; cache in {self.cache_dir}"
        )
        return "\n".join(lines)


def _listed(files: Sequence[BadFile], one: str, several: str) -> list[str]:
    if not files:
        return []
    lines = [f"{len(files)} {one if len(files) == 1 else several}:"]
    lines += [f"  {file.path!r}: {file.reason}" for file in files[:SHOWN]]
    if len(files) > SHOWN:
        lines.append(f"  and {len(files) - SHOWN} more, all in bad_files.json")
    return lines


def count_samples(samples: Sequence[CachedSample], multiple: int) -> dict[str, object]:
    """The fields of Summary that follow from the samples."""
    first = [s for s in samples if s.sample.repeat == 0]
    buckets = Counter(s.plan.bucket for s in samples)
    return {
        "num_train": sum(not s.sample.held_out for s in samples),
        "num_held_out": sum(s.sample.held_out for s in samples),
        "buckets": dict(buckets),
        "tokens": tuple(sorted({width * height // multiple**2 for width, height in buckets})),
        "num_captions": len({s.sample.caption for s in first}),
        "num_empty_captions": sum(not s.sample.caption for s in first),
        "num_upscaled": sum(is_upscaled(s.sample.width, s.sample.height, s.plan) for s in first),
    }
