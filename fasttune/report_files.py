"""What report.html takes from a run folder besides the metrics: pictures, lists of files, text.

A part that is missing or damaged is left out, or named, and never an error: the folder may be that
of a run that was killed.
"""

import base64
import io
import json
import logging
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from fasttune.charts import format_number

logger = logging.getLogger(__name__)

MAX_GRIDS = 24
"""Sample grids embedded; of more, the first, the last and an even choice between."""

MAX_GRID_SIDE = 1600
"""Longer sides are scaled down to this many pixels."""

MAX_PNG_BYTES = 300_000
"""Larger pictures are embedded as JPEG."""

MAX_BAD_FILES = 200
"""Rows of each list of files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A sample grid; `source` is a data URI."""

    title: str
    source: str
    width: int
    file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileList:
    """(path, reason) of some of `count` files."""

    title: str
    rows: list[tuple[str, str]]
    count: int


def read_text(path: Path) -> str:
    """The file's text; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path, kind: type) -> Any:
    """The file's value if it is a `kind`, else None."""
    text = read_text(path)
    if not text:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        logger.warning("%s: left out of the report (%s)", path, error)
        return None
    return value if isinstance(value, kind) else None


def parse_config(text: str) -> dict[str, Any]:
    """The config as tables; empty if it is no TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        logger.warning("config.toml: left out of the report (%s)", error)
        return {}


def sample_grids(run_dir: Path) -> tuple[list[Grid], int, list[str]]:
    """(grids newest first, how many there are in all, names of those that cannot be read)."""

    def step_of(path: Path) -> int:
        digits = re.search(r"(\d+)$", path.stem)
        return int(digits.group(1)) if digits else -1

    paths = sorted((run_dir / "samples").glob("*.png"), key=lambda p: (step_of(p), p.name))
    chosen = paths
    if len(paths) > MAX_GRIDS:
        last = len(paths) - 1
        chosen = [paths[round(i * last / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    grids: list[Grid] = []
    unreadable: list[str] = []
    for path in reversed(chosen):
        try:
            source, width = _embed(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            logger.warning("%s: left out of the report (%s)", path, error)
            unreadable.append(path.name)
            continue
        step = step_of(path)
        title = f"step {step:,}" if step >= 0 else path.stem
        grids.append(Grid(title=title, source=source, width=width, file=f"samples/{path.name}"))
    return grids, len(paths), unreadable


def _embed(path: Path) -> tuple[str, int]:
    """(data URI, width in pixels to show it at) of a picture."""
    with Image.open(path) as file:
        file.load()
        # Grids of tiny models would be stamps: twice their pixels at most.
        width = min(MAX_GRID_SIDE, file.width if file.width >= 600 else 2 * file.width)
        if max(file.size) <= MAX_GRID_SIDE and path.stat().st_size <= MAX_PNG_BYTES:
            kind, content = "png", path.read_bytes()
        else:
            picture = file.convert("RGB")
            picture.thumbnail((MAX_GRID_SIDE, MAX_GRID_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            # Full colour resolution: the writing in a grid would fray.
            picture.save(buffer, "JPEG", quality=88, subsampling=0)
            kind, content = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width


def file_lists(run_dir: Path) -> list[FileList]:
    """The two lists of bad_files.json, as far as they hold anything."""
    content = read_json(run_dir / "bad_files.json", dict) or {}
    found: list[FileList] = []
    for key, title in (("bad_files", "Files not used"), ("warnings", "Warnings about files")):
        entries = content.get(key)
        rows = [
            (str(entry.get("path", "")), str(entry.get("reason", "")))
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict)
        ]
        if rows:
            found.append(FileList(title=title, rows=rows[:MAX_BAD_FILES], count=len(rows)))
    return found


def weight_files(run_dir: Path) -> list[tuple[str, str]]:
    """(path in the run folder, size) of each exported file, the largest first."""
    files = [(p.stat().st_size, p) for p in (run_dir / "weights").rglob("*") if p.is_file()]
    files.sort(key=lambda item: (-item[0], item[1].as_posix()))
    return [(path.relative_to(run_dir).as_posix(), _format_bytes(size)) for size, path in files]


def _format_bytes(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{format_number(size / factor)} {unit}"
    return f"{size} bytes"


_TOML = re.compile(
    r"""(?P<section>^[ \t]*\[[^\n]*\][ \t]*$)
      | (?P<key>^[ \t]*[\w.\-]+(?=[ \t]*=))
      | (?P<string>\"\"\"[\s\S]*?\"\"\"|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
      | (?P<comment>\#[^\n]*)
      | (?P<number>(?<![\w.])[+\-]?\d[\d_]*(?:\.\d+)?(?:[eE][+\-]?\d+)?\b)
      | (?P<word>\b(?:true|false)\b)""",
    re.MULTILINE | re.VERBOSE,
)


def highlight_toml(text: str) -> Markup:
    """TOML with a span around each token; every piece of it is escaped."""
    pieces: list[Markup] = []
    end = 0
    for match in _TOML.finditer(text):
        pieces.append(Markup.escape(text[end : match.start()]))
        pieces.append(
            Markup('<span class="{}">{}</span>').format(f"t-{match.lastgroup}", match.group())
        )
        end = match.end()
    pieces.append(Markup.escape(text[end:]))
    return Markup("").join(pieces)
