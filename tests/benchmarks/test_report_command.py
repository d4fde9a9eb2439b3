"""`fasttune bench report` as a command: where the page goes, and what it says of rows it cannot use."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttune.cli import main

Report = Callable[..., int]
GOOD = json.dumps({"measurement": "loop", "step_ms": 1.0})


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """report(results, *arguments) -> exit status; the page goes to page.html."""

    def report(results: Path, *arguments: str) -> int:
        options = ["--results", str(results), "--expected", str(tmp_path / "absent.json")]
        return main(["bench", "report", "--out", str(tmp_path / "page.html"), *options, *arguments])

    return report


@pytest.mark.parametrize(
    ("text", "said", "status"),
    [
        ("", ["rows.jsonl has no rows"], 1),
        ("\n\n", ["rows.jsonl has no rows"], 1),
        ("no json\n[1]\n", ["rows.jsonl:1 is no JSON", "rows.jsonl:2 has no measurement"], 1),
        (f"no json\n{GOOD}\n", ["rows.jsonl:1 is no JSON"], 0),
        (f"{GOOD}\n", [], 0),
    ],
)
def test_what_cannot_be_used_is_said(
    report: Report,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    said: list[str],
    status: int,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    assert report(rows) == status
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.startswith("not used: ") for line in lines] == [True] * len(said) + [
        False
    ] * status
    assert all(part in line for part, line in zip(said, lines, strict=False))
    assert ("no rows that can be used" in captured.err) == bool(status)
    assert captured.out == f"{tmp_path / 'page.html'}\n"


def test_many_bad_rows_are_counted(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("no json\n" * 25 + GOOD)
    assert report(rows) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "and 15 more, at the end of the page"


def test_a_folder_without_rows(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path) == 1
    assert f"--results {tmp_path}: no rows that can be used" in capsys.readouterr().err


def test_where_no_page_can_be_written(
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(GOOD)

    def failing(code: int) -> str:
        def replace(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            assert report(rows) == 2
        return capsys.readouterr().err

    assert failing(errno.EROFS).strip().endswith("cannot be written (Read-only file system)")
    assert failing(errno.ENOSPC).strip().endswith("(No space left on device); free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert report(rows, "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path} is a folder: name a file, as {tmp_path / 'report.html'}" in said
    assert report(rows, "--out", str(rows / "page.html")) == 2
    assert "rows.jsonl: " in capsys.readouterr().err
