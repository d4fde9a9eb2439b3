"""What one launch over many tensors needs to know on the device: where they are, and who does what.

The work is cut into chunks of some tiles of one tensor, one a program. Chunks and layout depend on
sizes, dtypes and groups, and stay on the device. The tensors' addresses are compared on every call
and copied, from pinned memory and without waiting, when one has changed, as those of gradients do.

In a captured CUDA graph, the copy would be repeated by every replay. So a capture takes buffers that
nobody writes again, and which have to be there: a step with tensors of these sizes runs before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.arena import BLOCK, arena_offsets
from fasttune_kernels.dispatch import arch, num_processors

Kind = tuple[torch.dtype, ...]

_captured: list[tuple[Tensor, ...]] = []
"""What graphs read and nothing else may keep: pinned addresses that they copy from, tables that a later
call replaces or the cache drops. For as long as the process lives: some KiB a capture."""


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How kernels over lists of tensors are launched. Not measured."""

    rows: int
    """Tiles that a program has at a time."""
    num_warps: int
    tiles: int
    """Tiles of a chunk."""

    @staticmethod
    def from_heuristic(arch: str, *, total: int, processors: int) -> "ChunkConfig":
        """8 warps with half a tile each are 4 elements a lane (2 where a wave has 64 lanes): loads of
        16 bytes from float32 and of 8 from bf16. With 4 warps 8-bit state takes 155 registers on
        sm_80 and kahan spills; with 8 they take 107 and 80. 16 tiles amortise the reads of the
        tables, which depend on each other (about 1 us); with less work than 4 such chunks a
        processor, chunks are short."""
        few = total < 4 * 16 * BLOCK * processors
        return ChunkConfig(rows=4, num_warps=8, tiles=4 if few else 16)

    @staticmethod
    def of(x: Tensor, total: int) -> "ChunkConfig":
        """For `total` elements on the device of `x`."""
        return ChunkConfig.from_heuristic(
            arch(x.device), total=total, processors=num_processors(x.device)
        )

    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The chunks of all tensors of one kind: a launch."""

    first: int
    """The first tensor of this kind."""
    begin: int
    end: int


@dataclass(slots=True)
class Tables:
    layout: Tensor
    """(T, 3) int64: offset in the arena, elements, group."""
    chunks: Tensor
    """(C, 2) int32: tensor, first tile in it. Ordered by kind."""
    ranges: tuple[ChunkRange, ...]
    num_lists: int
    addresses: list[int] = field(default_factory=list)
    pointers: Tensor = field(default_factory=lambda: torch.empty(0))
    """(lists, T) int64."""
    aligned: bool = False
    """Whether all addresses are multiples of 16 bytes."""
    spare: Tensor | None = None
    """Pinned, for a capture, which must not allocate such memory."""


def tables_of(lists: Sequence[Sequence[Tensor]], groups: Sequence[int], tiles: int) -> Tables:
    """Of lists of tensors that have the same sizes, in chunks of `tiles` tiles."""
    sizes = tuple(t.numel() for t in lists[0])
    kinds = tuple(zip(*([t.dtype for t in tensors] for tensors in lists), strict=True))
    tables = _tables(sizes, kinds, tuple(groups), lists[0][0].device, tiles)
    addresses = [t.data_ptr() for tensors in lists for t in tensors]
    if addresses != tables.addresses:
        _point_to(tables, addresses)
    if _is_capturing(tables.layout.device):
        # Also where the addresses are those of the eager step before: the next one replaces its buffer.
        _captured.append((tables.layout, tables.chunks, tables.pointers))
    return tables


@lru_cache(maxsize=16)
def _tables(
    sizes: tuple[int, ...],
    kinds: tuple[Kind, ...],
    groups: tuple[int, ...],
    device: torch.device,
    tiles: int,
) -> Tables:
    order = list(dict.fromkeys(kinds))
    tiles_of = torch.tensor([-(-size // BLOCK) for size in sizes])
    chunks_of = (tiles_of + tiles - 1) // tiles
    chunks: list[Tensor] = []
    ranges: list[ChunkRange] = []
    begin = 0
    for kind in order:
        members = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
        tensor = members.repeat_interleave(chunks_of[members])
        starts = chunks_of[members].cumsum(0) - chunks_of[members]
        place = torch.arange(len(tensor)) - starts.repeat_interleave(chunks_of[members])
        chunks.append(torch.stack([tensor, place * tiles], dim=1).int())
        if len(tensor):
            ranges.append(ChunkRange(int(tensor[0]), begin, begin + len(tensor)))
        begin += len(tensor)
    layout = torch.tensor(
        [arena_offsets(sizes)[0], sizes, groups], dtype=torch.int64
    ).T.contiguous()
    return Tables(layout.to(device), torch.cat(chunks).to(device), tuple(ranges), len(kinds[0]))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _point_to(tables: Tables, addresses: list[int]) -> None:
    device = tables.layout.device
    host = torch.tensor(addresses, dtype=torch.int64).view(tables.num_lists, -1)
    tables.aligned = not any(address % 16 for address in addresses)
    if device.type != "cuda":
        tables.addresses, tables.pointers = addresses, host.to(device)
    elif _is_capturing(device):
        if tables.spare is None:
            raise RuntimeError(
                "a step over tensors of these sizes and dtypes has to run once before each capture"
            )
        pinned, tables.spare = tables.spare.copy_(host), None
        _captured.append((pinned,))
        # In the graph's own memory, filled by each replay: no call outside of it finds it.
        tables.addresses, tables.pointers = [], pinned.to(device, non_blocking=True)
    else:
        if tables.spare is None:
            tables.spare = torch.empty_like(host, pin_memory=True)
        # A new one each time, as an earlier copy may not have been made yet; torch reuses the memory
        # of those that have.
        tables.pointers = host.pin_memory().to(device, non_blocking=True)
        tables.addresses = addresses
