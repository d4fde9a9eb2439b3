"""metrics.jsonl: what a run writes line by line, and reads back when it continues."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttune.errors import StorageError
from fasttune.run_folder import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that are no JSON object with a step.

    A run that was killed can leave half a line at the end.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class MetricsFile:
    """metrics.jsonl: one JSON object a line, flushed line by line.

    Opening it for a run that continues after `resume_step` cuts what lies beyond, and any torn
    line, so that no step occurs twice; 0 starts an empty file. StorageError if it cannot be
    written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if resume_step else []
        self.kept: tuple[dict[str, Any], ...] = tuple(kept)
        text = "".join(_json_line(record) for record in kept)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _storage_error(path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become null."""
        try:
            self._file.write(_json_line(record))
            self._file.flush()
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise _storage_error(self.path, error) from error


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); free space or check permissions, "
        "then continue with --resume latest"
    )
