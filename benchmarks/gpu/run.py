"""One run of the suite: what was asked for, the time it has, its rows, and which of its checks passed."""

import argparse
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu.parts import LEAST_S, Said


@dataclass(kw_only=True, slots=True)
class Run:
    """One run of the suite."""

    args: argparse.Namespace
    facts: harness.Row
    path: Path
    began: float
    rows: list[harness.Row] = field(default_factory=list)
    said: Said = field(default_factory=Said)
    left: dict[str, list[str]] = field(default_factory=dict)
    """Part -> items that are not run yet."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the children, beside what all have."""

    def deadline(self, share: float = 1.0) -> float:
        seconds: float = 60 * self.args.minutes * share
        return self.began + seconds

    def has_time(self, share: float = 1.0) -> bool:
        return self.deadline(share) - time.monotonic() > LEAST_S

    def add(self, row: harness.Row) -> None:
        """Writes a row with the facts of the machine; what the row says itself holds."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {**self.facts, "time": now, **row}
        head = {"measurement": whole.pop("measurement"), "case": whole.pop("case", "")}
        harness.write_rows(self.path, [{**head, **whole}])
        self.rows.append({**head, **whole})
        print(f"  {head['measurement']}: {head['case']}", flush=True)

    def wrong(self) -> list[str]:
        """Operations with a check that failed, or crashed."""
        checked = [row for row in self.rows if row["measurement"] == "correctness"]
        return sorted({row["operation"] for row in checked if not row["passed"]})

    def right(self) -> set[str]:
        """Operations whose checks have all ended and passed."""
        found = {row["operation"] for row in self.rows if row["measurement"] == "correctness"}
        return found.difference(self.wrong(), self.left.get("correctness", ()))

    @property
    def smoke(self) -> list[str]:
        return ["--smoke"] if self.args.smoke else []
