"""Aspect buckets chosen so that sequence lengths coincide.

A compiled block depends on the number of tokens alone, so what costs is not how many shapes the
buckets have but how many different token counts. 4032 = 63 x 64 = 56 x 72 = 48 x 84 and
4200 = 60 x 70 = 56 x 75 = 50 x 84 serve many aspect ratios around one megapixel with two lengths.
`bucket_sizes` finds such families for any resolution: the exact square, and the two token counts near
it that leave the least of an image to crop. Rejected: every (width, height) under an area limit, which
makes about as many sequence lengths as buckets.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

from fasttune.seeds import derive_seed

ASPECT_SAMPLES = 64
"""Aspect ratios, evenly spaced in the logarithm, over which a family's crop loss is averaged."""
COMMON_ASPECTS = (5 / 4, 4 / 3, 3 / 2, 16 / 9)
"""Cameras and screens; they count as much as all others together."""
AREA_WEIGHT = 0.25
"""A family whose area is off by 4 % counts as much as one that crops 1 % more."""
MAX_AREA_ERROR = 0.06
"""Tolerated difference in tokens from the square; small grids allow one row or column."""


@dataclass(frozen=True, slots=True)
class CropPlan:
    """Scale an oriented image to (resize_width, resize_height), then cut the target at (left, top)."""

    resize_width: int
    resize_height: int
    left: int
    top: int
    target_width: int
    target_height: int

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) in pixels: what a batch has in common."""
        return self.target_width, self.target_height


@dataclass(frozen=True, slots=True)
class Buckets:
    """The (width, height) in pixels that images are brought to, and their aspect ratios, sorted."""

    sizes: tuple[tuple[int, int], ...]
    log_aspects: tuple[float, ...]

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The bucket whose aspect ratio is closest, as a ratio, to that of the image."""
        wanted = math.log(width / height)
        right = bisect_left(self.log_aspects, wanted)
        if right == 0:
            return self.sizes[0]
        if right == len(self.sizes):
            return self.sizes[-1]
        nearer_left = wanted - self.log_aspects[right - 1] <= self.log_aspects[right] - wanted
        return self.sizes[right - 1 if nearer_left else right]


def make_buckets(
    *,
    resolution: int,
    resolution_type: Literal["area", "pixel"],
    multiple: int,
    max_aspect: float,
    aspect_buckets: bool = True,
) -> Buckets:
    """Buckets for `resolution` (config: data.resolution).

    `multiple` is the side of a token in pixels (16 for Flux; 8 times the latent multiple for a
    U-Net). A resolution that is no multiple of it is rounded to the nearest one. Square images
    always get exactly the square of that side.
    """
    side = max(1, math.floor(resolution / multiple + 0.5))
    grids = {(side, side)}
    if aspect_buckets and resolution_type == "area":
        grids |= _area_grids(side, max_aspect)
    elif aspect_buckets:
        grids |= _pixel_grids(side, max_aspect)
    ordered = sorted(grids, key=lambda grid: grid[0] / grid[1])
    return Buckets(
        sizes=tuple((width * multiple, height * multiple) for width, height in ordered),
        log_aspects=tuple(math.log(width / height) for width, height in ordered),
    )


def _pixel_grids(side: int, max_aspect: float) -> set[tuple[int, int]]:
    """The short side is fixed, so lengths cannot coincide; eighths of it keep them few."""
    step = max(1, side // 8)
    longs = range(side, math.floor(side * max_aspect + 1e-9) + 1, step)
    return {grid for long in longs for grid in ((long, side), (side, long))}


@lru_cache(maxsize=64)
def _area_grids(side: int, max_aspect: float) -> set[tuple[int, int]]:
    """Token grids (width, height) of the one or two best token counts near side * side."""
    square = side * side
    slack = max(MAX_AREA_ERROR, 1.01 / side)
    first = max(1, math.ceil(square * (1 - slack)))
    families = {
        count: grids
        for count in range(first, math.floor(square * (1 + slack)) + 1)
        if (grids := _factor_pairs(count, max_aspect))
    }
    samples = [
        math.log(max_aspect) * index / (ASPECT_SAMPLES - 1) for index in range(ASPECT_SAMPLES)
    ]
    common = [math.log(aspect) for aspect in COMMON_ASPECTS if aspect <= max_aspect]
    samples += common * (ASPECT_SAMPLES // len(common)) if common else []

    def cost(counts: tuple[int, ...]) -> float:
        aspects = {0.0} | {math.log(w / h) for n in counts for w, h in families[n]}
        ordered = sorted(aspects)
        lost = 0.0
        for wanted in samples:
            at = bisect_left(ordered, wanted)
            around = ordered[max(0, at - 1) : at + 1]
            lost += 1 - math.exp(-min(abs(wanted - aspect) for aspect in around))
        area = sum(abs(n / square - 1) for n in counts) / max(1, len(counts))
        return lost / len(samples) + AREA_WEIGHT * area

    # Pairs of the 32 best single counts. For sides 1 to 48 and 64 no pair of any counts was better.
    singles = sorted(families, key=lambda count: (cost((count,)), count))[:32]
    choices: list[tuple[int, ...]] = [(), *((n,) for n in singles), *combinations(singles, 2)]
    best = min(choices, key=lambda counts: (cost(counts), counts))
    return {g for n in best for w, h in families[n] for g in ((w, h), (h, w))}


def _factor_pairs(count: int, max_aspect: float) -> list[tuple[int, int]]:
    """All (width, height) with width > height, width * height = count, within `max_aspect`."""
    lowest = max(1, math.ceil(math.sqrt(count / max_aspect) - 1e-9))
    return [
        (count // height, height)
        for height in range(lowest, math.isqrt(count) + 1)
        if count % height == 0 and count // height > height
    ]


def plan(
    width: int,
    height: int,
    *,
    buckets: Buckets,
    crop: Literal["center", "random", "corner"] = "center",
    seed: int = 0,
    name: str = "",
    repeat: int = 0,
) -> CropPlan:
    """How an image of (width, height) after EXIF orientation is brought to its bucket.

    Scaled to cover the bucket, then cropped; a random crop is a function of (seed, name, repeat),
    where `name` is the path relative to its source. Images smaller than the bucket are enlarged.
    """
    target_width, target_height = buckets.nearest(width, height)
    scale = max(target_width / width, target_height / height)
    resize_width = max(target_width, round(width * scale))
    resize_height = max(target_height, round(height * scale))
    spare_width, spare_height = resize_width - target_width, resize_height - target_height
    left = top = 0
    if crop == "center":
        left, top = spare_width // 2, spare_height // 2
    elif crop == "random" and (spare_width or spare_height):
        draw: Callable[[str], int] = lambda axis: derive_seed(seed, "crop", axis, name, repeat)  # noqa: E731
        left, top = draw("x") % (spare_width + 1), draw("y") % (spare_height + 1)
    return CropPlan(resize_width, resize_height, left, top, target_width, target_height)


def is_upscaled(width: int, height: int, crop_plan: CropPlan) -> bool:
    """Whether the plan enlarges an image of (width, height)."""
    return crop_plan.resize_width > width or crop_plan.resize_height > height


def size_conditions(width: int, height: int, crop_plan: CropPlan) -> tuple[float, ...]:
    """SDXL's micro-conditioning: original (h, w), crop (top, left), target (h, w).

    The crop is counted in the resized image, as in section 2.2 of arXiv 2307.01952.
    """
    p = crop_plan
    numbers = (height, width, p.top, p.left, p.target_height, p.target_width)
    return tuple(float(number) for number in numbers)
