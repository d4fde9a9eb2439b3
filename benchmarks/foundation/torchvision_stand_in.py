"""The few names of torchvision.transforms that the diffusers LoRA script uses, on Pillow and torch.

For machines without torchvision, whose CPU build is not on PyPI. `install` puts it into sys.modules of
this process alone, after transformers and diffusers have looked for the real one.
"""

import enum
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(enum.Enum):
    """Pillow's filters."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Resize:
    """The shorter side to `size`, the longer one cut down to an integer."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.filter = size, interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        return (
            image if image.size == (width, height) else image.resize((width, height), self.filter)
        )


class CenterCrop:
    """A square of `size` around the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return crop(image, top, left, self.size, self.size)


class RandomCrop:
    """A square of `size` anywhere."""

    def __init__(self, size: int) -> None:
        self.size = size

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
        height, width = size
        top = random.randint(0, image.height - height)
        left = random.randint(0, image.width - width)
        return top, left, height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        return crop(image, *self.get_params(image, (self.size, self.size)))


class RandomHorizontalFlip:
    """Mirrors with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        mirrored = random.random() < self.p
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


class Compose:
    """One after another."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class ToTensor:
    """Pillow image -> (3, H, W) float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    """(x - mean) / std, one number or one a channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The box from (left, top)."""
    return image.crop((left, top, left + width, top + height))


def install() -> bool:
    """Makes `torchvision.transforms` importable in this process; False if the real one is there."""
    if importlib.util.find_spec("torchvision") is not None:
        return False
    import diffusers
    import transformers

    # Both must have decided that there is no torchvision before something of this name appears.
    transformers.utils.is_torchvision_available()
    diffusers.utils.is_torchvision_available()
    functional = _module("torchvision.transforms.functional", crop=crop)
    names = (InterpolationMode, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip)
    named: dict[str, Any] = {c.__name__: c for c in (*names, Compose, ToTensor, Normalize)}
    transforms = _module("torchvision.transforms", functional=functional, **named)
    _module("torchvision", transforms=transforms)
    return True


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name, "Stand-in, see benchmarks/torchvision_stand_in.py.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module
    return module
