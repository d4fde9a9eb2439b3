"""Captions: a text file beside each image, the file's name, one table for all, or one text for all.

A table (JSONL, CSV, Parquet) has a column with the image's path relative to the source and one
with the caption. Every way gives the same thing: caption by image, images without one and why,
and captions without an image.
"""

import csv
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fasttune.errors import DatasetError

CaptionKind = Literal["textfile", "filename", "jsonl", "csv", "parquet", "constant"]
SHOWN = 10
"""Paths listed in an error message."""


@dataclass(frozen=True, slots=True)
class Captions:
    """Names are paths relative to the source, with forward slashes."""

    by_name: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    """Image without a usable caption -> reason."""
    unmatched: list[tuple[str, str]] = field(default_factory=list)
    """Captions without an image, or with more than one text: (text file or table row, what)."""


def read_captions(
    folder: str,
    names: Sequence[str],
    text_names: Iterable[str],
    *,
    captions: CaptionKind,
    key: str = "data.path",
    caption: str | None = None,
    caption_file: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "caption",
) -> Captions:
    """Captions of the images `names` in `folder`; `text_names` are the .txt files found there.

    `key` is what messages call the folder. Raises DatasetError if the table is missing, lacks a
    column or is damaged, and if no image at all has a caption.
    """
    if captions == "constant":
        if caption is None:
            raise DatasetError(f'{folder}: captions = "constant" needs data.caption, the text')
        text = caption.strip()
        return Captions(by_name=dict.fromkeys(names, text))
    if captions == "filename":
        return Captions(by_name={name: _from_filename(name) for name in names})
    if captions == "textfile":
        found = _from_text_files(folder, names, text_names)
        remedy = (
            "write the caption of cat.png to cat.txt beside it, or set data.captions to "
            '"filename", "constant", "jsonl", "csv" or "parquet"'
        )
    else:
        path = _table_path(folder, captions, caption_file, key)
        rows = _rows(captions, path, image_column, caption_column)
        found = _from_rows(folder, path, names, rows)
        remedy = (
            f"column {image_column!r} of {path} must hold paths relative to {folder}, such as "
            f"{names[0]!r}"
            if names
            else ""
        )
    if names and not found.by_name:
        listed = "".join(f"\n  {os.path.join(folder, name)}" for name in names[:SHOWN])
        more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise DatasetError(
            f"{folder}: none of the {len(names)} images has a caption:{listed}{more}\n{remedy}"
        )
    return found


def _stem(name: str) -> str:
    """Without the extension, which every image and text file has."""
    return name.rpartition(".")[0]


def _from_filename(name: str) -> str:
    return " ".join(posixpath.basename(_stem(name)).replace("_", " ").split())


def _clean(text: str) -> str:
    return (text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text).strip()


def _from_text_files(folder: str, names: Sequence[str], text_names: Iterable[str]) -> Captions:
    found = Captions()
    text_of = {_stem(name): name for name in text_names}
    used: set[str] = set()
    for name in names:
        stem = _stem(name)
        text_name = text_of.get(stem)
        if text_name is None:
            found.unusable[name] = f"has no caption: {posixpath.basename(stem)}.txt is missing"
            continue
        used.add(stem)
        try:
            with open(f"{folder}/{text_name}", "rb", buffering=0) as file:
                found.by_name[name] = _clean(file.read().decode("utf-8-sig"))
        except UnicodeDecodeError:
            found.unusable[name] = f"its caption {text_name} is not UTF-8; save it as UTF-8"
        except OSError as error:
            found.unusable[name] = f"its caption {text_name} cannot be read: {error.strerror}"
    for stem in sorted(text_of.keys() - used):
        found.unmatched.append((f"{folder}/{text_of[stem]}", "is a caption without an image"))
    return found


def _table_path(folder: str, kind: str, caption_file: str | None, key: str) -> str:
    if caption_file is not None:
        path = os.path.join(folder, caption_file)
        if not os.path.isfile(path):
            raise DatasetError(
                f"{key} = {folder!r}: data.caption_file: {path} does not exist; it is looked for in "
                "each folder of images"
            )
        return path
    candidates = [os.path.join(folder, f"{stem}.{kind}") for stem in ("captions", "metadata")]
    for path in candidates:
        if os.path.isfile(path):
            return path
    raise DatasetError(
        f"{key} = {folder!r}: captions = {kind!r} needs {candidates[0]} or {candidates[1]}; neither exists. "
        "Name another file with data.caption_file"
    )


def _from_rows(
    folder: str, path: str, names: Sequence[str], rows: Iterator[tuple[int, Any, Any]]
) -> Captions:
    found = Captions()
    wanted = set(names)
    for number, image, text in rows:
        where = f"{path}, row {number}"
        if not isinstance(image, str) or not image:
            found.unmatched.append((where, f"names no image ({image!r})"))
            continue
        name = posixpath.normpath(image.replace("\\", "/"))
        if posixpath.isabs(name):
            name = posixpath.relpath(name, folder.replace(os.sep, "/"))
        if name not in wanted:
            found.unmatched.append((where, f"is a caption without an image ({image})"))
        elif not isinstance(text, str):
            found.unusable[name] = f"its caption in {where} is no text ({text!r})"
        elif name in found.by_name:
            found.unmatched.append((where, f"is a second caption of {image}; the first is used"))
        else:
            found.by_name[name] = _clean(text)
            found.unusable.pop(name, None)
    for name in names:
        if name not in found.by_name:
            found.unusable.setdefault(name, f"has no caption: {path} has no row for it")
    return found


def _check_columns(path: str, present: Iterable[str], *wanted: str) -> None:
    columns = list(present)
    keys = ("data.image_column", "data.caption_column")
    for key, column in zip(keys, wanted, strict=True):
        if column not in columns:
            raise DatasetError(
                f"{path} has no column {column!r} ({key}); its columns are "
                f"{', '.join(map(repr, columns)) or 'none'}"
            )


def _rows(kind: str, path: str, image_column: str, caption_column: str) -> Iterator[tuple]:
    """Number, image and caption of each row. Raises DatasetError, whatever goes wrong on the way."""
    try:
        yield from _ROWS[kind](path, image_column, caption_column)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror or error}); copy it anew, or name another "
            "file with data.caption_file"
        ) from error


def _jsonl_rows(path: str, image_column: str, caption_column: str) -> Iterator[tuple]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DatasetError(f"{path}, line {number} is no JSON in UTF-8: {error}") from error
            if not text:
                continue
            if not isinstance(row, dict):
                raise DatasetError(f"{path}, line {number} is no JSON object: {text[:80]}")
            _check_columns(f"{path}, line {number}", row, image_column, caption_column)
            yield number, row[image_column], row[caption_column]


def _csv_rows(path: str, image_column: str, caption_column: str) -> Iterator[tuple]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or (), image_column, caption_column)
            for row in reader:
                yield reader.line_num, row[image_column], row[caption_column]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is no CSV in UTF-8: {error}") from error


def _parquet_rows(path: str, image_column: str, caption_column: str) -> Iterator[tuple]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DatasetError(
            f"{path}: reading Parquet needs pyarrow; install fasttune[parquet]"
        ) from error
    wanted = [image_column, caption_column]
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, *wanted)
            for batch in file.iter_batches(columns=wanted):
                columns = (batch.column(name).to_pylist() for name in wanted)
                for image, text in zip(*columns, strict=True):
                    number += 1
                    yield number, image, text
    except DatasetError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DatasetError(
            f"{path} is no Parquet file or damaged after row {number} ({error}); copy or write it "
            "anew, or name another file with data.caption_file"
        ) from error


_ROWS = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
