"""Reads the config: defaults < file < command line, all problems reported together; writes it too.

Imports the standard library, `errors` and the config modules alone: no config error waits for torch.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

from fasttune.config import Config, Data
from fasttune.config_checks import BOUNDS, PATH_KEYS, clashes, machine_problems
from fasttune.config_values import MismatchError, convert, describe, toml_value, typed
from fasttune.errors import ConfigError

# Names that other trainers give to our keys; difflib would not find them.
_KNOWN_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "unet_lr": "optimizer.lr",
    "optimizer_type": "optimizer.name",
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_train_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "grad_clip": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "gradient_checkpointing": "memory.activations",
    "mixed_precision": "precision.compute",
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "pretrained_model_name_or_path": "model.path",
    "snr_gamma": "objective.min_snr_gamma",
    "noise_offset": "objective.offset_noise",
    "train_data_dir": "data.path",
}

# Stand in for required values that are missing or wrong, so that the remaining checks still run.
_PLACEHOLDERS = {"model.family": "sdxl", "model.path": ".", "data.path": "."}


@dataclass(slots=True)
class _Problems:
    """What is wrong so far, and which keys it concerns: checks between keys leave those out."""

    lines: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def add(self, line: str, *keys: str) -> None:
        self.lines.append(line)
        self.keys.update(keys)


@cache
def section_types() -> dict[str, Any]:
    """Section -> dataclass; "data" -> Data, of which a config has a list."""
    hints = get_type_hints(Config)
    return {f.name: Data if f.name == "data" else hints[f.name] for f in fields(Config)}


@cache
def key_types() -> dict[str, Any]:
    """ "section.key" -> annotation, for all keys in order."""
    return {
        f"{section}.{key}": hint
        for section, cls in section_types().items()
        for key, hint in get_type_hints(cls).items()
    }


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, check_files: bool = True
) -> Config:
    """The config from a TOML file (None: from overrides alone) and `section.key=value` overrides.

    `data.0.path=...` addresses one source, `data.path=...` the only one. `check_files=False` leaves
    out what depends on this machine: files and folders that are named, optional libraries.
    Raises ConfigError with every problem found.
    """
    tables = {} if path is None else read_toml(Path(path))
    source = None if path is None else str(path)
    return config_from_tables(tables, overrides, check_files=check_files, source=source)


def config_from_tables(
    tables: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    check_files: bool = True,
    source: str | None = None,
) -> Config:
    """As `load_config`, from tables as tomllib gives them; `source` names them in errors."""
    problems = _Problems()
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    sources = _sources(tables, problems)
    _apply_overrides(tables, sources, overrides, problems)
    config = _build(tables, sources, problems)
    findings = chain(clashes(config), machine_problems(config) if check_files else ())
    for keys, line in findings:
        if not problems.keys.intersection(keys):
            problems.lines.append(line)
    if problems.lines:
        raise ConfigError(problems.lines, source=source)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError with file, line, column and the line itself."""
    if path.is_dir():
        raise ConfigError([f"{path}: a folder; give the config file in it"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        nearby = sorted(path.parent.glob("*.toml")) if path.parent.is_dir() else []
        close = get_close_matches(path.name, [p.name for p in nearby], 1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise ConfigError([f"{path}: no such file{hint}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_toml_problem(path, text, str(error))]) from None


def _toml_problem(path: Path, text: str, message: str) -> str:
    """tomllib ends its message with "(at line 3, column 7)" or "(at end of document)"."""
    lines = text.splitlines() or [""]
    where = re.search(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if where is None:
        return f"{path}: invalid TOML: {message}"
    row = int(where[1]) if where[1] else len(lines)
    column = int(where[2]) if where[2] else len(lines[-1]) + 1
    line = lines[row - 1] if row <= len(lines) else ""
    what = message[: where.start()]
    return f"{path}:{row}:{column}: invalid TOML: {what}\n        {line}\n        {' ' * (column - 1)}^"


def _sources(tables: dict[str, Any], problems: _Problems) -> list[dict[str, Any]]:
    """The tables under [[data]], as a list of its own."""
    given = tables.get("data", [])
    if isinstance(given, dict):
        problems.add(
            "[data]: write [[data]], in double brackets; each [[data]] is a source", "data"
        )
        return [given]
    if not isinstance(given, list):
        problems.add(f"data = {toml_value(given)}: expected [[data]] tables", "data")
        return []
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            problems.add(f"data.{i} = {toml_value(item)}: expected a table, [[data]]", "data")
    return [item for item in given if isinstance(item, dict)]


def _apply_overrides(
    tables: dict[str, Any],
    sources: list[dict[str, Any]],
    overrides: Sequence[str],
    problems: _Problems,
) -> None:
    """Puts command-line values over the file's, in place."""
    num_in_file = len(sources)
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not separator or not all(parts):
            problems.add(f"{override!r}: expected section.key=value, such as train.steps=100")
        elif parts[0] == "data" and len(parts) in (2, 3):
            _override_source(sources, num_in_file, parts, text, problems)
        elif len(parts) == 2:
            table = tables.setdefault(parts[0], {})
            if isinstance(table, dict):  # else the file's own value is reported
                table[parts[1]] = typed(text)
        elif len(parts) == 1:
            problems.add(_unknown_key("", parts[0], typed(text)))
        else:
            problems.add(f"{override!r}: expected section.key=value, such as train.steps=100")


def _override_source(
    sources: list[dict[str, Any]],
    num_in_file: int,
    parts: list[str],
    text: str,
    problems: _Problems,
) -> None:
    index = parts[1] if len(parts) == 3 else "0"
    label = ".".join(parts)
    if num_in_file == 0 and not sources:
        sources.append({})
    if len(parts) == 2 and len(sources) > 1:
        last = len(sources) - 1
        problems.add(
            f"{label}: the config has {len(sources)} sources; name one, "
            f"from data.0.{parts[1]} to data.{last}.{parts[1]}"
        )
    elif not index.isascii() or not index.isdigit() or int(index) >= len(sources):
        names = ", ".join(f"data.{i}" for i in range(len(sources)))
        problems.add(f"{label}: no such source; the config has {names}")
    else:
        sources[int(index)] = sources[int(index)] | {parts[-1]: typed(text)}


def _build(tables: Mapping[str, Any], sources: list[dict[str, Any]], problems: _Problems) -> Config:
    sections = section_types()
    for name, value in tables.items():
        if name in sections:
            continue
        if isinstance(value, dict):
            close = get_close_matches(name, sections, 1)
            hint = f"; did you mean [{close[0]}]?" if close else ""
            problems.add(f"[{name}]: unknown section{hint} Sections: {', '.join(sections)}")
        else:
            problems.add(_unknown_key("", name, value))
    built: dict[str, Any] = {}
    for name, cls in sections.items():
        if name == "data":
            continue
        table = tables.get(name, {})
        if not isinstance(table, dict):
            problems.add(f"{name} = {toml_value(table)}: expected a section, [{name}]", name)
            table = {}
        built[name] = _section(cls, name, name, table, problems)
    if not sources and "data" not in problems.keys:
        problems.add("[[data]]: missing; at least one source of images, with its path", "data")
    built["data"] = tuple(
        _section(Data, "data", f"data.{i}", source, problems) for i, source in enumerate(sources)
    )
    return Config(**built)


def _section(cls: Any, name: str, label: str, table: Mapping[str, Any], problems: _Problems) -> Any:
    """One dataclass from its table. `label` is `name`, or "data.0" for a source."""
    hints = key_types()
    known = {f.name: f for f in fields(cls)}
    for key, value in table.items():
        if key not in known:
            problems.add(_unknown_key(name, key, value, label))
    values: dict[str, Any] = {}
    for key, info in known.items():
        dotted = f"{name}.{key}"
        if key in table:
            try:
                values[key] = _value(table[key], dotted, hints[dotted])
                continue
            except MismatchError as error:
                given = toml_value(table[key])
                problems.add(f"{label}.{key} = {given}: expected {error}", f"{label}.{key}")
        elif info.default is MISSING and info.default_factory is MISSING:
            expected = describe(hints[dotted])
            problems.add(f"{label}.{key}: missing; expected {expected}", f"{label}.{key}")
        if dotted in _PLACEHOLDERS:
            values[key] = _PLACEHOLDERS[dotted]
    return cls(**values)


def _value(given: Any, dotted: str, hint: Any) -> Any:
    """The value, converted and within its bounds. Raises MismatchError."""
    value = convert(given, hint)
    bound = BOUNDS.get(dotted)
    if bound is not None:
        items = value if isinstance(value, tuple) else (value,)
        if not all(bound.holds(item) for item in items if isinstance(item, int | float)):
            raise MismatchError(f"{describe(hint)}, {bound}")
    if dotted in PATH_KEYS and isinstance(value, str) and value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise MismatchError("a path; this home folder is unknown") from None
    return value


def _unknown_key(section: str, key: str, value: Any, label: str = "") -> str:
    """Names the nearest valid key: in its section, by another trainer's name, anywhere."""
    keys = key_types()
    own = [k.partition(".")[2] for k in keys if k.partition(".")[0] == section]
    same_name = [k for k in keys if k.partition(".")[2] == key]
    close = get_close_matches(key, own, 1)
    if same_name:
        nearest = same_name[0]
    elif close:
        nearest = f"{label or section}.{close[0]}"
    elif key in _KNOWN_ELSEWHERE:
        nearest = _KNOWN_ELSEWHERE[key]
    else:
        anywhere = get_close_matches(key, [k.partition(".")[2] for k in keys], 1, 0.75)
        nearest = next((k for k in keys if anywhere and k.endswith("." + anywhere[0])), "")
    dotted = f"{label or section}.{key}" if section else key
    hint = f"; did you mean {nearest}?" if nearest else ""
    allowed = f" Keys of [{section}]: {', '.join(own)}" if section else ""
    if isinstance(value, Mapping):
        return f"{dotted}: unknown section{hint}{allowed}"
    return f"{dotted} = {toml_value(value)}: unknown key{hint}{allowed}"


def to_toml(config: Config) -> str:
    """The whole config with every key; `load_config` of it gives an equal one."""
    blocks = []
    for name in section_types():
        section = getattr(config, name)
        for table in section if name == "data" else (section,):
            head = "[[data]]" if name == "data" else f"[{name}]"
            lines = [f"{f.name} = {toml_value(getattr(table, f.name))}" for f in fields(table)]
            blocks.append("\n".join([head, *lines]) + "\n")
    return "\n".join(blocks)
