"""Safetensors files read and written tensor by tensor, so that converting a model of any size needs
memory for its largest tensor alone.

Format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian;
a JSON header, name -> dtype, shape and byte range; then the bytes of all tensors without gaps.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasttune.errors import ModelError, StorageError

HASH_KEY = "modelspec.hash_sha256"
"""Metadata key that `write_tensors` fills with the hash of the tensors' bytes."""
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)[.-]")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def mapped(
    tensor: LazyTensor, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None
) -> LazyTensor:
    """`change` applied when it is written; `shape` if it is another one."""
    return LazyTensor(shape or tensor.shape, tensor.dtype, lambda: change(tensor.load()))


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of several tensors after one another."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


def stored(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Floating tensors cast to `dtype` when written. ModelError for values beyond float16."""

    def cast(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            value = tensor.load()
            narrow = value.to(dtype)
            if dtype == torch.float16 and narrow.isinf().any() and not value.isinf().any():
                raise ModelError(
                    f"{name} holds values up to {value.abs().max():.3g}, beyond fp16; export with "
                    "dtype bf16 or fp32"
                )
            return narrow

        return LazyTensor(tensor.shape, dtype, load) if tensor.dtype.is_floating_point else tensor

    return {name: cast(name, tensor) for name, tensor in tensors.items()}


def open_tensors(paths: Sequence[Path]) -> dict[str, LazyTensor]:
    """The tensors of safetensors files, memory-mapped. ModelError for a damaged file."""
    found: dict[str, LazyTensor] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():
                facts = file.get_slice(name)
                shape, dtype = tuple(facts.get_shape()), _DTYPES[facts.get_dtype()]
                found[name] = LazyTensor(shape, dtype, lambda f=file, n=name: f.get_tensor(n))  # type: ignore[misc]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); it is missing, damaged or quantized"
            ) from error
    return found


def component_files(folder: Path) -> list[Path]:
    """The safetensors files of one component of a model in diffusers layout. ModelError if it has
    none, or not all that its index names."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"), key=_variants_last)), None)
    if index is not None and not _variants_last(index)[0]:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"), key=_variants_last)
    if not files:
        raise ModelError(f"{folder} has no .safetensors weights; export needs the whole model")
    return files[:1]


def write_tensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    seen: Callable[[bytes | memoryview], object] | None = None,
) -> None:
    """Writes a safetensors file whole or not at all; an earlier file of this name stays until then.

    With HASH_KEY in the metadata its value becomes "0x" and the SHA-256 of all tensor bytes in file
    order, as modelspec asks. Without it `seen` can be given: it is called with all bytes of the
    file, in order. StorageError if the disk is full or the folder cannot be written.
    """
    assert seen is None or HASH_KEY not in metadata, "the header with the hash is written last"
    # Largest elements first keep every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    metadata = dict(metadata)
    if HASH_KEY in metadata:
        metadata[HASH_KEY] = "0x" + "0" * 64
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.num_bytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with beside.open("wb") as file:
            header = _header(entries)
            file.write(header)
            if seen is not None:
                seen(header)
            for name in order:
                value = tensors[name].load().detach().cpu().contiguous()
                assert tuple(value.shape) == tensors[name].shape, name
                data = value.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                if HASH_KEY in metadata:
                    digest.update(data)
                if seen is not None:
                    seen(data)
                del value, data  # before the next one is loaded
            if HASH_KEY in metadata:
                metadata[HASH_KEY] = f"0x{digest.hexdigest()}"
                file.seek(0)
                file.write(_header(entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error}); free some space or choose another folder. Earlier "
            "files are intact"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _variants_last(path: Path) -> tuple[bool, str]:
    return (VARIANT.search(path.name) is not None, path.name)
