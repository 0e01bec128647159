"""Trains a small byte-level transformer on a text: the commands `demo` and `train`, one loop.

A run writes into one folder: checkpoints, a log with a row for each step, a picture of the curves,
samples, and a summary. `fit` is the loop on its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import flash_attention_jax
from flash_attention_jax._commands.check import check_main
from flash_attention_jax._commands.line import Parser, UsageError
from flash_attention_jax._training import curves
from flash_attention_jax._training.fleet import Fleet, join_processes, make_mesh, parse_mesh
from flash_attention_jax._training.loop import Config, evaluate, fit, fit_alone, sample
from flash_attention_jax._training.saving import writing
from flash_attention_jax.data import InputError, Text, byte_entropy, load_text, replacing

__all__ = ["Config", "demo_main", "evaluate", "fit", "train_main"]

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
VALID_BYTES = 2**16  # at the end
RESULTS = ("checkpoints", "log.csv", "curves.png", "summary.json", "samples.txt", "tensorboard")


def demo_main(argv: Sequence[str]) -> int:
    """`python -m flash_attention_jax demo`: the check table, then a few minutes of training.

    Args:
        argv: the arguments after `demo`; `--help` lists them.

    Returns:
        The exit code: 0, 2 for bad input, 130 when interrupted, or that of the check.
    """
    parser = _parser("demo", steps=300, out="runs/demo")
    parser.description = "Check the attention engines, then train a small model on a text."
    return _main("demo", parser, argv)


def train_main(argv: Sequence[str]) -> int:
    """`python -m flash_attention_jax train`: the demo's training, longer.

    Args:
        argv: the arguments after `train`; `--help` lists them.

    Returns:
        The exit code: 0, 2 for bad input, or 130 when interrupted.
    """
    parser = _parser("train", steps=5000, out="runs/train")
    parser.description = "Train a small byte-level transformer on a text."
    return _main("train", parser, argv)


def _parser(command: str, *, steps: int, out: str) -> Parser:
    """The options, the same for both commands; only the defaults differ."""
    parser = Parser(
        prog=f"flash_attention_jax {command}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", help="a text: a file, as .gz, .bz2, .xz or .zip too, or a folder; without it "
        "data/enwik8.gz if there is one, else the source of Python's standard library")  # fmt: skip
    add("--similarity", choices=("dot", "cosine"), default="dot", help="of queries and keys")
    add("--attention", choices=("auto", "dense", "blocked"), default="auto", help="engine")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add("--dim", type=int, default=128, help="features of the model")
    add("--depth", type=int, default=4, help="layers")
    add("--heads", type=int, default=2, help="attention heads of 64 features")
    add("--seq-len", type=int, default=256, help="bytes read at once")
    add("--batch", type=int, default=8, help="sequences held in memory at once")
    add("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    add("--steps", type=int, default=steps, help="length of the run")
    add("--lr", type=float, default=4e-3, help="highest learning rate; falls along a cosine")
    add("--warmup", type=int, help="steps in which the rate rises; a twentieth without it")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="of parameters, batches and samples")
    add("--out", type=Path, default=Path(out), help="folder for all that the run writes")
    add("--save-every", type=int, default=0, help="steps between checkpoints; there is one each "
        "minute and at the end anyway")  # fmt: skip
    add("--validate-every", type=int, help="steps between validations, 0 = at the end alone; a "
        "tenth of the run without it")  # fmt: skip
    add("--sample-every", type=int, default=0, help="steps between samples, which go to "
        "samples.txt; 0 = at the end alone")  # fmt: skip
    add("--mesh", help="devices along data, context and model, as in data=2,context=4; one device "
        "without it")  # fmt: skip
    add("--coordinator", help="host:port of process 0, where several processes train together")
    add("--processes", type=int, default=1, help="how many there are")
    add("--process", type=int, default=0, help="which of them this is")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser


def _main(command: str, parser: Parser, argv: Sequence[str]) -> int:
    """Runs a command; bad input ends in one line and exit code 2."""
    try:
        return _run(command, parser.parse_args(argv), argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def _run(command: str, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Text, check, training, validation, sample."""
    _check_numbers(args)
    fleet = _fleet(args)
    if fleet.first:
        return _train(command, args, argv, fleet)
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        return _train(command, args, argv, fleet)


def _fleet(args: argparse.Namespace) -> Fleet:
    """The devices and processes that the options name."""
    sizes = None if args.mesh is None else parse_mesh(args.mesh)
    if args.processes > 1:
        if args.coordinator is None or sizes is None:
            missing = "coordinator" if args.coordinator is None else "mesh"
            raise InputError(
                f"`--{missing}` must be given where there are processes, got none for "
                f"--processes {args.processes}. Add --coordinator localhost:12345 --mesh data=2, "
                "say."
            )
        join_processes(args.coordinator, args.processes, args.process)
    fleet = Fleet(None if sizes is None else make_mesh(sizes))
    fleet.check(batch=args.batch, heads=args.heads, seq_len=args.seq_len)
    return fleet


