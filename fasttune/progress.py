"""What the terminal and run.log show while a run goes on.

In a terminal a bar on stderr, elsewhere (CI, nohup, a pipe) one log line at every logging step.
tqdm's own rate and ETA are left out: they average over the first steps, which compile kernels and
fill caches, so they start far too slow. `metrics.Rates` has the ones shown here.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fasttune.errors import StorageError

logger = logging.getLogger(__name__)

Values = Mapping[str, float | None]

_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def format_duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s, 2h07m or 3d04h: two units, the smaller one padded."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_step_time(milliseconds: float) -> str:
    """A step time with three significant digits: 4.21 ms, 385 ms, 2.46 s."""
    if milliseconds >= 999.5:
        seconds = milliseconds / 1000
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def format_values(values: Values) -> str:
    """The readable part of a progress line; values that are missing are left out."""

    def known(key: str) -> float | None:
        value = values.get(key)
        return value if value is not None and math.isfinite(value) else None

    # What matters most comes first: a narrow terminal cuts the line at its right end.
    parts: list[str] = []
    if (loss := known("loss_smoothed")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (step_ms := known("step_ms")) is not None:
        parts.append(f"{format_step_time(step_ms)}/step")
    if (eta := known("eta_s")) is not None:
        parts.append(f"ETA {format_duration(eta)}")
    if (lr := known("lr")) is not None:
        parts.append(f"lr {lr:.2e}")
    if (rate := known("images_per_s")) is not None:
        parts.append(f"{rate:.3g} images/s")
    if (peak := known("peak_gib")) is not None:
        parts.append(f"{peak:.2f} GiB")
    if (wait := known("data_wait_share")) is not None:
        parts.append(f"data wait {wait:.0%}")
    return ", ".join(parts)


def _has_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn there: some containers have terminals of zero columns."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


class Progress:
    """Shows how far a run of `total_steps` is; `start_step` are those an earlier start made.

    A terminal at `stream` (default: stderr) gets a bar; anything else gets an INFO log line with
    each `update` that brings values. `enabled=False` shows neither.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        out = sys.stderr if stream is None else stream
        self._total_steps = total_steps
        self._enabled = enabled
        self._bar: tqdm | None = None
        if enabled and _has_terminal(out):
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=out,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                mininterval=0.2,
            )
            for handler in self._console_handlers():
                handler.addFilter(self._make_room)

    def update(self, step: int, values: Values | None = None) -> None:
        """Move to `step`; `values` (as in metrics.jsonl, and `eta_s`) replace those shown."""
        bar = self._bar
        if bar is not None:
            if values is not None:
                bar.set_postfix_str(format_values(values), refresh=False)
            bar.update(step - bar.n)
        if values is not None:
            level = logging.INFO if self._enabled and bar is None else logging.DEBUG
            logger.log(level, "step %d/%d: %s", step, self._total_steps, format_values(values))

    def note(self, message: str) -> None:
        """Log `message`, above the bar where there is one."""
        logger.info("%s", message)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands; may be called twice."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
            for handler in self._console_handlers():
                handler.removeFilter(self._make_room)

    @staticmethod
    def _console_handlers() -> list[logging.Handler]:
        return [
            handler
            for handler in logging.getLogger("fasttune").handlers
            if isinstance(handler, logging.StreamHandler)
            and not isinstance(handler, logging.FileHandler)
        ]

    def _make_room(self, record: logging.LogRecord) -> bool:
        """Clears the bar's line just before a record is written there; the next step redraws it."""
        if self._bar is not None:
            self._bar.clear()
        return True


class _RunLog(logging.FileHandler):
    """Gives up with one warning when its file cannot be written: the run goes on without it."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        # What could not be written is still in the buffer, and close would try it again.
        stream, self.stream = self.stream, None  # type: ignore[assignment]
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
        logger.warning(
            "%s: cannot be written (%s); the log goes on without it",
            self.baseFilename,
            error.strerror or error,
        )


def setup_run_log(run_dir: Path, verbose: bool = False) -> logging.Handler:
    """Append everything fasttune logs, DEBUG included, to <run_dir>/run.log.

    `verbose` adds file and line to each record. The caller removes the handler from
    logging.getLogger("fasttune") and closes it at the end of the run. StorageError if the file
    cannot be opened; if it cannot be written later, one warning says so and the run goes on.
    """
    path = run_dir / "run.log"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handler = _RunLog(path, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
    handler.setLevel(logging.DEBUG)
    where = " (%(filename)s:%(lineno)d)" if verbose else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s %(name)s: %(message)s{where}")
    )
    root = logging.getLogger("fasttune")
    root.addHandler(handler)
    # Handlers filter by their own level; the logger itself must let DEBUG through to the file.
    root.setLevel(logging.DEBUG)
    return handler
