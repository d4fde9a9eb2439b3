"""Two revisions of fasttune beside each other, under one harness.

Into a temporary folder go: the base revision's code, the working tree's code as it is now, and the
working tree's benchmarks, which measure both. All three are copies, so both sides lie on one file
system without compiled files, edits during a run change nothing, and nothing has to be undone in the
repository when the run is killed. (`git worktree add` would leave its registration behind then, and
would take the models of configs/ along.)
"""

import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT
from fasttune.errors import FasttuneError

CODE = ("fasttune", "kernels", "csrc")
"""Folders that are the measured code; a revision may lack the later ones."""

NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", "*.safetensors")


class RevisionError(FasttuneError):
    """A revision that cannot be had, or cannot run what is to be measured."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared."""

    name: str
    """base or head."""
    text: str
    """What it is, for the reader."""
    commit: str | None
    """Its hash; None is the working tree."""
    tree: Path
    """Holds fasttune/ and kernels/."""
    inputs: Path
    """For models, data and caches of this side."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The two sides and the folder whose `benchmarks` measures both."""

    base: Side
    head: Side
    harness: Path

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.base, self.head


@contextmanager
def side_by_side(base: str, head: str | None = None, root: Path = ROOT) -> Iterator[Beside]:
    """Copies of `base` and of `head`, by default the working tree; removed afterwards.

    RevisionError for a revision that `root`'s repository does not have.
    """
    commits = [None if each is None else commit_of(each, root) for each in (base, head)]
    with tempfile.TemporaryDirectory(prefix="fasttune-ab-") as temporary:
        folder = Path(temporary)
        copy_code(root / "benchmarks", folder / "harness" / "benchmarks")
        copy_code(root / "configs", folder / "harness" / "configs")
        sides = []
        for name, revision, commit in zip(("base", "head"), (base, head), commits, strict=True):
            tree = folder / name
            tree.mkdir()
            if commit is None:
                for code in CODE:
                    copy_code(root / code, tree / code)
                text = f"the working tree ({described(root)})"
            else:
                extract(commit, tree, root)
                text = f"{revision} ({commit[:12]})"
            sides.append(Side(name, text, commit, tree, folder / "inputs" / name))
        yield Beside(sides[0], sides[1], folder / "harness")


def commit_of(revision: str, root: Path = ROOT) -> str:
    """Its full hash. RevisionError says what is the matter with one that is not there."""
    found = git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}"
    )
    if found.returncode == 0:
        return found.stdout.strip()
    inside = git(root, "rev-parse", "--is-shallow-repository")
    if inside.returncode != 0:
        raise RevisionError(
            f"{root} is not a git repository that can be read, and {revision} is a revision of one: "
            f"clone the repository with git\n{inside.stderr.strip()}".rstrip()
        )
    advice = "`git log` and `git branch -a` name those that there are"
    if inside.stdout.strip() == "true":
        advice = (
            "this clone is shallow: run `git fetch --unshallow`, or give actions/checkout "
            "`fetch-depth: 0`"
        )
    raise RevisionError(f"--base {revision}: the repository has no such revision; {advice}")


def described(root: Path = ROOT) -> str:
    """Commit of the working tree and how many tracked files were changed since."""
    commit = git(root, "rev-parse", "--short=12", "HEAD").stdout.strip() or "no commit"
    changed = len(git(root, "status", "--porcelain", "-uno").stdout.splitlines())
    return f"{commit} and {changed} changed files" if changed else commit


def extract(commit: str, folder: Path, root: Path = ROOT) -> None:
    """The code of a commit into `folder`."""
    there = git(root, "ls-tree", "--name-only", commit).stdout.splitlines()
    code = [name for name in CODE if name in there]
    if "fasttune" not in code:
        raise RevisionError(f"{commit[:12]} has no folder fasttune/: it is not to be compared with")
    archive = folder / "code.zip"
    done = git(root, "archive", "--format=zip", f"--output={archive}", commit, *code)
    if done.returncode != 0:
        raise RevisionError(f"git archive {commit[:12]} failed:\n{done.stderr.strip()}")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    archive.unlink()


def copy_code(source: Path, target: Path) -> None:
    """A folder without what was built from it; nothing where there is none."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=NOT_COPIED)


def search_path(harness: Path, tree: Path, inherited: str = "", root: Path = ROOT) -> str:
    """PYTHONPATH of a side's processes: `benchmarks` of the harness, the rest of the tree, and what
    of the `inherited` one is not the working tree, whose packages an older tree may lack.

    It goes before site-packages, and with it before an editable install of the project; processes
    say what they have imported all the same, see benchmarks/ab_child.py.
    """
    others = [
        entry
        for entry in inherited.split(os.pathsep)
        if entry and not Path(entry).resolve().is_relative_to(root.resolve())
    ]
    return os.pathsep.join([str(harness), str(tree), str(tree / "kernels"), *others])


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], text=True, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise RevisionError("git is not installed, and `--base` takes a git revision") from error
