"""Memory of a training step of SDXL at 1024 x 1024, counted on fake tensors: no GPU, no weights.

    python benchmarks/step_memory.py

Two micro-batches of one image, the second with the gradients of the first in place; recomputation,
bf16 compute. Counted is every tensor that torch's operators return while it lives. Not counted are
what kernels use inside, the allocator's rounding and the driver's context.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttune.models import MODELS
from fasttune.models.layers import set_recompute

CONFIG = Path(__file__).parent / "model_configs" / "sdxl.json"
BF16 = torch.bfloat16


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main() -> None:
    spec = MODELS["sdxl"]
    with FakeTensorMode():
        denoiser = spec.build(json.loads(CONFIG.read_text(encoding="utf-8")))  # fp32
        set_recompute(denoiser, True)
        conditions = {
            "text_embeddings": torch.randn(1, 77, 2048, dtype=BF16),
            "pooled_text_embeddings": torch.randn(1, 1280, dtype=BF16),
        }
        latents, sizes = torch.randn(1, 4, 128, 128, dtype=BF16), torch.full((1, 6), 1024.0)
        weights = sum(p.nbytes for p in denoiser.parameters())
        print(f"fp32 weights             {weights / 2**30:6.2f} GiB")
        with LiveBytes() as live:
            for _ in range(2):
                live.peak, before = live.now, live.now
                predicted = spec.predict(
                    denoiser, latents, torch.tensor([500.0]), conditions, sizes, torch.ones(1)
                )
                predicted.float().square().mean().backward()
                del predicted
        print(f"fp32 gradients           {before / 2**30:6.2f} GiB")
        print(f"peak of a micro-batch    {(live.peak - before) / 2**30:6.2f} GiB more")


if __name__ == "__main__":
    main()
