"""Exponential moving average of the trained weights: shadow = lerp(shadow, weights, 1 - decay)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fasttune.errors import CheckpointError
from fasttune.optim.chunks import bounded, float32


class Ema:
    """Averages of named parameters, kept in float32 on the parameters' device: 4 bytes of its memory
    a weight, whatever the dtype of the weights.

    float32, because a bf16 average with decay 0.9999 would never move: its updates are smaller
    than half a unit in the last place. Works on whatever is trained, a LoRA or the whole network.
    `shadow`: the averages, if an optimizer has them, see `FusedAdamW.average`; `update` is then its own.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        *,
        decay: float,
        shadow: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        named = dict(params)
        self.decay = decay
        self.names = list(named)
        self.params = list(named.values())
        if shadow is None:
            self.shadow = [p.detach().to(torch.float32, copy=True) for p in self.params]
        else:
            self.shadow = [shadow[p] for p in self.params]

    def decay_at(self, step: int) -> float:
        """Of the update number `step` (from 1): min(decay, (1 + step) / (10 + step)), so that the random
        start is forgotten."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer update number `step` (from 1): few kernels, no host sync; 16-bit weights
        are widened a chunk at a time. The decay is `decay_at(step)`."""
        decay = self.decay_at(step)
        begin = 0
        for params in bounded(self.params):
            shadow = self.shadow[begin : begin + len(params)]
            torch._foreach_lerp_(shadow, float32(p.detach() for p in params), 1 - decay)
            begin += len(params)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the averages; after, bitwise what they held before.

        The parameters keep their storage, so compiled graphs stay valid. float32 weights are
        exchanged with the averages one at a time; 16-bit ones are set aside, at 2 bytes a weight.
        """
        pairs = list(zip(self.params, self.shadow, strict=True))
        wide = [(p, shadow) for p, shadow in pairs if p.dtype == torch.float32]
        narrow = [
            (p, shadow, p.detach().clone()) for p, shadow in pairs if p.dtype != torch.float32
        ]
        _exchange_(wide)
        for p, shadow, _ in narrow:
            p.data.copy_(shadow)
        try:
            yield
        finally:
            _exchange_(wide)
            for p, _, saved in narrow:
                p.data.copy_(saved)

    def state_tensors(self) -> dict[str, Tensor]:
        """For the checkpoint and for export: name -> float32 average. Not inside `swapped`."""
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from `state_tensors`; CheckpointError on a missing, extra or mis-shaped one."""
        wrong = sorted(set(self.names) ^ set(tensors)) or [
            name
            for name, shadow in zip(self.names, self.shadow, strict=True)
            if tensors[name].shape != shadow.shape
        ]
        if wrong:
            raise CheckpointError(
                f"the averaged weights do not fit what is trained: {wrong[0]!r}"
                f" (and {len(wrong) - 1} more) is missing, unknown or of another shape; resume with"
                " the model, adapter and [ema] the checkpoint was trained with"
            )
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(tensors[name])


@torch.no_grad()
def _exchange_(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Swaps the values of each pair."""
    for p, shadow in pairs:
        weights = p.detach().clone()
        p.copy_(shadow)
        shadow.copy_(weights)
