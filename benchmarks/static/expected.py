"""What the gates are expected to find: expected/static.json, and what a difference means.

The file is exact and two-sided: a number that rose is a regression, one that fell is an improvement
that nobody recorded, and either fails. So the file says what the code does, and its history what each
change did to it. What is worse or gone needs its line in LOG.md.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row
from benchmarks.static.versions import differing
from fasttune.errors import FasttuneError

EXPECTED = ROOT / "benchmarks" / "expected" / "static.json"
LOG = ROOT / "benchmarks" / "LOG.md"

DERIVED = "step_ms "
"""Begins keys that follow from others of their row, whose lines in the log explain them, too."""

MATRIX = "matrix"
"""The key whose text is better than "none": the matrix instruction of a kernel."""

Gates = dict[str, dict[str, Row]]
"""gate -> case -> values."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """The file's contents."""

    versions: dict[str, str]
    """Of torch, triton, python and so on (versions.py), as they were when it was written."""
    gates: Gates
    depends: dict[str, list[str]]
    """gate -> of which versions its numbers are a function."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is not as expected."""

    gate: str
    case: str
    key: str
    """Empty where the whole case is new or gone."""
    expected: Any
    found: Any

    @property
    def place(self) -> str:
        return f"`{self.gate} / {self.case}`"

    @property
    def is_raised(self) -> bool:
        """Smaller is better everywhere."""
        numbers = (self.expected, self.found)
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            return False
        return bool(self.found > self.expected)

    @property
    def is_gone(self) -> bool:
        """The case, or a value of it, is no longer looked at."""
        return self.found is None

    @property
    def is_lost(self) -> bool:
        """What held does not hold any more, or a kernel is without its matrix instruction."""
        if self.key == MATRIX:
            return self.expected not in (None, "none")
        return self.expected is True and self.found is False

    @property
    def needs_reason(self) -> bool:
        """Other texts and lists, such as where the peak falls, may change without one."""
        raised = self.is_raised and not self.key.startswith(DERIVED)
        return raised or self.is_gone or self.is_lost

    @property
    def change(self) -> str:
        """`peak_gib 9.1 -> 9.6`: this text, in LOG.md, is what explains it."""
        if not self.key:
            return "gone" if self.found is None else "new"
        return f"{self.key} {_short(self.expected)} -> {_short(self.found)}"

    def __str__(self) -> str:
        if not self.key:
            return f"{self.place}: {self.change}"
        note = "  (raised)" if self.is_raised else ""
        if isinstance(self.expected, list) and isinstance(self.found, list):
            less = [f"-{item}" for item in self.expected if item not in self.found]
            more = [f"+{item}" for item in self.found if item not in self.expected]
            changed = ", ".join([*less, *more][:6]) or "another order"
            return f"{self.place}: {self.key}: {changed}"
        return f"{self.place}: {self.change}{note}"


def _short(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str, origin: str) -> Expectation:
    """FasttuneError for a file that is not an expectation."""
    try:
        found = json.loads(text)
        # Without "depends", as the first states of the file are, any version counts.
        return Expectation(found["versions"], found["gates"], found.get("depends", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise FasttuneError(
            f"{origin} is no expectation ({error!r}); restore it with `git checkout {origin}`, or "
            "make it anew with `fasttune bench static --write`"
        ) from error


def read(path: Path = EXPECTED) -> Expectation:
    """The expectation, empty where there is no file yet."""
    if not path.exists():
        return Expectation({}, {}, {})
    return parse(path.read_text(encoding="utf-8"), str(path))


def to_json(expectation: Expectation) -> str:
    """One case a line, so that a diff shows what changed."""
    gates = []
    for gate, cases in sorted(expectation.gates.items()):
        lines = [
            f"   {json.dumps(case)}: {json.dumps(row, ensure_ascii=False)}"
            for case, row in sorted(cases.items())
        ]
        gates.append(f"  {json.dumps(gate)}: {{\n" + ",\n".join(lines) + "\n  }")
    return (
        f'{{\n "versions": {json.dumps(expectation.versions, sort_keys=True)},\n'
        f' "depends": {json.dumps(expectation.depends, sort_keys=True)},\n'
        ' "gates": {\n' + ",\n".join(gates) + "\n }\n}\n"
    )


def compare(expected: Gates, found: Gates) -> list[Difference]:
    """Every difference, both ways, in the order of the cases."""
    differences = []
    for gate in sorted({*expected, *found}):
        old, new = expected.get(gate, {}), found.get(gate, {})
        for case in sorted({*old, *new}):
            if case not in old or case not in new:
                differences.append(Difference(gate, case, "", old.get(case), new.get(case)))
                continue
            differences += [
                Difference(gate, case, key, old[case].get(key), new[case].get(key))
                for key in sorted({*old[case], *new[case]})
                if old[case].get(key) != new[case].get(key)
            ]
    return differences


def log_line(difference: Difference, reason: str) -> str:
    """The line of LOG.md that goes with a change."""
    return f"- {difference.place}: {difference.change}. {reason}"


NO_REASON = "WHY"
"""Stands where a reason is to be written."""


def is_reason(text: str, begin: str = "") -> bool:
    """Whether something is said after `begin`."""
    return text.removeprefix(begin).strip(" .") not in ("", NO_REASON)


def unexplained(differences: Iterable[Difference], log: str) -> list[Difference]:
    """What needs a reason and has no line in the log: each takes one of its own, with case, both
    values and the reason."""
    lines = [line.strip() for line in log.splitlines()]
    found = []
    for difference in differences:
        if not difference.needs_reason:
            continue
        begin = log_line(difference, "")
        line = next((x for x in lines if x.startswith(begin) and is_reason(x, begin)), None)
        if line is None:
            found.append(difference)
        else:
            lines.remove(line)
    return found


def history(path: Path = EXPECTED) -> list[Expectation] | None:
    """The file as it is, and as the branch's commits had it, newest first. None where git does not
    have them all: no repository, or a shallow clone."""
    name = path.relative_to(ROOT).as_posix()
    if _git("rev-parse", "--is-shallow-repository") != "false\n":
        return None
    versions = [path.read_text(encoding="utf-8")] if path.exists() else []
    # Along first parents alone: two branches side by side are no change from one to the other.
    for commit in _git("log", "--first-parent", "--format=%H", "-n", "200", "--", name).split():
        text = _git("show", f"{commit}:{name}")
        if text:  # absent in the commit that removed it
            versions.append(text)
    return [parse(text, name) for text in versions]


def unexplained_raises(states: Sequence[Expectation], log: str) -> list[Difference]:
    """Over the whole history, newest first: what has no line in the log. Between states of other
    versions a gate's numbers may differ for no change of ours."""
    differences = []
    for newer, older in zip(states, states[1:], strict=False):
        for gate in sorted({*older.gates, *newer.gates}):
            if same_versions(gate, newer, older.versions):
                before, now = older.gates.get(gate, {}), newer.gates.get(gate, {})
                differences += compare({gate: before}, {gate: now})
    return unexplained(differences, log)


def same_versions(gate: str, expectation: Expectation, versions: Mapping[str, str]) -> bool:
    """Whether the gate's numbers were made with these versions of what they depend on."""
    names = expectation.depends.get(gate, list(expectation.versions))
    return not differing(names, expectation.versions, versions)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )
    return done.stdout if done.returncode == 0 else ""
