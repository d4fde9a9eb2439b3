"""The log file of a run, from before its folder exists."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from fasttune.progress import setup_run_log

log = logging.getLogger(__name__)


@contextmanager
def kept_log() -> Iterator[MemoryHandler]:
    """Keeps what is logged before the run folder exists, for its log file."""
    handler = MemoryHandler(capacity=1 << 20, flushLevel=logging.CRITICAL + 1)
    logger = logging.getLogger("fasttune")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


@contextmanager
def run_log(run_dir: Path, early: MemoryHandler, verbose: bool) -> Iterator[None]:
    """Logs to <run>/run.log until the end of the run, beginning with what `early` has kept."""
    handler = setup_run_log(run_dir, verbose)
    logger = logging.getLogger("fasttune")
    early.setTarget(handler)
    early.flush()
    logger.removeHandler(early)
    try:
        yield
    except Exception:
        log.debug("the run ended with an error", exc_info=True)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
