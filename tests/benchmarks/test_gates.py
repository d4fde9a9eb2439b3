"""The runner of the static gates: exact both ways, raises explained, nothing taken for compared."""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static import codegen, gates, host, lock, python_calls, sources, step, versions
from benchmarks.static import expected as e
from benchmarks.static.versions import CPU_LIBRARY
from fasttune.errors import FasttuneError

VERSIONS = {"torch": "2.13.0", "triton": "3.9.0", "python": "3.11", CPU_LIBRARY: "built"}
DEPENDS = {"memory": ["torch"]}
MEMORY = {"flux": {"peak_gib": 9.5, "module": "blocks.3", "parts": ["a", "b"]}}

Run = Callable[..., int]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with an expectation and a log."""
    path, log = tmp_path / "benchmarks/expected/static.json", tmp_path / "benchmarks/LOG.md"
    path.parent.mkdir(parents=True)
    path.write_text(e.to_json(e.Expectation(VERSIONS, {"memory": MEMORY}, DEPENDS)))
    log.write_text("# Benchmark log\n\nNewest first.\n\n## 2026-01-01: before\n\nOld.\n")
    monkeypatch.setattr(e, "ROOT", tmp_path)
    monkeypatch.setattr(e, "EXPECTED", path)
    monkeypatch.setattr(e, "LOG", log)
    monkeypatch.setattr(e.history, "__defaults__", (path,))
    monkeypatch.setattr(e.read, "__defaults__", (path,))
    monkeypatch.setattr(gates, "ROOT", tmp_path)
    monkeypatch.setattr(gates, "REPLACEMENT", path.with_name("static.new.json"))
    monkeypatch.setattr(lock, "MODULES", path.with_name("gates.lock"))
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(gates, "GATES", {"memory": ("memory",), "codegen": ("codegen",)})
    monkeypatch.setattr(gates, "installed_versions", lambda: dict(VERSIONS))
    git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "A state.")


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(memory rows, *arguments) -> exit status, with the modules' findings given."""

    def run(memory: dict[str, Any], *arguments: str, codegen: dict[str, Any] | None = None) -> int:
        outcomes = [
            gates.Outcome("memory", {"memory": memory}, ("torch",), 0.0),
            gates.Outcome("codegen", {"codegen": codegen} if codegen else {}, ("triton",), 0.0),
        ]
        monkeypatch.setattr(gates, "find", lambda modules, **_: outcomes)
        parser = argparse.ArgumentParser()
        gates.add_arguments(parser)
        return gates.run(parser.parse_args(arguments))

    return run


def kernel(**values: Any) -> dict[str, Any]:
    """The memory row with further columns: what a column means does not depend on its gate."""
    return {"flux": {**MEMORY["flux"], **values}}


def with_peak(peak: float) -> dict[str, Any]:
    return {"flux": {**MEMORY["flux"], "peak_gib": peak}}


def test_what_is_expected_passes(run: Run) -> None:
    assert run(MEMORY) == 0


@pytest.mark.parametrize(("peak", "raised"), [(9.6, True), (9.4, False)])
def test_a_number_fails_both_ways(
    run: Run, repository: Path, capsys: pytest.CaptureFixture[str], peak: float, raised: bool
) -> None:
    assert run(with_peak(peak)) == 1
    said = capsys.readouterr().out
    assert f"`memory / flux`: peak_gib 9.5 -> {peak}" in said
    assert ("(raised)" in said) == raised
    assert (f"- `memory / flux`: peak_gib 9.5 -> {peak}. WHY" in said) == raised
    replacement = e.read(repository / "benchmarks/expected/static.new.json")
    assert replacement.gates["memory"]["flux"]["peak_gib"] == peak


