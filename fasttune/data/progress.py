"""Progress of a preparation that takes hours: a bar in a terminal, a line every half minute elsewhere."""

import logging
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class Progress:
    """Counts up to `total` (None: unknown). `hidden` shows no bar, and logs instead."""

    def __init__(self, description: str, total: int | None, unit: str, *, hidden: bool) -> None:
        self._bar = tqdm(
            desc=description, total=total, unit=unit, disable=hidden, leave=bool(total)
        )
        self._description = description
        self._total = total
        self._unit = unit
        self._hidden = hidden
        self.count = 0
        """Done so far."""
        self._start = self._logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """`count` more are done."""
        self.count += count
        self._bar.update(count)
        now = time.monotonic()
        if not self._hidden or now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        rate = self.count / max(now - self._start, 1e-9)
        text = f"{self.count} {self._unit}s"
        if self._total is not None:
            left = _duration((self._total - self.count) / rate)
            text = f"{self.count} of {self._total} {self._unit}s, {left} left"
        log.info("%s: %s, %.3g/s", self._description, text, rate)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
