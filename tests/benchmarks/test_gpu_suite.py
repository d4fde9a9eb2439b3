"""The suite: what runs in which order, what is not timed, and what is said at the end."""

import argparse
import json
import os
import signal
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import harness
from benchmarks.gpu import (
    chosen_items,
    judging,
    loss_curves,
    parts,
    planning,
    suite,
)
from benchmarks.gpu.chosen_items import PARTS, asked, own_kernels
from benchmarks.gpu.report_table import summary
from benchmarks.gpu.run import Run
from benchmarks.gpu.step_cases import StepCase
from fasttune.errors import FasttuneError


def _arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(given)


def test_smoke_rows_are_no_results() -> None:
    args = _arguments("--smoke", "--out", str(harness.RESULTS))
    with pytest.raises(FasttuneError, match="no results"):
        suite._results_file(args, {"gpu": None, "cpu": "x", "cores": 1})


@pytest.mark.parametrize("minutes", ["-1", "0", "0.25", "nan"])
def test_a_time_in_which_nothing_runs_is_refused(minutes: str) -> None:
    with pytest.raises(FasttuneError, match=r"--minutes .*: more than 0\.25"):
        suite.run(_arguments("--smoke", "--minutes", minutes))


STEPS = sorted(own_kernels())


def _suite(folder: Path, *given: str, **left: list[str]) -> Run:
    run = Run(args=_arguments(*given), facts={}, path=folder / "rows.jsonl", began=time.monotonic())
    run.left = left
    return run


def _no_planner(folder: Path) -> planning.Planner:
    return planning.Planner([], folder / "plan.json", {}, smoke=True)


def _check(operation: str, passed: bool) -> harness.Row:
    return {
        "measurement": "correctness",
        "case": f"{operation} 1",
        "operation": operation,
        "own_kernel": True,
        "passed": passed,
    }


def test_what_steps_never_launch_may_fail(tmp_path: Path) -> None:
    """Our flash kernel stands in where PyTorch has none; attention's own check says if it did."""
    run = _suite(tmp_path, correctness=[], steps=["s"], contenders=["c | s"])
    run.add(_check("flash attention", False))
    for operation in own_kernels() - {"attention"}:
        run.add(_check(operation, True))
    suite._run_part(run, "steps", 1.0, _no_planner(tmp_path), tmp_path)
    assert run.left["steps"] == ["s"] and not run.said.notes  # it waits for attention
    run.add(_check("attention", False))
    suite._run_part(run, "steps", 1.0, _no_planner(tmp_path), tmp_path)
    assert run.left["steps"] == [] and "attention failed its check" in run.said.notes[0]


def test_wrong_kernels_are_not_timed(tmp_path: Path) -> None:
    names = ["ceilings", "geglu b1", "attention b1", "qk norm rope b1"]
    run = _suite(tmp_path, correctness=[], kernels=names, steps=["s"], contenders=["c | s"])
    run.add(_check("attention", False))
    suite._leave_out_failed(run)
    assert run.left["kernels"] == ["ceilings", "geglu b1", "qk norm rope b1"]
    for name in ("steps", "contenders"):
        suite._run_part(run, name, 1.0, _no_planner(tmp_path), tmp_path)
        assert run.left[name] == []
    assert any("steps were not run" in note for note in run.said.notes)


def test_what_is_not_checked_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ceilings", "geglu b1", "attention b1", "gelu tanh b1"]
    run = _suite(tmp_path, correctness=["attention"], kernels=names, steps=["s"])
    for operation in own_kernels() - {"gelu tanh"}:  # of attention the first check of several
        run.add(_check(operation, True))
    timed: list[str] = []

    def run_items(module: str, items: list[str], **options: Any) -> list[str]:
        timed.extend(items)
        return []

    monkeypatch.setattr(suite, "run_items", run_items)
    suite._run_part(run, "kernels", 1.0, _no_planner(tmp_path), tmp_path)
    assert timed == ["ceilings", "geglu b1"]
    assert run.left["kernels"] == ["attention b1", "gelu tanh b1"]
    suite._run_part(run, "steps", 1.0, _no_planner(tmp_path), tmp_path)
    assert run.left["steps"] == ["s"]  # until attention is checked to the end


