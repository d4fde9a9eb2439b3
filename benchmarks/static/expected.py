"""What the gates are expected to find: expected/static.json, and what a difference means.

The file is exact and two-sided: a number that rose is a regression, one that fell is an improvement
that nobody recorded, and either fails. So the file says what the code does, and its history what each
change did to it. A raised number needs its line in LOG.md.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row
from fasttune.errors import FasttuneError

EXPECTED = ROOT / "benchmarks" / "expected" / "static.json"
LOG = ROOT / "benchmarks" / "LOG.md"

Gates = dict[str, dict[str, Row]]
"""gate -> case -> values."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """The file's contents."""

    versions: dict[str, str]
    """Of torch, triton and python, as they were when it was written."""
    gates: Gates


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
        """Smaller is better everywhere. A bool or a text that changes is no raise."""
        numbers = (self.expected, self.found)
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            return False
        return bool(self.found > self.expected)

    @property
    def change(self) -> str:
        """`peak_gib 9.1 -> 9.6`: this text, in LOG.md, is what explains a raise."""
        return f"{self.key} {_short(self.expected)} -> {_short(self.found)}"

    def __str__(self) -> str:
        if not self.key:
            return f"{self.place}: {'gone' if self.found is None else 'new'}"
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
        return Expectation(versions=found["versions"], gates=found["gates"])
    except (ValueError, KeyError, TypeError) as error:
        raise FasttuneError(
            f"{origin} is no expectation ({error!r}); restore it with `git checkout {origin}`, or "
            "make it anew with `fasttune bench static --write`"
        ) from error


def read(path: Path = EXPECTED) -> Expectation:
    """The expectation, empty where there is no file yet."""
    if not path.exists():
        return Expectation(versions={}, gates={})
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
        f'{{\n "versions": {json.dumps(expectation.versions)},\n'
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


def merged(expectation: Expectation, found: Gates, versions: Mapping[str, str]) -> Expectation:
    """The replacement: what was found, and untouched what was not looked at."""
    return Expectation(
        versions={**expectation.versions, **versions}, gates={**expectation.gates, **found}
    )


def log_line(difference: Difference, reason: str) -> str:
    """The line of LOG.md that goes with a change."""
    return f"- {difference.place}: {difference.change}. {reason}"


def unexplained(differences: Iterable[Difference], log: str) -> list[Difference]:
    """Raised numbers that no line of the log names with the case and both values."""
    lines = log.splitlines()
    return [
        d
        for d in differences
        if d.is_raised and not any(d.place in line and d.change in line for line in lines)
    ]


def history(path: Path = EXPECTED) -> list[Expectation]:
    """The file as it is, and as the repository's commits had it, newest first."""
    name = path.relative_to(ROOT).as_posix()
    versions = [path.read_text(encoding="utf-8")] if path.exists() else []
    for commit in _git("log", "--format=%H", "-n", "200", "--", name).split():
        text = _git("show", f"{commit}:{name}")
        if text:  # absent in the commit that removed it
            versions.append(text)
    return [parse(text, name) for text in versions]


def unexplained_raises(states: Sequence[Expectation], log: str) -> list[Difference]:
    """Over the whole history, newest first: raises without a line in the log. Between states of
    other versions of torch, triton or python numbers may differ for no change of ours."""
    found = []
    for newer, older in zip(states, states[1:], strict=False):
        if newer.versions == older.versions:
            found += unexplained(compare(older.gates, newer.gates), log)
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )
    return done.stdout if done.returncode == 0 else ""
