"""Keys that are read only with certain values of another key.

A request is honoured or refused: such a key with a value of its own, where nothing reads it, is an
error. Its default passes, so that a resolved config, which writes every key, loads again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from fasttune.config import Config
from fasttune.config_values import toml_value

Finding = tuple[tuple[str, ...], str]
"""(keys, line): what is wrong, and the keys it is about."""

DDPM_FAMILIES = ("sdxl", "sd1", "sd2")
_DENOISERS = ("flux", *DDPM_FAMILIES)
_CAPTION_TABLES = ("jsonl", "csv", "parquet")
_DECLINING = ("linear", "cosine", "cosine_with_restarts", "polynomial", "sine")


@dataclass(frozen=True, slots=True)
class Condition:
    """`key` is read only where `decided_by` has one of `values`."""

    key: str
    decided_by: str
    values: tuple[Any, ...]
    hint: str = "remove it"
    honoured: tuple[Any, ...] = ()
    """Values besides the default that ask for what happens without the key."""


# Where a key has several, the first that fails is reported.
CONDITIONS = (
    Condition("adapter.rank", "adapter.type", ("lora",)),
    Condition("adapter.alpha", "adapter.type", ("lora",)),
    Condition("adapter.targets", "adapter.type", ("lora",)),
    Condition("adapter.dropout", "adapter.type", ("lora",)),
    Condition(
        "adapter.init_from",
        "adapter.type",
        ("lora",),
        'set adapter.type = "lora", or name the whole network in model.path',
    ),
    Condition("data.caption", "data.captions", ("constant",)),
    Condition("data.caption_file", "data.captions", _CAPTION_TABLES),
    Condition("data.image_column", "data.captions", _CAPTION_TABLES),
    Condition("data.caption_column", "data.captions", _CAPTION_TABLES),
    Condition("data.max_aspect", "data.aspect_buckets", (True,)),
    Condition("memory.activations", "model.family", _DENOISERS, honoured=("save",)),
    Condition("train.compile", "model.family", _DENOISERS, honoured=("off",)),
    Condition("train.caption_dropout", "model.family", _DENOISERS, honoured=(0.0,)),
    Condition("objective.logit_mean", "model.family", ("flux",)),
    # For flux, "auto" is logit_normal.
    Condition("objective.logit_mean", "objective.timestep_sampling", ("auto", "logit_normal")),
    Condition("objective.logit_std", "model.family", ("flux",)),
    Condition("objective.logit_std", "objective.timestep_sampling", ("auto", "logit_normal")),
    Condition("objective.mode_scale", "model.family", ("flux",)),
    Condition("objective.mode_scale", "objective.timestep_sampling", ("mode",)),
    Condition("objective.shift", "model.family", ("flux",), honoured=("none",)),
    Condition(
        "objective.shift",
        "objective.timestep_sampling",
        ("auto", "uniform", "logit_normal", "mode"),
        "explicit timesteps are used as they are: remove it and list the shifted ones",
        honoured=("none",),
    ),
    Condition("objective.min_snr_gamma", "model.family", DDPM_FAMILIES),
    Condition("objective.zero_terminal_snr", "model.family", DDPM_FAMILIES),
    Condition("objective.offset_noise", "model.family", DDPM_FAMILIES),
    Condition("objective.huber_delta", "objective.loss", ("huber",)),
    Condition("objective.guidance", "model.family", ("flux",)),
    Condition("objective.text_mask", "model.family", ("flux",)),
    Condition("objective.kl_weight", "model.family", ("autoencoder",)),
    Condition("optimizer.state_dtype", "optimizer.name", ("adamw",)),
    Condition("optimizer.betas", "optimizer.name", ("adamw", "adamw8bit", "lion")),
    Condition("optimizer.eps", "optimizer.name", ("adamw", "adamw8bit", "adafactor")),
    Condition(
        "schedule.warmup_steps",
        "schedule.name",
        ("constant_with_warmup", *_DECLINING),
        'take "constant_with_warmup", or remove it',
    ),
    Condition("schedule.min_lr_ratio", "schedule.name", _DECLINING),
    Condition("schedule.cycles", "schedule.name", ("cosine_with_restarts", "sine")),
    Condition("schedule.power", "schedule.name", ("polynomial",)),
    Condition("ema.decay", "ema.enabled", (True,)),
    Condition("validation.prompts", "model.family", _DENOISERS),
    Condition(
        "validation.negative_prompt",
        "model.family",
        DDPM_FAMILIES,
        "only classifier-free guidance has a negative prompt; remove it",
    ),
    Condition("validation.seeds", "model.family", _DENOISERS),
    Condition("validation.resolutions", "model.family", _DENOISERS),
    Condition("validation.sampling_steps", "model.family", _DENOISERS),
    Condition("validation.guidance_scale", "model.family", _DENOISERS),
    Condition("validation.held_out_timesteps", "model.family", _DENOISERS),
    Condition("logging.wandb_project", "logging.wandb", (True,)),
    Condition("logging.wandb_mode", "logging.wandb", (True,)),
)


def unread_keys(config: Config) -> Iterator[Finding]:
    """Keys with a value of their own that this config does not read."""
    reported = set()
    for condition in CONDITIONS:
        section, _, name = condition.key.partition(".")
        deciding_section, _, deciding_name = condition.decided_by.partition(".")
        owner = getattr(config, section)
        for index, table in enumerate(owner if section == "data" else (owner,)):
            deciding = table if deciding_section == section else getattr(config, deciding_section)
            value, decision = getattr(table, name), getattr(deciding, deciding_name)
            if decision in condition.values or value in condition.honoured:
                continue
            if value == _default(table, name):
                continue
            prefix = f"data.{index}" if section == "data" else section
            key = f"{prefix}.{name}"
            if key in reported:
                continue
            reported.add(key)
            decided_by = f"{prefix if deciding_section == section else deciding_section}"
            decided_by += f".{deciding_name}"
            yield (
                (key, decided_by),
                f"{key} = {toml_value(value)}: is read only with {decided_by} = "
                f"{_alternatives(condition.values)}, not with {toml_value(decision)}; "
                f"{condition.hint}",
            )


def _default(table: Any, name: str) -> Any:
    return next(field.default for field in fields(table) if field.name == name)


def _alternatives(values: tuple[Any, ...]) -> str:
    """ "a", "b" or "c"."""
    *first, last = map(toml_value, values)
    return f"{', '.join(first)} or {last}" if first else last
