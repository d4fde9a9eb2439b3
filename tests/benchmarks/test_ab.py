"""Two revisions side by side: what is copied and imported, the order of turns, and who is accused."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ab, ab_rounds, compare, false_alarms, harness, revisions
from benchmarks.ab_rounds import Round, Workload, run_round, series
from benchmarks.gpu.step_cases import cases, parse
from benchmarks.revisions import Beside, RevisionError, Side, commit_of, side_by_side
from benchmarks.verdicts import Change, Outcome, parse_limits
from fasttune.cli import main

ROOT = Path(__file__).parents[2]

WORKLOAD = """
import json, sys
import fasttune
for _ in range(3):
    print("turn", flush=True)
    sys.stdin.readline()
    with open(sys.argv[1], "a") as order:
        order.write(fasttune.NAME)
print("noise of a library")
print("row: " + json.dumps({"measurement": "fake", "step_ms": fasttune.STEP_MS, "name": fasttune.NAME}))
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, text=True, capture_output=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of the project's layout: NAME is "b" in its one commit, "h" in the working tree."""
    root = tmp_path / "repository"
    for package in ("fasttune", "kernels/fasttune_kernels", "benchmarks"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / "fasttune" / "__init__.py").write_text('NAME = "b"\nSTEP_MS = 10.0\n')
    shutil.copy(ROOT / "benchmarks" / "ab_child.py", root / "benchmarks")
    (root / "benchmarks" / "fake.py").write_text("raise SystemExit('the harness of base ran')")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=one")
    (root / "fasttune" / "__init__.py").write_text('NAME = "h"\nSTEP_MS = 11.0\n')
    (root / "benchmarks" / "fake.py").write_text(WORKLOAD)
    (root / "fasttune" / "new.py").write_text("")
    (root / "fasttune" / "__pycache__").mkdir()
    return root


@pytest.fixture
def beside(repository: Path) -> Iterator[Beside]:
    with side_by_side("HEAD", root=repository) as found:
        yield found


def fake(order: Path, *, in_turns: bool) -> Workload:
    return Workload(
        commands=(("benchmarks.fake", str(order)),),
        in_turns=in_turns,
        limits="step_ms:3%",
        rounds=2,
        max_rounds=4,
    )


# Copies.


def test_base_is_the_revision_and_head_the_working_tree(repository: Path) -> None:
    with side_by_side("main", root=repository) as beside:
        folder = beside.harness.parent
        assert 'NAME = "b"' in (beside.base.tree / "fasttune" / "__init__.py").read_text()
        assert 'NAME = "h"' in (beside.head.tree / "fasttune" / "__init__.py").read_text()
        assert not (beside.base.tree / "fasttune" / "new.py").exists()
        assert (beside.head.tree / "fasttune" / "new.py").exists()
        assert not (beside.head.tree / "fasttune" / "__pycache__").exists()
        for side in beside.sides:
            assert (side.tree / "kernels" / "fasttune_kernels" / "__init__.py").exists()
            assert not (side.tree / "benchmarks").exists()
        assert (beside.harness / "benchmarks" / "fake.py").read_text() == WORKLOAD
        commit = git(repository, "rev-parse", "HEAD")
        assert beside.base.text == f"main ({commit[:12]})" and beside.base.commit == commit
        assert beside.head.text == f"the working tree ({commit[:12]} and 2 changed files)"
    assert not folder.exists()


def test_false_alarms_need_a_repository(tmp_path: Path) -> None:
    for folder in ("benchmarks", "fasttune", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.false_alarms"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "kernels")},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {tmp_path} is not a git repository that can be read")
    assert "Traceback" not in done.stderr