def test_a_crash_in_a_check_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _suite(tmp_path, correctness=["attention"], kernels=["attention b1"], steps=["s"])

    def run_items(module: str, items: list[str], **options: Any) -> list[str]:
        options["said"].failed.append(("attention", "killed by SIGSEGV"))
        return []

    monkeypatch.setattr(suite, "run_beside", run_items)
    suite._run_part(run, "correctness", 1.0, _no_planner(tmp_path), tmp_path)
    (row,) = run.rows
    assert row["operation"] == "attention" and row["passed"] is False and row["own_kernel"]
    suite._leave_out_failed(run)
    assert run.left["kernels"] == []
    assert "checked: 1 kernels, 0 model operations without one; 0 of 1" in summary(
        run.rows, run.said, run.left
    )


@pytest.mark.parametrize(
    ("given", "checks", "others"),
    [
        (("--part", "kernels", "--only", "geglu"), ["geglu"], {"kernels"}),
        (("--part", "steps"), STEPS, {"steps"}),
        (("--part", "contenders"), [], {"contenders"}),
        (("--only", "sdxl lora fp16"), STEPS, {"steps"}),
        (("--only", "gelu tanh b4"), ["gelu tanh"], {"kernels"}),
    ],
)
def test_checks_of_what_is_timed_are_run(
    given: tuple[str, ...], checks: list[str], others: set[str]
) -> None:
    found = asked(_arguments(*given), {"memory_gib": 80.0}, parts.Said())
    assert set(found.pop("correctness")) == set(checks)
    assert {part for part, names in found.items() if names} == others


def test_nothing_of_the_name_is_a_mistake() -> None:
    with pytest.raises(FasttuneError, match='--only "typo".*geglu b1.*sdxl lora bf16'):
        asked(_arguments("--only", "typo"), {"memory_gib": 80.0}, parts.Said())


def test_what_is_not_run_is_named(tmp_path: Path) -> None:
    run = _suite(tmp_path, "--minutes", "0", **{part: ["x"] for part in PARTS})
    for name in PARTS:
        suite._run_part(run, name, 1.0, _no_planner(tmp_path), tmp_path)
    text = summary(run.rows, run.said, run.left)
    assert text.count("not run: budget:") == 4


def test_caps_of_larger_cards_are_left_out() -> None:
    said = parts.Said()
    names = chosen_items.steps_of({"memory_gib": 15.9}, said)
    assert any(name.endswith("cap12") for name in names)
    assert not any(name.endswith(("cap16", "cap24")) for name in names)
    assert said.absent == [f"cap{cap}: the card has 15.9 GiB" for cap in (16, 24)]


def test_predictions_complete_rows_that_were_written_without(tmp_path: Path) -> None:
    run = _suite(tmp_path)
    step, case = "flux lora bf16 recompute b1 1024", StepCase()
    late = {"gpu": "NVIDIA H200", "step_ms": 500.0, "tflop": None, "mfu": None}
    run.path.write_text('{"measurement": "of an earlier run"}\n')
    run.add({"measurement": "training step", "case": case.name, **late})
    run.add({"measurement": "contender step", "case": f"{step}, diffusers peft", **late})
    run.add({"measurement": "kernel", "case": "x"})
    assert planning.case_of(run.rows[0]) == planning.case_of(run.rows[1]) == case
    plan = tmp_path / "plan.json"
    planning.complete(run.rows, run.path, plan)  # nothing is predicted
    assert run.rows[0]["mfu"] is None
    plan.write_text(json.dumps({case.name: {"tflop": 98.9, "predicted_peak_gib": 24.7}}))
    planning.complete(run.rows, run.path, plan)
    first, *written = (json.loads(line) for line in run.path.read_text().splitlines())
    assert first == {"measurement": "of an earlier run"} and written == run.rows
    assert [row["mfu"] for row in written[:2]] == [pytest.approx(0.2, abs=0.003)] * 2
    assert [row["predicted_peak_gib"] for row in written[:2]] == [24.7, None]


