"""The libraries that fasttune uses: their versions, those of pyproject.toml, and what each is for."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A library that fasttune uses, and the versions it works with: those of pyproject.toml."""

    name: str
    minimum: str
    below: str | None = None
    extra: str | None = None
    """The extra that installs it; None: it is required."""
    used_for: str
    without: str = ""
    """What happens without an optional one."""
    probe: tuple[str, ...] = ()


EIGHT_BIT = 'optimizer.name = "adamw8bit" where fasttune\'s own operation does not run'

_TORCH = "2.13" if sys.platform == "darwin" else "2.11"
"""2.13 is the first with a kernel of group norm's backward for Apple's GPUs."""

LIBRARIES = (
    Library(name="torch", minimum=_TORCH, below="2.14", used_for="everything"),
    Library(name="numpy", minimum="1.26", used_for="images"),
    Library(name="safetensors", minimum="0.5", used_for="weights and caches"),
    Library(name="pillow", minimum="11", used_for="reading images"),
    Library(name="tqdm", minimum="4.66", used_for="progress bars"),
    Library(
        name="diffusers",
        minimum="0.36",
        used_for="autoencoders",
        probe=("imports", "diffusers", "AutoencoderKL"),
    ),
    Library(
        name="transformers",
        minimum="4.57",
        used_for="text encoders",
        probe=("imports", "transformers", "CLIPTextModel", "T5EncoderModel", "AutoTokenizer"),
    ),
    Library(name="accelerate", minimum="1.0", used_for="loading the frozen models"),
    Library(name="huggingface_hub", minimum="0.34", used_for="models by hub id"),
    Library(name="jinja2", minimum="3.1", used_for="report.html"),
    Library(
        name="triton",
        minimum="3.6",
        extra="dev",
        used_for="the kernels and torch.compile on a GPU",
        without="comes with the GPU builds of torch; not needed on a CPU",
        probe=("imports", "triton"),
    ),
    Library(
        name="torchao",
        minimum="0.14",
        extra="torchao",
        used_for=EIGHT_BIT,
        probe=("imports", "torchao.optim", "AdamW8bit"),
    ),
    Library(
        name="bitsandbytes",
        minimum="0.46",
        extra="bitsandbytes",
        used_for=EIGHT_BIT,
        probe=("adamw8bit", "bitsandbytes", "auto"),
    ),
    Library(name="pyarrow", minimum="15", extra="parquet", used_for='data.captions = "parquet"'),
    Library(
        name="tensorboard", minimum="2.16", extra="tensorboard", used_for="logging.tensorboard"
    ),
    Library(name="wandb", minimum="0.17", extra="wandb", used_for="logging.wandb"),
)
