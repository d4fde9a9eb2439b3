"""What the workflows may do, whom they trust, and that what they call is there."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.command import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.iterdir())

FROM_OUTSIDE = re.compile(r"head\.(ref|label|repo\.(?!full_name\b))|\.title|\.body|author|inputs\.")
"""Parts of an event whose text a stranger chooses, and what a dispatch is given."""


def load(path: Path) -> dict[str, Any]:
    """YAML 1.1 takes the key `on` for true."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    found["on"] = found.pop(True)
    return found


WORKFLOWS = {path.stem: load(path) for path in FILES}
JOBS = [
    pytest.param(job, id=f"{workflow}-{name}")
    for workflow, found in WORKFLOWS.items()
    for name, job in found["jobs"].items()
]
STEPS = [
    pytest.param(step, id=f"{workflow}-{name}-{number}")
    for workflow, found in WORKFLOWS.items()
    for name, job in found["jobs"].items()
    for number, step in enumerate(job["steps"])
]


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["bench.yml", "ci.yml"]


def test_ci_runs_on_every_change() -> None:
    ci = WORKFLOWS["ci"]
    assert ci["on"].keys() == {"push", "pull_request"}
    steps = ci["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    setup = next(s["with"] for s in steps if "setup-python" in s.get("uses", ""))
    assert setup["python-version"] == "3.11"
    assert setup["cache"] == "pip"
    for path in setup["cache-dependency-path"].split():
        assert (ROOT / path).is_file(), path


def test_what_ci_takes_from_a_lock_or_leaves_out_is_run_as_well() -> None:
    jobs = WORKFLOWS["ci"]["jobs"]
    commands = {name: jobs[name]["steps"][-1]["run"] for name in ("slow", "fresh")}
    assert commands["slow"].endswith("-m slow") and commands["fresh"].endswith("--strict --fresh")
    assert not any(jobs[name].get("continue-on-error") for name in commands)


def test_newest_versions_block_nothing() -> None:
    newest = WORKFLOWS["ci"]["jobs"]["newest"]
    assert newest["continue-on-error"] is True
    assert "continue-on-error" not in WORKFLOWS["ci"]["jobs"]["check"]
    commands = "\n".join(step.get("run", "") for step in newest["steps"])
    assert "--upgrade torch triton" in commands
    assert "bench static" in commands
    assert "--strict" not in commands


def test_code_of_forks_does_not_reach_the_gpu() -> None:
    bench = WORKFLOWS["bench"]
    # pull_request_target would run with the rights of this repository.
    assert bench["on"].keys() == {"pull_request", "workflow_dispatch"}
    job = bench["jobs"]["measure"]
    assert job["runs-on"] == ["self-hosted", "gpu"]
    condition = " ".join(job["if"].split())
    dispatched, _, asked = condition.partition(" || ")
    assert dispatched == "github.event_name == 'workflow_dispatch'"
    assert re.fullmatch(r"\( [^|]*&& \([^|]*\|\|[^|]*\) \)", asked), asked
    assert "github.event.pull_request.head.repo.full_name == github.repository &&" in asked
    assert "contains(github.event.pull_request.labels.*.name, 'benchmark') &&" in asked


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_only_bench_uses_our_machine(workflow: str) -> None:
    for name, job in WORKFLOWS[workflow]["jobs"].items():
        if (workflow, name) != ("bench", "measure"):
            assert job["runs-on"] == "ubuntu-latest"


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_rights_are_few(workflow: str) -> None:
    found = WORKFLOWS[workflow]
    assert found["permissions"] in ({}, {"contents": "read"})
    for name, job in found["jobs"].items():
        rights = job.get("permissions", {})
        if "write" in rights.values():
            assert (workflow, name) == ("bench", "comment")
            assert rights == {"pull-requests": "write"}
            # Nothing of the change is there that could run.
            assert not any("checkout" in s.get("uses", "") for s in job["steps"])
            assert not any("run" in step for step in job["steps"])


@pytest.mark.parametrize("job", JOBS)
def test_jobs_end(job: dict[str, Any]) -> None:
    assert 0 < job["timeout-minutes"] <= 180


@pytest.mark.parametrize("step", STEPS)
def test_step(step: dict[str, Any]) -> None:
    assert ("run" in step) != ("uses" in step)
    if "uses" in step:
        # A tag can be moved to other code.
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
    if "checkout" in step.get("uses", ""):
        assert step["with"]["persist-credentials"] is False
        assert step["with"]["fetch-depth"] == 0


@pytest.mark.parametrize("step", STEPS)
def test_no_text_from_outside_becomes_code(step: dict[str, Any]) -> None:
    # `${{ }}` is replaced before a shell or node reads the line; the environment is not.
    for code in (step.get("run", ""), str(step.get("with", {}).get("script", ""))):
        assert "${{" not in code
    given = {k: v for k, v in step.get("with", {}).items() if k != "script"}
    assert not FROM_OUTSIDE.search(str(given))


@pytest.mark.parametrize("step", [s for s in STEPS if "run" in s.values[0]])
def test_shell_is_correct(step: dict[str, Any]) -> None:
    done = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    # A variable outside of quotes would be split and expanded.
    bare = re.sub(r'"[^"]*"', "", step["run"])
    assert "$" not in bare, bare


def test_commands_exist() -> None:
    called = []
    for step in (param.values[0] for param in STEPS):
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "bench" in words:
                called.append(words[words.index("bench") + 1])
    assert sorted(called) == ["ab", "static", "static"]
    assert set(called) <= COMMANDS.keys()
    assert (ROOT / ".ci" / "run").is_file()


def test_one_comment_is_kept_up_to_date() -> None:
    steps = WORKFLOWS["bench"]["jobs"]["comment"]["steps"]
    script = steps[-1]["with"]["script"]
    assert script.count("updateComment") == script.count("createComment") == 1
    uploaded = next(
        s["with"]["name"]
        for s in WORKFLOWS["bench"]["jobs"]["measure"]["steps"]
        if "upload-artifact" in s.get("uses", "")
    )
    assert steps[0]["with"]["name"] == uploaded