def test_the_planner_stands_still_while_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Popen:
        signals: ClassVar[list[int]] = []

        def __init__(self, command: list[str], **options: Any) -> None:
            assert command.count("--case") == 2

        def poll(self) -> None:
            return None

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

    monkeypatch.setattr(planning.subprocess, "Popen", Popen)
    planner = planning.Planner(["a", "b", "a"], tmp_path / "plan.json", {}, smoke=True)
    with planner.standing_still():
        assert Popen.signals == [signal.SIGSTOP]
    assert Popen.signals == [signal.SIGSTOP, signal.SIGCONT]
    began = time.monotonic()
    planner.wait_for_flops(began + 0.3)
    assert time.monotonic() - began >= 0.3
    planner.file.write_text(json.dumps({"a": {"tflop": 1.0}, "b": {"no_prediction": "why"}}))
    planner.wait_for_flops(time.monotonic() + 60)


def _step_row(name: str, losses: list[float]) -> harness.Row:
    return {
        "measurement": "training step",
        "case": name,
        "gpu": "G",
        "torch": "2.11.0",
        "loss_curve": "new",
        "losses": losses,
        "loss_at_20": losses[-1],
    }


def test_curves_of_the_same_weights_and_noise_agree() -> None:
    eager, losses = StepCase(), [1.0] * 20
    rows = [
        _step_row(eager.name, losses),
        _step_row(replace(eager, activations="save", compiled=True).name, [1.009] * 20),
        _step_row(replace(eager, size=512).name, [2.0] * 20),
        _step_row(replace(eager, cap_gib=24).name, [*losses[:5], 1.02, *losses[6:]]),
        _step_row(replace(eager, compiled=True).name, [*losses[:-1], float("nan")]),
    ]
    assert loss_curves.differing(rows) == [
        (rows[3]["case"], eager.name),
        (rows[4]["case"], eager.name),
    ]


@pytest.mark.parametrize(
    ("changed_files", "checked", "losses", "recorded"),
    [
        (0, True, 1.0, 2),
        (1, True, 1.0, 0),
        (None, True, 1.0, 0),
        (0, False, 1.0, 0),
        (0, True, 2.0, 0),
    ],
)
def test_only_a_run_that_can_be_trusted_records_curves(
    tmp_path: Path, changed_files: int | None, checked: bool, losses: float, recorded: int
) -> None:
    run = _suite(tmp_path, "--out", str(tmp_path), correctness=[])
    run.facts["changed_files"] = changed_files
    if checked:
        for operation in own_kernels():
            run.add(_check(operation, True))
    run.rows += [
        _step_row(StepCase().name, [1.0] * 20),
        _step_row(StepCase(compiled=True).name, [losses] * 20),
    ]
    judging.judge_curves(run)
    found = loss_curves.read(tmp_path / "loss_curves.json").get("G, torch 2.11", {})
    assert len(found) == recorded
    assert bool(run.said.failed) == (losses != 1.0)


def test_compiled_contenders_start_with_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _suite(tmp_path)
    children: list[tuple[str, str]] = []

    def run_child(module: str, options: list[str], **others: Any) -> parts.Ended:
        count = options[options.index("--steps") + 1]
        children.append((count, others["environment"].get("TORCHINDUCTOR_CACHE_DIR", "")))
        row = {"measurement": "contender step", "case": "c", "first_step_s": float(count)}
        others["on_row"](row)
        return parts.Ended(status=0, in_time=True, begun=None, done=[], error="")

    monkeypatch.setattr(suite, "run_child", run_child)
    item, plan = "diffusers peft compile | " + StepCase().name, tmp_path / "plan.json"
    assert suite._contender(run, item, time.monotonic() + 60, plan, tmp_path)
    (cold, first), (warm, second) = children
    assert (cold, warm) == ("1", "20") and first == second != ""
    assert len(run.rows) == 1 and run.rows[0]["first_step_cold_s"] == 1.0
    suite._contender(run, item.replace(" compile", ""), time.monotonic() + 60, plan, tmp_path)
    assert children[2:] == [("20", "")]


def test_wheels_are_for_the_children(tmp_path: Path) -> None:
    with pytest.raises(FasttuneError, match="no wheels"):
        suite._unpacked(tmp_path, tmp_path / "site")
    with zipfile.ZipFile(tmp_path / "a_contender-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_contender.py", "x = 1\n")
    environment = suite._unpacked(tmp_path, tmp_path / "site")
    assert str(tmp_path / "site") in environment["PYTHONPATH"].split(os.pathsep)
    assert (tmp_path / "site" / "a_contender.py").is_file()
