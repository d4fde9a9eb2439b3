"""The CPU suite: how a row comes about, and that the contenders do the same work as ours."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.cpu import contest, loop, quickstart, suite, updates
from benchmarks.cpu.contest import MEASUREMENTS, Contender, Contest, contests, play
from benchmarks.harness import ROOT, Row, environment

LIGHT = ("cache-write", "cache-read", "checkpoint-write", "checkpoint-read", "ema", "adamw")
LIGHT += ("adamw-bf16", "clip")
"""Measurements that need torch and safetensors alone, without child processes of their own."""


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(arguments)


def test_rounds_are_interleaved_and_the_row_has_their_ratio() -> None:
    order: list[str] = []

    def takes(name: str, seconds: list[float]) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return seconds.pop(0)

        return measure

    # the first of each is the warm-up; the machine is twice as slow in the last round
    ours = takes("ours", [9.0, 0.001, 0.001, 0.001, 0.002])
    theirs = takes("theirs", [9.0, 0.002, 0.002, 0.004, 0.004])
    (row,) = play(
        Contest(
            what="work",
            ours=ours,
            theirs={"someone": Contender(measure=theirs, differs="all")},
            facts={"images": 3},
        ),
        rounds=4,
    )
    turns = ["ours", "theirs", "theirs", "ours"]
    assert order == ["ours", "theirs", *turns, *turns]
    assert row["case"] == "work against someone"
    assert row["ratio"] == 0.5  # of 0.5, 0.5, 0.25, 0.5
    low, high = row["bounds_95"]
    assert 0 < low <= 0.5 <= high
    assert (row["ours_ms"], row["theirs_ms"]) == (1.0, 3.0)
    assert row["p20"] == {"ours_ms": 1.0, "theirs_ms": 2.0}
    assert row["p80"] == {"ours_ms": 1.4, "theirs_ms": 4.0}  # between the third and the fourth
    assert row["rounds"] == 4 and row["images"] == 3 and row["differs"] == "all"
    assert row["contender"] == f"torch {torch.__version__}"
    assert row["samples"] == {
        "ours_ms": [1.0, 1.0, 1.0, 2.0],
        "theirs_ms": [2.0, 2.0, 4.0, 4.0],
        "ratio": [0.5, 0.5, 0.25, 0.5],
    }
    json.dumps(row)
    assert "0.500" in suite.summary([row])


def test_short_work_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls = 0

    def work() -> None:
        nonlocal now, calls
        now, calls = now + 0.001, calls + 1

    monkeypatch.setattr(contest.time, "perf_counter", lambda: now)
    measure = contest.timed(work, quick=False)
    calls = 0
    assert measure() == pytest.approx(0.001)
    assert calls == pytest.approx(1000 * contest.SAMPLE_S)


@pytest.mark.parametrize("name", LIGHT)
def test_contenders_come_to_the_same_result(name: str, tmp_path: Path) -> None:
    # each contest begins with its own check
    for found in contests(name, tmp_path, quick=True):
        assert found.theirs
        assert all(row["ratio"] > 0 for row in play(found, rounds=1))


def test_another_computation_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    list(updates.adamw(tmp_path, quick=True))
    other = {**updates._adamw_numbers(), "weight_decay": 1.0}
    monkeypatch.setattr(updates, "_adamw_numbers", lambda: other)
    with pytest.raises(RuntimeError, match=r"torch AdamW\(foreach=True\) is another computation"):
        list(updates.adamw(tmp_path, quick=True))


def test_bf16_moments_that_stand_still_are_noticed(tmp_path: Path) -> None:
    """The tolerance of 16-bit weights still tells an update from none."""
    named = updates.network_weights(True, torch.bfloat16)
    start = [p.detach().clone() for _, p in named]
    optimizer = updates._WithFloat32Copy([p for _, p in named])
    after = updates._two_steps(optimizer, named)
    updates._check_updates(start, after, after, 2**-8, "itself")
    with pytest.raises(RuntimeError, match="none is another computation"):
        updates._check_updates(start, after, start, 2**-8, "none")


def test_bare_loop_trains_and_logs(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert loop.bare_loop(log, steps=30) > 0
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert all(line["loss"] > 0 for line in lines)


def test_quickstart_has_the_same_losses_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    mse = quickstart.mse_loss
    (found,) = quickstart.quickstart(tmp_path, quick=True)
    assert list(found.theirs) == ["diffusers and PEFT by hand"]
    monkeypatch.setattr(quickstart, "mse_loss", lambda a, b: 1.001 * mse(a, b))
    with pytest.raises(RuntimeError, match="step 0: loss"):
        list(quickstart.quickstart(tmp_path, quick=True))


def test_the_suite_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ("--only", "clip", "--quick", "--rounds", "2", "--out", str(out))
    assert suite.run(parsed(*arguments, "--folder", str(tmp_path))) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["measurement"] == "cpu"
    assert row["case"] == "gradient clipping, LoRA against torch clip_grad_norm_"
    assert row["quick"] is True and row["rounds"] == 2 and len(row["samples"]["ours_ms"]) == 2
    assert {"commit", "torch", "cpu", "threads", "load_average"} <= set(row)
    assert row["case"] in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # inputs are gone


def test_rows_that_were_just_written_are_no_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, code = tmp_path / "benchmarks/results/cpu.jsonl", tmp_path / "fasttune.py"
    results.parent.mkdir(parents=True)
    results.write_text("")
    code.write_text("")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "A state.")):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", results.parent)
    assert harness.machine()["changed_files"] == 0
    harness.write_rows(results, [{"measurement": "cpu"}])
    assert harness.machine()["changed_files"] == 0
    code.write_text("1")
    assert harness.machine()["changed_files"] == 1


def test_one_failure_keeps_the_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"ours_ms": 1.0, "theirs_ms": 1.0}
    row: Row = {"case": "x", "ratio": 1.0, "bounds_95": None, "rounds": 1, **times}
    row |= {"p20": times, "p80": times}

    def measure(name: str, **_: Any) -> list[Row]:
        if name == "ema":
            raise RuntimeError("no such library")
        return [row]

    monkeypatch.setattr(suite, "measure", measure)
    out = tmp_path / "rows.jsonl"
    assert suite.run(parsed("--only", "ema", "clip", "--out", str(out))) == 1
    assert len(out.read_text().splitlines()) == 1
    assert "ema: failed\nno such library" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--rounds", "0"), "'0' is not a number of rounds: 1 or more"),
        (("--rounds", "x"), "'x' is not a number of rounds: 1 or more"),
        (("--only", "speed"), "'speed'"),
    ],
)
def test_wrong_arguments(
    wrong: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(*wrong)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_measurement_exists_and_arguments_need_no_torch() -> None:
    code = (
        "import argparse, sys; from benchmarks.cpu import suite; "
        "suite.add_arguments(argparse.ArgumentParser()); assert 'torch' not in sys.modules; "
        "import importlib; from benchmarks.cpu.contest import MEASUREMENTS; "
        "[getattr(importlib.import_module(m), f) for m, f in "
        "(place.split(':') for place in MEASUREMENTS.values())]; "
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(set(MEASUREMENTS.values())) == len(MEASUREMENTS)
