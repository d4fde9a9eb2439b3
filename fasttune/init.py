"""`fasttune init`: asks what a config needs to know, or takes it from flags, and writes the config.

What it writes follows from the rules in config_template.py.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fasttune.config_file import config_from_tables
from fasttune.config_template import (
    FAMILIES,
    METHODS,
    Choices,
    config_tables,
    find_card,
    header,
    render,
)
from fasttune.errors import ConfigError, StorageError

Answers = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One thing to know; `name` is that of its flag."""

    name: str
    text: str
    check: Callable[[str], object]
    """Raises ConfigError if the answer will not do."""
    default: Callable[[Answers], str | None] = lambda _: None
    """From the answers before: what Enter and --yes give. None: has to be answered."""
    asked_if: Callable[[Answers], bool] = lambda _: True
    """Otherwise the answer is empty."""
    in_script: bool = True
    """A script has to give it, unless it says --yes."""


def init(
    given: Answers,
    *,
    ask: Callable[[str], str] | None,
    say: Callable[[str], None],
    take_defaults: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes the config and returns its path.

    `given` holds answers by the name of their question. Missing ones are put to `ask`, which
    returns "" for the default; without `ask` they take their default if `take_defaults`, else a
    ConfigError lists them. `say` shows what was wrong with an answer.
    """
    answers = _collect(given, ask, say, take_defaults)
    out = Path(answers["out"]).expanduser()
    if out.exists() and not overwrite:
        raise ConfigError([f"{out}: exists already; give another --out, or --force"])
    choices = Choices(
        family=answers["family"],
        method=answers["method"],
        card=find_card(answers["card"]),
        data=answers["data"],
        captions=find_captions(answers["data"]) or "constant",
        caption=answers["caption"],
        model=answers["model"],
        prompt=answers["prompt"],
        name=re.sub(r'[/\\\0<>:"|?*]', "-", out.stem),
    )
    tables = config_tables(choices)
    config_from_tables(tables)  # raises on a model path or a data folder that is not there
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(tables, header(choices)), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error
    return out


def _collect(
    given: Answers,
    ask: Callable[[str], str] | None,
    say: Callable[[str], None],
    take_defaults: bool,
) -> dict[str, str]:
    """An answer to every question; all that is wrong or missing in one ConfigError."""
    answers: dict[str, str] = {}
    problems = []
    for name, answer in given.items():
        try:
            next(q for q in QUESTIONS if q.name == name).check(answer)
            answers[name] = answer
        except ConfigError as error:
            problems += [f"--{name} {answer}: {line}" for line in error.problems]
    if problems:
        raise ConfigError(problems, source="the answers")
    missing = []
    for question in QUESTIONS:
        if question.name in answers:
            continue
        if not question.asked_if(answers):
            answers[question.name] = ""
            continue
        default = question.default(answers)
        if ask is not None:
            answers[question.name] = _ask(question, default, ask, say)
        elif default is not None and (take_defaults or not question.in_script):
            answers[question.name] = default
        else:
            missing.append("--card or --vram" if question.name == "card" else f"--{question.name}")
    if missing:
        raise ConfigError([f"missing: {', '.join(missing)}"], source="the answers")
    return answers


def _ask(
    question: Question, default: str | None, ask: Callable[[str], str], say: Callable[[str], None]
) -> str:
    shown = f" [{default}]" if default else ""
    while True:
        answer = ask(f"{question.text}{shown}: ").strip()
        if not answer and default is not None:
            return default
        try:
            question.check(answer)
        except ConfigError as error:
            say("  " + "; ".join(error.problems))
            continue
        return answer


def detect_card() -> str | None:
    """Memory of the first NVIDIA card as its driver says, such as "24GiB"; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, _, mib = result.stdout.splitlines()[0].rpartition(",")
        gib = round(float(mib) / 1024)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    try:
        find_card(name)
    except ConfigError:
        return f"{gib}GiB"
    return name.strip()


def find_captions(data: str) -> str | None:
    """How the folder has its captions, as `data.captions` calls it; None if it has none."""
    folder = Path(data).expanduser()
    for kind in ("jsonl", "csv", "parquet"):
        if any((folder / f"{stem}.{kind}").is_file() for stem in ("captions", "metadata")):
            return kind
    return "textfile" if next(folder.rglob("*.txt"), None) is not None else None


def _one_of(*allowed: str) -> Callable[[str], None]:
    def check(answer: str) -> None:
        if answer not in allowed:
            raise ConfigError([f"expected one of {', '.join(allowed)}"])

    return check


def _check_folder(answer: str) -> None:
    if not answer or not Path(answer).expanduser().is_dir():
        raise ConfigError(["no such folder"])


def _check_text(answer: str) -> None:
    if not answer:
        raise ConfigError(["an answer is needed"])


def _check_out(answer: str) -> None:
    if not answer.endswith(".toml") or Path(answer).stem.startswith("."):
        raise ConfigError(["expected a file name that ends in .toml"])


QUESTIONS = (
    Question(
        name="family",
        text=f"Family ({', '.join(FAMILIES)})",
        check=_one_of(*FAMILIES),
        default=lambda _: "sdxl",
    ),
    Question(
        name="method",
        text="Method (lora, or full for all weights)",
        check=_one_of(*METHODS),
        default=lambda _: "lora",
    ),
    Question(
        name="card",
        text="Card (its name, its memory such as 24GiB, or cpu)",
        check=find_card,
        default=lambda _: detect_card(),
    ),
    Question(name="data", text="Folder with the images", check=_check_folder),
    Question(
        name="caption",
        text="It has no captions; one caption for every image",
        check=_check_text,
        asked_if=lambda answers: "data" in answers and find_captions(answers["data"]) is None,
    ),
    Question(
        name="model",
        text="Model (folder in diffusers layout, or hub id)",
        check=_check_text,
        default=lambda answers: FAMILIES[answers.get("family", "sdxl")].model,
        in_script=False,
    ),
    Question(
        name="prompt",
        text="Prompt of the images sampled during training (Enter for none)",
        check=lambda _: None,
        default=lambda _: "",
        in_script=False,
    ),
    Question(
        name="out",
        text="Config to write",
        check=_check_out,
        default=lambda answers: (
            f"{answers.get('family', 'sdxl')}-{answers.get('method', 'lora')}.toml"
        ),
        in_script=False,
    ),
)
