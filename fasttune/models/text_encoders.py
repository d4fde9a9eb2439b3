"""Text encoders of the families: captions -> text embeddings as the reference pipelines make them.

Each `open_*` returns one opener per encoder. An opener loads one encoder and its tokenizer from
the model folder and returns the function that encodes captions; dropping that function frees the
encoder, so that the largest one alone bounds the memory. `merge_*` joins what the encoders of a
family returned for the same captions.

Shapes: B captions, T token positions, D width, P pooled width.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.spec import EncodeText

log = logging.getLogger(__name__)

Outputs = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""(encoder, token ids (B, T), mask of real tokens (B, T) bool) -> text embeddings."""


class TextEncoder:
    """One encoder with its tokenizer; `num_truncated` counts the captions that were cut so far."""

    truncated: dict[str, str]
    """Captions that the last call cut -> what it read of them."""

    def __init__(
        self, *, name: str, tokenizer: Any, encoder: nn.Module, max_length: int, outputs: Outputs
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_length = max_length
        self.outputs = outputs
        self.num_truncated = 0
        self.truncated = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """Embeddings of `captions`, on the encoder's device and in its dtype."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        self._note_truncated(captions)
        device = next(self.encoder.parameters()).device
        mask = tokens.attention_mask.to(device, torch.bool)
        return self.outputs(self.encoder, tokens.input_ids.to(device), mask)

    def _note_truncated(self, captions: list[str]) -> None:
        # One token more than allowed is enough to see that a caption is too long.
        longer = self.tokenizer(captions, truncation=True, max_length=self.max_length + 1)
        cut = [
            caption
            for caption, ids in zip(captions, longer.input_ids, strict=True)
            if len(ids) > self.max_length
        ]
        if cut and self.num_truncated == 0:
            log.warning(
                "%s reads %d tokens: longer captions lose their end (%d of %d so far), such as %r;"
                " further ones are counted without a message",
                self.name,
                self.max_length,
                len(cut),
                len(captions),
                cut[0] if len(cut[0]) <= 200 else cut[0][:200] + "...",
            )
        self.num_truncated += len(cut)
        self.truncated = {}
        if cut:
            # A limit that nothing reaches: without one the tokenizer warns in its own words.
            whole = self.tokenizer(cut, truncation=True, max_length=2**20).input_ids
            self.truncated = {
                caption: f"{self.name} reads {self.max_length} of its {len(ids)} tokens"
                for caption, ids in zip(cut, whole, strict=True)
            }


def open_clip(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> list[Callable[[], EncodeText]]:
    """SD 1.x (CLIP-L) and 2.x (OpenCLIP-H): last hidden state after the final norm, (B, 77, D)."""

    def outputs(encoder: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text_embeddings": encoder(ids).last_hidden_state}

    return [partial(_open_clip, folder, "", device, dtype, outputs=outputs)]


def open_sdxl(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> list[Callable[[], EncodeText]]:
    """SDXL: the penultimate hidden states of CLIP-L and OpenCLIP-G, and G's projected pooling."""

    def outputs(encoder: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"text_embeddings": encoder(ids, output_hidden_states=True).hidden_states[-2]}

    def outputs_2(encoder: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        result = encoder(ids, output_hidden_states=True)
        return {
            "text_embeddings": result.hidden_states[-2],
            "pooled_text_embeddings": result.text_embeds,
        }

    return [
        partial(_open_clip, folder, "", device, dtype, outputs=outputs),
        partial(_open_clip, folder, "_2", device, dtype, outputs=outputs_2, projected=True),
    ]


def t5_positions(config: Mapping[str, Any]) -> int:
    """T that FLUX.1 was trained with, by transformer/config.json: 512 with a guidance embedding
    (dev), 256 without (schnell)."""
    return 512 if config.get("guidance_embeds", False) else 256


def open_flux(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_length: int | None = None,
) -> list[Callable[[], EncodeText]]:
    """FLUX.1: CLIP-L's pooled output (B, P); T5 at all positions, padding included and unmasked,
    because the released model was trained so, with the mask of real tokens beside it.

    max_length: T5 positions T. None takes what the model was trained with.
    """
    if max_length is None:
        max_length = t5_positions(_read_json(folder / "transformer" / "config.json"))

    def clip_outputs(encoder: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"pooled_text_embeddings": encoder(ids).pooler_output}

    return [
        partial(_open_clip, folder, "", device, dtype, outputs=clip_outputs),
        partial(_open_t5, folder, "_2", device, dtype, max_length=max_length),
    ]


def merge_clip(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """SD 1.x and 2.x have one encoder: its output as it is."""
    (part,) = parts
    return part


def merge_sdxl(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Text embeddings (B, 77, 768) and (B, 77, 1280) side by side: (B, 77, 2048)."""
    first, second = parts
    embeddings = torch.cat([first["text_embeddings"], second["text_embeddings"]], dim=-1)
    return {**second, "text_embeddings": embeddings}


def merge_flux(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """CLIP's pooled vector (B, P), T5's embeddings (B, T, D) and mask (B, T)."""
    clip, t5 = parts
    return {**clip, **t5}


def _open_clip(
    folder: Path,
    suffix: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    outputs: Outputs,
    projected: bool = False,
) -> EncodeText:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    encoder = _load_encoder(
        CLIPTextModelWithProjection if projected else CLIPTextModel,
        folder / f"text_encoder{suffix}",
        device,
        dtype,
    )
    tokenizer = _load_tokenizer(CLIPTokenizer, folder / f"tokenizer{suffix}")
    positions: int = encoder.config.max_position_embeddings
    return TextEncoder(
        name=f"text_encoder{suffix} (CLIP)",
        tokenizer=tokenizer,
        encoder=encoder,
        max_length=min(tokenizer.model_max_length, positions),
        outputs=outputs,
    )


def _open_t5(
    folder: Path, suffix: str, device: torch.device, dtype: torch.dtype, *, max_length: int
) -> EncodeText:
    from transformers import T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined]

    def outputs(encoder: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # T5 keeps some weights in fp32 when loaded in fp16; the embeddings follow the others.
        embeddings = encoder(ids).last_hidden_state.to(dtype)
        return {"text_embeddings": embeddings, "text_mask": mask}

    return TextEncoder(
        name=f"text_encoder{suffix} (T5)",
        encoder=_load_encoder(T5EncoderModel, folder / f"text_encoder{suffix}", device, dtype),
        tokenizer=_load_tokenizer(T5TokenizerFast, folder / f"tokenizer{suffix}"),
        max_length=max_length,
        outputs=outputs,
    )


def _load_encoder(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen transformers model. Raises ModelError for a missing, damaged or incomplete one."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no text encoder here (config.json is missing); model.path must be a whole"
            " diffusers folder, with all its text encoders and tokenizers"
        )
    plain, half = folder / "model.safetensors", folder / "model.fp16.safetensors"
    has_plain = plain.is_file() or (folder / "model.safetensors.index.json").is_file()
    try:
        with _quiet_transformers():
            encoder, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant="fp16" if half.is_file() and not has_plain else None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise their own, undocumented types
        raise ModelError(
            f"{folder}: the text encoder cannot be loaded ({error}); its .safetensors files are"
            " missing, damaged or of another model: download the folder again"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}; download the"
            " folder again, or check that it is of this family"
        )
    return encoder.to(device).eval().requires_grad_(False)


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no tokenizer here; model.path must be a whole diffusers folder, with all"
            " its text encoders and tokenizers"
        )
    try:
        with _quiet_transformers():
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded ({error}); download the folder again"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters becomes a ModelError."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); model.path must be a whole diffusers folder"
        ) from error
