"""Latents and text embeddings on disk: safetensors shards and a SQLite index.

A shard is written beside its final name, fsynced, renamed, and only then indexed in one SQLite
transaction. So whatever the index names can be read, whenever a process was killed or the disk
filled up; what is lost is the work since the last shard. Shards have unique names, so several
processes may fill one cache; at worst both do the same work.

Entries live in spaces. A space is everything one encoder made with one way of storing it; its
identity is a hash of the model's files (data/identity.py), dtypes and storage. Keys within it say
which image, at which size and modification time, cropped how, or which caption.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasttune.data.samples import ImageFile
from fasttune.data.storage import tensor_bytes
from fasttune.errors import DatasetError, StorageError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SHARD_ITEMS = 2048
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 20.0
OPEN_SHARDS = 128
"""Shards kept mapped for reading; each is address space and page cache, not memory."""
ORPHAN_SECONDS = 3600.0
"""A shard is indexed right after it is written; one this old without an entry is a leftover."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    path TEXT PRIMARY KEY, file_size INTEGER, mtime_ns INTEGER, width INTEGER, height INTEGER,
    reason TEXT, decoder TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spaces (
    id INTEGER PRIMARY KEY, kind TEXT, identity TEXT, UNIQUE (kind, identity));
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, space INTEGER, name TEXT UNIQUE, num_bytes INTEGER);
CREATE TABLE IF NOT EXISTS entries (
    space INTEGER, key BLOB, shard INTEGER, slot INTEGER, PRIMARY KEY (space, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_of_shard ON entries (shard);
CREATE TABLE IF NOT EXISTS remarks (
    space INTEGER, key BLOB, remark TEXT, PRIMARY KEY (space, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS file_hashes (
    path TEXT PRIMARY KEY, file_size INTEGER, mtime_ns INTEGER, hash BLOB) WITHOUT ROWID;
"""


def make_key(*parts: object) -> bytes:
    """16 bytes that differ whenever a part does."""
    text = "\0".join([str(part) for part in parts]).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


class Cache:
    """A cache folder. Raises StorageError if it cannot be written, DatasetError if damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._handles: OrderedDict[str, tuple[Any, list[str]]] = OrderedDict()
        self._lock = threading.Lock()
        index = self.folder / "index.sqlite"
        with self._storage_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(index, timeout=60.0, isolation_level=None)
            try:
                version = self._index.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, SCHEMA_VERSION):
                    raise DatasetError(
                        f"{index} was written by another version of fasttune (format {version}, "
                        f"this one has {SCHEMA_VERSION}); set cache.dir to another folder"
                    )
                self._index.executescript(_SCHEMA)  # tables of this format that were added later
                if version == 0:
                    self._index.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            except BaseException:
                self._index.close()
                raise
        self._remove_orphans()

    def close(self) -> None:
        """Closes index and shards; entries that were read stay valid."""
        self._index.close()
        with self._lock:
            self._handles.clear()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def image_files(self, decoder: str) -> dict[str, ImageFile]:
        """All files earlier scans opened, by path. Failures count for the same decoder alone."""
        query = (
            "SELECT path, file_size, mtime_ns, width, height, reason FROM images "
            "WHERE reason IS NULL OR decoder = ?"
        )
        with self._storage_errors():
            return {row[0]: ImageFile(*row[1:]) for row in self._index.execute(query, (decoder,))}

    def remember_image_files(self, files: Mapping[str, ImageFile], decoder: str) -> None:
        """Adds or replaces what is known of files."""
        rows = ((path, *file, decoder) for path, file in files.items())
        with self._transaction():
            self._index.executemany("INSERT OR REPLACE INTO images VALUES (?,?,?,?,?,?,?)", rows)

    def file_hash(self, path: str, file_size: int, mtime_ns: int) -> bytes | None:
        """What `remember_file_hash` was told of a file that has not changed since."""
        query = "SELECT hash FROM file_hashes WHERE path = ? AND file_size = ? AND mtime_ns = ?"
        with self._storage_errors():
            row = self._index.execute(query, (path, file_size, mtime_ns)).fetchone()
        return None if row is None else row[0]

    def remember_file_hash(self, path: str, file_size: int, mtime_ns: int, content: bytes) -> None:
        """Adds or replaces the hash of a file's content."""
        values = (path, file_size, mtime_ns, content)
        with self._transaction():
            self._index.execute("INSERT OR REPLACE INTO file_hashes VALUES (?,?,?,?)", values)

    def space(self, kind: Literal["latents", "text"], identity: str) -> "Space":
        """The space of this identity with all its readable entries.

        Entries whose shard is missing or cut off are forgotten, with a warning in the log.
        """
        with self._transaction():
            values = (kind, identity)
            self._index.execute(
                "INSERT OR IGNORE INTO spaces (kind, identity) VALUES (?,?)", values
            )
            query = "SELECT id FROM spaces WHERE kind = ? AND identity = ?"
            number = self._index.execute(query, values).fetchone()[0]
            query = "SELECT id, name, num_bytes FROM shards WHERE space = ?"
            # Shards are renamed before they are indexed, so a row read here has its file.
            shards = self._index.execute(query, (number,)).fetchall()
            names: dict[int, str] = {}
            for shard, name, num_bytes in shards:
                if self._is_whole(name, num_bytes):
                    names[shard] = name
                    continue
                lost = self._index.execute("DELETE FROM entries WHERE shard = ?", (shard,)).rowcount
                self._index.execute("DELETE FROM shards WHERE id = ?", (shard,))
                path = self.folder / name
                log.warning("%s is missing or damaged: its %d entries are made again", path, lost)
                path.unlink(missing_ok=True)
            query = "SELECT key, shard, slot FROM entries WHERE space = ?"
            rows = self._index.execute(query, (number,))
            entries = {key: (names[shard], slot) for key, shard, slot in rows}
            query = "SELECT key, remark FROM remarks WHERE space = ?"
            remarks = dict(self._index.execute(query, (number,)).fetchall())
        return Space(self, kind, number, entries, remarks)

    def _is_whole(self, name: str, num_bytes: int) -> bool:
        try:
            with (self.folder / name).open("rb") as file:
                head = file.read(9)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        header = int.from_bytes(head[:8], "little")
        return size == num_bytes and 8 + header <= size and head[8:9] == b"{"

    def _shard(self, name: str) -> tuple[Any, list[str]]:
        """The mapped file and the names of each entry's tensors, which a shard's entries share."""
        with self._lock:
            opened = self._handles.get(name)
            if opened is None:
                path = self.folder / name
                try:
                    handle: Any = safe_open(path, framework="pt")
                    fields = [key[2:] for key in handle.keys() if key.startswith("0.")]
                except (OSError, SafetensorError) as error:
                    raise DatasetError(
                        f"{path} is missing or damaged ({error}); delete it and start again: "
                        "what it held is made anew"
                    ) from error
                opened = self._handles[name] = (handle, fields)
                if len(self._handles) > OPEN_SHARDS:
                    self._handles.popitem(last=False)
            else:
                self._handles.move_to_end(name)
            return opened

    def _write_shard(
        self,
        kind: str,
        space: int,
        items: Sequence[tuple[bytes, Mapping[str, Tensor]]],
        remarks: Mapping[bytes, str],
    ) -> str:
        name = f"{kind}-{uuid.uuid4().hex[:16]}.safetensors"
        path, beside = self.folder / name, self.folder / f"{name}.tmp"
        tensors = {
            f"{slot}.{field}": tensor
            for slot, (_, fields) in enumerate(items)
            for field, tensor in fields.items()
        }
        with self._storage_errors():
            try:
                save_file(tensors, beside)
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                num_bytes = beside.stat().st_size
                os.replace(beside, path)
                if os.name == "posix":
                    folder = os.open(self.folder, os.O_RDONLY)
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            with self._transaction():
                query = "INSERT INTO shards (space, name, num_bytes) VALUES (?,?,?)"
                shard = self._index.execute(query, (space, name, num_bytes)).lastrowid
                rows = ((space, key, shard, slot) for slot, (key, _) in enumerate(items))
                self._index.executemany("INSERT OR REPLACE INTO entries VALUES (?,?,?,?)", rows)
                noted = ((space, key, remark) for key, remark in remarks.items())
                self._index.executemany("INSERT OR REPLACE INTO remarks VALUES (?,?,?)", noted)
        return name

    def _remove_orphans(self) -> None:
        with self._storage_errors():
            listed = list(os.scandir(self.folder))
            indexed = {row[0] for row in self._index.execute("SELECT name FROM shards")}
            for entry in listed:
                is_shard = entry.name.startswith(("latents-", "text-"))
                if not is_shard or entry.name in indexed:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime > ORPHAN_SECONDS:
                        os.unlink(entry.path)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._storage_errors():
            self._index.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._index.execute("COMMIT")
            except BaseException:
                if self._index.in_transaction:
                    self._index.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        remedy = "free some space or set cache.dir to another folder; what is there stays valid"
        try:
            yield
        except (OSError, SafetensorError, sqlite3.OperationalError) as error:
            raise StorageError(f"{self.folder} cannot be written ({error}); {remedy}") from error
        except sqlite3.DatabaseError as error:
            raise DatasetError(
                f"{self.folder / 'index.sqlite'} is damaged ({error}); delete it: the cache is "
                "made again"
            ) from error


class Space:
    """The entries of one encoder and storage: key -> named tensors."""

    def __init__(
        self,
        cache: Cache,
        kind: str,
        number: int,
        entries: dict[bytes, tuple[str, int]],
        remarks: dict[bytes, str],
    ) -> None:
        self._cache = cache
        self._kind = kind
        self._number = number
        self._entries = entries
        self.remarks = remarks
        """What the encoder had to say about entries, by key; few have any."""

    @property
    def folder(self) -> Path:
        """Where the entries are written."""
        return self._cache.folder

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Keys without an entry, each once, in the given order."""
        return [key for key in dict.fromkeys(keys) if key not in self._entries]

    def read(self, key: bytes) -> dict[str, Tensor]:
        """The tensors of an entry as stored, mapped from the file: copy before changing them.

        Raises KeyError for an unknown key, DatasetError if the shard has gone or is damaged.
        """
        name, slot = self._entries[key]
        handle, fields = self._cache._shard(name)
        return {field: handle.get_tensor(f"{slot}.{field}") for field in fields}

    def writer(self) -> "ShardWriter":
        """Context in which entries are added; what is pending is written at its end."""
        return ShardWriter(self)

    def _add(
        self, items: Sequence[tuple[bytes, Mapping[str, Tensor]]], remarks: Mapping[bytes, str]
    ) -> None:
        name = self._cache._write_shard(self._kind, self._number, items, remarks)
        self.remarks.update(remarks)
        self._entries.update({key: (name, slot) for slot, (key, _) in enumerate(items)})


class ShardWriter:
    """Collects entries and writes a shard when enough are pending.

    Shards end where a call to `add` ends, so that a resumed run meets whole batches.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._pending: list[tuple[bytes, Mapping[str, Tensor]]] = []
        self._remarks: dict[bytes, str] = {}
        self._num_bytes = 0
        self._since = 0.0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # After Ctrl-C or a bad file the finished work is kept; a full disk is not tried again.
        if kind is None or not issubclass(kind, StorageError):
            self.flush()

    def add(
        self,
        items: Sequence[tuple[bytes, Mapping[str, Tensor]]],
        remarks: Mapping[bytes, str] | None = None,
    ) -> None:
        """Adds a batch of (key, contiguous CPU tensors that share no memory), some with a remark."""
        if not self._pending:
            self._since = time.monotonic()
        self._pending += items
        self._remarks.update(remarks or {})
        self._num_bytes += sum(tensor_bytes(fields.values()) for _, fields in items)
        if (
            len(self._pending) >= SHARD_ITEMS
            or self._num_bytes >= SHARD_BYTES
            or time.monotonic() - self._since >= SHARD_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard. Raises StorageError."""
        pending, self._pending, self._num_bytes = self._pending, [], 0
        remarks, self._remarks = self._remarks, {}
        if pending:
            self._space._add(pending, remarks)
