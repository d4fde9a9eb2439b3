"""What the types of the config cannot say: bounds, clashes between keys, missing files.

Every finding is (keys, line): load_config leaves out a finding about a key that is already wrong.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fasttune.config import Config, Data
from fasttune.config_conditions import DDPM_FAMILIES, Finding, unread_keys

PATH_KEYS = frozenset(
    {
        "run.output_dir",
        "model.path",
        "adapter.init_from",
        "data.path",
        "data.caption_file",
        "cache.dir",
        "validation.held_out_path",
    }
)
"""Keys whose value may start with ~, the home folder."""

LORA_FORMATS = ("peft", "kohya", "comfyui")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The interval a number, or each number of a list, must lie in."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = (
            ("at least", self.minimum),
            ("above", self.above),
            ("at most", self.maximum),
            ("below", self.below),
        )
        return " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


_COUNT = Bound(minimum=1)
_NOT_NEGATIVE = Bound(minimum=0)
_POSITIVE = Bound(above=0)
_PROBABILITY = Bound(minimum=0, maximum=1)
_BELOW_ONE = Bound(minimum=0, below=1)

BOUNDS = {
    # torch seeds are 64 bits wide; streams are derived from non-negative ones.
    "run.seed": Bound(minimum=0, maximum=2**63 - 1),
    "adapter.rank": _COUNT,
    "adapter.alpha": _POSITIVE,
    "adapter.dropout": _BELOW_ONE,
    "data.resolution": Bound(minimum=16),
    "data.max_aspect": Bound(minimum=1),
    "data.repeats": _COUNT,
    "data.held_out": _BELOW_ONE,
    "cache.batch_size": _COUNT,
    "cache.workers": _NOT_NEGATIVE,
    "train.steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.gradient_accumulation": _COUNT,
    "train.max_grad_norm": _POSITIVE,
    "train.caption_dropout": _PROBABILITY,
    "objective.logit_std": _POSITIVE,
    "objective.timesteps": Bound(minimum=0, maximum=999),
    "objective.shift": _POSITIVE,
    "objective.min_snr_gamma": _POSITIVE,
    "objective.offset_noise": _NOT_NEGATIVE,
    "objective.huber_delta": _POSITIVE,
    "objective.guidance": _NOT_NEGATIVE,
    "objective.kl_weight": _NOT_NEGATIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.betas": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "schedule.warmup_steps": _NOT_NEGATIVE,
    "schedule.min_lr_ratio": _PROBABILITY,
    "schedule.cycles": _COUNT,
    "schedule.power": _POSITIVE,
    "ema.decay": _BELOW_ONE,
    "validation.every": _NOT_NEGATIVE,
    "validation.seeds": Bound(minimum=0, maximum=2**63 - 1),
    "validation.sampling_steps": _COUNT,
    "validation.guidance_scale": _NOT_NEGATIVE,
    "validation.held_out_timesteps": _COUNT,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep": _NOT_NEGATIVE,
    "logging.every": _COUNT,
}


def clashes(config: Config) -> Iterator[Finding]:
    """Values that are fine alone and not together, or not of the form their key needs."""
    yield from _run_clashes(config)
    yield from _adapter_clashes(config)
    yield from _objective_clashes(config)
    for index, source in enumerate(config.data):
        yield from _source_clashes(config, source, f"data.{index}")
    yield from _schedule_clashes(config)
    yield from _validation_clashes(config)
    yield from unread_keys(config)


def _run_clashes(config: Config) -> Iterator[Finding]:
    name = config.run.name
    if not name or name in (".", "..") or re.search(r'[/\\\0<>:"|?*]', name):
        yield (
            ("run.name",),
            f'run.name = "{name}": expected the name of one folder, without / \\ : * ? " < > |',
        )
    for key, text in (("run.output_dir", config.run.output_dir), ("cache.dir", config.cache.dir)):
        if not text:
            yield (key,), f'{key} = "": expected a folder; "." is the current one'


def _adapter_clashes(config: Config) -> Iterator[Finding]:
    adapter, precision = config.adapter, config.precision
    if config.model.family == "autoencoder" and adapter.type != "none":
        yield (
            ("model.family", "adapter.type"),
            f'adapter.type = "{adapter.type}": family "autoencoder" is trained whole; write '
            'adapter.type = "none"',
        )
    if config.model.family == "autoencoder" and {precision.base, precision.compute} & {
        "bf16",
        "fp16",
    }:
        yield (
            ("model.family", "precision.base", "precision.compute"),
            'precision: family "autoencoder" is trained in fp32; leave base and compute "auto"',
        )
    if adapter.type == "none" and precision.base == "fp16":
        # fp16 gradients underflow and fp16 weights lose updates below 2^-11 of their size.
        yield (
            ("adapter.type", "precision.base"),
            'precision.base = "fp16": with adapter.type = "none" the stored weights are trained, '
            'which needs fp32 (with compute = "fp16") or bf16',
        )
    if not adapter.targets or adapter.targets == ("",):
        yield ("adapter.targets",), "adapter.targets: empty; name a preset or module patterns"
    for index, name in enumerate(config.export.formats):
        if (name in LORA_FORMATS) != (adapter.type == "lora"):
            fitting = LORA_FORMATS if adapter.type == "lora" else ("diffusers", "single_file")
            yield (
                ("export.formats", "adapter.type"),
                f'export.formats: "{name}" does not go with adapter.type = "{adapter.type}"; '
                "allowed are " + ", ".join(f'"{f}"' for f in fitting),
            )
        if name in config.export.formats[:index]:
            yield ("export.formats",), f'export.formats: "{name}" occurs twice'


def _objective_clashes(config: Config) -> Iterator[Finding]:
    objective, family = config.objective, config.model.family
    predictions = {"flux": ("velocity",), "autoencoder": ()}.get(
        family, ("epsilon", "v_prediction")
    )
    if objective.prediction not in ("auto", *predictions):
        allowed = ", ".join(f'"{p}"' for p in ("auto", *predictions))
        yield (
            ("objective.prediction", "model.family"),
            f'objective.prediction = "{objective.prediction}": family "{family}" has {allowed}',
        )
    if (
        family in DDPM_FAMILIES
        and objective.zero_terminal_snr
        and objective.prediction == "epsilon"
    ):
        # At zero SNR the input is the noise itself: nothing is left to predict.
        yield (
            ("objective.zero_terminal_snr", "objective.prediction"),
            'objective.zero_terminal_snr: needs objective.prediction = "v_prediction"; at the last '
            "timestep the input is pure noise, and predicting it teaches nothing",
        )
    yield from _timestep_clashes(config)


def _timestep_clashes(config: Config) -> Iterator[Finding]:
    objective, family = config.objective, config.model.family
    sampling, timesteps = objective.timestep_sampling, objective.timesteps
    if family == "autoencoder" and sampling != "auto":
        yield (
            ("objective.timestep_sampling", "model.family"),
            f'objective.timestep_sampling = "{sampling}": an autoencoder has no timesteps; remove it',
        )
    elif family in DDPM_FAMILIES and sampling in ("logit_normal", "mode"):
        yield (
            ("objective.timestep_sampling", "model.family"),
            f'objective.timestep_sampling = "{sampling}": is made for flow matching; family '
            f'"{family}" has "auto", "uniform", "explicit"',
        )
    elif sampling == "explicit" and not timesteps:
        yield (
            ("objective.timestep_sampling", "objective.timesteps"),
            'objective.timesteps: missing; timestep_sampling = "explicit" draws from this list',
        )
    if timesteps and sampling != "explicit":
        yield (
            ("objective.timestep_sampling", "objective.timesteps"),
            "objective.timesteps: is read only with objective.timestep_sampling = "
            f'"explicit", not with "{sampling}"',
        )
    elif family == "flux" and any(t > 1 for t in timesteps):
        yield (
            ("objective.timesteps", "model.family"),
            "objective.timesteps: flow matching takes sigmas, numbers from 0 to 1; "
            f"{max(timesteps):g} is outside",
        )
    elif family in DDPM_FAMILIES and any(t != int(t) for t in timesteps):
        odd = next(t for t in timesteps if t != int(t))
        yield (
            ("objective.timesteps", "model.family"),
            f'objective.timesteps: family "{family}" takes integers from 0 to 999; {odd:g} is none',
        )


def _source_clashes(config: Config, source: Data, label: str) -> Iterator[Finding]:
    if source.captions == "constant" and source.caption is None:
        yield (
            (f"{label}.captions", f"{label}.caption"),
            f'{label}.caption: missing; {label}.captions = "constant" gives it to every image',
        )
    if source.held_out > 0 and config.validation.held_out_path is not None:
        yield (
            (f"{label}.held_out", "validation.held_out_path"),
            f"{label}.held_out and validation.held_out_path: held-out images come from a fraction "
            "or from a folder; keep one of the two",
        )


def _schedule_clashes(config: Config) -> Iterator[Finding]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.name != "constant" and schedule.warmup_steps > steps:
        yield (
            ("schedule.warmup_steps", "train.steps"),
            f"schedule.warmup_steps = {schedule.warmup_steps}: longer than the run, "
            f"train.steps = {steps}",
        )


def _validation_clashes(config: Config) -> Iterator[Finding]:
    validation = config.validation
    for text in validation.resolutions:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None or min(int(match[1]), int(match[2])) < 16:
            line = f'validation.resolutions: "{text}"; expected width x height, such as "1024x768"'
            yield ("validation.resolutions",), line
    if not validation.seeds:
        yield ("validation.seeds",), "validation.seeds: empty; expected at least one, such as [0]"


def machine_problems(config: Config) -> Iterator[Finding]:
    """What the config names and this machine lacks: files, folders, optional libraries."""
    yield from _missing_model(config.model.path)
    if config.adapter.init_from is not None and not Path(config.adapter.init_from).is_file():
        yield (
            ("adapter.init_from",),
            f'adapter.init_from = "{config.adapter.init_from}": no such file; expected a LoRA in '
            ".safetensors",
        )
    for index, source in enumerate(config.data):
        yield from _missing_source(source, f"data.{index}")
    held_out = config.validation.held_out_path
    if held_out is not None and not Path(held_out).is_dir():
        yield ("validation.held_out_path",), _no_folder("validation.held_out_path", held_out)
    for keys, modules, extra in _needed_libraries(config):
        if not any(find_spec(module) for module in modules):
            yield (
                keys,
                f"{keys[0]}: needs {' or '.join(modules)}, not installed here; "
                f"pip install 'fasttune[{extra}]'",
            )


def _no_folder(key: str, path: str) -> str:
    kind = "is a file, not a folder" if Path(path).is_file() else "no such folder"
    start = "" if Path(path).is_absolute() else f" (from {Path.cwd()})"
    return f'{key} = "{path}": {kind}{start}'


def _missing_model(path: str) -> Iterator[Finding]:
    if Path(path).is_dir():
        return
    if Path(path).is_file() or path.endswith((".safetensors", ".ckpt")):
        yield (
            ("model.path",),
            f'model.path = "{path}": is a single file; expected a folder in diffusers layout, as '
            "from_single_file(...).save_pretrained(...) of diffusers writes it, or a hub id",
        )
    elif path.startswith((".", "/", "\\")) or path.count("/") > 1 or Path(path).is_absolute():
        yield ("model.path",), _no_folder("model.path", path)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        yield (
            ("model.path",),
            f'model.path = "{path}": neither a folder here nor a hub id, "owner/name"',
        )


def _missing_source(source: Data, label: str) -> Iterator[Finding]:
    folder = Path(source.path)
    if not folder.is_dir():
        yield (f"{label}.path",), _no_folder(f"{label}.path", source.path)
        return
    if source.captions not in ("jsonl", "csv", "parquet"):
        return
    keys = (f"{label}.path", f"{label}.captions", f"{label}.caption_file")
    if source.caption_file is not None:
        if not (folder / source.caption_file).is_file():
            yield (
                keys,
                f'{label}.caption_file = "{source.caption_file}": no such file in {folder}',
            )
        return
    names = [f"{stem}.{source.captions}" for stem in ("captions", "metadata")]
    if not any((folder / name).is_file() for name in names):
        yield (
            keys,
            f'{label}.captions = "{source.captions}": neither {" nor ".join(names)} is in {folder}; '
            f"name the file in {label}.caption_file",
        )


def _needed_libraries(config: Config) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """(keys, modules of which one is needed, extra of this package that installs it)."""
    if config.logging.tensorboard:
        yield ("logging.tensorboard",), ("tensorboard",), "tensorboard"
    if config.logging.wandb:
        yield ("logging.wandb",), ("wandb",), "wandb"
    for index, source in enumerate(config.data):
        if source.captions == "parquet":
            yield (f"data.{index}.captions",), ("pyarrow",), "parquet"
