"""`fasttune bench static`: what a training step takes, exactly, on a machine without a GPU.

Each module of GATES has `VERSIONS`, the packages its numbers depend on, and `rows()`. They run in
processes of their own, two at a time, and are compared with expected/static.json.
"""

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from benchmarks.harness import ROOT, Row, collect, emit, table
from benchmarks.static import expected as e
from benchmarks.static import lock, sources
from benchmarks.static.versions import CONSTRAINTS, advice, differing, installed_versions
from fasttune.errors import FasttuneError

GATES = {
    "step": ("memory", "flops", "launches"),
    "graphs": ("graphs",),
    "blocks": ("blocks",),
    "compiled_launches": ("compiled_launches",),
    "host": ("host",),
    "python_calls": ("python_calls",),
    "codegen": ("codegen",),
}
"""Module -> the gates its rows belong to. A row of several names its own. The slowest is first, but for
codegen, which compiles only what changed and a twentieth of the rest."""
LOCKED = ("step", "graphs", "blocks", "compiled_launches")
"""Modules that take minutes: they are counted where a source changed since their values were written, and
one of `SAMPLED` all the same."""
SAMPLED = ("graphs", "blocks", "compiled_launches")
"""`step` takes as long as two of these; with --fresh it is counted, too."""
DONE = "done"
"""Marks the last row of a module, so that one without cases is not taken for a failure."""
FRESH = "--fresh"
"""To a child: keeps nothing from before, wherever it is kept."""
REPLACEMENT = e.EXPECTED.with_name("static.new.json")
CACHE = ROOT / ".cache" / "static"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one module found."""

    module: str
    gates: e.Gates
    versions: tuple[str, ...]
    """What its numbers depend on."""
    seconds: float
    digests: dict[str, str] = field(default_factory=dict)
    """Of what its rows were made from, where they say so: lock.py."""
    state: str = ""
    """Of the sources that it ran on; none where they changed meanwhile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", action="append", choices=GATES, help="repeat for several")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes at a time, and compilers; default 2"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="count anew what is kept from the same sources"
    )
    parser.add_argument("--show", action="store_true", help="print every number that was found")
    parser.add_argument("--write", action="store_true", help="take over what was found")
    parser.add_argument(
        "--reason",
        action="append",
        help="with --write: why values are worse or gone; goes into LOG.md. Again for more: "
        '"host: why" is of that gate alone',
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail, too, where other versions of torch, triton or Python are installed than those "
        f"the expectation was made with ({CONSTRAINTS} has them), or csrc/cpu is not built",
    )


def run(args: argparse.Namespace) -> int:
    """0 if all is as expected, 1 if not."""
    if args.jobs < 1:
        raise FasttuneError(f"--jobs {args.jobs}: at least 1")
    reasons = reasons_of(args.reason or ())
    if reasons and not args.write:
        raise FasttuneError("--reason is written into LOG.md together with the values: add --write")
    begin = time.perf_counter()
    installed, modules = installed_versions(), args.gate or list(GATES)
    known = {} if args.fresh else recorded(modules, e.read(), installed, writing=args.write)
    cache = None if args.fresh else CACHE
    outcomes = list(find(modules, jobs=args.jobs, cache=cache, known=known))
    problems = problems_of(outcomes)
    for problem in problems:
        print(f"PROBLEM  {problem}")
    if args.show:
        print(summary(outcomes))
    expectation = e.read()
    if args.write:
        return 1 if problems else write(outcomes, expectation, installed, reasons)
    status = 1 if problems else 0
    status |= report(outcomes, expectation, installed, strict=args.strict)
    status |= report_history()
    print(f"{'FAILED' if status else 'ok'}, {time.perf_counter() - begin:.0f} s")
    return status


def reasons_of(given: Sequence[str]) -> dict[str, str]:
    """Gate -> why its values are worse, of texts that begin with a gate; "" -> why all others are.
    FasttuneError for a text that says nothing, and for two in one place."""
    gates = {gate for names in GATES.values() for gate in names}
    found: dict[str, str] = {}
    for text in given:
        begin, _, rest = text.partition(":")
        gate, reason = (begin, rest) if begin in gates else ("", text)
        if not e.is_reason(reason) or gate in found:
            raise FasttuneError(
                f'--reason {text!r}: one for all values ("why"), or one for a gate ("host: why")'
            )
        found[gate] = reason.strip(" .")
    return found


