"""The `fasttune` command.

Imports nothing heavy: torch loads only after the arguments are parsed and the config is checked.
Exit status: 0 done, 1 a bug of ours, 2 an error of the user's, 130 interrupted (143: SIGTERM).
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fasttune import __version__, environment
from fasttune.errors import CheckpointError, ConfigError, FasttuneError

Command = Callable[[argparse.Namespace], int]

LESS_MEMORY = (
    'What takes less: memory.activations = "recompute", train.batch_size = 1 with more '
    "train.gradient_accumulation, a smaller data.resolution, adapter.rank or cache.batch_size, "
    'optimizer.name = "adafactor".'
)
OVERRIDES_HELP = "keys over the config's, such as train.steps=100 or data.0.path=photos"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    args = _parse(argv)
    environment.prepare()  # before a command imports torch
    _set_up_logging(verbose=args.verbose)
    command: Command = args.command
    try:
        return command(args)
    except FasttuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left. Python would complain at exit.
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except Exception as error:
        if isinstance(error, OSError) and (message := _file_problem(error)):
            logging.getLogger("fasttune").debug("the command ended with an error", exc_info=True)
            print(f"error: {message}", file=sys.stderr)
            return 2
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            print(f"error: out of memory: {error}\n{LESS_MEMORY}", file=sys.stderr)
            return 2
        # Through the logger, so that a run's log file has it too.
        logging.getLogger("fasttune").exception("This is a bug in fasttune. Please report it:")
        return 1


_MENDED_BY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def _file_problem(error: OSError) -> str | None:
    """What to say about a file that nobody below could read or write; None if it is about none.

    A write to a full disk does not know the name of its file."""
    names = [
        n for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)
    ]
    mend = _MENDED_BY.get(error.errno or 0)
    if not names and mend is None:
        return None
    path = f"{' -> '.join(os.fsdecode(name) for name in names)}: " if names else ""
    return f"{path}{error.strerror or error}" + (f"; {mend}" if mend else "")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. argparse takes key=value only in one place; here they may stand anywhere."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["bench"]:  # has a parser of its own, in the source tree
        return argparse.Namespace(command=_bench, verbose=False, arguments=given[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    misplaced = [text for text in rest if text.startswith("-") or "=" not in text]
    if misplaced or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(misplaced or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _set_up_logging(*, verbose: bool) -> None:
    """Messages of fasttune go to stderr: from INFO on, with -v all. Warnings that other libraries
    log without a handler of their own are shown with -v alone."""
    if not verbose:
        logging.getLogger().addHandler(logging.NullHandler())
    logger = logging.getLogger("fasttune")
    logger.setLevel(logging.DEBUG)
    for handler in [h for h in logger.handlers if getattr(h, "is_console", False)]:
        logger.removeHandler(handler)
    console = _Console()
    console.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.addHandler(console)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Plain text for INFO; the level's name in front of anything else."""

    is_console = True

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def _train(args: argparse.Namespace) -> int:
    from fasttune.config_file import load_config

    config = load_config(args.config, args.overrides)
    from fasttune.train import train

    return train(config, resume=args.resume, verbose=args.verbose)


def _prepare(args: argparse.Namespace) -> int:
    from fasttune.config_file import load_config

    config = load_config(args.config, args.overrides)
    from fasttune.prepare import prepare

    prepare(config)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from fasttune.config_file import load_config

    if args.source.suffix == ".safetensors":
        raise ConfigError(
            [
                f"{args.source}: weights alone do not say which model they belong to; give the run "
                f"folder or config file, and --weights {args.source}"
            ]
        )
    path, checkpoint = _locate(args.source)
    config = load_config(path, args.overrides, check_files=False)
    if args.weights is not None and not args.weights.exists():
        raise CheckpointError(f"--weights {args.weights}: no such file or folder")
    if args.weights is None and checkpoint is None and args.source.is_dir():
        raise CheckpointError(f"{args.source}: no checkpoint yet; give --weights, or a config file")
    from fasttune.sample import main as sample

    paths = sample(
        config,
        checkpoint=None if args.weights is not None else checkpoint,
        weights=args.weights,
        prompts=args.prompt,
        negative_prompt=args.negative_prompt,
        seeds=args.seed,
        resolutions=args.resolution,
        steps=args.steps,
        guidance_scale=args.guidance,
        out=args.out,
    )
    _print_paths(paths)
    return 0


def _export(args: argparse.Namespace) -> int:
    from fasttune.config_file import load_config

    path, checkpoint = _locate(args.source)
    if checkpoint is None:
        raise CheckpointError(
            f"{args.source}: no checkpoint here; give a run folder that has one, or the checkpoint "
            "itself, such as runs/dog/checkpoints/step-000500"
        )
    overrides = [f"export.{key}={value}" for key, value in _export_keys(args)]
    config = load_config(path, overrides, check_files=False)
    from fasttune.export import main as export

    paths = export(
        config,
        checkpoint=checkpoint,
        formats=config.export.formats,
        dtype=config.export.dtype,
        out=args.out,
    )
    _print_paths(paths)
    return 0


