"""What every benchmark needs: facts of the machine, rows of results, quantiles, child processes.

A measurement runs in a process of its own, so that none sees what another has imported, cached or
allocated. It prints JSON rows; `collect` reads them from its output.
"""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ROW = "row: "
"""Marks the lines of a child's output that are rows."""

Row = dict[str, Any]


def emit(measurement: str, **values: Any) -> None:
    """Prints a row for the parent. `measurement` names what was measured; values carry their unit
    in the name (`wall_s`, `peak_gib`)."""
    print(ROW + json.dumps({"measurement": measurement, **values}), flush=True)


def collect(command: Sequence[str], *, threads: int | None = None) -> list[Row]:
    """Rows that a child process prints; `threads` of OpenMP are torch's. RuntimeError with the end
    of its output if it fails or prints none."""
    env = environment() | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    done = subprocess.run(command, text=True, capture_output=True, env=env, check=False)
    rows = [
        json.loads(line.removeprefix(ROW))
        for line in done.stdout.splitlines()
        if line.startswith(ROW)
    ]
    if done.returncode != 0 or not rows:
        said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
    return rows


def environment() -> dict[str, str]:
    """The environment of children: this checkout importable, and no network."""
    inherited = dict(os.environ)  # noqa: TID251  # passed on, not read as settings
    path = [str(ROOT), str(ROOT / "kernels"), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM ends the command as Ctrl-C does, so that processes and copies go with it."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def machine() -> Row:
    """Facts that every row carries. Imports torch."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "changed_files": changed_files(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2),
    }


def changed_files() -> int:
    """Tracked files that are not as in the commit. Results are left out: each row that a run writes
    there would count as a change to its next one."""
    results = RESULTS.relative_to(ROOT).as_posix()
    status = _git("status", "--porcelain", "-uno", "--", ".", f":(exclude){results}")
    return len(status.splitlines())


def machine_name(facts: Row) -> str:
    """Name of the results file: "amd-epyc-2-cores", or the GPU's."""
    text = facts["gpu"] or f"{facts['cpu']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    """The processor as the system names it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, text=True, capture_output=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Appends rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def spread(values: Sequence[float], unit: str, digits: int = 3) -> dict[str, float]:
    """Median, mean, 10th and 90th percentile, named `median_<unit>` and so on."""
    many = len(values) > 1
    deciles = statistics.quantiles(values, n=10, method="inclusive") if many else [values[0]] * 9
    return {
        f"median_{unit}": round(statistics.median(values), digits),
        f"mean_{unit}": round(statistics.fmean(values), digits),
        f"p10_{unit}": round(deciles[0], digits),
        f"p90_{unit}": round(deciles[-1], digits),
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)
