"""TensorBoard and Weights & Biases, each imported only where the config asks for it.

metrics.jsonl is complete without either; a tracker is a second place to look at the same numbers.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from fasttune.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where scalars and images go besides metrics.jsonl."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in <run_dir>/tensorboard. StorageError, from any call, if they cannot be written:
    a thread writes them, so it may be a later call than the one whose values are lost."""

    def __init__(self, run_dir: Path, *, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                [
                    "logging.tensorboard = true needs the tensorboard package: "
                    'pip install "fasttune[tensorboard]", or set it to false'
                ]
            ) from error
        # Events of steps that a resumed run makes again are hidden by purge_step.
        purge_step = start_step + 1 if start_step else None
        self._folder = run_dir / "tensorboard"
        with self._writing():
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._folder}: TensorBoard events cannot be written ({error.strerror or error}); "
                "free space or check permissions, or set logging.tensorboard = false"
            ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._writing():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as file:
            pixels_HWC = np.asarray(file.convert("RGB"))
        with self._writing():
            self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        with self._writing():
            self._writer.close()


class WandbTracker:
    """A W&B run whose id is kept in <run_dir>/wandb-id, so that a resumed run continues it.

    W&B drops what is logged for a step it has already seen. That is what a resumed run needs: the
    steps it makes again have the same values.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        mode: Literal["online", "offline"],
        run_name: str,
        config: Mapping[str, Any],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                [
                    'logging.wandb = true needs the wandb package: pip install "fasttune[wandb]", '
                    "or set it to false"
                ]
            ) from error
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                id=_wandb_id(run_dir / "wandb-id"),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dict(config),
                # Capturing the console would wrap stderr, and with it the progress bar.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                [
                    f"logging.wandb = true: W&B refused the run ({error}); "
                    'run "wandb login", or set logging.wandb_mode = "offline"'
                ]
            ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: Path) -> str:
    """The id in `path`, made and stored at the first start."""
    try:
        stored = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if stored:
            return stored
        new = secrets.token_hex(4)
        path.write_text(new + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
    return new


def open_trackers(
    run_dir: Path,
    *,
    tensorboard: bool,
    wandb: bool,
    wandb_project: str,
    wandb_mode: Literal["online", "offline"],
    run_name: str,
    config: Mapping[str, Any],
    start_step: int = 0,
) -> list[Tracker]:
    """The trackers asked for, in the order TensorBoard, W&B.

    config: the resolved config as plain data, shown by W&B beside the curves. start_step: the step
    a resumed run continues from. ConfigError if a library is missing or W&B has no login.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoardTracker(run_dir, start_step=start_step))
    if wandb:
        trackers.append(
            WandbTracker(
                run_dir, project=wandb_project, mode=wandb_mode, run_name=run_name, config=config
            )
        )
    return trackers