def test_new_gone_and_changed_cases_fail(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run({"sdxl": {"peak_gib": 1.0}}) == 1
    said = capsys.readouterr().out
    assert "`memory / flux`: gone" in said and "`memory / sdxl`: new" in said
    assert run({"flux": {**MEMORY["flux"], "parts": ["a", "c"]}}) == 1
    assert "`memory / flux`: parts: -b, +c" in capsys.readouterr().out
    assert run({"flux": {**MEMORY["flux"], "module": "blocks.4"}}) == 1


def test_a_raise_is_written_with_its_reason(run: Run, repository: Path) -> None:
    with pytest.raises(FasttuneError, match="--reason"):
        run(with_peak(9.6), "--write")
    assert run(MEMORY) == 0  # nothing was written
    assert run(with_peak(9.6), "--write", "--reason", "A larger table.") == 0
    log = (repository / "benchmarks/LOG.md").read_text()
    assert "- `memory / flux`: peak_gib 9.5 -> 9.6. A larger table.\n" in log
    assert log.index("A larger table") < log.index("## 2026-01-01")
    assert run(with_peak(9.6)) == 0
    commit(repository)
    assert run(with_peak(9.6)) == 0


def test_an_improvement_is_written_without_a_reason(run: Run, repository: Path) -> None:
    assert run(with_peak(9.0), "--write") == 0
    assert "9.0" not in (repository / "benchmarks/LOG.md").read_text()
    assert run(with_peak(9.0)) == 0


def test_a_raise_by_hand_is_found_even_after_later_commits(
    run: Run, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "benchmarks/expected/static.json"
    path.write_text(path.read_text().replace("9.5", "9.9"))
    assert run(with_peak(9.9)) == 1
    assert "WORSE WITHOUT A LINE" in capsys.readouterr().out
    commit(repository)
    path.write_text(path.read_text().replace("9.9", "9.8"))
    commit(repository)
    assert run(with_peak(9.8)) == 1
    assert "peak_gib 9.5 -> 9.9" in capsys.readouterr().out
    log = repository / "benchmarks/LOG.md"
    log.write_text(log.read_text() + "- `memory / flux`: peak_gib 9.5 -> 9.9. Needed.\n")
    assert run(with_peak(9.8)) == 0


def test_other_versions_are_not_compared_and_fail_when_strict(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gates, "installed_versions", lambda: {**VERSIONS, "torch": "2.14.0"})
    assert run(with_peak(11.0)) == 0
    said = capsys.readouterr().out
    assert "NOT COMPARED  memory: torch 2.14.0, not 2.13.0" in said and "constraints.txt" in said
    assert run(with_peak(11.0), "--strict") == 1


def test_a_library_that_is_not_built_is_another_version(
    run: Run, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(CPU_LIBRARY in each.VERSIONS for each in (host, python_calls, step))
    found = [gates.Outcome("memory", {"memory": with_peak(1.0)}, ("torch", CPU_LIBRARY), 0.0)]
    monkeypatch.setattr(gates, "installed_versions", lambda: {**VERSIONS, CPU_LIBRARY: "absent"})
    expectation = e.read(repository / "benchmarks/expected/static.json")
    absent = gates.installed_versions()
    assert gates.report(found, expectation, absent, strict=True) == 1
    said = capsys.readouterr().out
    assert "NOT COMPARED  memory: cpu library absent, not built." in said
    assert said.strip().endswith("pip install -e . where there is a C++ compiler")
    # A file from before it was looked at is compared, and what replaces it says how it was made.
    older = e.Expectation({"torch": "2.13.0"}, expectation.gates, DEPENDS)
    assert gates.report(found, older, absent, strict=False) == 1
    assert "peak_gib 9.5 -> 1" in capsys.readouterr().out
    new = e.read(repository / "benchmarks/expected/static.new.json")
    assert new.versions == {"torch": "2.13.0", CPU_LIBRARY: "absent"}
    assert new.depends == {"memory": [CPU_LIBRARY, "torch"]}
    assert e.same_versions("memory", new, older.versions)
    assert not e.same_versions("memory", new, VERSIONS)


def test_the_library_is_looked_for_where_the_gates_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune_kernels import cpu_library

    here = "built" if cpu_library.available() else "absent"
    assert versions.installed_versions()[CPU_LIBRARY] == here
    planted = tmp_path / "fasttune_kernels"
    planted.mkdir()
    (planted / "__init__.py").write_text("")
    monkeypatch.setattr(versions, "environment", lambda: {"PYTHONPATH": str(tmp_path)})
    for text in ("True", "False"):
        (planted / "cpu_library.py").write_text(f"def available() -> bool:\n    return {text}\n")
        found = versions.installed_versions()[CPU_LIBRARY]
        assert found == ("built" if text == "True" else "absent")


def test_a_problem_fails_and_cannot_be_written(
    run: Run, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spilling = {"norm / sm_89": {"registers": 255, "problem": "1656 B spilled"}}
    before = (repository / "benchmarks/expected/static.json").read_text()
    assert run(MEMORY, "--write", codegen=spilling) == 1
    assert (repository / "benchmarks/expected/static.json").read_text() == before
    assert "PROBLEM  `codegen / norm / sm_89`: 1656 B spilled" in capsys.readouterr().out


def test_a_damaged_expectation_says_what_to_do(run: Run, repository: Path) -> None:
    (repository / "benchmarks/expected/static.json").write_text("{")
    with pytest.raises(FasttuneError, match="git checkout"):
        run(MEMORY)


def test_the_file_has_one_case_a_line() -> None:
    both = {"memory": {**MEMORY, "sdxl": {"peak_gib": 1.0}}}
    text = e.to_json(e.Expectation(VERSIONS, both, DEPENDS))
    assert json.loads(text)["gates"]["memory"]["sdxl"] == {"peak_gib": 1.0}
    assert sum('"peak_gib"' in line for line in text.splitlines()) == 2
    assert e.parse(text, "x") == e.Expectation(VERSIONS, both, DEPENDS)


def test_a_gate_that_finds_nothing_fails(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run({}) == 1
    assert "`memory / flux`: gone" in capsys.readouterr().out


def test_what_is_gone_needs_a_reason(run: Run, repository: Path) -> None:
    with pytest.raises(FasttuneError, match="--reason"):
        run({}, "--write")
    with pytest.raises(FasttuneError, match="--reason"):
        run({}, "--write", "--reason", "WHY")
    assert run({}, "--write", "--reason", "Not trained any more") == 0
    log = (repository / "benchmarks/LOG.md").read_text()
    assert "- `memory / flux`: gone. Not trained any more.\n" in log
    commit(repository)
    assert run({}) == 0


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ({"matrix": "wgmma"}, {"matrix": "mma.sync"}, "matrix wgmma -> mma.sync"),
        ({"matrix": "mma.sync"}, {"matrix": "none"}, "matrix mma.sync -> none"),
        ({"losses_agree": True}, {"losses_agree": False}, "losses_agree True -> False"),
        ({"spill_bytes": 0}, {}, "spill_bytes 0 -> None"),
        ({"matrix": "none"}, {"matrix": "mma.sync"}, None),
        ({"losses_agree": False}, {"losses_agree": True}, None),
        ({}, {"matrix": "none", "losses_agree": False}, None),
        ({"compiler": "nvrtc 13.5"}, {"compiler": "nvrtc 13.6"}, None),
    ],
)
def test_what_is_worse_without_a_larger_number_needs_a_reason(
    run: Run, repository: Path, before: dict[str, Any], after: dict[str, Any], change: str | None
) -> None:
    assert run(kernel(**before), "--write") == 0
    commit(repository)
    log = repository / "benchmarks/LOG.md"
    if change is None:
        assert run(kernel(**after), "--write") == 0 and run(kernel(**after)) == 0
        return
    with pytest.raises(FasttuneError, match="1 values are worse or gone"):
        run(kernel(**after), "--write")
    path = repository / "benchmarks/expected/static.json"
    recorded = path.read_text()
    assert run(kernel(**after), "--write", "--reason", "Meant") == 0
    assert f"- `memory / flux`: {change}. Meant.\n" in log.read_text()
    log.write_text(log.read_text().replace(change, "something else"))
    assert path.read_text() != recorded and run(kernel(**after)) == 1  # as if by hand


def test_a_reason_for_each_gate(run: Run, repository: Path) -> None:
    spills = {"norm / sm_89": {"spill_bytes": 0}}
    assert run(MEMORY, "--write", codegen=spills) == 0
    raised = {"norm / sm_89": {"spill_bytes": 8}}
    with pytest.raises(FasttuneError, match="1 values are worse"):
        run(with_peak(9.6), "--write", "--reason", "codegen: A longer row", codegen=raised)
    reasons = ("--reason", "codegen: A longer row", "--reason", "A larger table: see above.")
    assert run(with_peak(9.6), "--write", *reasons, codegen=raised) == 0
    log = (repository / "benchmarks/LOG.md").read_text()
    assert "- `codegen / norm / sm_89`: spill_bytes 0 -> 8. A longer row.\n" in log
    assert "- `memory / flux`: peak_gib 9.5 -> 9.6. A larger table: see above.\n" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reason", "why"), "add --write"),
        (("--write", "--reason", "one", "--reason", "two"), "one for all values"),
        (("--write", "--reason", "memory: "), "one for a gate"),
    ],
)
def test_reasons_that_would_be_lost(run: Run, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(FasttuneError, match=message):
        run(with_peak(9.6), *arguments)


def test_a_reason_that_nothing_needs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(with_peak(9.0), "--write", "--reason", "why") == 0
    assert "LOG.md is as it was, without the reason" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "- `memory / flux`: peak_gib 9.5 -> 9.61. Another number.",
        "- `memory / flux`: peak_gib 9.5 -> 9.6. WHY",
        "- `memory / flux`: peak_gib 9.5 -> 9.6. ",
        "- `memory / flux2`: peak_gib 9.5 -> 9.6. Another case.",
    ],
)
def test_a_line_that_explains_nothing(run: Run, repository: Path, line: str) -> None:
    path, log = repository / "benchmarks/expected/static.json", repository / "benchmarks/LOG.md"
    path.write_text(path.read_text().replace("9.5", "9.6"))
    log.write_text(f"{log.read_text()}{line}\n")
    assert run(with_peak(9.6)) == 1
    log.write_text(f"{log.read_text()}- `memory / flux`: peak_gib 9.5 -> 9.6. Needed.\n")
    assert run(with_peak(9.6)) == 0


