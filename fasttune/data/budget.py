"""A limit on how much is decoded at once, for folders with a few enormous images."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Threads that decode hold as many pixels as their image has.

    67 million pixels are about 0.6 GB while an image is converted, turned and resized. A larger
    image waits until it is alone.
    """

    def __init__(self, limit: int = 2**26) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for `pixels`, and holds them in the context."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()
