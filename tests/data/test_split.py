"""Held-out files stay held out, whatever way a source takes to them."""

from pathlib import Path

import numpy as np
from PIL import Image

from fasttune.data.samples import Scan, draw_held_out, name_in, scan
from fasttune.data.split import join_splits


def write(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.zeros((8, 8, 3), "u1")).save(folder / f"{index}.png")
    return folder


def scan_all(*sources: tuple[Path, float], repeats: int = 1) -> list[Scan]:
    roots = [str(path.resolve()) for path, _ in sources]
    return [
        scan(n, str(path), captions="filename", held_out=part, roots=roots, repeats=repeats)
        for n, (path, part) in enumerate(sources)
    ]


def sides(scans: list[Scan]) -> tuple[set[str], set[str]]:
    samples = [sample for found in scans for sample in found.samples]
    held_out = {s.real_path for s in samples if s.held_out}
    return {s.real_path for s in samples if not s.held_out}, held_out


def test_sources_within_each_other(tmp_path: Path) -> None:
    write(tmp_path / "all", 40)
    inner = write(tmp_path / "all/sub", 40)
    scans = scan_all((tmp_path / "all", 0.25), (inner, 0.25))
    train, held_out = sides(scans)
    assert held_out and not train & held_out  # both draw alike
    assert join_splits(scans, None) == (scans, 0)
    # with other fractions they do not, and the larger one holds
    for first, second in ((0.0, 0.5), (0.1, 0.5), (0.5, 0.0)):
        scans = scan_all((tmp_path / "all", first), (inner, second), repeats=3)
        before, held_before = sides(scans)
        assert before & held_before
        joined, dropped = join_splits(scans, None)
        train, held_out = sides(joined)
        assert dropped == 0
        assert held_out == held_before and not train & held_out
        assert len(train) + len(held_out) == 80
        held = [s for found in joined for s in found.samples if s.held_out]
        assert all(s.repeat == 0 for s in held)


def test_sources_through_links(tmp_path: Path) -> None:
    real = write(tmp_path / "real", 30)
    (tmp_path / "linked").symlink_to(real)
    farm = tmp_path / "farm"
    farm.mkdir()
    for path in real.iterdir():
        (farm / f"other name {path.name}").symlink_to(path)
    scans = scan_all((real, 0.3), (tmp_path / "linked", 0.3), (farm, 0.3))
    train, held_out = sides(scans)
    assert 0 < len(held_out) < 30 and not train & held_out
    assert len(train | held_out) == 30


def test_the_held_out_folder_within_a_source(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 5)
    inside = write(data / "val", 3)
    outside = write(tmp_path / "elsewhere", 2)
    (inside / "a.png").symlink_to(data / "4.png")  # a link out of the folder counts as well
    (data / "b.png").symlink_to(outside / "0.png")
    scans = [scan(0, str(data), captions="filename", repeats=2)]
    scans.append(scan(1, str(inside), captions="filename", held_out=1.0))
    joined, dropped = join_splits(scans, str(inside))
    assert dropped == 4
    names = [s.name for s in joined[0].samples if s.repeat == 0]
    assert names == ["0.png", "1.png", "2.png", "3.png", "b.png"]
    assert not any(s.held_out for s in joined[0].samples)
    assert len(joined[1].samples) == 4


def test_the_draw() -> None:
    names = [f"{i}.png" for i in range(1000)]
    drawn = draw_held_out(names, 0.1)
    assert 60 < len(drawn) < 140  # binomial: four standard deviations
    assert draw_held_out(names[:500], 0.1) == drawn & set(names[:500])
    assert draw_held_out(names, 0.0) == set()
    assert draw_held_out([], 0.5) == set()
    few = names[:20]
    assert len(draw_held_out(few, 1e-12)) == 1
    assert draw_held_out(few, 1e-12) == draw_held_out(reversed(few), 1e-12)


def test_names_in_the_outermost_root() -> None:
    roots = ["/data/a", "/data", "/data/ab"]
    assert name_in(roots, "/data/ab/c/d.png", "x") == "ab/c/d.png"
    assert name_in(roots, "/elsewhere/d.png", "x") == "x"
