"""LoRA files in the three layouts that tools exchange, from and to `dict[module, LoraPair]` under
diffusers module names.

    peft     transformer.<module>.lora_A.weight, unet.<module>.lora_B.weight
    kohya    lora_unet_<module with _ for .>.lora_down.weight, .lora_up.weight, .alpha
             modules in BFL (Flux), LDM (SDXL) or diffusers names (SD 1.x, 2.x), as kohya has them
    comfyui  diffusion_model.<BFL or LDM module>.lora_A.weight, .lora_B.weight, .alpha

The PEFT layout has no place for alpha that every loader reads (diffusers refuses alpha keys for
U-Nets, other tools skip its metadata), so alpha / rank is multiplied into B there and alpha = rank
holds. In PEFT files of other tools alpha is read from where they keep it: diffusers in the file's
metadata, PEFT itself in the adapter_config.json beside adapter_model.safetensors. Where modules are row blocks of one original module (Flux's qkv), their pairs are joined to
one of the summed rank: A stacked, B block-diagonal, alpha summed, so that alpha / rank stays.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fasttune.adapters.lora import LoraPair, module_shapes, set_lora_
from fasttune.adapters.original_layout import Place, fused_modules, original_places
from fasttune.errors import ConfigError

Layout = Literal["peft", "kohya", "comfyui"]
Shapes = Mapping[str, tuple[int, ...]]
"""Weight shape of every Linear and Conv2d of the network, from `lora.module_shapes`."""

LAYOUTS: tuple[Layout, ...] = ("peft", "kohya", "comfyui")
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".alpha": "alpha",
}
_TEXT_ENCODERS = ("lora_te", "text_encoder", "lora_prior_te")


class PeftSettings(NamedTuple):
    """What a PEFT LoraConfig says of the scales. The ranks are those of the tensors."""

    alpha: float
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    """Modules with another alpha; the first pattern that a name fits counts."""
    rank_stabilised: bool
    """The scale is alpha / sqrt(rank), https://arxiv.org/abs/2312.03732."""

    def alpha_of(self, module: str, rank: int) -> float:
        """alpha of a module such that alpha / rank is its scale."""
        fits = (alpha for pattern, alpha in self.alpha_pattern if pattern.match(module))
        alpha = next(fits, self.alpha)
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def peft_settings(config: Mapping[str, Any]) -> PeftSettings | None:
    """From a LoraConfig's dict, or from the metadata of diffusers' pipelines, where each key has the
    network's name before it. None if it says nothing of this network's adapter."""
    for prefix in ("unet.", "transformer.", "vae.", ""):
        if f"{prefix}lora_alpha" in config:
            others = config.get(f"{prefix}alpha_pattern") or {}
            return PeftSettings(
                alpha=float(config[f"{prefix}lora_alpha"]),
                alpha_pattern=tuple(
                    (re.compile(rf"(.*\.)?({ending})$"), float(alpha))  # PEFT's own rule
                    for ending, alpha in others.items()
                ),
                rank_stabilised=bool(config.get(f"{prefix}use_rslora")),
            )
    return None


