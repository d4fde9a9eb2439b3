"""Captions of each kind, and what is said when they do not fit."""

import errno
import io
import sys
from pathlib import Path

import pytest

from fasttune.data.captions import Captions, read_captions
from fasttune.errors import DatasetError

NAMES = ["a.png", "sub/b c.jpg", "sub/ü_d.webp"]


def read(folder: Path, names: list[str] = NAMES, **options: object) -> Captions:
    texts = [p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")]
    return read_captions(str(folder), names, texts, **options)  # type: ignore[arg-type]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  first line\r\nsecond\r\n\r\n")
    (tmp_path / "sub/b c.txt").write_bytes(b"")
    (tmp_path / "sub/ü_d.txt").write_text("grün", encoding="utf-8")
    (tmp_path / "sub/other.txt").write_text("nobody")
    found = read(tmp_path, captions="textfile")
    assert found.by_name == {
        "a.png": "first line\nsecond",
        "sub/b c.jpg": "",
        "sub/ü_d.webp": "grün",
    }
    assert found.unusable == {}
    assert found.unmatched == [(f"{tmp_path}/sub/other.txt", "is a caption without an image")]


def test_some_text_files_missing_or_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "sub/b c.txt").write_text("grün", encoding="utf-16")
    found = read(tmp_path, captions="textfile")
    assert found.by_name == {"a.png": "fine"}
    assert found.unusable == {
        "sub/b c.jpg": "its caption sub/b c.txt is not UTF-8; save it as UTF-8",
        "sub/ü_d.webp": "has no caption: ü_d.txt is missing",
    }


def test_no_text_file_at_all_names_ten_and_the_count(tmp_path: Path) -> None:
    names = [f"{i:02d}.png" for i in range(13)]
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, names, captions="textfile")
    message = str(caught.value)
    assert "none of the 13 images has a caption" in message
    assert f"{tmp_path}/09.png" in message
    assert f"{tmp_path}/10.png" not in message
    assert "and 3 more" in message
    assert 'data.captions to "filename"' in message


def test_file_names(tmp_path: Path) -> None:
    found = read(tmp_path, ["a_red__cat.png", "sub/two.dots.jpg"], captions="filename")
    assert found.by_name == {"a_red__cat.png": "a red cat", "sub/two.dots.jpg": "two.dots"}


def test_constant(tmp_path: Path) -> None:
    found = read(tmp_path, captions="constant", caption=" a photo of sks dog ")
    assert found.by_name == dict.fromkeys(NAMES, "a photo of sks dog")
    with pytest.raises(DatasetError, match=r"needs data\.caption"):
        read(tmp_path, captions="constant")


JSONL = (
    '\ufeff{"file_name": "a.png", "caption": "one\\r\\ntwo "}\r\n\r\n'
    '{"file_name": ".\\\\sub\\\\b c.jpg", "caption": "", "extra": 1}\n'
    '{"file_name": "gone.png", "caption": "x"}\n'
    '{"file_name": "a.png", "caption": "again"}\n'
    '{"file_name": "sub/ü_d.webp", "caption": null}\n'
    '{"file_name": null, "caption": "y"}\n'
)
CSV = (
    "\ufefffile_name,caption,extra\r\n"
    'a.png,"one\r\ntwo ",1\r\n'
    "./sub/b c.jpg,,1\r\ngone.png,x,1\r\na.png,again,1\r\n,y,1\r\n"
)


