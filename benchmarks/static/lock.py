"""Which sources the recorded machine code was made from, so that nothing is compiled where nothing changed.

expected/codegen.lock has for each case a digest of all that its values depend on (the kernel with
what it calls, its launch, the target, the compiler, the code that reads the result) together with the
values in static.json. Where both are as they were, compiling again would give them again. One case in
`SAMPLE` is compiled all the same, others after each change of the file, so that a file which says what
was never compiled is found out.
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
SAMPLE = 20
HEAD = (
    "# fasttune bench static --write makes this file. Of each case: its sources and its values.\n"
)


def digest(identity: str, resources: Resources) -> str:
    """Of what a compilation depends on, and of what it gave."""
    text = f"{identity} {json.dumps(asdict(resources), sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read(path: Path = LOCK) -> dict[str, str]:
    """Case -> digest; nothing where there is no file. FasttuneError for what is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        value, _, case = line.partition(" ")
        if line.startswith("#"):
            continue
        if len(value) != 20 or not case:
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
