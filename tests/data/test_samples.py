"""The scan of a folder: what is found, what is reported, what is not opened again."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttune.data import samples as module
from fasttune.data.samples import scan
from fasttune.errors import DatasetError


def write(path: Path, width: int = 30, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), "u1")).save(path)
    return path


def test_nested_odd_and_hidden_names(tmp_path: Path) -> None:
    names = ["z.PNG", "a b.jpg", "sub/deep/ü é.webp", "sub/new\nline.png", "日本/猫.bmp"]
    for name in names:
        write(tmp_path / name)
    write(tmp_path / ".hidden.png")
    write(tmp_path / ".thumbs/x.png")
    (tmp_path / "notes.md").write_text("x")
    found = scan(3, str(tmp_path), captions="filename")
    assert [s.name for s in found.samples] == sorted(names)
    assert found.bad_files == []
    first = found.samples[0]
    assert (first.path, first.source, first.caption) == (f"{tmp_path}/a b.jpg", 3, "a b")
    assert (first.width, first.height, first.repeat, first.held_out) == (30, 20, 0, False)
    status = os.stat(first.path)
    assert (first.file_size, first.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_relative_path_gives_absolute_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path)
    assert scan(0, "in", captions="filename").samples[0].path == f"{tmp_path}/in/a.png"


def test_links(tmp_path: Path) -> None:
    write(tmp_path / "real/a.png")
    write(tmp_path / "elsewhere/b.png")
    root = tmp_path / "real"
    (root / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "elsewhere/b.png")
    (root / "broken.png").symlink_to(tmp_path / "nothing")
    found = scan(0, str(root), captions="filename")
    assert [s.name for s in found.samples] == ["a.png", "file.png", "linked/b.png"]
    assert [(b.path, b.reason) for b in found.bad_files] == [
        (f"{root}/broken.png", "is a link to a missing file")
    ]


def test_bad_files_are_reported_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "new.jxl").write_bytes(b"\xff\x0a")
    (tmp_path / "no caption.heic").write_bytes(b"x")
    for name in ("good", "empty", "text", "alone"):
        (tmp_path / f"{name}.txt").write_text("caption")
    write(tmp_path / "mute.png")
    found = scan(0, str(tmp_path), captions="textfile")
    assert [s.name for s in found.samples] == ["good.png"]
    assert {Path(b.path).name: b.reason for b in found.bad_files} == {
        "empty.png": "is empty (0 bytes)",
        "text.jpg": "is not an image that Pillow can read",
        "new.jxl": "JPEG XL is not supported; convert it to PNG, JPEG or WebP",
        "no caption.heic": "HEIC is not supported; convert it to PNG, JPEG or WebP",
        "mute.png": "has no caption: mute.txt is missing",
    }
    assert [Path(w.path).name for w in found.warnings] == ["alone.txt"]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    os.rename(os.fsencode(write(tmp_path / "b.png")), os.fsencode(tmp_path) + b"/\xff.png")
    found = scan(0, str(tmp_path), captions="filename")
    assert len(found.samples) == 1
    assert found.bad_files[0].reason == "its name is not valid UTF-8; rename it"
    found.bad_files[0].path.encode()  # can be printed and written to JSON


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: p.rmdir(), "does not exist"),
        (lambda p: (p.rmdir(), p.write_text("x")), "is a file"),
        (lambda p: (p / "a.txt").write_text("x"), "has no images"),
    ],
)
def test_unusable_folders(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        scan(0, str(folder))
    assert str(folder) in str(caught.value)


def test_known_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", 31, 17)
    (tmp_path / "bad.png").write_text("x")
    first = scan(0, str(tmp_path), captions="filename")
    assert set(first.measured) == {f"{tmp_path}/a.png", f"{tmp_path}/bad.png"}
    opened: list[str] = []
    real = module.measure
    monkeypatch.setattr(module, "measure", lambda path: opened.append(path) or real(path))
    again = scan(0, str(tmp_path), captions="filename", known=first.measured)
    assert opened == []
    assert (again.samples, again.bad_files, again.measured) == (first.samples, first.bad_files, {})
    os.utime(tmp_path / "a.png", ns=(1, 1))
    changed = scan(0, str(tmp_path), captions="filename", known=first.measured)
    assert opened == [f"{tmp_path}/a.png"]
    assert changed.samples[0].mtime_ns == 1


def test_a_link_in_a_circle_is_a_bad_file(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    for name in ("circle", "circle.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    found = scan(0, str(tmp_path), captions="filename")
    assert [s.name for s in found.samples] == ["a.png"]
    assert [Path(b.path).name for b in found.bad_files] == ["circle", "circle.png"]
    assert all("symbolic links" in b.reason for b in found.bad_files)


def test_all_that_pillow_reads_is_an_image(tmp_path: Path) -> None:
    names = ["a.jfif", "b.ppm", "c.jp2", "d.tga", "e.jpe", "f.pgm", "g.qoi", "h.ico", "i.apng"]
    for name in names:
        image = Image.new("L" if name.endswith("pgm") else "RGB", (32, 32))
        kinds = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG"}
        image.save(tmp_path / name, kinds.get(name.split(".")[1]))
    found = scan(0, str(tmp_path), captions="filename")
    assert [s.name for s in found.samples] == names
    assert found.bad_files == []
    assert found.other_files == {}


def test_refused_and_other_files_are_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    refused = "x.CR2 x.nef x.arw x.dng x.heic x.mp4 x.mov x.webm x.mpg x.eps x.pdf x.svg".split()
    for name in [*refused, "x.npz", "y.NPZ", "x.db", "noending", "x.md", "x.json", "x.csv"]:
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    found = scan(0, str(tmp_path), captions="filename")
    assert [s.name for s in found.samples] == ["a.png"]
    reasons = {Path(b.path).name: b.reason for b in found.bad_files}
    assert sorted(reasons) == sorted(refused)
    assert reasons["x.CR2"] == "is a camera's raw file; develop it to PNG, TIFF or JPEG"
    assert reasons["x.mov"] == "is a film; save the frames you want as images"
    assert reasons["x.eps"] == "is a drawing or document; export it as PNG"
    assert found.other_files == {".npz": 2, ".db": 1, "": 1}


def test_the_key_is_named(tmp_path: Path) -> None:
    key = "validation.held_out_path"
    with pytest.raises(DatasetError, match=rf"^{key} = .*does not exist"):
        scan(1, str(tmp_path / "no"), key=key)
    write(tmp_path / "a.png")
    for options in ({}, {"caption_file": "x.csv"}):
        with pytest.raises(DatasetError, match=rf"^{key} = .*exist"):
            scan(1, str(tmp_path), key=key, captions="csv", **options)


def test_a_small_folder_holds_out_at_least_one(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"{index}.png")
    options = {"captions": "filename", "held_out": 1e-9}
    samples = scan(0, str(tmp_path), **options).samples  # type: ignore[arg-type]
    (chosen,) = [s.name for s in samples if s.held_out]
    (
        tmp_path / next(s.name for s in samples if s.name != chosen)
    ).unlink()  # the choice does not depend on what was not chosen
    samples = scan(0, str(tmp_path), **options).samples  # type: ignore[arg-type]
    assert [s.name for s in samples if s.held_out] == [chosen]
    for path in tmp_path.iterdir():
        if path.name != chosen:
            path.unlink()
    assert not scan(0, str(tmp_path), **options).samples[0].held_out  # type: ignore[arg-type]
    write(tmp_path / "more.png")
    samples = scan(0, str(tmp_path), captions="filename").samples
    assert not any(s.held_out for s in samples)


def test_repeats_and_held_out(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    status = {f"{tmp_path}/{i}.png": os.stat(tmp_path / f"{i}.png") for i in range(200)}
    known = {p: module.ImageFile(s.st_size, s.st_mtime_ns, 8, 8, None) for p, s in status.items()}
    options = {"captions": "filename", "known": known}
    found = scan(0, str(tmp_path), repeats=3, held_out=0.25, **options).samples  # type: ignore[arg-type]
    held_out = {s.name for s in found if s.held_out}
    assert 25 <= len(held_out) <= 75  # binomial(200, 0.25): four standard deviations
    for name in {s.name for s in found}:
        repeats = [s.repeat for s in found if s.name == name]
        assert repeats == ([0] if name in held_out else [0, 1, 2])
    for index in range(0, 200, 2):
        os.unlink(tmp_path / f"{index}.png")
    fewer = scan(0, str(tmp_path), held_out=0.25, **options).samples  # type: ignore[arg-type]
    assert {s.name for s in fewer if s.held_out} == held_out & {s.name for s in fewer}
    more = scan(0, str(tmp_path), held_out=0.5, **options).samples  # type: ignore[arg-type]
    assert held_out & {s.name for s in fewer} < {s.name for s in more if s.held_out}
