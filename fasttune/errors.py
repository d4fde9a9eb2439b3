"""Errors meant for the user: what was given, what is allowed, what to do. cli.py prints them
without a traceback and exits with status 2."""

from collections.abc import Sequence


class FasttuneError(ValueError):
    """Base of every error a user can cause and mend."""


class ConfigError(FasttuneError):
    """All problems of a config, reported together, one line each."""

    def __init__(self, problems: Sequence[str], source: str | None = None) -> None:
        self.problems = tuple(problems)
        where = source or "the config"
        count = len(self.problems)
        head = f"1 problem in {where}" if count == 1 else f"{count} problems in {where}"
        super().__init__("\n".join([head + ":", *(f"  - {problem}" for problem in self.problems)]))


class DatasetError(FasttuneError):
    """A folder, image or caption file that cannot be used."""


class ModelError(FasttuneError):
    """A model folder that is incomplete, of another family or of other shapes."""


class CheckpointError(FasttuneError):
    """Resume state that is damaged or belongs to another model or config."""


class HardwareError(FasttuneError):
    """A request this machine, its driver or its installed libraries cannot honour."""


class TrainingError(FasttuneError):
    """A run that cannot go on, such as a non-finite loss."""


class StorageError(FasttuneError):
    """A file that cannot be written: full disk, no permission. Nothing earlier is lost."""