@pytest.mark.parametrize(("kind", "text"), [("jsonl", JSONL), ("csv", CSV)])
@pytest.mark.parametrize("file_name", ["captions", "metadata", "other"])
def test_tables(tmp_path: Path, kind: str, text: str, file_name: str) -> None:
    path = tmp_path / f"{file_name}.{kind}"
    path.write_bytes(text.encode())
    named = path.name if file_name == "other" else None
    found = read(tmp_path, captions=kind, caption_file=named)
    assert found.by_name == {"a.png": "one\ntwo", "sub/b c.jpg": ""}
    assert list(found.unusable) == ["sub/ü_d.webp"]
    reasons = [reason for _, reason in found.unmatched]
    assert reasons[:2] == [
        "is a caption without an image (gone.png)",
        "is a second caption of a.png; the first is used",
    ]
    assert reasons[2].startswith("names no image")
    assert all(str(path) in where for where, _ in found.unmatched)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {
        "path": ["a.png", "gone.png", str(tmp_path / "sub/b c.jpg")],
        "text": ["one", "x", "z"],
    }
    parquet.write_table(arrow.table(table), tmp_path / "metadata.parquet")
    found = read(tmp_path, captions="parquet", image_column="path", caption_column="text")
    assert found.by_name == {"a.png": "one", "sub/b c.jpg": "z"}
    assert "row 2" in found.unmatched[0][0]
    with pytest.raises(DatasetError, match=r"no column 'caption' .*its columns are 'path', 'text'"):
        read(tmp_path, captions="parquet", image_column="path")
    (tmp_path / "captions.parquet").write_text("no parquet")
    with pytest.raises(DatasetError, match="is no Parquet file"):
        read(tmp_path, captions="parquet")


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captions.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"install fasttune\[parquet\]"):
        read(tmp_path, captions="parquet")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "jsonl",
            '{"file_name": "a.png", "text": "x"}\n',
            "'caption'.*columns are 'file_name', 'text'",
        ),
        ("jsonl", '{"file_name": "a.png"\n', "line 1 is no JSON"),
        ("jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("csv", "image,caption\na.png,x\n", "'file_name'.*columns are 'image', 'caption'"),
        ("csv", "", "its columns are none"),
        ("csv", "file_name,caption\nb.png,x\n", "none of the 3 images has a caption"),
        ("jsonl", '{"file_name": "b.png", "caption": "x"}', "must hold paths relative to"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, kind: str, text: str, message: str) -> None:
    (tmp_path / f"captions.{kind}").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, captions=kind)


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    for kind in ("csv", "jsonl"):
        (tmp_path / f"captions.{kind}").write_bytes("file_name,caption\na.png,ü\n".encode("latin1"))
        with pytest.raises(DatasetError, match="UTF-8"):
            read(tmp_path, captions=kind)


def test_missing_tables(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"captions\.csv.*metadata\.csv.*data\.caption_file"):
        read(tmp_path, captions="csv")
    with pytest.raises(DatasetError, match=r"data\.caption_file: .*x\.csv does not exist"):
        read(tmp_path, captions="csv", caption_file="x.csv")


class Damaged(io.BytesIO):
    """A file on a failing disk."""

    def readline(self, *args: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    __next__ = readline
    read = readinto = readline  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_on_a_failing_disk(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"captions.{kind}").write_text("file_name,caption\na.png,a\n")

    def fails(*args: object, **kwargs: object) -> io.BytesIO:
        return Damaged()

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(DatasetError, match=rf"captions\.{kind} cannot be read \(Input/output"):
        read(tmp_path, ["a.png"], captions=kind)


def test_a_parquet_file_with_damaged_pages(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = [f"{i}.png" for i in range(2000)]
    table = arrow.table({"file_name": names, "caption": [f"caption {i}" for i in range(2000)]})
    path = tmp_path / "captions.parquet"
    parquet.write_table(table, path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[4:3000] = bytes(2996)  # pages; the footer, at the end, is whole
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"captions\.parquet is no Parquet file or damaged"):
        read(tmp_path, names, captions="parquet")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = arrow.array([b"\xff\xfe"], arrow.binary()).view(arrow.string())
    table = arrow.table({"file_name": ["a.png"], "caption": raw})
    parquet.write_table(table, tmp_path / "captions.parquet")
    with pytest.raises(DatasetError, match=r"captions\.parquet .*damaged"):
        read(tmp_path, ["a.png"], captions="parquet")