def _print_paths(paths: Sequence[Path]) -> None:
    """What a command has written, on stdout, one path a line: for people and for scripts."""
    for path in paths:
        print(path)


def _export_keys(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The flags as config keys, so that their clashes are checked in one place."""
    keys = []
    if args.format:
        keys.append(("formats", "[" + ", ".join(f'"{name}"' for name in args.format) + "]"))
    if args.dtype:
        keys.append(("dtype", args.dtype))
    return keys


def _locate(source: Path) -> tuple[Path, Path | None]:
    """(config file, checkpoint) of a run folder, a checkpoint folder, or a config file."""
    if not source.exists():
        raise ConfigError([f"{source}: no such run folder, checkpoint or config file"])
    if source.is_file():
        return source, None
    checkpoint: Path | None
    if (source / "state.json").is_file():
        run, checkpoint = source.resolve().parent.parent, source
    else:
        steps = list((source / "checkpoints").glob("step-*"))
        run, checkpoint = source, max(steps, key=lambda p: (len(p.name), p.name), default=None)
    config = run / "config.toml"
    if not config.is_file():
        raise ConfigError([f"{source}: not a run folder, {config} is missing"])
    return config, checkpoint


def _init(args: argparse.Namespace) -> int:
    from fasttune.init import QUESTIONS, init

    given = {q.name: getattr(args, q.name) for q in QUESTIONS if getattr(args, q.name) is not None}
    if args.vram is not None:
        given["card"] = args.vram
    ask = None if args.yes or not sys.stdin.isatty() else input
    written = init(given, ask=ask, say=print, take_defaults=args.yes, overwrite=args.force)
    print(f"{written} written. Next: fasttune train {written}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fasttune.doctor import examine, to_json, to_text

    findings = examine()
    print(to_json(findings) if args.json else to_text(findings))
    return 0 if findings.can_train else 2


def _bench(args: argparse.Namespace) -> int:
    from fasttune.bench import main as bench

    return bench(args.arguments)


def _schema(args: argparse.Namespace) -> int:
    from fasttune.schema import schema_text

    print(schema_text(), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fasttune",
        description="A minimal, performance-focused trainer for image diffusion models.",
        epilog="`fasttune COMMAND --help` says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"fasttune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("-v", "--verbose", action="store_true", help="show debug messages")
        return sub

    train = add("train", _train, "Train a model as a config says; prepares the cache if needed.")
    train.add_argument("config", type=Path, help="TOML file; `fasttune init` writes one")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP)
    train.add_argument(
        "--resume", metavar="WHICH", help="latest, or the path of a run folder or checkpoint"
    )

    prepare = add("prepare", _prepare, "Encode images and captions into the cache.")
    prepare.add_argument("config", type=Path, help="TOML file")
    prepare.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP
    )

    sample = add("sample", _sample, "Make images with a model, before or after training.")
    sample.add_argument("source", type=Path, help="run folder, checkpoint, or config file")
    sample.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP
    )
    sample.add_argument("--prompt", action="append", help="repeat for several")
    sample.add_argument("--negative-prompt", help="what guidance leads away from")
    sample.add_argument("--seed", action="append", type=int, help="repeat for several")
    sample.add_argument("--resolution", action="append", metavar="WxH", help="repeat for several")
    sample.add_argument("--steps", type=int, help="denoising steps")
    sample.add_argument("--guidance", type=float, help="guidance scale")
    sample.add_argument("--weights", type=Path, help="exported weights, instead of a checkpoint's")
    sample.add_argument("--out", type=Path, help="PNG of the grid")

    export = add("export", _export, "Write the trained weights for use elsewhere.")
    export.add_argument("source", type=Path, help="run folder (newest checkpoint) or checkpoint")
    export.add_argument(
        "--format",
        action="append",
        help="LoRA: peft, kohya, comfyui; whole network: diffusers, single_file; repeat for several",
    )
    export.add_argument("--dtype", help="bf16, fp16 or fp32")
    export.add_argument("--out", type=Path, help="folder; default: weights in the run folder")

    init = add("init", _init, "Write a commented config; in a terminal, asks for what is missing.")
    init.add_argument("--family", help="flux, sdxl, sd1 or sd2")
    init.add_argument("--method", help="lora or full")
    card = init.add_mutually_exclusive_group()
    card.add_argument("--card", help='such as "RTX 4090"; cpu for none')
    card.add_argument("--vram", help="memory of the card, such as 24GiB")
    init.add_argument("--data", help="folder with the images")
    init.add_argument("--caption", help="caption of every image, where the folder has none")
    init.add_argument("--model", help="diffusers folder or hub id")
    init.add_argument("--prompt", help="prompt of the images sampled during training")
    init.add_argument("--out", help="the config to write")
    init.add_argument("--yes", action="store_true", help="take the default for what is missing")
    init.add_argument("--force", action="store_true", help="write over an existing config")
    doctor = add("doctor", _doctor, "Say what this machine has and what each feature would use.")
    doctor.add_argument("--json", action="store_true", help="for machines")
    add("schema", _schema, "Print the JSON schema of the config.")
    add("bench", _bench, "Measure speed and memory, and hold changes to them (source tree only).")
    return parser