def _train(command: str, args: argparse.Namespace, argv: Sequence[str], fleet: Fleet) -> int:
    """The same, for devices that are there."""
    # First of all: a mistake in a path must show before minutes have passed.
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        raise InputError(
            f"`--out` must be a folder that can be written, got {args.out}: {error.strerror}. "
            "Choose another."
        ) from error
    # From before an earlier run's results are moved until the report is written.
    with writing(args.out, lock=fleet.first):
        return _train_alone(command, args, argv, fleet)


def _train_alone(command: str, args: argparse.Namespace, argv: Sequence[str], fleet: Fleet) -> int:
    """The same, for a folder into which no other run writes."""
    text = load_text(args.data, cache=args.out, seq_len=args.seq_len)
    config = _config(args, text)
    if command == "demo" and not args.resume and fleet.first:
        code = _check()
        if code:
            return code
    print(
        f"text: {text.source}, {len(text.train) + len(text.valid):,} bytes: "
        f"{len(text.train):,} to train, {len(text.valid):,} to validate"
    )
    if not args.resume and fleet.first:
        _keep_previous(args.out)
    every = math.ceil(config.steps / 10) if args.validate_every is None else args.validate_every
    state = fit_alone(
        config,
        text,
        args.out,
        resume=args.resume,
        label=command,
        save_every=args.save_every,
        validate_every=every,
        sample_every=args.sample_every,
        fleet=fleet,
    )
    if not fleet.first:
        return 0 if state["step"] == config.steps else INTERRUPTED
    with contextlib.suppress(KeyboardInterrupt):
        curves.draw(args.out, f"attention by {config.similarity}, {config.attention}")
        if state["step"] == config.steps:
            _report(config, text, state["params"], args.out)
            return 0
    checkpoints = args.out / "checkpoints"
    print(f"\nInterrupted at step {state['step']} of {config.steps}, saved in {checkpoints}.")
    print(f"To go on: {_resume_command(command, argv)}")
    return INTERRUPTED


def _config(args: argparse.Namespace, text: Text) -> Config:
    """The configuration that the options describe."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)}
    values["data"] = f"text {text.fingerprint}"
    if args.warmup is None:
        values["warmup"] = max(1, args.steps // 20)
    return Config(**values)


def _keep_previous(out: Path) -> None:
    """Moves the results of an earlier run out of the way; those of the one before it go."""
    found = [out / name for name in RESULTS if (out / name).exists()]
    if not found:
        return
    kept = out / "previous"
    if kept.exists():
        shutil.rmtree(kept)
    kept.mkdir()
    for path in found:
        path.rename(kept / path.name)
    print(f"an earlier run's results are kept in {kept}")


def _report(config: Config, text: Text, params: PyTree, out: Path) -> None:
    """Prints bits per byte on the held-out text, and a sample; both go into `summary.json` too."""
    windows = max(config.batch, VALID_BYTES // config.seq_len)
    tokens = text.validation(windows=windows, seq_len=config.seq_len)
    order0 = byte_entropy(tokens[:, 1:])
    bits = evaluate(config, params, tokens)
    print(f"\non {tokens[:, 1:].size:,} bytes of held-out text, in bits per byte:")
    print(f"  {order0:.3f}  byte frequencies, the best of order 0 for these very bytes")
    print(f"  {bits:.3f}  this model, attention by {config.similarity}, {config.steps} steps")
    given, drawn = sample(config, params, tokens)
    print("\na sample; the text before the bar was given:\n")
    print(f"{given}|{drawn}")
    _write_summary(out, config, {"order0": order0, "model": bits}, {"given": given, "drawn": drawn})
    print(f"\nlog, curves and checkpoints are in {out}")


def _write_summary(
    out: Path, config: Config, bits: dict[str, float], drawn: dict[str, str]
) -> None:
    """Writes what a run was and what came of it, as JSON."""
    summary: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "held_out_bits_per_byte": bits,
        "sample": drawn,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flash-attention-jax": flash_attention_jax.__version__,
        },
        "device": jax.devices()[0].device_kind,
    }
    with replacing(out / "summary.json") as file:
        file.write((json.dumps(summary, indent=1) + "\n").encode())


def _check() -> int:
    """The table of the engines' errors, times and memory, at lengths that take seconds."""
    return check_main(["--lengths", "256,1024"])


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuses what no run can use."""
    positive = ("dim", "depth", "heads", "seq_len", "batch", "accumulate", "steps", "processes")
    least = dict.fromkeys(positive, 1)
    least |= dict.fromkeys(("seed", "warmup", "save_every", "validate_every", "sample_every"), 0)
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            option = name.replace("_", "-")
            raise InputError(f"`--{option}` must be at least {bound}, got {value}. Raise it.")
    for name in ("lr", "clip"):
        value = getattr(args, name)
        if not 0.0 < value < math.inf:
            raise InputError(f"`--{name}` must be positive and finite, got {value}. Change it.")


def _resume_command(command: str, argv: Sequence[str]) -> str:
    """What to type to go on."""
    python = sys.executable
    if Path(python).is_relative_to(Path.cwd()):
        python = os.path.relpath(python)
    options = [option for option in argv if option != "--resume"]
    return shlex.join([python, "-m", "flash_attention_jax", command, *options, "--resume"])
