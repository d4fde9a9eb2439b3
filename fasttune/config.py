"""The config: frozen dataclasses, the only place with defaults.

Imports the standard library and `errors` alone, so that `fasttune --help` and every config error
come without loading torch. The docstring under each field says its unit and effect; the schema
and `fasttune init` read them from this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Family = Literal["flux", "sdxl", "sd1", "sd2", "autoencoder"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Activation = Literal["save", "int8", "offload", "recompute"]
Kept = Literal[
    "default", "qkv", "attention", "query", "cross_attention", "residual", "mlp", "hidden"
]
"""What a block keeps for its backward; each kind of block has some of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run goes and what makes it repeatable."""

    name: str = "run"
    """Folder under output_dir that receives everything the run leaves."""
    output_dir: str = "runs"
    """Parent folder of all runs; relative paths start at the current directory."""
    seed: int = 42
    """Every random number of the run is a function of this seed and the step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA or ROCm, then MPS, then the CPU. AMD GPUs are "cuda" to torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The pretrained model."""

    family: Family
    """Architecture of the model in `path`; "autoencoder" trains a VAE by reconstruction."""
    path: str
    """Folder in diffusers layout, or hub id such as "black-forest-labs/FLUX.1-dev"."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random keeps the sizes in the folder's config.json and starts from new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is trained."""

    type: Literal["lora", "none"] = "lora"
    """lora trains low-rank adapters on frozen base weights; none trains the whole network."""
    rank: int = 16
    """Inner width of each low-rank pair; parameters and file size grow with it."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "attention"
    """A preset of the family ("attention", "all-linear"), or patterns of module names."""
    dropout: float = 0.0
    """Probability with which an input element of an adapter is dropped in training."""
    init_from: str | None = None
    """A LoRA file (PEFT, kohya or ComfyUI keys) to start from instead of zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Dtypes, written out: there is no autocast."""

    base: Dtype = "auto"
    """Storage dtype of the network's weights. auto: as compute under an adapter, else fp32."""
    compute: Dtype = "auto"
    """Dtype of matmuls and activations. auto: bf16 where the device has it, else fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How a step fits."""

    activations: Activation | Mapping[Kept, Activation] = "recompute"
    """What becomes of what a block keeps for its backward. save: kept. int8: rounded, half the bytes.
    offload: moved to host memory. recompute: computed again. Or a table by tensor, such as
    { default = "save", mlp = "int8" }; what it leaves out is as its default, or saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """One source of images; repeat the table for several."""

    path: str
    """Folder with images, nested or not."""
    captions: Literal["textfile", "filename", "jsonl", "csv", "parquet", "constant"] = "textfile"
    """textfile: cat.txt beside cat.png. filename: the name without extension, _ as spaces."""
    caption: str | None = None
    """The caption of every image, for captions = "constant"."""
    caption_file: str | None = None
    """The JSONL, CSV or Parquet file; relative to `path`. Default: captions.<ext> or
    metadata.<ext> in `path`."""
    image_column: str = "file_name"
    """Column with the image's path relative to `path`."""
    caption_column: str = "caption"
    """Column with the caption."""
    resolution: int = 1024
    """Size in pixels; what it measures is `resolution_type`."""
    resolution_type: Literal["area", "pixel"] = "area"
    """area: side of the square with an image's area. pixel: the shorter side."""
    aspect_buckets: bool = True
    """Keep each image's aspect ratio, to the nearest bucket; false crops squares."""
    max_aspect: float = 2.0
    """Longest side divided by shortest beyond which an image is cropped to this ratio."""
    crop: Literal["center", "random", "corner"] = "center"
    """Where to crop what the bucket leaves over; corner is the top left."""
    repeats: int = 1
    """Times each image occurs in an epoch; with random crops each repeat has its own crop."""
    held_out: float = 0.0
    """Fraction of the images, chosen by path, kept out of training for the held-out loss; above 0
    at least one of two or more. What one source holds out no other trains on."""
    on_bad_file: Literal["skip", "fail"] = "skip"
    """What to do about a file that cannot be read; skipped files are listed in the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Latents and text embeddings, made once by `fasttune prepare`."""

    dir: str = "cache"
    """Folder of the cache; runs with the same model and data share it."""
    latents: Literal["moments", "sample"] = "moments"
    """moments keeps mean and std, so each epoch draws anew; sample keeps one draw, half the size."""
    text_storage: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Storage of text embeddings. auto: the compute dtype. int8: half of bf16, one scale for 64
    elements; error 0.6 % of the RMS, but 45 % for elements beside an outlier channel."""
    batch_size: int = 4
    """Images or captions encoded at once."""
    workers: int = 0
    """Threads that decode images; 0 takes one where the CPU encodes, else one a CPU core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """The loop."""

    steps: int = 2000
    """Optimizer updates in all."""
    batch_size: int = 1
    """Samples in a micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches in a step."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; none leaves them ("none" in TOML)."""
    caption_dropout: float = 0.1
    """Probability that a sample trains with the empty caption."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """blocks: one graph for each kind of block and token count, by torch.compile. auto: that on CUDA and
    ROCm, and eager blocks where it fails, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised; "auto" takes the family's own."""

    prediction: Literal["auto", "velocity", "epsilon", "v_prediction"] = "auto"
    """What the network predicts: velocity for flow matching, the others for DDPM models."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "mode", "explicit"] = "auto"
    """Distribution of noise levels in training. auto: logit_normal for flow matching."""
    logit_mean: float = 0.0
    """Mean of logit_normal; larger means noisier."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Strength s of mode sampling (SD3 paper, equation 20)."""
    timesteps: tuple[float, ...] = ()
    """The list drawn from when timestep_sampling = "explicit"; sigmas in [0, 1] for flow
    matching, integers in [0, 999] for DDPM models."""
    shift: Literal["auto", "none", "resolution"] | float = "auto"
    """Timestep shift: a factor, by image size as Flux does, or none. auto: the family's own."""
    min_snr_gamma: float | None = None
    """Weights the loss by min(SNR, gamma) (arXiv 2303.09556); 5 is usual."""
    zero_terminal_snr: bool = False
    """Rescales the schedule so that the last step is pure noise (arXiv 2305.08891)."""
    offset_noise: float = 0.0
    """Strength of a per-channel constant added to the noise; 0.05 is usual."""
    loss: Literal["mse", "huber", "l1"] = "mse"
    """huber is the square below huber_delta and linear beyond; l1 is the absolute error."""
    huber_delta: float = 0.1
    """Where huber turns linear."""
    guidance: float = 1.0
    """The guidance value a guidance-distilled Flux is told during training."""
    text_mask: bool = False
    """Mask padding tokens of T5 in attention; the released Flux was trained without."""
    kl_weight: float = 1e-6
    """Weight of the KL term when family = "autoencoder"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """The update rule."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion"] = "adamw"
    """adamw8bit keeps its state in 8 bits; adafactor keeps factored second moments."""
    state_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Of adamw's two moments: 8, 4 or 2 bytes a weight; auto is fp32. With int8 it is adamw8bit."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate over the steps."""

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "sine",
    ] = "constant_with_warmup"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0; "constant" has none."""
    min_lr_ratio: float = 0.0
    """The rate ends at lr times this."""
    cycles: int = 1
    """Restarts of cosine_with_restarts, periods of sine."""
    power: float = 1.0
    """Exponent of polynomial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ema:
    """Exponential moving average of the trained weights."""

    enabled: bool = False
    """Keep the average, sample with it and export it."""
    decay: float = 0.999
    """Upper limit of the decay, which starts as (1 + step) / (10 + step)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What is looked at during training."""

    every: int = 500
    """Steps between validations; 0 for none."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grid; empty for no grid."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch when guidance_scale > 1."""
    seeds: tuple[int, ...] = (0,)
    """One image a prompt, seed and resolution."""
    resolutions: tuple[str, ...] = ()
    """Such as "1024x1024" (width x height); empty takes the first source's resolution, square."""
    sampling_steps: int = 28
    """Denoising steps of an image."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; for guidance-distilled models the embedded guidance."""
    held_out_path: str | None = None
    """A folder of held-out images with captions like the first source's."""
    held_out_timesteps: int = 8
    """Fixed noise levels at which the held-out loss is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Resume state."""

    every: int = 500
    """Steps between checkpoints; 0 for the last step alone."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Weights for use elsewhere, written at the end to <run>/weights."""

    formats: tuple[Literal["peft", "kohya", "comfyui", "diffusers", "single_file"], ...] = ()
    """LoRA: peft, kohya, comfyui. Whole network: diffusers, single_file. Empty: peft or diffusers."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Dtype of the exported weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """metrics.jsonl is always written."""

    every: int = 10
    """Steps between lines of metrics.jsonl; reading the loss costs one device sync."""
    tensorboard: bool = False
    """Also write TensorBoard events to <run>/tensorboard."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "fasttune"
    """Project the run is logged to."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline writes to <run>/wandb alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    run: Run = field(default_factory=Run)
    model: Model
    adapter: Adapter = field(default_factory=Adapter)
    precision: Precision = field(default_factory=Precision)
    memory: Memory = field(default_factory=Memory)
    data: tuple[Data, ...]
    cache: Cache = field(default_factory=Cache)
    train: Train = field(default_factory=Train)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    ema: Ema = field(default_factory=Ema)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    logging: Logging = field(default_factory=Logging)
