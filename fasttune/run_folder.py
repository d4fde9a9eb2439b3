"""The folder a run leaves: opening a new one, finding the one to resume, stopping in order."""

import errno
import glob
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from fasttune.checkpoint import ResumeState, find_checkpoint, list_checkpoints
from fasttune.errors import CheckpointError, StorageError

log = logging.getLogger(__name__)


def new_run(output_dir: str, name: str) -> Path:
    """Creates `output_dir`/`name`, or name-2, name-3 ... when it is taken: a run never writes
    over another."""
    parent = Path(output_dir).expanduser()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for candidate in _names(name):
            path = parent / candidate
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise StorageError(f"{path} is a file; choose another run.name") from None
                if any(path.iterdir()):
                    continue
            if candidate != name:
                log.info("%s holds an earlier run; this one goes to %s", parent / name, path)
            return path
    except OSError as error:
        raise StorageError(
            f"{parent / name}: the run folder cannot be created ({error}); set run.output_dir"
        ) from error
    raise AssertionError("unreachable: the names do not end")


def resume_run(output_dir: str, name: str, which: str) -> tuple[Path, ResumeState]:
    """The run folder and state for `--resume which`: "latest" takes the newest run of this name
    that has a checkpoint; otherwise `which` is a run folder or a checkpoint folder."""
    if which != "latest":
        path = Path(which).expanduser()
        if (path / "checkpoints").is_dir():
            return path, find_checkpoint(path / "checkpoints", "latest")
        if not path.is_dir():
            raise CheckpointError(
                f"--resume {which}: no such folder; give a run folder, one of its checkpoints, or latest"
            )
        return path.resolve().parent.parent, find_checkpoint(path.parent, str(path))
    parent = Path(output_dir).expanduser()
    ours = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [(ours.fullmatch(path.name), path) for path in parent.glob(f"{glob.escape(name)}*")]
    runs = sorted((int(match[1] or 1), path) for match, path in found if match and path.is_dir())
    for _, path in reversed(runs):
        if list_checkpoints(path / "checkpoints"):
            log.info("resuming the run in %s", path)
            return path, find_checkpoint(path / "checkpoints", "latest")
        log.warning("%s has no checkpoint; looking for an earlier run", path)
    raise CheckpointError(
        f"--resume latest: {parent / name} has no checkpoint; start without --resume"
    )


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "; free some space" if full else ""
        raise StorageError(f"{path} cannot be written ({error.strerror or error}){mend}") from error


class StopRequest:
    """What SIGINT or SIGTERM asked for; the loop looks at it once a step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: leave now
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = number
        log.warning(
            "%s: finishing this step, then writing a checkpoint (once more to leave at once)",
            signal.Signals(number).name,
        )


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request while the loop runs."""
    request = StopRequest()
    with _handling(request, signal.SIGINT, signal.SIGTERM):
        yield request


def leave_on_sigterm() -> AbstractContextManager[None]:
    """Outside the loop SIGTERM ends the process as Ctrl-C does, files and cache whole."""

    def leave(number: int, frame: FrameType | None) -> None:
        log.warning("SIGTERM: leaving; what is cached and saved is kept")
        raise SystemExit(128 + number)

    return _handling(leave, signal.SIGTERM)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder. The system frees the lock of a killed one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{run_dir}: another process is training in this folder; wait for it or stop it"
            ) from error
        yield


def _names(name: str) -> Iterator[str]:
    yield name
    count = 2
    while True:
        yield f"{name}-{count}"
        count += 1