def test_nothing_is_left_after_ctrl_c(repository: Path) -> None:
    before = git(repository, "status", "--porcelain", "--ignored")
    with pytest.raises(KeyboardInterrupt), side_by_side("HEAD", root=repository) as beside:
        folder = beside.harness.parent
        raise KeyboardInterrupt
    assert not folder.exists()
    assert git(repository, "status", "--porcelain", "--ignored") == before
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_sigterm_is_as_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), harness.terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_revisions_that_are_not_there(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match="--base nowhere: the repository has no such revision"):
        commit_of("nowhere", repository)
    with pytest.raises(RevisionError, match="no such revision"):
        commit_of("--all", repository)
    git(repository, "commit", "--quiet", "--all", "--message=two")
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "shallow")
    with pytest.raises(RevisionError, match=r"this clone is shallow: .*fetch-depth: 0"):
        commit_of("HEAD~1", tmp_path / "shallow")
    (tmp_path / "plain").mkdir()
    with pytest.raises(RevisionError, match="is not a git repository"):
        commit_of("HEAD", tmp_path / "plain")
    git(repository, "rm", "--quiet", "-r", "fasttune")
    git(repository, "commit", "--quiet", "--message=three")
    with pytest.raises(RevisionError, match="has no folder fasttune/"):
        revisions.extract("HEAD", tmp_path / "plain", repository)


