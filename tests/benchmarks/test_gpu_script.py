"""run.sh, from its complaints to the whole suite in miniature."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness

SCRIPT = harness.ROOT / "benchmarks" / "gpu" / "run.sh"


def test_the_script_names_what_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"  # without site-packages
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", str(SCRIPT)],
        env={"PYTHON": str(python), "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "lacks torch, numpy, safetensors, Pillow, tqdm: install" in done.stderr


@pytest.mark.slow
def test_sigterm_ends_the_children(tmp_path: Path) -> None:
    script = subprocess.Popen(
        ["sh", str(SCRIPT), "--smoke", "--part", "steps", "--out", "rows"],
        env={**harness.environment(), "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    started, deadline = set[int](), time.monotonic() + 120
    while not started and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        started = {p for p in _children(script.pid) if _is_module(p, "benchmarks.gpu.step")}
    assert started
    script.terminate()
    assert script.wait(60) == 130
    assert not any(_is_module(process, "benchmarks.gpu") for process in started)
    assert not list(tmp_path.glob("fasttune-bench-*/plan*"))


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _is_module(pid: int, module: str) -> bool:
    try:
        return module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_the_whole_suite_in_miniature(tmp_path: Path) -> None:
    results = {path: path.stat().st_mtime for path in harness.RESULTS.iterdir()}
    done = subprocess.run(
        ["sh", str(SCRIPT), "--smoke", "--minutes", "30"],
        env={**harness.environment(), "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed:" not in done.stdout and "not run" not in done.stdout
    assert "diffusers peft: " not in done.stdout  # as absent
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    measured = {row["measurement"] for row in rows}
    assert measured == {
        "correctness",
        "ceiling",
        "kernel",
        "training step",
        "bucket sweep",
        "contender step",
        "target",
    }
    assert any(row["case"].endswith(", interpreted") for row in rows)
    (sweep,) = (row for row in rows if row["measurement"] == "bucket sweep")
    assert sweep["buckets"] == 3 and sweep["graphs"] > 0 and sweep["recompiles"] == 0
    assert len({(row["measurement"], row["case"]) for row in rows}) == len(rows)
    for row in rows:
        assert {"time", "commit", "torch", "triton", "driver", "gpu"} <= set(row)
    compiled = next(r for r in rows if r["case"] == "flux lora bf16 save b1 1024 compile")
    assert compiled["first_step_cold_s"] > 0 and compiled["graphs"] > 0
    assert compiled["recompiles"] == 0 and compiled["tflop"] > 0
    assert {path: path.stat().st_mtime for path in harness.RESULTS.iterdir()} == results