def recorded(
    modules: Sequence[str],
    expectation: e.Expectation,
    installed: dict[str, str],
    *,
    writing: bool = False,
) -> dict[str, Outcome]:
    """What need not be counted: values that were written for the sources as they are."""
    state, locked = sources.of_sources(), lock.read(lock.MODULES, writing=writing)
    sampled = SAMPLED[int(state, 16) % len(SAMPLED)]
    found = {}
    for module in {*modules} & {*LOCKED} - {sampled}:
        gates = {gate: expectation.gates.get(gate, {}) for gate in GATES[module]}
        same = all(e.same_versions(gate, expectation, installed) for gate in gates)
        if same and locked.get(module) == lock.digest(state, gates):
            names = {name for gate in gates for name in expectation.depends.get(gate, ())}
            found[module] = Outcome(module, gates, tuple(sorted(names)), 0.0, state=state)
    return found


def find(
    modules: Sequence[str],
    *,
    jobs: int,
    cache: Path | None,
    known: Mapping[str, Outcome] = MappingProxyType({}),
) -> Iterator[Outcome]:
    """Runs the modules, but for those that are known, and yields what they found, in their order."""

    def outcome_of(module: str) -> Outcome:
        return known[module] if module in known else _run_module(module, cache=cache, jobs=jobs)

    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(outcome_of, modules):
            count = sum(len(cases) for cases in outcome.gates.values())
            how = "as recorded" if outcome.module in known else f"{outcome.seconds:.0f} s"
            print(f"{outcome.module}: {count} cases, {how}", file=sys.stderr, flush=True)
            yield outcome


def _run_module(module: str, cache: Path | None, jobs: int) -> Outcome:
    """From the cache if nothing changed that a number could depend on."""
    begin = time.perf_counter()
    before = sources.of_machine()
    # What an environment of its own may have changed is not of the sources alone.
    state = "" if sources.of_environment() else sources.of_sources()
    kept = None if cache is None else cache / f"{module}-{before}.json"
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
    else:
        command = [sys.executable, "-m", "benchmarks.static.gates", module, str(jobs)]
        found = collect([*command, *([FRESH] if cache is None else [])], threads=1)
        # Not what was found while somebody edited, nor a problem: it may be gone the next time.
        if sources.of_machine() != before:
            state = ""
        elif kept is not None and not any(r.get("problem") for r in found):
            _keep(kept, module, found)
    *rows, last = found
    gates: e.Gates = {}
    digests: dict[str, str] = {}
    for row in rows:
        row.pop("measurement")
        cases = gates.setdefault(row.pop("gate", module), {})
        case = row.pop("case")
        if lock.KEY in row:
            digests[case] = row.pop(lock.KEY)
        if case in cases:
            raise RuntimeError(f"gate {module}: two rows {case!r}")
        cases[case] = row
    seconds = time.perf_counter() - begin
    return Outcome(module, gates, tuple(last["versions"]), seconds, digests, state)


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
    compared: list[Outcome] = []
    for outcome in outcomes:
        other = differing(outcome.versions, expectation.versions, installed)
        if other:
            said = ", ".join(f"{n} {now}, not {then}" for n, (then, now) in other.items())
            print(f"NOT COMPARED  {outcome.module}: {said}. To compare: {advice(other)}")
            status |= strict
            continue
        compared.append(outcome)
        for gate in GATES[outcome.module]:
            old, new = expectation.gates.get(gate, {}), outcome.gates.get(gate, {})
            differences += e.compare({gate: old}, {gate: new})
    if not differences:
        return int(status)
    print(f"\n{len(differences)} values are not as in {e.EXPECTED.relative_to(ROOT)}:")
    for difference in differences:
        print(f"  {difference}")
    REPLACEMENT.write_text(
        e.to_json(replacement(compared, expectation, installed)), encoding="utf-8"
    )
    print(
        f"\nThe replacement is in {REPLACEMENT.relative_to(ROOT)}. If the change is meant, take it:"
    )
    print('  fasttune bench static --write --reason "why"')
    lines = [e.log_line(d, e.NO_REASON) for d in differences if d.needs_reason]
    if lines:
        print("What is worse or gone needs its line in benchmarks/LOG.md; --reason writes them:")
        print("\n".join(f"  {line}" for line in lines))
    return 1


