"""The adapters of fused blocks as products read them: joined, and in the dtype of the computation.

Adapters are float32 parameters. Cast and joined where they are used, each matrix is a launch in each
direction: 456 in a step of a Flux LoRA on the attention's projections. Here they lie side by side in one
buffer, those of projections that are one product as one matrix, and one pass before a forward makes the
copy of all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.models.projection import MATRICES, Projection

ALIGNMENT = 64
"""Elements at whose multiples matrices begin: 128 bytes of the copy, for wide loads."""


class AdapterCopy:
    """Hook of a network that makes the copy anew before each forward.

    Backwards read the same memory. To autograd the copy never changes: a forward between another's
    forward and backward writes the values that are there, unless parameters changed meanwhile, and then
    autograd refuses the backward for those, which the blocks save as well.
    """

    def __init__(self, master: Tensor, copy: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.master = master
        """What the parameters are views of."""
        self.copy = copy
        self._parameters = parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        place = self.master.untyped_storage()._cdata
        if any(p.untyped_storage()._cdata != place for p in self._parameters):
            raise RuntimeError(
                "adapters have been moved since fuse(); call fuse() after to(), assignments and the like"
            )
        self.refresh()

    def refresh(self) -> None:
        with torch.no_grad():
            self.copy.data.copy_(self.master)


def pack_adapters_(
    places: Sequence[tuple[nn.Module, Projection]], dtype: torch.dtype | None
) -> tuple[list[dict[str, Tensor]], AdapterCopy | None]:
    """Moves the adapters of projections of blocks into one buffer of which each becomes a view.

    Returns for each place its matrices by the names that the projection has for them, in `dtype` (None:
    that of the parameters), and what makes them anew, None if they are the parameters' own memory.
    ValueError for adapters of several dtypes or devices.
    """
    joints = [
        (place, name, parts)
        for place, (block, projection) in enumerate(places)
        for name, parts in _matrices(block, projection)
    ]
    found: list[dict[str, Tensor]] = [{} for _ in places]
    if not joints:
        return found, None
    kinds = {(p.dtype, p.device) for _, _, parts in joints for p in parts}
    if len(kinds) > 1:
        raise ValueError(f"adapters of one network are of {kinds}; give all one dtype and device")
    ((own_dtype, device),) = kinds
    sizes = [sum(p.numel() for p in parts) for _, _, parts in joints]
    lengths = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    master = torch.zeros(sum(lengths), dtype=own_dtype, device=device)
    copy = master if dtype in (None, own_dtype) else torch.zeros_like(master, dtype=dtype)
    ranges = zip(joints, sizes, master.split(lengths), copy.split(lengths), strict=True)
    for (place, name, parts), size, own, copied in ranges:
        columns = parts[0].shape[1]
        views = own[:size].view(-1, columns).split([len(p) for p in parts])
        for p, view in zip(parts, views, strict=True):
            view.copy_(p.detach())
            p.data = view
        found[place][name] = copied[:size].view(-1, columns)
    if copy is master:
        return found, None
    made = AdapterCopy(master, copy, [p for _, _, parts in joints for p in parts])
    made.refresh()  # for a block that is called on its own
    return found, made


def _matrices(block: nn.Module, projection: Projection) -> list[tuple[str, list[nn.Parameter]]]:
    """(the projection's name for A or B, the parameters that it consists of)"""
    members = projection.adapted_members()
    if not members:
        return []
    return [
        (projection.matrix(name), [block.get_parameter(f"{m}.{name}") for m in members])
        for name in MATRICES
    ]
