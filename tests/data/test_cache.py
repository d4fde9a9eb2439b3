"""The cache under everything that goes wrong: kills, full disks, deleted files, two writers."""

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.data import cache as module
from fasttune.data.cache import Cache, Space, make_key
from fasttune.data.samples import ImageFile
from fasttune.errors import DatasetError, StorageError


def entry(number: int) -> tuple[bytes, dict[str, Tensor]]:
    fields = {"mean": torch.full((2, 3), float(number)), "mask": torch.tensor([number % 2 == 0])}
    return make_key(number), fields


def fill(space: Space, numbers: range) -> None:
    with space.writer() as writer:
        writer.add([entry(number) for number in numbers])


def check(space: Space, numbers: range) -> None:
    for number in numbers:
        tensors = space.read(make_key(number))
        assert torch.equal(tensors["mean"], torch.full((2, 3), float(number)))
        assert tensors["mask"].tolist() == [number % 2 == 0]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_entries_come_back_after_reopening(tmp_path: Path) -> None:
    with Cache(tmp_path / "a" / "cache") as cache:
        space = cache.space("latents", "m")
        assert space.missing([make_key(1), make_key(0), make_key(1)]) == [make_key(1), make_key(0)]
        fill(space, range(5))
        check(space, range(5))
    with Cache(tmp_path / "a" / "cache") as cache:
        space = cache.space("latents", "m")
        assert len(space) == 5
        check(space, range(5))
        assert space.missing(map(make_key, range(7))) == [make_key(5), make_key(6)]
        assert len(cache.space("latents", "other model")) == 0
        assert len(cache.space("text", "m")) == 0


def test_keys_differ_by_every_part() -> None:
    keys = {make_key("a", 1), make_key("a", 2), make_key("b", 1), make_key("a1"), make_key("a", "")}
    assert len(keys) == 5


def test_shards_end_with_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ITEMS", 4)
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        with space.writer() as writer:
            for start in range(0, 12, 3):
                writer.add([entry(number) for number in range(start, start + 3)])
        assert len(shards(tmp_path)) == 2
        check(space, range(12))
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "n")
        with space.writer() as writer:
            for number in range(3):
                writer.add([entry(number)])
        assert len(shards(tmp_path)) == 5
    monkeypatch.setattr(module, "SHARD_SECONDS", 1e9)
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 25)
    with Cache(tmp_path) as cache, cache.space("latents", "o").writer() as writer:
        for number in range(4):
            writer.add([entry(number)])  # 24 bytes of floats and one of mask
    assert len(shards(tmp_path)) == 7