def lora_tensors(
    lora: Mapping[str, LoraPair], shapes: Shapes, *, layout: Layout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a LoRA file. Folding and joining are done in float32, alphas stay in it."""
    lora = {name: LoraPair(p.A.float(), p.B.float(), p.alpha) for name, p in lora.items()}
    prefix = "transformer" if _is_flux(shapes) else "unet" if original_places(shapes) else "vae"
    down, up, alphas = "lora_A", "lora_B", True
    if layout == "peft":
        named = {f"{prefix}.{name}": _folded(pair) for name, pair in lora.items()}
        alphas = False
    elif layout == "comfyui":
        named = {f"diffusion_model.{name}": p for name, p in _to_original(lora, shapes).items()}
    else:
        original = _to_original(lora, shapes) if _kohya_is_original(shapes) else lora
        named = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in original.items()}
        down, up = "lora_down", "lora_up"
    tensors = {}
    for name, pair in named.items():
        tensors[f"{name}.{down}.weight"] = pair.A.to(dtype).contiguous()
        tensors[f"{name}.{up}.weight"] = pair.B.to(dtype).contiguous()
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def read_lora(path: Path, shapes: Shapes) -> tuple[dict[str, LoraPair], list[str]]:
    """Reads a LoRA file of any of the layouts for the network with `shapes`.

    Returns the pairs in float32 by diffusers module name, and the keys left aside because they
    belong to a text encoder. A pair on a joined module is taken apart: by blocks where B is
    block-diagonal, else each part gets all of A and its rows of B; the delta W is the same.
    ConfigError if the file is missing, damaged, of another model or not a plain LoRA.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        beside = path.with_name("adapter_config.json")
        if "lora_adapter_metadata" in metadata:
            settings = peft_settings(json.loads(metadata["lora_adapter_metadata"]))
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            settings = peft_settings(json.loads(beside.read_text(encoding="utf-8")))
        else:
            settings = None
    except (OSError, SafetensorError) as error:
        raise _refused(path, f"cannot be read ({error}); give a .safetensors LoRA file") from error
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise _refused(path, f"has damaged PEFT settings ({error}); write it anew") from error
    return parse_lora(tensors, shapes, origin=path, settings=settings)


def parse_lora(
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    *,
    origin: Path,
    settings: PeftSettings | None = None,
) -> tuple[dict[str, LoraPair], list[str]]:
    """`read_lora` from tensors in memory; `origin` is named in errors. Alpha is that of the pair's
    own key, else of `settings`, else the rank."""
    places = original_places(shapes)
    groups = fused_modules(places)
    index = _key_index(shapes, places)
    found: dict[tuple[bool, str], dict[str, Tensor]] = {}
    aside, unknown = [], []
    for key, tensor in tensors.items():
        if key.startswith(_TEXT_ENCODERS):
            aside.append(key)
            continue
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        module = index.get(key.removesuffix(suffix)) if suffix is not None else None
        if suffix is None or module is None:
            unknown.append(key)
        else:
            found.setdefault(module, {})[_SUFFIXES[suffix]] = tensor.float()
    if unknown or not found:
        what = f"{len(unknown)} keys such as {unknown[0]}" if unknown else "no LoRA keys"
        raise _refused(
            origin,
            f"has {what}, which this network does not know; only a plain LoRA (no LoHa, LoKr, DoRA) "
            "of the same family, in PEFT, kohya or ComfyUI keys, can be the start",
        )
    lora: dict[str, LoraPair] = {}
    for (is_original, name), parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise _refused(origin, f"has only one half of the pair of {name}; the file is damaged")
        rank = parts["A"].shape[0]
        if "alpha" in parts:
            alpha = float(parts["alpha"])
        else:
            alpha = float(rank) if settings is None else settings.alpha_of(name, rank)
        pair = LoraPair(parts["A"], parts["B"], alpha)
        if is_original:
            lora |= _from_original(pair, groups[name], places, shapes, origin)
        else:
            lora[name] = _shaped(pair, shapes[name], name, origin)
    return {name: lora[name] for name in shapes if name in lora}, aside


def load_lora(model: nn.Module, path: Path) -> list[str]:
    """Fills the adapter of a model (see `apply_lora`) from a LoRA file of any layout. Returns the
    keys left aside because they belong to a text encoder."""
    lora, aside = read_lora(path, module_shapes(model))
    set_lora_(model, lora, origin=str(path))
    return aside


def _is_flux(shapes: Shapes) -> bool:
    return any(name.startswith("single_transformer_blocks.") for name in shapes)


def _kohya_is_original(shapes: Shapes) -> bool:
    """kohya trains SD 1.x and 2.x on a U-Net with diffusers names, SDXL on one with LDM names."""
    return _is_flux(shapes) or "add_embedding.linear_1" in shapes


def _key_index(shapes: Shapes, places: Mapping[str, Place]) -> dict[str, tuple[bool, str]]:
    """Every spelling of a module in a LoRA file -> (is an original module, name)."""
    index: dict[str, tuple[bool, str]] = {}
    for original in {place.module for place in places.values()}:
        for key in (
            f"lora_unet_{original.replace('.', '_')}",
            f"diffusion_model.{original}",
            f"model.diffusion_model.{original}",
            original,
        ):
            index[key] = (True, original)
    for name in shapes:
        flat = name.replace(".", "_")
        for key in (
            f"lora_unet_{flat}",
            f"lora_transformer_{flat}",
            f"transformer.{name}",
            f"unet.{name}",
            f"vae.{name}",
            f"base_model.model.{name}",
            name,
        ):
            index[key] = (False, name)
    return index


def _to_original(lora: Mapping[str, LoraPair], shapes: Shapes) -> dict[str, LoraPair]:
    """Pairs by original module; modules that are row blocks of one are joined."""
    places = original_places(shapes)
    original = {}
    for module, names in fused_modules(places).items():
        pairs = [lora[name] for name in names if name in lora]
        if not pairs:
            continue
        if len(names) > 1:
            original[module] = _joined(names, lora, shapes)
        elif places[names[0]].halves_swapped:
            # Loaders of this one module are known to pass over its alpha.
            pair = _folded(pairs[0])
            original[module] = pair._replace(B=_swap_halves(pair.B))
        elif module == "final_layer.linear":
            original[module] = _folded(pairs[0])
        else:
            original[module] = pairs[0]
    return original


def _joined(names: Sequence[str], lora: Mapping[str, LoraPair], shapes: Shapes) -> LoraPair:
    """One pair for modules stacked by rows: A (sum of ranks, in), B (sum of outs, sum of ranks)
    block-diagonal. Rows of a module without an adapter are zero."""
    present = {name: lora[name] for name in names if name in lora}
    if len({pair.scale for pair in present.values()}) > 1:
        present = {name: _folded(pair) for name, pair in present.items()}
    total = sum(pair.rank for pair in present.values())
    B = torch.zeros(sum(shapes[name][0] for name in names), total)
    row = column = 0
    for name in names:
        if name in present:
            pair = present[name]
            B[row : row + shapes[name][0], column : column + pair.rank] = pair.B
            column += pair.rank
        row += shapes[name][0]
    A = torch.cat([pair.A for pair in present.values()])
    return LoraPair(A, B, sum(pair.alpha for pair in present.values()))


def _from_original(
    pair: LoraPair,
    names: Sequence[str],
    places: Mapping[str, Place],
    shapes: Shapes,
    origin: Path,
) -> dict[str, LoraPair]:
    if len(names) == 1:
        pair = _shaped(pair, shapes[names[0]], names[0], origin)
        if places[names[0]].halves_swapped:
            pair = pair._replace(B=_swap_halves(pair.B))
        return {names[0]: pair}
    shape = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
    pair = _shaped(pair, shape, " + ".join(names), origin)
    rows = pair.B.split([shapes[name][0] for name in names])
    used = {name: B for name, B in zip(names, rows, strict=True) if B.any()}
    columns = _column_blocks(list(used.values()), pair.rank)
    if columns is None:
        return {name: LoraPair(pair.A, B, pair.alpha) for name, B in used.items()}
    return {
        name: LoraPair(pair.A[at], B[:, at], pair.scale * (at.stop - at.start))
        for (name, B), at in zip(used.items(), columns, strict=True)
    }


def _column_blocks(parts: Sequence[Tensor], rank: int) -> list[slice] | None:
    """Columns of each part if B is block-diagonal with equal blocks, else None."""
    if not parts or rank % len(parts):
        return None
    width = rank // len(parts)
    blocks = [slice(i * width, (i + 1) * width) for i in range(len(parts))]
    for part, at in zip(parts, blocks, strict=True):
        if part[:, : at.start].any() or part[:, at.stop :].any():
            return None
    return blocks


def _folded(pair: LoraPair) -> LoraPair:
    """The same delta W with alpha = rank."""
    if pair.scale == 1.0:
        return pair
    return LoraPair(pair.A, pair.B * pair.scale, float(pair.rank))


def _swap_halves(B: Tensor) -> Tensor:
    first, second = B.chunk(2)
    return torch.cat([second, first])


def _shaped(pair: LoraPair, shape: tuple[int, ...], name: str, origin: Path) -> LoraPair:
    """Checks a pair against its module; 1x1 convolutions and matrices stand for each other."""
    rank = pair.A.shape[0]
    A_shape, B_shape = (rank, *shape[1:]), (shape[0], rank, *(1,) * (len(shape) - 2))
    if pair.A.numel() != _numel(A_shape) or pair.B.numel() != _numel(B_shape):
        raise _refused(
            origin,
            f"has a pair of shapes {tuple(pair.A.shape)} and {tuple(pair.B.shape)} for {name}, whose "
            f"weight is {shape}; it is of another model",
        )
    return LoraPair(pair.A.reshape(A_shape), pair.B.reshape(B_shape), pair.alpha)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _refused(path: Path, problem: str) -> ConfigError:
    return ConfigError([f"adapter.init_from: {path} {problem}"])