def replacement(
    outcomes: Sequence[Outcome], expectation: e.Expectation, installed: dict[str, str]
) -> e.Expectation:
    """What was found, and untouched the gates that were not looked at."""
    gates, depends = dict(expectation.gates), dict(expectation.depends)
    for outcome in outcomes:
        for gate in GATES[outcome.module]:
            gates[gate] = outcome.gates.get(gate, {})
            depends[gate] = sorted(outcome.versions)
    if len(outcomes) == len(GATES):  # gates that no module has any more go
        owned = [gate for names in GATES.values() for gate in names]
        gates = {gate: gates[gate] for gate in owned}
        depends = {gate: depends[gate] for gate in owned}
    found = {name: installed[name] for outcome in outcomes for name in outcome.versions}
    return e.Expectation({**expectation.versions, **found}, gates, depends)


def report_history() -> int:
    """1 if a value of the file ever got worse, or went, without a line in LOG.md."""
    states = e.history()
    if states is None:
        print("LOG.md is not checked: git has not the whole history here (a shallow clone?)")
        return 0
    bad = e.unexplained_raises(states, e.LOG.read_text(encoding="utf-8"))
    for difference in bad:
        print(f"WORSE WITHOUT A LINE IN LOG.md  {difference.place}: {difference.change}")
    return 1 if bad else 0


def write(
    outcomes: Sequence[Outcome],
    expectation: e.Expectation,
    installed: dict[str, str],
    reasons: dict[str, str],
) -> int:
    """Takes over what was found. What is worse or gone needs a reason, which goes into LOG.md."""
    new = replacement(outcomes, expectation, installed)
    other = [
        gate
        for gate in expectation.gates
        if not e.same_versions(gate, expectation, installed) and gate not in _gates_of(outcomes)
    ]
    if other:
        raise FasttuneError(
            f"{', '.join(other)} were recorded with other versions than those installed: write all "
            "gates together, without --gate"
        )
    differences = [
        d
        for gate in sorted({*expectation.gates, *new.gates})
        if e.same_versions(gate, expectation, installed)
        for d in e.compare({gate: expectation.gates.get(gate, {})}, {gate: new.gates.get(gate, {})})
    ]
    worse = [d for d in differences if d.needs_reason]
    why = [reasons.get(d.gate, reasons.get("", "")) for d in worse]
    unexplained = [d for d, reason in zip(worse, why, strict=True) if not reason]
    if unexplained:
        for difference in unexplained:
            print(f"  {difference}")
        raise FasttuneError(
            f'{len(unexplained)} values are worse or gone: give --reason "why", or "GATE: why" for '
            "those of one gate, which is written into LOG.md"
        )
    e.EXPECTED.write_text(e.to_json(new), encoding="utf-8")
    lock_values(outcomes)
    REPLACEMENT.unlink(missing_ok=True)
    if worse:
        lines = "\n".join(e.log_line(d, f"{r}.") for d, r in zip(worse, why, strict=True))
        _into_log(f"## {time.strftime('%Y-%m-%d')}: static gates raised\n\n{lines}\n\n")
    elif reasons:
        print("Nothing is worse or gone: LOG.md is as it was, without the reason")
    print(f"{len(differences)} values taken over into {e.EXPECTED.relative_to(ROOT)}")
    return 0


def lock_values(outcomes: Sequence[Outcome]) -> None:
    """Notes which sources the written values are of."""
    modules = lock.read(lock.MODULES, writing=True)
    for outcome in outcomes:
        if outcome.digests:
            lock.write(outcome.digests)
        modules.pop(outcome.module, None)
        if outcome.module in LOCKED and outcome.state:
            gates = {gate: outcome.gates.get(gate, {}) for gate in GATES[outcome.module]}
            modules[outcome.module] = lock.digest(outcome.state, gates)
    lock.write(modules, lock.MODULES)


def _gates_of(outcomes: Sequence[Outcome]) -> set[str]:
    return {gate for outcome in outcomes for gate in GATES[outcome.module]}


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
    """In the child: prints the rows of one module, which may use so many processes."""
    name, jobs, *options = sys.argv[1:]
    module = importlib.import_module(f"benchmarks.static.{name}")
    fresh = FRESH in options and hasattr(module, "fresh_rows")
    rows: Callable[..., Iterator[Row]] = module.fresh_rows if fresh else module.rows
    takes_jobs = "jobs" in inspect.signature(rows).parameters
    for row in rows(jobs=int(jobs)) if takes_jobs else rows():
        emit(name, **row)
    emit(DONE, versions=list(module.VERSIONS))


if __name__ == "__main__":
    main()
