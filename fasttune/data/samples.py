"""The scan: which images a source has, with size, caption and repeats.

Written for folders of 100,000 files that are scanned again at every start: one `os.scandir` pass,
one stat a file, and no image opened whose (path, size, modification time) the cache's index knows.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from fasttune.data.captions import CaptionKind, read_captions
from fasttune.data.images import EXTENSIONS, UNREADABLE, BadImageError, measure, refusal
from fasttune.errors import DatasetError


class ImageFile(NamedTuple):
    """What the index remembers of a file; `reason` says why an unusable one is unusable."""

    file_size: int
    mtime_ns: int
    width: int
    height: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of an epoch; a file with `repeats` = 3 gives three."""

    path: str
    """Absolute."""
    name: str
    """Relative to the source, with forward slashes."""
    file_size: int
    mtime_ns: int
    source: int
    repeat: int
    caption: str
    width: int
    height: int
    """In pixels, after EXIF orientation."""
    held_out: bool


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that is not used or not as meant, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What one source holds."""

    samples: list[Sample]
    bad_files: list[BadFile]
    warnings: list[BadFile]
    """Captions without an image and the like: reported, and no reason to stop."""
    measured: dict[str, ImageFile]
    """Files that were opened and can be remembered, by path."""


class _Found(NamedTuple):
    name: str
    path: str
    file_size: int
    mtime_ns: int


def scan(
    source: int,
    path: str,
    *,
    captions: CaptionKind = "textfile",
    caption: str | None = None,
    caption_file: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "caption",
    repeats: int = 1,
    held_out: float = 0.0,
    known: Mapping[str, ImageFile] | None = None,
    workers: int = 4,
    on_measured: Callable[[int], object] | None = None,
) -> Scan:
    """Samples of the folder `path`, sorted by name, `repeats` in a row for each file.

    `held_out` is a fraction, chosen by a hash of the name: it stays the same when files are
    added. `known` holds the files of earlier scans by path. `on_measured` is called with 1 after
    each image that had to be opened. Raises DatasetError for a missing or empty folder and for
    captions that fit no image.
    """
    root = os.path.abspath(path)
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"data.path = {path!r}: {root} {what}; name a folder with images")
    images, texts, bad_files = _walk(root)
    if not images and not bad_files:
        wanted = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise DatasetError(f"data.path = {path!r}: {root} has no images ({wanted})")
    found_captions = read_captions(
        root,
        [image.name for image in images],
        texts,
        captions=captions,
        caption=caption,
        caption_file=caption_file,
        image_column=image_column,
        caption_column=caption_column,
    )
    by_name, unusable = found_captions.by_name, found_captions.unusable
    bad_files += [BadFile(f"{root}/{name}", reason) for name, reason in unusable.items()]
    images = [image for image in images if image.name in by_name]
    sizes, measured, unreadable = _sizes(images, known or {}, workers, on_measured)
    bad_files += unreadable
    samples: list[Sample] = []
    for image in images:
        size = sizes.get(image.path)
        if size is None:
            continue
        kept_out = held_out > 0 and _fraction(image.name) < held_out
        file = (image.path, image.name, image.file_size, image.mtime_ns, source)
        caption_text = by_name[image.name]
        samples += [
            Sample(*file, repeat, caption_text, *size, kept_out)
            for repeat in range(1 if kept_out else repeats)
        ]
    warnings = [BadFile(where, what) for where, what in found_captions.unmatched]
    bad_files.sort(key=lambda bad: bad.path)
    return Scan(samples, bad_files, warnings, measured)


def _walk(root: str) -> tuple[list[_Found], list[str], list[BadFile]]:
    """Images sorted by name, names of .txt files, and what cannot be used.

    Hidden files and folders are left out. Linked folders are entered once each, so loops end.
    """
    images: list[_Found] = []
    texts: list[str] = []
    bad: list[BadFile] = []
    entered: set[tuple[int, int]] = set()
    pending = [(root, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            bad.append(BadFile(folder, f"cannot be listed: {error.strerror}"))
            continue
        for entry in listed:
            file_name = entry.name
            if file_name[0] == ".":
                continue
            if entry.is_dir():
                pending.append((f"{folder}/{file_name}", f"{prefix}{file_name}/"))
                continue
            _, dot, ending = file_name.rpartition(".")
            extension = dot + ending.lower()
            name = prefix + file_name
            if extension == ".txt":
                texts.append(name)
            elif extension in EXTENSIONS or extension in UNREADABLE:
                reason = refusal(extension) or _name_problem(name)
                if reason is not None:
                    shown = f"{root}/{name}".encode(errors="backslashreplace").decode()
                    bad.append(BadFile(shown, reason))
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    broken = "is a link to a missing file" if entry.is_symlink() else error.strerror
                    bad.append(BadFile(f"{root}/{name}", str(broken)))
                    continue
                images.append(_Found(name, f"{root}/{name}", status.st_size, status.st_mtime_ns))
    images.sort(key=lambda image: image.name)
    return images, texts, bad


def _name_problem(name: str) -> str | None:
    try:
        name.isascii() or name.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    return None


def _sizes(
    images: list[_Found],
    known: Mapping[str, ImageFile],
    workers: int,
    on_measured: Callable[[int], object] | None,
) -> tuple[dict[str, tuple[int, int]], dict[str, ImageFile], list[BadFile]]:
    """(width, height) by path, what was learnt by opening files, and the unreadable ones."""
    sizes: dict[str, tuple[int, int]] = {}
    bad: list[BadFile] = []
    unknown: list[_Found] = []
    for image in images:
        row = known.get(image.path)
        if row is None or row[0] != image.file_size or row[1] != image.mtime_ns:
            unknown.append(image)
        elif row[4] is not None:
            bad.append(BadFile(image.path, row[4]))
        else:
            sizes[image.path] = (row[2], row[3])
    measured: dict[str, ImageFile] = {}

    def look(image: _Found) -> tuple[int, int] | BadImageError:
        if image.file_size == 0:
            return BadImageError(image.path, "is empty (0 bytes)", lasting=True)
        try:
            return measure(image.path)
        except BadImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for image, result in zip(unknown, pool.map(look, unknown), strict=True):
            if isinstance(result, BadImageError):
                bad.append(BadFile(image.path, result.reason))
                if result.lasting:
                    row = ImageFile(image.file_size, image.mtime_ns, 0, 0, result.reason)
                    measured[image.path] = row
            else:
                sizes[image.path] = result
                measured[image.path] = ImageFile(image.file_size, image.mtime_ns, *result, None)
            if on_measured is not None:
                on_measured(1)
    return sizes, measured, bad


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
