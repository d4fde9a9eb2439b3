"""`fasttune bench static`: what a training step takes, exactly, on a machine without a GPU.

Each module of GATES has `VERSIONS`, the packages its numbers depend on, and `rows()`. They run in
processes of their own, two at a time, and are compared with expected/static.json.
"""

import argparse
import functools
import hashlib
import importlib
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.harness import ROOT, Row, collect, emit, table
from benchmarks.static import expected as e
from fasttune.errors import FasttuneError

GATES = ("step", "graphs", "launches", "blocks", "codegen", "host", "python_calls")
"""Modules, the slowest first. A row may name another gate than its module's."""
DONE = "done"
"""Marks the last row of a module, so that one without cases is not taken for a failure."""
REPLACEMENT = e.EXPECTED.with_name("static.new.json")
CACHE = ROOT / ".cache" / "static"
CONSTRAINTS = "benchmarks/expected/constraints.txt"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one module found."""

    module: str
    gates: e.Gates
    versions: tuple[str, ...]
    """What its numbers depend on."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", action="append", choices=GATES, help="repeat for several")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default 2")
    parser.add_argument(
        "--fresh", action="store_true", help="count anew what is kept from the same sources"
    )
    parser.add_argument("--show", action="store_true", help="print every number that was found")
    parser.add_argument("--write", action="store_true", help="take over what was found")
    parser.add_argument("--reason", help="with --write: why numbers rose; goes into LOG.md")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail, too, where other versions of torch, triton or Python are installed than those "
        f"the expectation was made with; {CONSTRAINTS} has them",
    )


def run(args: argparse.Namespace) -> int:
    """0 if all is as expected, 1 if not."""
    if args.jobs < 1:
        raise FasttuneError(f"--jobs {args.jobs}: at least 1")
    begin = time.perf_counter()
    outcomes = list(find(args.gate or GATES, jobs=args.jobs, cache=None if args.fresh else CACHE))
    installed = installed_versions()
    problems = problems_of(outcomes)
    for problem in problems:
        print(f"PROBLEM  {problem}")
    if args.show:
        print(summary(outcomes))
    expectation = e.read()
    if args.write:
        return 1 if problems else write(outcomes, expectation, installed, args.reason)
    status = 1 if problems else 0
    status |= report(outcomes, expectation, installed, strict=args.strict)
    status |= report_history()
    print(f"{'FAILED' if status else 'ok'}, {time.perf_counter() - begin:.0f} s")
    return status


