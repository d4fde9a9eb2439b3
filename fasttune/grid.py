"""A grid of images with labelled rows and columns, readable as it is: what validation leaves."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fasttune.errors import StorageError

# Longest side of a cell in pixels. Smaller images are enlarged by a whole factor, so that labels
# and details can be read; larger ones are reduced, because the full images are files of their own.
_MIN_CELL, _MAX_CELL = 224, 512
_LABEL_WIDTH = 200
_PAD = 10
_FONT_SIZE = 15
_INK, _PAPER = (24, 24, 27), (255, 255, 255)


def make_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> Image.Image:
    """One RGB image: a labelled row for each of `rows` (prompts, wrapped), a labelled column for
    each position in them ("untrained", "step 500"). Images may differ in size; a row may be short.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    cells = [[_to_cell(image) for image in row] for row in rows]
    columns = range(len(column_labels))
    heads = [_wrap(label, font, _MIN_CELL) for label in column_labels]
    widths = [
        max([_text_width(heads[c], font), *(row[c].width for row in cells if c < len(row))])
        for c in columns
    ]
    line = _FONT_SIZE + 4
    head = line * max((len(lines) for lines in heads), default=0)
    labels = [_wrap(label, font, _LABEL_WIDTH) for label in row_labels]
    tallest = [max((cell.height for cell in row), default=line) for row in cells]
    # A label may take three more lines than its row has; what is longer still ends in an ellipsis.
    labels = [
        _shorten(lines, height // line + 3) for lines, height in zip(labels, tallest, strict=True)
    ]
    heights = [max(h, line * len(lines)) for h, lines in zip(tallest, labels, strict=True)]
    left = _text_width([text for lines in labels for text in lines], font) + 2 * _PAD
    grid = Image.new(
        "RGB",
        (
            left + sum(width + _PAD for width in widths),
            head + 2 * _PAD + sum(heights) + _PAD * len(heights),
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(grid)
    x = left
    for c in columns:
        _write(draw, (x, _PAD), heads[c], font, line)
        x += widths[c] + _PAD
    y = head + 2 * _PAD
    for r, row in enumerate(cells):
        _write(draw, (_PAD, y), labels[r], font, line)
        x = left
        for c, cell in enumerate(row):
            grid.paste(cell, (x, y))
            x += widths[c] + _PAD
        y += heights[r] + _PAD
    return grid


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all. StorageError names the path."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error}); free some space") from error


def _to_cell(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > _MAX_CELL:
        scale = _MAX_CELL / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = -(-_MIN_CELL // longest)
    size = (image.width * factor, image.height * factor)
    return image if factor == 1 else image.resize(size, Image.Resampling.BICUBIC)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; words longer than a line are broken."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and font.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines


def _shorten(lines: list[str], count: int) -> list[str]:
    return lines if len(lines) <= count else [*lines[: count - 1], lines[count - 1] + " ..."]


def _text_width(lines: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return max((int(font.getlength(line)) + 1 for line in lines), default=0)


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line_height: int,
) -> None:
    x, y = position
    for text in lines:
        draw.text((x, y), text, fill=_INK, font=font)
        y += line_height
