"""The lock of the codegen gate: what it vouches for is not compiled, and it vouches for nothing else."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.static import lock
from benchmarks.static.targets import Resources
from fasttune.errors import FasttuneError

FITS = Resources(32, 0, 0, 1024, 0, 128, "none", 500)
CASES = {f"norm {number} / sm_89": f"source {number}" for number in range(400)}


def locked(used: Resources = FITS) -> dict[str, str]:
    return {case: lock.digest(identity, used) for case, identity in CASES.items()}


def recorded(used: Resources = FITS) -> dict[str, dict[str, object]]:
    row = {**dataclasses.asdict(used), "shared_limit": 101376, "allowed": "", "problem": ""}
    return dict.fromkeys(CASES, row)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "codegen.lock"
    assert lock.read(path) == {}
    lock.write(locked(), path)
    assert lock.read(path) == locked()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_text("# a comment\n1234 norm / sm_89\n")
    with pytest.raises(FasttuneError, match=r"codegen.lock:2: .*--write"):
        lock.read(path)


def test_all_but_a_sample_are_known() -> None:
    known = lock.known(CASES, locked(), recorded())
    assert set(known.values()) == {FITS}
    # 400 draws of 1 in 20: 20, with a deviation of 4.4
    assert 4 <= len(CASES) - len(known) <= 42
    assert lock.known(CASES, locked(), recorded()) == known
    more = locked() | {"another / sm_89": "0" * 20}
    assert lock.known(CASES, more, recorded()) != known  # another sample


def test_another_source_or_value_is_not_known() -> None:
    changed = {case: f"{identity}, changed" for case, identity in CASES.items()}
    assert lock.known(changed, locked(), recorded()) == {}
    fewer = dataclasses.replace(FITS, registers=31)
    assert lock.known(CASES, locked(), recorded(fewer)) == {}  # edited in static.json alone
    assert lock.known(CASES, {}, recorded()) == {}
    assert lock.known(CASES, locked(), {}) == {}
    without = {case: {"registers": 32} for case in CASES}  # rows of an older kind
    assert lock.known(CASES, locked(), without) == {}


def test_identities_name_no_place_of_this_machine() -> None:
    """So that a lock which was written in one folder holds in another."""
    pytest.importorskip("triton")
    code = (
        "from benchmarks.static import triton_offline, targets\n"
        "from fasttune_kernels.launch import Launch, launches\n"
        "launch = next(x for x in launches() if isinstance(x, Launch))\n"
        "for name in ('sm_89', 'gfx1100'):\n"
        "    print(triton_offline.identity(launch, targets.target_of(name)))\n"
    )
    env = harness.environment()
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=True)
    nvidia, amd = done.stdout.splitlines()
    assert "libdevice" in nvidia and "ocml" in amd
    for identity in (nvidia, amd):
        assert "site-packages" not in identity and str(harness.ROOT) not in identity