def find(modules: Sequence[str], *, jobs: int, cache: Path | None) -> Iterator[Outcome]:
    """Runs the modules and yields what they found, in their order."""
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(partial(_run_module, cache=cache), modules):
            count = sum(len(cases) for cases in outcome.gates.values())
            print(
                f"{outcome.module}: {count} cases, {outcome.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            yield outcome


def _run_module(module: str, cache: Path | None) -> Outcome:
    """From the cache if nothing changed that a number could depend on."""
    begin = time.perf_counter()
    kept = None if cache is None else cache / f"{module}-{fingerprint()}.json"
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
    else:
        found = collect([sys.executable, "-m", "benchmarks.static.gates", module], threads=1)
        if kept is not None:
            _keep(kept, module, found)
    *rows, last = found
    gates: e.Gates = {}
    for row in rows:
        row.pop("measurement")
        cases = gates.setdefault(row.pop("gate", module), {})
        case = row.pop("case")
        if case in cases:
            raise RuntimeError(f"gate {module}: two rows {case!r}")
        cases[case] = row
    return Outcome(module, gates, tuple(last["versions"]), time.perf_counter() - begin)


SOURCES = ("fasttune", "kernels", "csrc", "configs", "pyproject.toml")
SOURCES += tuple(
    f"benchmarks/{name}"
    for name in ("static", "models", "harness.py", "roofline.py", "gpus.toml", "command.py")
)
IGNORED = {"__pycache__"}
KINDS = {".py", ".toml", ".json", ".cu", ".cuh", ".h", ".cpp"}


@functools.cache
def fingerprint() -> str:
    """Of every file that the gates run or read, and of what they run on."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([installed_versions(), sys.version, platform.machine()]).encode())
    for name in SOURCES:
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            inside = path.relative_to(ROOT)
            if path.suffix in KINDS and path.is_file() and not IGNORED & set(inside.parts):
                digest.update(f"{inside}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    allowed = e.EXPECTED.with_name("codegen_allowed.toml")
    digest.update(allowed.read_bytes() if allowed.is_file() else b"")
    return digest.hexdigest()


def _keep(path: Path, module: str, rows: list[Row]) -> None:
    """Written beside and renamed; what an earlier state of the tree found goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{module}-*.json"):
        old.unlink(missing_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(rows), encoding="utf-8")
    beside.replace(path)


def problems_of(outcomes: Sequence[Outcome]) -> list[str]:
    """What must not be even if it is expected: rows that say so themselves."""
    return [
        f"`{gate} / {case}`: {row['problem']}"
        for outcome in outcomes
        for gate, cases in outcome.gates.items()
        for case, row in cases.items()
        if row.get("problem")
    ]


def installed_versions() -> dict[str, str]:
    """torch, triton and python, without what names a build."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def report(
    outcomes: Sequence[Outcome],
    expectation: e.Expectation,
    installed: dict[str, str],
    *,
    strict: bool,
) -> int:
    """Prints the differences and writes the replacement; 1 if there are any."""
    status = 0
    differences: list[e.Difference] = []
    found: e.Gates = {}
    for outcome in outcomes:
        other = {
            name: (expectation.versions[name], installed[name])
            for name in outcome.versions
            if expectation.versions.get(name, installed[name]) != installed[name]
        }
        if other:
            said = ", ".join(f"{n} {now}, not {then}" for n, (then, now) in other.items())
            print(
                f"NOT COMPARED  {outcome.module}: {said}. To compare: pip install -c {CONSTRAINTS} "
                + " ".join(sorted(set(other) - {"python"}))
            )
            status |= strict
            continue
        for gate, cases in outcome.gates.items():
            found.setdefault(gate, {}).update(cases)
    # A gate that several modules feed is compared when all have run.
    for gate, cases in found.items():
        old = expectation.gates.get(gate, {})
        if len(outcomes) < len(GATES):
            old = {case: row for case, row in old.items() if case in cases}
        differences += e.compare({gate: old}, {gate: cases})
    if not differences:
        return int(status)
    print(f"\n{len(differences)} values are not as in {e.EXPECTED.relative_to(ROOT)}:")
    for difference in differences:
        print(f"  {difference}")
    replacement = _replacement(expectation, found, installed)
    REPLACEMENT.write_text(e.to_json(replacement), encoding="utf-8")
    print(
        f"\nThe replacement is in {REPLACEMENT.relative_to(ROOT)}. If the change is meant, take it:"
    )
    print('  fasttune bench static --write --reason "why"')
    raised = [d for d in differences if d.is_raised]
    if raised:
        print("Raised numbers need their lines in benchmarks/LOG.md; --reason writes them:")
        for difference in raised:
            print(f"  {e.log_line(difference, 'WHY')}")
    return 1


def _replacement(
    expectation: e.Expectation, found: e.Gates, installed: dict[str, str]
) -> e.Expectation:
    """Cases that were not looked at stay."""
    gates = {gate: {**expectation.gates.get(gate, {}), **cases} for gate, cases in found.items()}
    return e.merged(expectation, gates, installed)


def report_history() -> int:
    """1 if the file was ever raised without a line in LOG.md."""
    bad = e.unexplained_raises(e.history(), e.LOG.read_text(encoding="utf-8"))
    for difference in bad:
        print(f"RAISED WITHOUT A LINE IN LOG.md  {difference.place}: {difference.change}")
    return 1 if bad else 0


def write(
    outcomes: Sequence[Outcome],
    expectation: e.Expectation,
    installed: dict[str, str],
    reason: str | None,
) -> int:
    """Takes over what was found. Raised numbers need a reason, which goes into LOG.md."""
    found: e.Gates = {}
    for outcome in outcomes:
        for gate, cases in outcome.gates.items():
            found.setdefault(gate, {}).update(cases)
    if len(outcomes) == len(GATES):
        replacement = e.merged(e.Expectation(expectation.versions, {}), found, installed)
    else:
        other = {n for n, v in installed.items() if expectation.versions.get(n, v) != v}
        if other:
            raise FasttuneError(
                f"other versions of {', '.join(sorted(other))} than the expectation's: write all "
                "gates together, without --gate"
            )
        replacement = _replacement(expectation, found, installed)
    differences = e.compare(expectation.gates, replacement.gates)
    raised = [d for d in differences if d.is_raised]
    same_versions = replacement.versions == expectation.versions
    if raised and same_versions and not reason:
        for difference in raised:
            print(f"  {difference}")
        raise FasttuneError(
            f'{len(raised)} numbers rose: give --reason "why", which is written into LOG.md'
        )
    e.EXPECTED.write_text(e.to_json(replacement), encoding="utf-8")
    REPLACEMENT.unlink(missing_ok=True)
    if raised and reason:
        lines = "\n".join(e.log_line(d, reason) for d in raised)
        _into_log(f"## {time.strftime('%Y-%m-%d')}: static gates raised\n\n{lines}\n\n")
    print(f"{len(differences)} values taken over into {e.EXPECTED.relative_to(ROOT)}")
    return 0


def _into_log(entry: str) -> None:
    """The log has the newest first."""
    text = e.LOG.read_text(encoding="utf-8")
    first = text.index("\n## ") + 1
    e.LOG.write_text(text[:first] + entry + text[first:], encoding="utf-8")


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line a case with its numbers."""
    lines = [["case", "values"]]
    for outcome in outcomes:
        for gate, cases in outcome.gates.items():
            for case, row in cases.items():
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
                lines.append([f"{gate} / {case}", json.dumps(numbers)])
    return table(lines)


def main() -> None:
    """In the child: prints the rows of one module."""
    module = importlib.import_module(f"benchmarks.static.{sys.argv[1]}")
    rows: Iterator[Row] = module.rows()
    for row in rows:
        emit(sys.argv[1], **row)
    emit(DONE, versions=list(module.VERSIONS))


if __name__ == "__main__":
    main()
