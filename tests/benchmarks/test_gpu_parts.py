"""Parts as processes: crashes, deadlines, and several at once."""

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.gpu import parts

_PART = """
import json, os, sys, time
names = [a for a in sys.argv[1:] if not a.startswith("--")]
for name in names:
    print("begin: " + name, flush=True)
    print("row: " + json.dumps({"measurement": "m", "case": name}), flush=True)
    if name == "crash": os.abort()
    if name == "once" and "--safe" not in sys.argv: sys.exit("a library broke")
    if name == "graph" and "--no-graphs" not in sys.argv:
        print("retry: --no-graphs", flush=True)
        sys.exit("cannot be captured")
    if name == "slow": time.sleep(60)
    print("absent: thing: why", flush=True)
    print("end: " + name, flush=True)
"""


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "part_of_a_test.py").write_text(_PART)
    environment = harness.environment()
    monkeypatch.setattr(
        harness, "environment", lambda: {**environment, "PYTHONPATH": str(tmp_path)}
    )
    monkeypatch.setattr(parts, "LEAST_S", 0.1)
    return "part_of_a_test"


def _run(part: str, items: list[str], seconds: float = 30, **options: Any) -> Any:
    said, rows = parts.Said(), []
    left = parts.run_items(
        part,
        items,
        deadline=time.monotonic() + seconds,
        said=said,
        on_row=lambda row: rows.append(row["case"]),
        **options,
    )
    return left, rows, said


def test_a_crash_loses_only_its_item(part: str) -> None:
    left, rows, said = _run(part, ["a", "crash", "b"])
    assert (left, rows) == ([], ["a", "b"])
    assert said.failed == [("crash", "killed by SIGABRT")]
    assert said.absent == ["thing: why"]


def test_a_crashed_item_is_tried_again_without_libraries(part: str) -> None:
    left, rows, said = _run(part, ["once", "b"], on_crash=("--safe",))
    assert (left, rows, said.failed) == ([], ["once", "b"], [])
    assert said.notes == ["once: a library broke; tried again with --safe"]


def test_an_item_may_ask_for_a_new_process(part: str) -> None:
    left, rows, said = _run(part, ["graph", "once"], on_crash=("--safe",))
    assert (left, rows, said.failed) == ([], ["graph", "once"], [])
    assert said.notes[0] == "graph: cannot be captured; tried again with --no-graphs"


def test_the_deadline_ends_a_part(part: str) -> None:
    left, rows, said = _run(part, ["a", "slow", "b"], seconds=2)
    assert left == ["slow", "b"]
    assert rows == ["a", "slow"] and not said.failed  # its rows until then count


def test_a_part_that_does_not_start_fails(part: str) -> None:
    left, rows, said = _run("no_such_module", ["a", "b"])
    assert (left, rows) == ([], [])
    assert [item for item, _ in said.failed] == ["a", "b"]
    assert "no_such_module" in said.failed[0][1]


def test_items_are_shared_among_processes(part: str) -> None:
    said, rows = parts.Said(), []
    left = parts.run_beside(
        part,
        ["a", "slow", "b", "crash", "c"],
        processes=2,
        deadline=time.monotonic() + 3,
        said=said,
        on_row=lambda row: rows.append(row["case"]),
    )
    # the first has a, b and c, the second slow and crash
    assert left == ["slow", "crash"] and sorted(rows) == ["a", "b", "c", "slow"]
    assert not said.failed
    assert parts.run_beside(part, [], processes=2, deadline=0.0, said=said, on_row=print) == []
