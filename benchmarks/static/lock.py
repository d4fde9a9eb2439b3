"""Which sources the recorded values are of, so that nothing is counted again where nothing changed.

expected/codegen.lock has for each case a digest of all that its values depend on (the kernel with
what it calls, its launch, the target, the compiler, the code that reads the result) together with the
values in static.json. Where both are as they were, compiling again would give them again. One case in
`SAMPLE` is compiled all the same, others after each change of the file, so that a file which says what
was never compiled is found out.

expected/gates.lock is the same for the other gates that take minutes, with a digest of all sources that
gates run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.static import expected as e
from benchmarks.static.targets import Resources
from fasttune.errors import FasttuneError

KEY = "lock"
"""Of a row: its digest, which is no value."""
LOCK = e.EXPECTED.with_name("codegen.lock")
MODULES = e.EXPECTED.with_name("gates.lock")
SAMPLE = 20
HEAD = (
    "# fasttune bench static --write makes this file. Digests of the sources and of the values.\n"
)


def digest(identity: str, values: Resources | e.Gates) -> str:
    """Of what values depend on, and of the values."""
    plain = asdict(values) if isinstance(values, Resources) else values
    text = f"{identity} {json.dumps(plain, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read(path: Path = LOCK, *, writing: bool = False) -> dict[str, str]:
    """Case -> digest; nothing where there is no file. FasttuneError for what is no such file, such as one
    with a conflict, unless it is about to be written anew."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        value, _, case = line.partition(" ")
        if line.startswith("#"):
            continue
        if len(value) != 20 or not case:
            if writing:
                return {}
            raise FasttuneError(
                f"{path}:{number}: expected a digest and a case, found {line!r}; "
                "`fasttune bench static --write` makes the file anew"
            )
        found[case] = value
    return found


def write(digests: Mapping[str, str], path: Path = LOCK) -> None:
    """One case a line, in their order by name."""
    lines = [f"{value} {case}\n" for case, value in sorted(digests.items())]
    beside = path.with_suffix(".new")
    beside.write_text(HEAD + "".join(lines), encoding="utf-8")
    beside.replace(path)


def known(
    identities: Mapping[str, str], locked: Mapping[str, str], recorded: Mapping[str, Row]
) -> dict[str, Resources]:
    """What need not be compiled, of cases with the identity of what they depend on: recorded values
    whose digest is locked, but for the sample."""
    state = hashlib.sha256(json.dumps(sorted(locked.items())).encode()).digest()
    found = {}
    for case, identity in identities.items():
        resources = _resources(recorded.get(case, {}))
        if resources is None or locked.get(case) != digest(identity, resources):
            continue
        if _draw(state, case) % SAMPLE:
            found[case] = resources
    return found


def _resources(row: Row) -> Resources | None:
    names = [field.name for field in fields(Resources)]
    return Resources(**{name: row[name] for name in names}) if row.keys() >= set(names) else None


def _draw(state: bytes, case: str) -> int:
    return int.from_bytes(hashlib.sha256(state + case.encode()).digest()[:4], "big")
