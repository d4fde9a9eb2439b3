"""Resume state: written beside, fsynced, renamed, so that a checkpoint is whole or absent.

    checkpoints/step-000500/
      state.json               step, what was trained, and size and CRC-32 of each file below
      trainable.safetensors    trained parameters under their names
      optimizer.safetensors    optimizer state tensors
      ema.safetensors          averaged parameters, if any

Random numbers and the data position need no state: they are functions of (seed, step).
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fasttune.errors import CheckpointError, StorageError
from fasttune.tensor_files import lazy, write_tensors

log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class ResumeState:
    """One checkpoint read back: `groups` maps "trainable", "optimizer", "ema" to tensors."""

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:06d}"


def save_checkpoint(
    root: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Writes `root`/step-N and returns it. `state` must be JSON. A full disk or a missing right
    raises StorageError and leaves every earlier checkpoint as it was."""
    final = root / checkpoint_name(step)
    beside = root / f".{final.name}.tmp-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
        files = {}
        for name, tensors in groups.items():
            if tensors:
                path = beside / f"{name}.safetensors"
                crc = _Crc32()
                # one tensor at a time in host memory: the state of a whole network is tens of GB
                whole = {key: lazy(tensor) for key, tensor in tensors.items()}
                write_tensors(path, whole, {}, seen=crc.update)
                files[path.name] = {"bytes": path.stat().st_size, "crc32": crc.value}
        text = json.dumps({"format": FORMAT, "step": step, "files": files, **state}, indent=1)
        (beside / "state.json").write_text(text, encoding="utf-8")
        _fsync(beside / "state.json")
        _fsync(beside)
        if final.exists():  # a damaged one of the same step: resuming went back past it
            final.rename(root / f".{final.name}.tmp-old-{os.getpid()}")
        beside.rename(final)
        _fsync(root)
        for leftover in root.glob(".step-*.tmp-old-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    except (OSError, StorageError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = error.__cause__ or error
        raise StorageError(
            f"{final}: the checkpoint could not be written ({reason}); free some space or choose "
            "another run.output_dir, then continue with --resume latest. Earlier checkpoints are intact"
        ) from error
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first; not checked."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=_step)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Removes all but the newest `keep`; 0 keeps all."""
    for path in list_checkpoints(root)[:-keep] if keep else []:
        doomed = path.with_name(f".{path.name}.tmp-pruned")
        path.rename(doomed)  # a kill in the middle leaves a hidden folder, never half a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside_checkpoints(root: Path, after_step: int) -> None:
    """Renames the checkpoints beyond `after_step`, from where training goes on another way, so that
    neither pruning nor "latest" takes them for its own. They stay until the user deletes them."""
    for path in list_checkpoints(root):
        if _step(path) > after_step:
            aside = path.with_name(f"abandoned-{path.name}")
            number = 2
            while aside.exists():
                aside = path.with_name(f"abandoned-{path.name}-{number}")
                number += 1
            path.rename(aside)
            log.warning("%s is beyond step %d and now %s; delete it", path, after_step, aside.name)


def load_checkpoint(path: Path) -> ResumeState:
    """Reads one checkpoint and checks every byte; CheckpointError says what is wrong."""
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    return _read(path)


def _read(path: Path) -> ResumeState:
    """A checkpoint without damage."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    groups = {Path(name).stem: load_file(path / name) for name in state["files"]}
    return ResumeState(path=path, step=state["step"], groups=groups, state=state)


def find_checkpoint(root: Path, which: str) -> ResumeState:
    """`which` is "latest" or a checkpoint folder. For "latest" a damaged newest one is named in
    the log and the one before it is used."""
    if which != "latest":
        return load_checkpoint(Path(which))
    paths = list_checkpoints(root)
    if not paths:
        raise CheckpointError(
            f"{root}: no checkpoint to resume from; start without --resume, or give its folder"
        )
    for path in reversed(paths):
        problem = damage(path)
        if problem is None:
            return _read(path)
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    raise CheckpointError(f"{root}: all {len(paths)} checkpoints are damaged; see the log for each")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            return f"format {state['format']}, this version reads format {FORMAT}"
        for name, facts in state["files"].items():
            file = path / name
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if _crc32(file) != facts["crc32"]:
                return f"{name} has changed since it was written (CRC-32 differs)"
            with safe_open(file, framework="pt"):
                pass
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"unreadable: {error}"
    return None


def check_same_tensors(
    path: Path, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> None:
    """CheckpointError if names or shapes differ: the checkpoint is of another model or adapter."""
    wrong = [f"{name} is missing in the checkpoint" for name in current if name not in saved]
    wrong += [f"{name} is not trained by this config" for name in saved if name not in current]
    wrong += [
        f"{name} has shape {tuple(saved[name].shape)} instead of {tuple(current[name].shape)}"
        for name in current
        if name in saved and saved[name].shape != current[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path} was written by another model or adapter: {'; '.join(wrong[:5])}{more}. "
            "Resume with the config.toml of its run folder, or start without --resume"
        )


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


class _Crc32:
    """CRC-32 of bytes that come in parts."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes | memoryview) -> None:
        self.value = zlib.crc32(data, self.value)


def _crc32(path: Path) -> int:
    crc = _Crc32()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc.update(chunk)
    return crc.value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
