"""The training loop: read this file first.

`train` has the data prepared, opens a run folder, builds network, objective and optimizer, and then
repeats one step: draw noise and noise levels, predict, loss, backward, clip, update, average. All
random numbers of a micro-batch come from (run.seed, its index), so there is no generator to save,
and a run that was killed and resumed ends with bitwise the weights of one that never stopped.
"""

import dataclasses
import json
import logging
import signal
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch

from fasttune.build import (
    check_model,
    denoiser_for,
    objective_for,
    placement_for,
    resolved,
    set_blocks,
    step_for,
)
from fasttune.checkpoint import (
    ResumeState,
    checkpoint_name,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    set_aside_checkpoints,
)
from fasttune.config import Config
from fasttune.config_file import to_toml
from fasttune.data.loader import BatchPlan, load
from fasttune.errors import TrainingError
from fasttune.export import main as export
from fasttune.metrics import Metrics, open_trackers
from fasttune.models import MODELS
from fasttune.prepare import Prepared, prepare, write_bad_files
from fasttune.report import write_report
from fasttune.run_folder import (
    leave_on_sigterm,
    locked,
    new_run,
    resume_run,
    stop_on_signals,
    write_text,
)
from fasttune.run_log import kept_log, run_log
from fasttune.seeds import derive_seed, seed_default
from fasttune.trained import Trained, settings_of, warn_of_changes
from fasttune.validate import Validator

log = logging.getLogger(__name__)


def train(config: Config, *, resume: str | None = None, verbose: bool = False) -> int:
    """Runs the config; returns 0, or 128 + signal after SIGINT or SIGTERM and a checkpoint.

    `resume` is "latest", a run folder or a checkpoint. Raises FasttuneError for whatever a user can
    mend, before the model is loaded where it can be known by then.
    """
    begin = time.perf_counter()
    placement = placement_for(config)
    run_dir, resumed = None, None
    if resume is not None:
        run_dir, resumed = resume_run(config.run.output_dir, config.run.name, resume)
    with ExitStack() as stack:
        stack.enter_context(leave_on_sigterm())
        early = stack.enter_context(kept_log())
        log.info("%s", placement.reason)
        config = resolved(config, placement, check_model(config, resumed))
        prepared = prepare(config)
        stack.callback(prepared.cache.close)
        run_dir = run_dir or new_run(config.run.output_dir, config.run.name)
        stack.enter_context(locked(run_dir))
        stack.enter_context(run_log(run_dir, early, verbose))
        own = replace(config.run, output_dir=str(run_dir.parent), name=run_dir.name)
        return _train(replace(config, run=own), run_dir, prepared, resumed, begin)