STEPS = ("--base", "HEAD", "--suite", "steps", "--smoke")


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--base", "no-such-revision"], "no-such-revision: the repository has no such revision"),
        (["--base", "HEAD", "--fail", "step_ms"], "'step_ms' is not a limit"),
        (["--base", "HEAD", "--fail", ""], "--fail is empty"),
        (["--base", "HEAD", "--rounds", "1"], "at least 2 rounds"),
        (["--base", "HEAD", "--rounds", "9", "--max-rounds", "4"], "no more than the most"),
        (["--base", "HEAD", "--smoke"], "belong to --suite steps"),
        ([*STEPS, "--case", "no such"], '--case "no such": no such training step. There are "flux'),
        ([*STEPS, "--case", "flux lora bf16 half b1 1024 eager"], "memory.activations"),
    ):
        assert main(["bench", "ab", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said


def test_a_suite_for_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ab, "_has_gpu", lambda: False)
    assert main(["bench", "ab", "--base", "HEAD", "--suite", "steps"]) == 2
    parser = argparse.ArgumentParser()
    ab.add_arguments(parser)
    case = "sdxl full bf16 recompute b1 1024 eager"
    workload = ab.workload_of(parser.parse_args([*STEPS, "--case", case]))
    (command,) = workload.commands
    assert command[0] == "benchmarks.gpu.steps" and command[-3:] == ("--case", case, "--smoke")
    assert workload.max_rounds == 2
    assert ab.workload_of(parser.parse_args([*STEPS, "--rounds=3"])).max_rounds == 3


def test_the_suite_for_gpus_has_what_users_run() -> None:
    chosen = [parse(command[-1]) for command in ab.SUITES["steps"].commands]
    assert {(case.model, case.train) for case in chosen if case.compiled} == {
        ("flux", "lora"),
        ("sdxl", "lora"),
    }
    assert set(chosen) <= set(cases())


# Processes, of a workload that takes no time.


def test_steps_take_turns_and_each_side_has_its_code(beside: Beside, tmp_path: Path) -> None:
    order = tmp_path / "order"
    found = run_round(beside, fake(order, in_turns=True), 0)
    assert order.read_text() == "bhhbbh"
    assert {side: row["name"] for side, (row,) in found.items()} == {"base": "b", "head": "h"}
    order.unlink()
    run_round(beside, fake(order, in_turns=True), 1)
    assert order.read_text() == "hbbhhb"


def test_runs_follow_each_other_where_they_cannot_share(beside: Beside, tmp_path: Path) -> None:
    order = tmp_path / "order"
    for index in range(2):
        run_round(beside, fake(order, in_turns=False), index)
    assert order.read_text() == "bbbhhh" + "hhhbbb"


def test_another_install_that_wins_is_found_out(
    beside: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "site"
    (elsewhere / "fasttune").mkdir(parents=True)
    (elsewhere / "fasttune" / "__init__.py").write_text("")
    (elsewhere / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {str(elsewhere)!r})"
    )
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    with pytest.raises(RevisionError, match=r"imports fasttune from .*site.* and not from .*base"):
        run_round(beside, fake(tmp_path / "order", in_turns=True), 0)


def test_the_working_tree_is_not_on_the_path(repository: Path, tmp_path: Path) -> None:
    inherited = os.pathsep.join([str(repository / "kernels"), str(tmp_path / "wheels"), ""])
    path = revisions.search_path(tmp_path / "h", tmp_path / "t", inherited, repository)
    names = ("h", "t", "t/kernels", "wheels")
    assert path.split(os.pathsep) == [str(tmp_path / name) for name in names]


def test_a_base_that_cannot_run_is_named(beside: Beside, tmp_path: Path) -> None:
    (beside.base.tree / "fasttune" / "__init__.py").write_text("")  # no NAME
    with pytest.raises(RevisionError) as caught:
        run_round(beside, fake(tmp_path / "order", in_turns=True), 0)
    message = str(caught.value)
    assert message.startswith(f"base, {beside.base.text}, cannot run this: AttributeError: module")
    assert "fake.py" in message  # the end of its traceback


def test_a_process_that_stops_early_or_says_nothing(beside: Beside, tmp_path: Path) -> None:
    code = beside.harness / "benchmarks" / "fake.py"
    code.write_text("raise SystemExit(3)")
    with pytest.raises(RevisionError, match="cannot run this: exit status 3"):
        run_round(beside, fake(tmp_path / "order", in_turns=True), 0)
    code.write_text("")
    with pytest.raises(RevisionError, match="printed no rows"):
        run_round(beside, fake(tmp_path / "order", in_turns=False), 0)


# Rounds and verdicts.


def rounds_of(ratio: float, noise: float, count: int, seed: int = 0) -> list[Round]:
    """Rounds of twenty steps each, of a known ratio, on a machine whose speed drifts by 30 %."""
    rng = np.random.default_rng(seed)
    rounds: list[Round] = []
    for _ in range(count):
        steps = 40 * rng.lognormal(0, 0.3) * rng.lognormal(0, 0.1, 20)
        pair = {"base": steps, "head": steps * ratio * rng.lognormal(0, noise)}
        rounds.append(
            {
                side: [
                    {
                        "measurement": "m",
                        "step_ms": float(np.median(values)),
                        "peak_gib": 8.0,
                        "recompiles": 0,
                        "checksum": 1.5,
                        "samples": {"step_ms": (values * rng.lognormal(0, 0.01, 20)).tolist()},
                    }
                ]
                for side, values in pair.items()
            }
        )
    return rounds


def judged(rounds: list[Round], *, step_by_step: bool = True) -> dict[str, Change]:
    limits = parse_limits("step_ms:3%")
    changes = ab_rounds.changes_of(rounds, limits, step_by_step=step_by_step)
    return {change.metric: change for change in changes}


def test_steps_of_the_same_index_are_compared() -> None:
    changes = judged(rounds_of(1.05, 0.003, 12))
    assert changes["step_ms"].outcome is Outcome.FAILS
    assert changes["step_ms"].ratio.value == pytest.approx(1.05, abs=0.005)
    assert changes["peak_gib"].outcome is changes["recompiles"].outcome is Outcome.EQUAL
    assert "checksum" not in changes
    assert judged(rounds_of(1.0, 0.003, 12))["step_ms"].outcome is Outcome.NOISE


def test_rounds_are_added_until_the_interval_is_settled() -> None:
    rounds = rounds_of(1.0, 0.012, 60)
    counts: list[int] = []

    def judge(done: Any) -> list[Change]:
        counts.append(len(done))
        return list(judged(done).values())

    done = series(rounds.__getitem__, judge, rounds=5, max_rounds=60)
    assert len(done) % 2 == 0 and 6 < len(done) < 60
    assert judged(done)["step_ms"].is_settled
    assert not judged(done[:-2])["step_ms"].is_settled
    loud = rounds_of(1.0, 0.2, 10, seed=1)
    assert len(series(loud.__getitem__, judge, rounds=4, max_rounds=9)) == 9
    clear = rounds_of(1.4, 0.03, 10)
    assert len(series(clear.__getitem__, judge, rounds=6, max_rounds=10)) == 6
    quiet = rounds_of(1.0, 0.001, 12)
    assert len(series(quiet.__getitem__, judge, rounds=7, max_rounds=12)) == 8  # an even number


class Runs:
    """Stands for `run_round`: rounds of the first series, then those of the second."""

    def __init__(self, *ratios: float) -> None:
        self.left = [each for seed, r in enumerate(ratios) for each in rounds_of(r, 0.002, 4, seed)]

    def __call__(self, *_: Any) -> Round:
        return self.left.pop(0)


@pytest.mark.parametrize(
    ("ratios", "alarms", "failures", "said"),
    [
        ((1.0,), 0, 0, "no difference seen"),
        ((1.06, 1.06), 1, 1, "past the limit, in both series: step_ms (m )."),
        ((1.06, 1.0), 1, 0, "did not confirm the alarm"),
    ],
)
def test_an_alarm_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ratios: tuple[float, ...],
    alarms: int,
    failures: int,
    said: str,
) -> None:
    runs = Runs(*ratios)
    monkeypatch.setattr(ab, "run_round", runs)
    monkeypatch.setattr(ab, "machine", lambda: {"commit": "of the tree", "changed_files": 2})
    base, head = (
        Side(name, name, commit, tmp_path, tmp_path)
        for name, commit in (("base", "0123456789abcdef"), ("head", None))
    )
    beside = Beside(base, head, tmp_path)
    workload = Workload(commands=(), in_turns=True, limits="", rounds=4, max_rounds=4)
    result = ab.measure(beside, workload, parse_limits("step_ms:3%,peak_gib:0.25%"))
    assert not runs.left  # as many series as were wanted
    assert (len(result.alarms), len(result.failures)) == (alarms, failures)
    assert said in ab.report(result, "title")
    rows = ab.rows_of(result, beside)
    assert [(row["side"], row["commit"]) for row in rows] == [
        ("base", "0123456789ab"),
        ("head", "of the tree"),
    ]
    assert all(len(row["samples"]["step_ms"]) == 4 * len(ratios) for row in rows)
    files = [tmp_path / f"{row['side']}.jsonl" for row in rows]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row))
    before, after = (compare.measured(compare.read_rows(file)) for file in files)
    assert compare.notes(before, after) == []  # both identities are the same
    summary = false_alarms.row_of([result])
    assert (summary["first_alarms"], summary["false_failures"]) == (alarms, failures)
    assert len(false_alarms.lines_of(1, result)) == 3 * len(ratios)


