"""Prompts to text embeddings, with one text encoder in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttune.errors import ConfigError
from fasttune.models.spec import ModelSpec, select_conditions


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompts:
    """Text embeddings on the CPU, batch 1 each; `negative` is None without guided sampling."""

    prompts: tuple[str, ...]
    positive: tuple[dict[str, Tensor], ...]
    negative: dict[str, Tensor] | None


@torch.no_grad()
def encode_prompts(
    spec: ModelSpec,
    folder: Path,
    *,
    prompts: Sequence[str],
    negative_prompt: str,
    device: torch.device,
    dtype: torch.dtype,
    text_mask: bool = False,
) -> EncodedPrompts:
    """Encodes all prompts with one text encoder in memory at a time; each is freed at the end.

    An empty negative prompt is zeros where the family has it so (SDXL), else the encoded "".
    Raises ConfigError for a negative prompt that a guidance-distilled family would ignore.
    """
    if negative_prompt and spec.has_guidance:
        raise ConfigError(
            [
                f'validation.negative_prompt = "{negative_prompt}": {spec.family} has its guidance'
                " built in and takes no negative prompt; leave it empty"
            ]
        )
    zeros = not negative_prompt and spec.empty_caption_is_zero
    captions = list(prompts) if zeros or spec.has_guidance else [*prompts, negative_prompt]
    parts = []
    for opener in spec.open_text_encoders(folder, device, dtype):
        encode = opener()
        # one caption at a time: this is a handful, and a batch would change nothing but memory
        encoded = [encode([caption]) for caption in captions]
        del encode
        parts.append([{k: v.cpu() for k, v in one.items()} for one in encoded])
    merged = [spec.merge_text(list(of_caption)) for of_caption in zip(*parts, strict=True)]
    merged = [select_conditions(one, text_mask=text_mask) for one in merged]
    positive, rest = merged[: len(prompts)], merged[len(prompts) :]
    negative = rest[0] if rest else None
    if zeros and positive:
        negative = {k: torch.zeros_like(v) for k, v in positive[0].items()}
    return EncodedPrompts(prompts=tuple(prompts), positive=tuple(positive), negative=negative)
