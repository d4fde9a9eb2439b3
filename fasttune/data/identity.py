"""What tells one frozen model from another: a hash of all its files.

Every byte counts: sampling large files would miss a change of a few tensors that leaves the size as
it was. Reading gigabytes takes a while (about a second a GB), so the hash of a large file is kept in the
cache's index and holds as long as its path, size and modification time do.

Library versions are not part of it. Decoders, resizing and encoders differ between releases by rounding
at most, far less than what training adds as noise, and an update would throw away hours of
encoding; `ENCODING_VERSION` (data/images.py) is raised when pixels really change.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fasttune.data.cache import Cache
from fasttune.errors import ModelError

log = logging.getLogger(__name__)

SMALL_BYTES = 2**20
"""Files up to this size are read at each start."""
SLOW_SECONDS = 2.0


def folder_identity(
    folder: Path, patterns: Sequence[str], *parts: object, cache: Cache | None = None
) -> str:
    """Hash of a model's files below `folder`, by relative name and content, and of `parts`.

    `cache` remembers the hashes of large files. Raises ModelError if nothing matches or a file
    cannot be read.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
    found: set[Path] = set()
    for pattern in patterns:
        found |= {path for match in folder.glob(pattern) for path in _files(match)}
    if not found:
        raise ModelError(f"{folder} has none of {', '.join(patterns)}; is it a model folder?")
    started, num_bytes = time.perf_counter(), 0
    for path in sorted(found):
        try:
            content, read = _file_hash(path, cache)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read ({error.strerror}); download the model again"
            ) from error
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + content)
        num_bytes += read
    seconds = time.perf_counter() - started
    if seconds > SLOW_SECONDS:
        log.info(
            "%s: read %.1f GiB in %.0f s to identify the weights, which is remembered",
            folder,
            num_bytes / 2**30,
            seconds,
        )
    return digest.hexdigest()


def _file_hash(path: Path, cache: Cache | None) -> tuple[bytes, int]:
    """The hash of a file's content, and how many bytes were read for it."""
    status = path.stat()
    real = str(path.resolve())
    known = (real, status.st_size, status.st_mtime_ns)
    remember = cache is not None and status.st_size > SMALL_BYTES
    if cache is not None and remember and (content := cache.file_hash(*known)) is not None:
        return content, 0
    with path.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    if cache is not None and remember:
        cache.remember_file_hash(*known, content)
    return content, status.st_size


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (below for below in path.rglob("*") if below.is_file())