def test_a_line_explains_one_raise(run: Run, repository: Path) -> None:
    path, log = repository / "benchmarks/expected/static.json", repository / "benchmarks/LOG.md"
    log.write_text(f"{log.read_text()}- `memory / flux`: peak_gib 9.5 -> 9.6. Needed.\n")
    for before, after in (("9.5", "9.6"), ("9.6", "9.5"), ("9.5", "9.6")):
        path.write_text(path.read_text().replace(before, after))
        commit(repository)
    assert run(with_peak(9.6)) == 1


def test_branches_side_by_side_accuse_nobody(run: Run, repository: Path) -> None:
    path = repository / "benchmarks/expected/static.json"
    between = {f"case {i}": {"peak_gib": 1.0} for i in range(8)}  # git merges what is apart
    two = {"a": {"peak_gib": 9.5}, **between, "z": {"peak_gib": 9.0}}
    path.write_text(e.to_json(e.Expectation(VERSIONS, {"memory": two}, DEPENDS)))
    commit(repository)
    git(repository, "checkout", "-q", "-b", "one")
    path.write_text(path.read_text().replace("9.5", "8.5"))
    commit(repository)
    git(repository, "checkout", "-q", "main")
    path.write_text(path.read_text().replace("9.0", "8.0"))
    commit(repository)
    git(repository, "merge", "-q", "--no-ff", "-m", "Merged.", "one")
    assert run({"a": {"peak_gib": 8.5}, **between, "z": {"peak_gib": 8.0}}) == 1  # flux is gone
    log = repository / "benchmarks/LOG.md"
    log.write_text(f"{log.read_text()}- `memory / flux`: gone. Replaced.\n")
    assert run({"a": {"peak_gib": 8.5}, **between, "z": {"peak_gib": 8.0}}) == 0