def test_few_open_shards_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        for number in range(5):
            fill(space, range(number, number + 1))
        for _ in range(2):
            check(space, range(5))
        assert len(cache._handles) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_what_is_finished_survives_an_exception(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        with pytest.raises(interruption), space.writer() as writer:
            writer.add([entry(0)])
            raise interruption
    with Cache(tmp_path) as cache:
        check(cache.space("latents", "m"), range(1))


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def wipe(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("damage", [delete, truncate, wipe])
def test_entries_of_a_damaged_shard_are_made_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with Cache(tmp_path) as cache:
        fill(cache.space("latents", "m"), range(3))
        (first,) = shards(tmp_path)
        fill(cache.space("latents", "m"), range(3, 5))
    damage(first)
    with Cache(tmp_path) as cache, caplog.at_level(logging.WARNING):
        space = cache.space("latents", "m")
        assert f"{first} is missing or damaged: its 3 entries are made again" in caplog.text
        assert space.missing(map(make_key, range(5))) == list(map(make_key, range(3)))
        check(space, range(3, 5))
        fill(space, range(3))
    caplog.clear()
    with Cache(tmp_path) as cache:
        check(cache.space("latents", "m"), range(5))
    assert caplog.text == ""


def test_a_shard_deleted_while_in_use_is_named(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        fill(space, range(1))
        (shard,) = shards(tmp_path)
        shard.unlink()
        with pytest.raises(DatasetError, match=f"{shard.name} is missing or damaged"):
            space.read(make_key(0))


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors: object, path: Path) -> None:
    Path(path).write_bytes(b"x" * 100)
    no_space()


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_cache_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        fill(space, range(3))
        with monkeypatch.context() as patch:
            if where == "save_file":
                patch.setattr(module, "save_file", half_written)
            else:
                patch.setattr(os, where, no_space)
            with pytest.raises(StorageError, match=f"{tmp_path} cannot be written .*No space left"):
                fill(space, range(3, 6))
        assert list(tmp_path.glob("*.tmp")) == []
        assert len(shards(tmp_path)) == 1
        check(space, range(3))
        fill(space, range(3, 6))
    with Cache(tmp_path) as cache:
        check(cache.space("latents", "m"), range(6))


def test_a_file_size_limit_of_the_system_is_a_storage_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        big = torch.zeros(2**20)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            with pytest.raises(StorageError, match="cannot be written"), space.writer() as writer:
                writer.add([(make_key(0), {"mean": big})])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.glob("*.safetensors*")) == []
        assert make_key(0) not in space


def test_a_full_disk_while_indexing(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        fill(space, range(2))
        pages = cache._index.execute("PRAGMA page_count").fetchone()[0]
        cache._index.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match="disk is full"):
            fill(space, range(2, 2002))
        assert len(space) == 2
    with Cache(tmp_path) as cache:
        space = cache.space("latents", "m")
        assert len(space) == 2
        check(space, range(2))


def test_leftovers_go_when_they_are_old(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        fill(cache.space("text", "m"), range(2))
    old = tmp_path / "latents-0.safetensors"
    young = tmp_path / "text-1.safetensors.tmp"
    foreign = tmp_path / "notes.md"
    for path in (old, young, foreign):
        path.write_text("x")
    long_ago = time.time() - 2 * module.ORPHAN_SECONDS
    os.utime(old, (long_ago, long_ago))
    os.utime(foreign, (long_ago, long_ago))
    for shard in tmp_path.glob("text-*.safetensors"):
        os.utime(shard, (long_ago, long_ago))
    with Cache(tmp_path) as cache:
        check(cache.space("text", "m"), range(2))
    assert (old.exists(), young.exists(), foreign.exists()) == (False, True, True)


def test_two_writers(tmp_path: Path) -> None:
    with Cache(tmp_path) as one, Cache(tmp_path) as two:
        first, second = one.space("latents", "m"), two.space("latents", "m")
        fill(first, range(4))
        fill(second, range(2, 6))
        check(first, range(4))
        check(second, range(2, 6))
    with Cache(tmp_path) as cache:
        check(cache.space("latents", "m"), range(6))


def test_image_files_are_remembered(tmp_path: Path) -> None:
    good, bad = ImageFile(10, 2**62, 640, 480, None), ImageFile(5, 1, 0, 0, "is empty")
    with Cache(tmp_path) as cache:
        cache.remember_image_files({"/ü\n.png": good, "/b.png": bad}, "pillow 1")
    with Cache(tmp_path) as cache:
        assert cache.image_files("pillow 1") == {"/ü\n.png": good, "/b.png": bad}
        # another Pillow may read what this one could not
        assert cache.image_files("pillow 2") == {"/ü\n.png": good}
        cache.remember_image_files({"/b.png": good}, "pillow 2")
        assert cache.image_files("pillow 3")["/b.png"] == good


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        Cache(tmp_path / "file")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "index.sqlite").write_bytes(b"no database " * 200)
    with pytest.raises(DatasetError, match=r"index\.sqlite is damaged"):
        Cache(damaged)
    Cache(tmp_path / "newer").close()
    connection = sqlite3.connect(tmp_path / "newer/index.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DatasetError, match="format 99"):
        Cache(tmp_path / "newer")


def test_remarks_are_kept_with_their_entries(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        space = cache.space("text", "model")
        with space.writer() as writer:
            writer.add([(b"a", {"x": torch.zeros(1)})], {b"a": "is long"})
            writer.add([(b"b", {"x": torch.zeros(1)})])
        assert space.remarks == {b"a": "is long"}
    with Cache(tmp_path) as cache:
        assert cache.space("text", "model").remarks == {b"a": "is long"}
        assert cache.space("text", "other").remarks == {}


def test_a_cache_from_before_remarks_opens(tmp_path: Path) -> None:
    Cache(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.executescript("DROP TABLE remarks; DROP TABLE file_hashes;")
    connection.close()
    with Cache(tmp_path) as cache:
        assert cache.space("text", "model").remarks == {}
