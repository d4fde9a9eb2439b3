"""Which images are held out: decided on real paths, so that none is trained on through another door.

A file can be reached more than once: by two sources of which one lies in the other, through links,
or because the folder of held-out images lies within a source. Whatever is held out through one is
held out, or dropped, in all.
"""

import dataclasses
import os
from collections.abc import Sequence

from fasttune.data.samples import Sample, Scan


def join_splits(scans: Sequence[Scan], held_out_folder: str | None) -> tuple[list[Scan], int]:
    """The scans with one split for all, and how many files were dropped.

    With `held_out_folder` the last scan is that of this folder; what the others share with it is
    dropped there. A file that another scan holds out is held out as well, once instead of repeated.
    """
    held_out = {s.real_path for found in scans for s in found.samples if s.held_out}
    elsewhere: set[str] = set()
    prefix = None
    if held_out_folder is not None:
        elsewhere = {sample.real_path for sample in scans[-1].samples}
        prefix = os.path.join(os.path.realpath(held_out_folder), "")
    dropped: set[str] = set()
    joined: list[Scan] = []
    for number, found in enumerate(scans):
        if held_out_folder is not None and number == len(scans) - 1:
            joined.append(found)
            continue
        kept: list[Sample] = []
        for sample in found.samples:
            real = sample.real_path
            if real in elsewhere or (prefix is not None and real.startswith(prefix)):
                dropped.add(real)
            elif sample.held_out or real not in held_out:
                kept.append(sample)
            elif sample.repeat == 0:
                kept.append(dataclasses.replace(sample, held_out=True))
        joined.append(dataclasses.replace(found, samples=kept))
    return joined, len(dropped)
