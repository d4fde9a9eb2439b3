"""The grid of images: layout, labels, and a full disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttune.errors import StorageError
from fasttune.grid import make_grid, save_png

RED, GREEN, BLUE = (220, 0, 0), (0, 160, 0), (0, 0, 220)


def solid(color: tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, color)


def boxes(grid: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of everything of this colour."""
    ys, xs = np.nonzero((np.asarray(grid) == color).all(-1))
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


def test_cells_are_where_their_labels_say() -> None:
    rows = [
        [solid(RED, (256, 256)), solid(GREEN, (256, 256))],
        [solid(BLUE, (1024, 512))],
    ]
    grid = make_grid(rows, ["a cat", "a very long prompt " * 60], ["untrained", "step 500"])
    pixels = np.asarray(grid)
    red, green, blue = (boxes(grid, color) for color in (RED, GREEN, BLUE))
    assert red[2:] == green[2:] == (256, 256)  # as they are
    assert blue[2:] == (512, 256)  # reduced to 512
    assert red[1] == green[1] < blue[1]
    assert red[0] == blue[0] < green[0]
    ink = (pixels < 100).all(-1)
    ink[:, red[0] :] &= np.arange(len(ink))[:, None] < red[1]
    assert ink[: red[1], red[0] : red[0] + 256].any()  # "untrained" above its column
    assert ink[: red[1], green[0] : green[0] + 256].any()
    assert ink[red[1] : red[1] + 256, : red[0]].any()  # "a cat" left of its row
    # the long prompt is wrapped, and cut where it would push the rows apart
    assert ink[blue[1] :, : blue[0]].any()
    assert not ink[:, red[0] - 5 : red[0]].any()
    assert grid.height < blue[1] + 256 + 100


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    grid = make_grid([[solid(RED, (64, 48))]], ["x"], ["y"])
    assert boxes(grid, RED)[2:] == (256, 192)


def test_long_words_and_empty_labels() -> None:
    grid = make_grid([[solid(RED, (256, 256))]], ["x" * 300], [""])
    left, _, width, _ = boxes(grid, RED)
    assert width == 256 and left < 300
    assert make_grid([], [], []).size[0] > 0


def test_a_png_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "grid.png"
    save_png(solid(RED, (8, 8)), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"grid\.png.*No space left"):
        save_png(solid(BLUE, (8, 8)), path)
    assert Image.open(path).getpixel((0, 0)) == RED
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