def test_a_shallow_clone_says_that_it_cannot_check(
    run: Run,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit(repository)
    shallow = tmp_path_factory.mktemp("shallow") / "clone"
    git(repository, "clone", "-q", "--depth", "1", f"file://{repository}", str(shallow))
    monkeypatch.setattr(e, "ROOT", shallow)
    monkeypatch.setattr(e.history, "__defaults__", (shallow / "benchmarks/expected/static.json",))
    assert run(MEMORY) == 0
    assert "LOG.md is not checked" in capsys.readouterr().out


def test_another_triton_hides_no_raise_of_memory(run: Run, repository: Path) -> None:
    path = repository / "benchmarks/expected/static.json"
    newer = e.Expectation({**VERSIONS, "triton": "3.10.0"}, {"memory": with_peak(9.9)}, DEPENDS)
    path.write_text(e.to_json(newer))
    states = e.history(path)
    assert states is not None
    (found,) = e.unexplained_raises(states, "")
    assert found.change == "peak_gib 9.5 -> 9.9"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """cached() runs one module on a tree of one file, whose contents are its number."""
    source = tmp_path / "fasttune" / "number.py"
    source.parent.mkdir()
    source.write_text("1")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET")  # of the tests

    def collect(command: list[str], *, threads: int) -> list[dict[str, Any]]:
        collect.runs += 1  # type: ignore[attr-defined]
        row = {"measurement": "memory", "case": "a", "u": int(source.read_text())}
        if row["u"] == 13:
            row["problem"] = "unlucky"
        after = tmp_path / "edit"
        if after.exists():  # somebody edits while the module runs
            source.write_text(after.read_text())
        return [row, {"measurement": "done", "versions": ["torch"]}]

    collect.runs = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(gates, "collect", collect)

    def run() -> dict[str, Any]:
        before = sources.of_sources()
        outcome = gates._run_module("memory", tmp_path / "cache", jobs=2)
        is_of_sources = before == sources.of_sources() and not sources.of_environment()
        assert outcome.state == (before if is_of_sources else "")
        return {**outcome.gates["memory"]["a"], "runs": collect.runs}  # type: ignore[attr-defined]

    return run


def test_results_are_kept_until_a_source_changes(
    cached: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "fasttune" / "number.py"
    assert cached() == {"u": 1, "runs": 1}
    assert cached() == {"u": 1, "runs": 1}
    source.write_text("2")
    assert cached() == {"u": 2, "runs": 2}
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setenv("TORCHINDUCTOR_MAX_FUSION_SIZE", "3")
    assert cached()["runs"] == 3
    (tmp_path / "fasttune" / "_cpu.so").write_bytes(b"built")
    assert cached()["runs"] == 4 and cached()["runs"] == 4
    source.write_text("13")
    assert cached()["runs"] == 5 and cached()["runs"] == 6  # problems are not kept


def test_what_was_found_while_a_file_was_edited_is_not_kept(
    cached: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    source, edit = tmp_path / "fasttune" / "number.py", tmp_path / "edit"
    edit.write_text("2")
    assert cached() == {"u": 1, "runs": 1}
    edit.unlink()
    source.write_text("1")
    assert cached() == {"u": 1, "runs": 2}


@pytest.fixture
def locked(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """locked(found, *arguments) -> the modules that were counted, in a run on four slow ones whose one
    number is `found`."""
    (repository / "fasttune").mkdir()
    (repository / "fasttune" / "number.py").write_text("1")
    monkeypatch.setattr(gates, "GATES", {name: (name,) for name in gates.LOCKED})
    monkeypatch.setattr(gates, "CACHE", repository / "cache")
    monkeypatch.delenv("TRITON_INTERPRET")  # of the tests

    def run(found: int, *arguments: str) -> list[str]:
        counted = []

        def collect(command: list[str], *, threads: int) -> list[dict[str, Any]]:
            counted.append(command[3])
            row = {"measurement": command[3], "case": "a", "u": found}
            return [row, {"measurement": "done", "versions": ["torch"]}]

        monkeypatch.setattr(gates, "collect", collect)
        for kept in (repository / "cache").glob("*"):
            kept.unlink()  # as in a clean clone
        parser = argparse.ArgumentParser()
        gates.add_arguments(parser)
        run.status = gates.run(parser.parse_args(arguments))  # type: ignore[attr-defined]
        return counted

    return run


def test_all_but_one_are_as_recorded_where_no_source_changed(
    locked: Callable[..., list[str]],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sorted(locked(1, "--write", "--reason", "first")) == sorted(gates.LOCKED)
    (sampled,) = locked(1)
    assert locked.status == 0  # type: ignore[attr-defined]
    assert capsys.readouterr().err.count("1 cases, as recorded") == 3
    assert locked(1) == [sampled]
    assert len(locked(1, "--fresh")) == 4
    # What the sample finds is compared.
    assert locked(2) == [sampled] and locked.status == 1  # type: ignore[attr-defined]

    source, expected = repository / "fasttune" / "number.py", e.EXPECTED.read_text()
    source.write_text("2")
    assert len(locked(1)) == 4  # of other sources
    source.write_text("1")
    e.EXPECTED.write_text(expected.replace('"u": 1', '"u": 0'))
    assert len(locked(1)) == 4  # by hand
    e.EXPECTED.write_text(expected)
    # Every change of a source changes all lines of the lock, which then is what branches conflict in.
    lock.MODULES.write_text("<<<<<<< HEAD\n")
    with pytest.raises(FasttuneError, match=r"gates.lock:1: .*--write"):
        locked(1)
    # Nor is what was counted under a compiler's variables of the sources alone.
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_MAX_FUSION_SIZE", "3")
        locked(1, "--write")
    assert len(locked(1)) == 4
    locked(1, "--write")
    assert locked(1) == [sampled]
    monkeypatch.setattr(gates, "installed_versions", lambda: {**VERSIONS, "torch": "2.14.0"})
    assert len(locked(1)) == 4  # with other versions


def test_each_module_is_the_sample_of_some_states(monkeypatch: pytest.MonkeyPatch) -> None:
    states, values = [f"{number:024x}" for number in range(6)], {"a": {"u": 1}}
    depends = {gate: ["torch"] for module in gates.LOCKED for gate in gates.GATES[module]}
    expectation = e.Expectation(VERSIONS, dict.fromkeys(depends, values), depends)
    drawn = []
    for state in states:
        digests = {
            module: lock.digest(state, dict.fromkeys(gates.GATES[module], values))
            for module in gates.LOCKED
        }
        monkeypatch.setattr(lock, "read", lambda path, digests=digests, **_: digests)
        monkeypatch.setattr(sources, "of_sources", lambda state=state: state)
        known = gates.recorded(list(gates.GATES), expectation, VERSIONS)
        drawn += {*gates.LOCKED} - {*known}
    assert drawn == [*gates.SAMPLED] * 2


def test_a_gate_that_compiles_gets_the_number_of_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def collect(command: list[str], *, threads: int) -> list[dict[str, Any]]:
        commands.append(command[3:])
        return [{"measurement": "done", "versions": []}]

    monkeypatch.setattr(gates, "collect", collect)
    list(gates.find(["codegen", "host"], jobs=1, cache=None))
    assert commands == [["codegen", "1", "--fresh"], ["host", "1", "--fresh"]]

    asked = []

    def inspect(*_: Any, workers: int, **__: Any) -> Iterator[dict[str, Any]]:
        asked.append(workers)
        return iter(())

    monkeypatch.setattr(codegen, "inspect", inspect)
    monkeypatch.setattr(
        codegen, "launches_in_steps", lambda listed: []
    )  # not where kernels interpret
    monkeypatch.setattr(host, "rows", lambda: iter([{"case": "a", "calls": 1}]))
    for command in (["codegen", "3"], ["codegen", "1", "--fresh"], ["host", "3"]):
        monkeypatch.setattr("sys.argv", ["gates.py", *command])
        gates.main()
    assert asked == [3, 1]
    assert capsys.readouterr().out.count('"done"') == 3
