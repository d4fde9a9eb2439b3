"""Whether the disk holds what is about to be encoded, asked before the hours are spent."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from fasttune.errors import StorageError

log = logging.getLogger(__name__)


def check_room(folder: Path, needed: Mapping[str, float]) -> None:
    """`needed` are the bytes still to be written to `folder`, by what they are.

    Logs them, and raises StorageError if they are more than is free.
    """
    total = sum(needed.values())
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(
            f"{folder}: the free space cannot be found out ({error}); set cache.dir to another folder"
        ) from error
    parts = " and ".join(f"{_size(count)} of {what}" for what, count in needed.items() if count)
    if total <= free:
        log.info("%s: about %s to write, %s free", folder, parts or "nothing", _size(free))
        return
    raise StorageError(
        f"{folder}: about {_size(total)} must be written ({parts}), {_size(free)} are free; free some "
        'space, set cache.dir to another disk, or store less (cache.latents = "sample", '
        'cache.text_storage = "int8", smaller data.resolution). What is encoded already is kept'
    )


def _size(count: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