def test_a_limit_that_nothing_matches_ends_the_first_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ab, "run_round", Runs(1.0))
    side = Side("base", "", None, tmp_path, tmp_path)
    workload = Workload(commands=(), in_turns=True, limits="", rounds=4, max_rounds=4)
    with pytest.raises(compare.FasttuneError, match="both sides have no such metric"):
        ab.measure(Beside(side, side, tmp_path), workload, parse_limits("epoch_ms:3%"))


# The proof that it bites.

BEGIN = "            lr = trained.set_lr(step)\n"
END = "            if step % config.logging.every == 0:\n"


@pytest.mark.slow  # 5 minutes where nothing else runs: the loop itself, two series of processes
def test_a_loop_that_is_five_percent_slower_is_caught(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(clone))
    loop = clone / "fasttune" / "train.py"
    code = loop.read_text()
    assert code.count(BEGIN) == code.count(END) == 1
    code = code.replace(BEGIN, "            began = time.thread_time()\n" + BEGIN)
    wait = (
        "            until = time.thread_time() + 0.05 * (time.thread_time() - began)\n"
        "            while time.thread_time() < until:\n"
        "                pass\n"
    )
    loop.write_text(code.replace(END, wait + END))
    git(clone, "commit", "--quiet", "--all", "--message=slower")
    path = os.pathsep.join([str(clone), str(clone / "kernels")])
    done = subprocess.run(
        # Processor time alone: it is what the wait takes, and narrows on a busy machine, too.
        [sys.executable, "-m", "benchmarks", "ab", "--base=HEAD~1", "--fail=step_cpu_ms:3%"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "past the limit, in both series: step_cpu_ms" in done.stdout
