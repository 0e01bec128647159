"""Trains a small byte-level transformer on a text: the commands `demo` and `train`, one loop.

The loss curve is a function of the configuration alone. Batches depend on the seed and the step,
checkpoints hold all the rest, so an interrupted run, resumed, goes on as if nothing had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from flash_attention_jax._optional import needs
from flash_attention_jax.compare import Parser, UsageError, check_main
from flash_attention_jax.data import InputError, Text, byte_entropy, load_text

with needs("flash_attention_jax.train", "flax", "optax", "tqdm", extra="train"):
    import optax
    from tqdm import tqdm

    from flash_attention_jax import _saving
    from flash_attention_jax.transformer import CausalTransformer, generate

__all__ = ["Config", "demo_main", "evaluate", "fit", "train_main"]

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
SAVE_SECONDS = 60.0  # the most that a kill can cost
VALID_BYTES = 2**16
SAMPLE_PROMPT, SAMPLE_LENGTH = 64, 192


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the loss curve depends on.

    Attributes:
        data: fingerprint of the text.
        similarity: "dot" or "cosine".
        attention: "auto", "dense" or "blocked".
        dtype: of the computation, "float32" or "bfloat16".
        dim: features of the residual stream.
        depth: layers.
        heads: attention heads of 64 features.
        seq_len: bytes that the model reads at once.
        batch: sequences in a step.
        steps: length of the whole run; the learning rate falls towards its end.
        lr: highest learning rate.
        seed: of parameters, batches and samples.
    """

    data: str
    similarity: Any
    attention: str
    dtype: str
    dim: int
    depth: int
    heads: int
    seq_len: int
    batch: int
    steps: int
    lr: float
    seed: int

    @functools.cached_property
    def model(self) -> CausalTransformer:
        """The model, without parameters."""
        return CausalTransformer(
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            similarity=self.similarity,
            implementation=None if self.attention == "auto" else self.attention,
            dtype=jnp.dtype(self.dtype),
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with a warmup over the first twentieth and cosine decay to a tenth, clipped."""
        warmup = max(1, self.steps // 20)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.lr, warmup, max(self.steps, warmup + 1), self.lr / 10
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01)
        )

    def initial_state(self) -> dict[str, Any]:
        """Step 0: parameters drawn from the seed, an empty optimizer state and no losses yet."""
        params, optimizer = _initial(self)
        losses = np.zeros(self.steps, np.float32)
        return {"step": 0, "params": params, "optimizer": optimizer, "losses": losses}


def fit(
    config: Config, text: Text, checkpoint: Path, *, resume: bool = False, label: str = "train"
) -> dict[str, Any]:
    """Trains for `config.steps` steps, with a progress bar and checkpoints.

    SIGINT and SIGTERM end it after the step under way, with a checkpoint; the state returned then
    has a `step` below `config.steps`.

    Args:
        config: what to train, and how.
        text: what to read.
        checkpoint: the file to save to: every minute, and at the end.
        resume: go on from `checkpoint`.
        label: stands before the progress bar.

    Returns:
        A dictionary: `step`, `params`, `optimizer`, and `losses`, (steps,) float32 numpy array in
        bits per byte.

    Raises:
        InputError: `resume` without a checkpoint, or with one of another configuration.
    """
    state = config.initial_state()
    if resume:
        state = _saving.restore(checkpoint, state, dataclasses.asdict(config))
        # Loaded arrays may be read-only, and numpy ones are not donated.
        state["losses"] = np.array(state["losses"])
    params, optimizer = jax.tree.map(jnp.asarray, (state["params"], state["optimizer"]))
    first, losses = int(state["step"]), state["losses"]

    def snapshot(step: int) -> dict[str, Any]:
        return {"step": step, "params": params, "optimizer": optimizer, "losses": losses}

    def save(step: int) -> None:
        _saving.save(checkpoint, snapshot(step), dataclasses.asdict(config))

    step, saved, saved_at = first, first if resume else -1, time.monotonic()
    with (
        _saving.interruptions() as interrupted,
        tqdm(total=config.steps, initial=first, desc=label, unit="step") as bar,
    ):
        while step < config.steps and not interrupted():
            tokens = text.batch(
                seed=config.seed, step=step, batch=config.batch, seq_len=config.seq_len
            )
            params, optimizer, loss = _update(config, params, optimizer, tokens)
            losses[step] = float(loss)
            if not math.isfinite(losses[step]):
                raise InputError(
                    f"`--lr` must keep the loss finite, got {config.lr} and a loss of "
                    f"{losses[step]} at step {step}. Take a smaller one."
                )
            step += 1
            bar.set_postfix_str(f"{losses[max(0, step - 10) : step].mean():.3f} bits/byte")
            bar.update()
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save(step)
                saved, saved_at = step, time.monotonic()
        if step != saved:
            save(step)
    return snapshot(step)


def evaluate(config: Config, params: PyTree, tokens: Int[np.ndarray, "windows length"]) -> float:
    """Bits per byte of the model on `tokens`, each window read on its own.

    Args:
        config: the configuration of the model.
        params: its parameters.
        tokens: (windows, seq_len + 1) integers, from `Text.validation`.

    Returns:
        The mean over all predicted bytes.
    """
    total = 0.0
    for start in range(0, len(tokens), config.batch):
        part = tokens[start : start + config.batch]
        # One shape for all parts: a second one would compile again.
        filled = np.resize(part, (config.batch, part.shape[1]))
        total += float(np.asarray(_bits(config, params, filled))[: len(part)].sum())
    return total / tokens[:, 1:].size


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: Config) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state of step 0."""
    params = config.model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    return params, config.optimizer.init(params)


@functools.partial(jax.jit, static_argnums=0)
def _bits(
    config: Config, params: PyTree, tokens: Int[Array | np.ndarray, "batch length"]
) -> Float[Array, " batch"]:
    """Bits that each sequence takes: the sum over its bytes but the first."""
    logits: Any = config.model.apply(params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.sum(axis=1) / math.log(2)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(
    config: Config,
    params: PyTree,
    optimizer: PyTree,
    tokens: Int[Array | np.ndarray, "batch length"],
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """One step of the optimizer on the mean bits per byte."""

    def loss(params: PyTree) -> Float[Array, ""]:
        return _bits(config, params, tokens).mean() / config.seq_len

    value, gradients = jax.value_and_grad(loss)(params)
    # optax adds numbers of different dtypes, which a caller may have made an error.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = config.optimizer.update(gradients, optimizer, params)
    return optax.apply_updates(params, updates), optimizer, value


def demo_main(argv: Sequence[str]) -> int:
    """`python -m flash_attention_jax demo`: the check table, then a few minutes of training.

    Args:
        argv: the arguments after `demo`; `--help` lists them.

    Returns:
        The exit code: 0, 2 for bad input, 130 when interrupted, or that of the check.
    """
    parser = _parser("demo", steps=500, out="runs/demo")
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
    add("--data", help="a text: a file, a .gz file or a folder; without it data/enwik8.gz if that "
        "is there, else the source of Python's standard library")  # fmt: skip
    add("--similarity", choices=("dot", "cosine"), default="dot", help="of queries and keys")
    add("--attention", choices=("auto", "dense", "blocked"), default="auto", help="engine")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add("--dim", type=int, default=128, help="features of the model")
    add("--depth", type=int, default=4, help="layers")
    add("--heads", type=int, default=2, help="attention heads of 64 features")
    add("--seq-len", type=int, default=256, help="bytes read at once")
    add("--batch", type=int, default=8, help="sequences in a step")
    add("--steps", type=int, default=steps, help="length of the run")
    add("--lr", type=float, default=4e-3, help="highest learning rate")
    add("--seed", type=int, default=0, help="of parameters, batches and samples")
    add("--out", type=Path, default=Path(out), help="folder for checkpoints and flat texts")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
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
    text = load_text(args.data, cache=args.out, seq_len=args.seq_len)
    names = [field.name for field in dataclasses.fields(Config) if field.name != "data"]
    config = Config(
        data=f"text {text.fingerprint}", **{name: getattr(args, name) for name in names}
    )
    checkpoint = args.out / "checkpoint.msgpack"
    if command == "demo" and not args.resume:
        code = _check()
        if code:
            return code
    print(
        f"text: {text.source}, {len(text.train) + len(text.valid):,} bytes: "
        f"{len(text.train):,} to train, {len(text.valid):,} to validate"
    )
    if not args.resume and checkpoint.exists():
        kept = checkpoint.with_suffix(".previous")
        checkpoint.replace(kept)
        print(f"an earlier run's checkpoint is kept as {kept}")
    state = fit(config, text, checkpoint, resume=args.resume, label=command)
    if state["step"] == config.steps:
        with contextlib.suppress(KeyboardInterrupt):
            _report(config, text, state["params"])
            return 0
    print(f"\nInterrupted at step {state['step']} of {config.steps}, saved in {checkpoint}.")
    print(f"To go on: {_resume_command(command, argv)}")
    return INTERRUPTED


def _report(config: Config, text: Text, params: PyTree) -> None:
    """Prints bits per byte on the held-out text, and a sample."""
    windows = max(config.batch, VALID_BYTES // config.seq_len)
    tokens = text.validation(windows=windows, seq_len=config.seq_len)
    order0 = byte_entropy(tokens[:, 1:])
    bits = evaluate(config, params, tokens)
    print(f"\non {tokens[:, 1:].size:,} bytes of held-out text, in bits per byte:")
    print(f"  {order0:.3f}  byte frequencies, the best of order 0 for these very bytes")
    print(f"  {bits:.3f}  this model, attention by {config.similarity}, {config.steps} steps")
    prompt = tokens[:1, :SAMPLE_PROMPT]
    drawn = generate(
        config.model,
        params,
        prompt,
        SAMPLE_LENGTH,
        key=jax.random.key(config.seed),
        temperature=0.8,
        top_k=40,
    )
    print("\na sample; the text before the bar was given:\n")
    print(f"{_printable(prompt[0])}|{_printable(np.asarray(drawn)[0])}")


def _printable(tokens: Int[np.ndarray, " n"]) -> str:
    """Bytes as text; what a terminal would take for a command becomes a question mark."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "?" for c in text)


def _check() -> int:
    """The table of the engines' errors, times and memory, at lengths that take seconds."""
    return check_main(["--lengths", "256,1024"])


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuses what no run can use."""
    for name in ("dim", "depth", "heads", "seq_len", "batch", "steps", "seed"):
        value, least = getattr(args, name), 0 if name == "seed" else 1
        if value < least:
            option = name.replace("_", "-")
            raise InputError(f"`--{option}` must be at least {least}, got {value}. Raise it.")
    if not 0.0 < args.lr < math.inf:
        raise InputError(f"`--lr` must be positive and finite, got {args.lr}. Change it.")


def _resume_command(command: str, argv: Sequence[str]) -> str:
    """What to type to go on."""
    python = sys.executable
    if Path(python).is_relative_to(Path.cwd()):
        python = os.path.relpath(python)
    options = [option for option in argv if option != "--resume"]
    return shlex.join([python, "-m", "flash_attention_jax", command, *options, "--resume"])