def _train(
    config: Config, run_dir: Path, prepared: Prepared, resumed: ResumeState | None, begin: float
) -> int:
    spec, placement = MODELS[config.model.family], placement_for(config)
    device, t_ = placement.device, config.train
    seconds = {"preparation": time.perf_counter() - begin}

    denoiser = denoiser_for(config, spec, prepared.folder, placement)
    compiler = set_blocks(config, denoiser, placement)
    trained = Trained(config, denoiser, placement, resuming=resumed is not None)
    objective = objective_for(config, spec, prepared.folder)
    validator = Validator(config, spec, placement, prepared, objective, run_dir)
    plan = BatchPlan(
        [cached.plan.bucket for cached in prepared.train],
        batch_size=t_.batch_size,
        seed=config.run.seed,
    )
    settings = settings_of(config, prepared.train)
    checkpoints = run_dir / "checkpoints"
    step = 0
    if resumed is not None:
        step = trained.restore(resumed)
        warn_of_changes(resumed, settings)
        resumed.groups.clear()  # gives mapped files back
        set_aside_checkpoints(checkpoints, step)
    # Only now, because a refused resume must leave the folder as it was.
    write_text(run_dir / "config.toml", to_toml(config))
    write_bad_files(run_dir / "bad_files.json", prepared)
    seconds["loading"] = time.perf_counter() - begin - seconds["preparation"]

    metrics = Metrics(
        run_dir,
        total_steps=t_.steps,
        start_step=step,
        batch_images=t_.batch_size * t_.gradient_accumulation,
        images_per_epoch=plan.batches_per_epoch * t_.batch_size,
        norms_may_overflow=trained.scales_loss,
        compiler=compiler,
        begin=begin,
        trackers=open_trackers(
            run_dir,
            tensorboard=config.logging.tensorboard,
            wandb=config.logging.wandb,
            wandb_project=config.logging.wandb_project,
            wandb_mode=config.logging.wandb_mode,
            run_name=config.run.name,
            config=dataclasses.asdict(config),
            start_step=step,
        ),
    )
    saved_step = step if resumed is not None else None

    def check_loss() -> None:
        metrics.log_now(step)
        bad = metrics.first_nonfinite_step
        if bad is not None:
            raise TrainingError(_nonfinite(bad, config, plan, prepared, checkpoints))

    def save() -> None:
        nonlocal saved_step
        if saved_step == step:
            return
        check_loss()  # resume state is always good
        with metrics.paused("checkpoint"):
            groups, state = trained.state()
            save_checkpoint(checkpoints, step, groups, state | {"settings": settings})
            prune_checkpoints(checkpoints, config.checkpoint.keep)
        saved_step = step

    def validate() -> None:
        check_loss()
        with metrics.paused("validation"), trained.averaged():
            validator.run(step, denoiser, metrics)

    batches = load(
        prepared.train,
        plan,
        prepared.reader,
        seed=config.run.seed,
        start=step * t_.gradient_accumulation,
        stop=t_.steps * t_.gradient_accumulation,
        caption_dropout=t_.caption_dropout,
        device=device,
    )
    forward = step_for(config, spec, denoiser, objective, placement, prepared.folder)
    generator = torch.Generator(device)

    with closing(metrics), batches, stop_on_signals() as stop:
        denoiser.train()
        due = config.validation.every and step % config.validation.every == 0
        if due and not all(metrics.has(step, what) for what in validator.records):
            validate()  # the untrained model, or what an earlier start was killed in
        while step < t_.steps and stop.signal is None:
            lr = trained.set_lr(step)
            waited = batches.wait_seconds
            step_loss = torch.zeros((), device=device)
            for _ in range(t_.gradient_accumulation):
                batch = next(batches)
                seed = derive_seed(config.run.seed, "micro-batch", batch.micro_batch)
                generator.manual_seed(seed)
                seed_default(device, derive_seed(seed, "network"))  # dropout
                loss = forward.loss(batch, generator) / t_.gradient_accumulation
                trained.backward(loss)
                step_loss += loss.detach()

            step += 1
            grad_norm = trained.update(step)
            metrics.step(step, step_loss, lr, grad_norm, batches.wait_seconds - waited)
            if step % config.logging.every == 0:
                check_loss()
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                save()
            if config.validation.every and step % config.validation.every == 0:
                validate()
        save()
        if stop.signal is None and config.validation.every and step % config.validation.every:
            validate()
        metrics.log_now(step)
        weights = []
        if stop.signal is None:
            with metrics.paused("export"):
                weights = export(
                    config,
                    checkpoint=checkpoints / checkpoint_name(step),
                    formats=config.export.formats,
                    dtype=config.export.dtype,
                    out=run_dir / "weights",
                )
        summary = metrics.summary()
        summary["seconds"] = seconds | summary["seconds"]
        summary |= {"placement": placement.reason, "torch": torch.__version__, "weights": weights}
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1, default=str))
    report = write_report(run_dir)
    if stop.signal is not None:
        log.warning(
            "stopped at step %d of %d by %s; continue with\n  fasttune train %s --resume %s",
            step,
            t_.steps,
            signal.Signals(stop.signal).name,
            run_dir / "config.toml",
            run_dir,
        )
        return 128 + stop.signal
    grids = sorted((run_dir / "samples").glob("step-*.png"))
    found = [("samples", path) for path in grids[-1:]]
    found += [("weights", path) for path in weights] + [("report", report)]
    log.info("done:%s", "".join(f"\n  {name:8} {path}" for name, path in found))
    return 0


def _nonfinite(
    step: int, config: Config, plan: BatchPlan, prepared: Prepared, checkpoints: Path
) -> str:
    """The message for a loss that was NaN or infinite in `step` (counted from 1)."""
    first = (step - 1) * config.train.gradient_accumulation
    indices = [
        index
        for micro_batch in range(first, first + config.train.gradient_accumulation)
        for index in plan.batch(micro_batch)
    ]
    paths = dict.fromkeys(prepared.train[index].sample.path for index in indices)
    good = list_checkpoints(checkpoints)
    back = (
        f"the last good checkpoint is {good[-1]}: continue from it with --resume latest and a "
        "lower optimizer.lr"
        if good
        else "there is no checkpoint yet: start again with a lower optimizer.lr or more "
        "schedule.warmup_steps"
    )
    return (
        f"the loss or gradient of step {step} is not finite, training stops. Images in that step: "
        f"{', '.join(paths)}. Then {back}; precision.compute = fp32 tells overflow from divergence"
    )
