"""The scan: which images a source has, with size, caption and repeats.

Written for folders of 100,000 files that are scanned again at every start: one `os.scandir` pass,
one stat a file, and no image opened whose (path, size, modification time) the cache's index knows.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from fasttune.data.captions import CaptionKind, read_captions
from fasttune.data.formats import COMMON, is_picture, is_text, refusal
from fasttune.data.images import BadImageError, measure
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
    real_path: str
    """`path` with all links followed: what tells whether two samples are one file."""


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
    other_files: dict[str, int]
    """Ending -> number of files that are neither images nor text."""


class _Found(NamedTuple):
    name: str
    path: str
    real_path: str
    file_size: int
    mtime_ns: int


class _Folder(NamedTuple):
    path: str
    prefix: str
    """Of the names of its files: "" or a path that ends in /."""
    real_path: str


def scan(
    source: int,
    path: str,
    *,
    key: str = "data.path",
    roots: Sequence[str] = (),
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

    `held_out` is a fraction, chosen by a hash of the name: it stays the same when files are added;
    of two or more images at least one is held out. `key` is what messages call the folder.
    `roots` are the real paths of all sources (see `name_in`). `known` holds the files of earlier
    scans by path. `on_measured` is called with 1 after each image that had to be opened. Raises
    DatasetError for a missing or empty folder and for captions that fit no image.
    """
    root = os.path.abspath(path)
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"{key} = {path!r}: {root} {what}; name a folder with images")
    images, texts, bad_files, other_files = _walk(root)
    if not images and not bad_files:
        wanted = " ".join(extension[1:] for extension in COMMON)
        raise DatasetError(f"{key} = {path!r}: {root} has no images ({wanted} ...)")
    found_captions = read_captions(
        root,
        [image.name for image in images],
        texts,
        key=key,
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
    images = [image for image in images if image.path in sizes]
    drawn_by: dict[str, str] = {}
    if held_out > 0:
        every_root = [os.path.realpath(root), *roots]
        drawn_by = {i.path: name_in(every_root, i.real_path, i.name) for i in images}
    drawn = draw_held_out(drawn_by.values(), held_out)
    samples: list[Sample] = []
    for image in images:
        kept_out = held_out > 0 and drawn_by[image.path] in drawn
        file = (image.path, image.name, image.file_size, image.mtime_ns, source)
        rest = (by_name[image.name], *sizes[image.path], kept_out, image.real_path)
        samples += [Sample(*file, repeat, *rest) for repeat in range(1 if kept_out else repeats)]
    warnings = [BadFile(where, what) for where, what in found_captions.unmatched]
    bad_files.sort(key=lambda bad: bad.path)
    return Scan(samples, bad_files, warnings, measured, other_files)


def _walk(root: str) -> tuple[list[_Found], list[str], list[BadFile], dict[str, int]]:
    """Images sorted by name, names of .txt files, what cannot be used, and endings of other files.

    Hidden files and folders are left out. Linked folders are entered once each, so loops end.
    """
    images: list[_Found] = []
    texts: list[str] = []
    bad: list[BadFile] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    pending = [_Folder(root, "", os.path.realpath(root))]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder.path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder.path) as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            bad.append(BadFile(_printable(folder.path), f"cannot be listed: {error.strerror}"))
            continue
        straight = folder.real_path == folder.path
        for entry in listed:
            if entry.name[0] == ".":
                continue
            path, name = f"{folder.path}/{entry.name}", folder.prefix + entry.name
            _, dot, ending = entry.name.rpartition(".")
            extension = dot + ending.lower()
            try:
                is_link = entry.is_symlink()
                if entry.is_dir():
                    real = os.path.realpath(path) if is_link else f"{folder.real_path}/{entry.name}"
                    pending.append(_Folder(path, name + "/", real))
                    continue
                if extension == ".txt":
                    texts.append(name)
                    continue
                if not is_picture(extension):
                    if not is_text(extension):
                        others[extension if dot else ""] += 1
                    continue
                reason = refusal(extension) or _name_problem(name)
                if reason is not None:
                    bad.append(BadFile(_printable(path), reason))
                    continue
                status = entry.stat()
            except OSError as error:  # is_dir and stat follow links, which may go in circles
                missing = isinstance(error, FileNotFoundError) and is_link
                what = (
                    "is a link to a missing file"
                    if missing
                    else f"cannot be used: {error.strerror}"
                )
                bad.append(BadFile(_printable(path), what))
                continue
            if is_link:
                real = os.path.realpath(path)
            else:
                real = path if straight else f"{folder.real_path}/{entry.name}"
            images.append(_Found(name, path, real, status.st_size, status.st_mtime_ns))
    images.sort(key=lambda image: image.name)
    return images, texts, bad, dict(others)


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()


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


def draw_held_out(names: Iterable[str], fraction: float) -> set[str]:
    """The names that are held out, by a hash of each: they stay the same when files are added.

    Of two or more names at least one is held out, if fraction > 0: where the hash of none is below the
    fraction, that with the smallest. Only then can a file that is added take its place.
    """
    drawn = {name: _hash(name) for name in names}
    chosen = {name for name, value in drawn.items() if value < fraction}
    if fraction > 0 and not chosen and len(drawn) > 1:
        chosen = {min(drawn, key=lambda name: (drawn[name], name))}
    return chosen


def name_in(roots: Sequence[str], real_path: str, otherwise: str) -> str:
    """`real_path` relative to the outermost of `roots` that holds it: what the draw looks at.

    So sources within each other draw alike, and a data set that moves keeps its split.
    """
    outer = [root for root in roots if real_path.startswith(root + os.sep)]
    return real_path[len(min(outer, key=len)) + 1 :] if outer else otherwise


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
