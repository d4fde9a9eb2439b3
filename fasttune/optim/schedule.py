"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math
from typing import Literal

ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "sine",
]


def lr_factor(
    step: int,
    *,
    name: ScheduleName,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    cycles: int = 1,
    power: float = 1.0,
) -> float:
    """What the peak rate is multiplied with in the update after `step` updates (0 for the first).

    All but "constant" rise linearly from 0 to 1 over `warmup_steps`. With x running from 0 to 1
    over the rest, and every shape below squeezed between `min_lr_ratio` and 1:

        constant, constant_with_warmup   1
        linear                           1 - x
        cosine                           (1 + cos(pi x)) / 2
        cosine_with_restarts             cosine of the fraction of cycles x, so `cycles` descents
        polynomial                       (1 - x)^power
        sine                             (1 + sin(pi / 2 + 2 pi cycles x)) / 2: a wave of `cycles`
                                         periods that starts and ends at the peak

    The numbers are those of the schedulers of diffusers and transformers, which have no sine.
    After `total_steps` the factor stays at its end value.
    """
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant_with_warmup":
        return 1.0
    x = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    if name == "linear":
        shape = 1 - x
    elif name == "cosine":
        shape = (1 + math.cos(math.pi * x)) / 2
    elif name == "cosine_with_restarts":
        shape = (1 + math.cos(math.pi * (cycles * x % 1))) / 2 if x < 1 else 0.0
    elif name == "polynomial":
        shape = (1 - x) ** power
    else:
        shape = (1 + math.sin(math.pi / 2 + 2 * math.pi * cycles * x)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * shape
