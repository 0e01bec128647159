"""The training loop: configuration, steps, checkpoints, validation.

The loss curve is a function of the configuration alone. Batches depend on the seed and the step,
checkpoints hold all the rest, so an interrupted run, resumed, goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from flash_attention_jax._commands.line import on_terminal
from flash_attention_jax._core.optional import needs
from flash_attention_jax._training.curves import Curves
from flash_attention_jax.data import InputError, Text

with needs("flash_attention_jax.train", "flax", "optax", "tqdm", extra="train"):
    import optax
    from tqdm import tqdm

    from flash_attention_jax._training import saving
    from flash_attention_jax._training.fleet import Fleet
    from flash_attention_jax.transformer import CausalTransformer, generate

__all__ = ["Config", "evaluate", "fit", "fit_alone", "sample"]

SAVE_SECONDS = 60.0  # the most that a kill can cost
VALID_BYTES = 2**13  # at a validation during the run
SPEED_STEPS = 10  # the progress bar shows their mean
LINES = 10  # of progress, where stderr is no terminal
LINE_SECONDS = 60.0  # the longest time between two of them
SAMPLE_PROMPT, SAMPLE_LENGTH = 64, 192
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 40


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
        batch: sequences that are held in memory at once.
        accumulate: batches whose gradients make one step.
        steps: length of the whole run; the learning rate falls towards its end.
        lr: highest learning rate.
        warmup: steps in which the learning rate rises from 0.
        clip: the largest norm of a gradient; a larger one is scaled down to it.
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
    accumulate: int
    steps: int
    lr: float
    warmup: int
    clip: float
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
    def schedule(self) -> optax.Schedule:
        """The learning rate by step: from 0 up to `lr`, then along a cosine to a tenth of it."""
        end = max(self.steps, self.warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, self.lr, self.warmup, end, self.lr / 10)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW on the clipped gradient."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.schedule, b2=0.99, weight_decay=0.01),
        )

    def initial_state(self) -> dict[str, Any]:
        """Step 0: parameters drawn from the seed, and an empty optimizer state."""
        params, optimizer = _initial(self)
        return {"step": 0, "params": params, "optimizer": optimizer}


def fit(
    config: Config,
    text: Text,
    out: Path,
    *,
    resume: bool = False,
    label: str = "train",
    save_every: int = 0,
    validate_every: int = 0,
    sample_every: int = 0,
    fleet: Fleet | None = None,
) -> dict[str, Any]:
    """Trains for `config.steps` steps, with progress on stderr, checkpoints and a log.

    SIGINT and SIGTERM end it after the step under way, with a checkpoint; the state returned then
    has a `step` below `config.steps`. A kill costs what came after the last checkpoint, which the
    resumed run computes again, to the bit.

    Args:
        config: what to train, and how.
        text: what to read.
        out: the folder to write to: `checkpoints`, every minute and at the end; `log.csv`, a row
            for each step; `tensorboard`, if that is installed; `samples.txt`, with `sample_every`.
        resume: go on from the newest checkpoint.
        label: stands before the progress.
        save_every: steps between checkpoints beside those of every minute; 0 = none.
        validate_every: steps between validations on a part of the held-out text; 0 = none.
        sample_every: steps between samples; 0 = none.
        fleet: the mesh, and the processes, that train together; the first one writes. Checkpoints
            are whole arrays, so a run goes on with any other mesh. None = one device.

    Returns:
        A dictionary: `step`, `params` and `optimizer`; with a mesh, whole and on the host.

    Raises:
        InputError: `resume` without a checkpoint, with a damaged one, or with one of another
            configuration; another run writes into `out`; the disk is full; or the loss is no
            longer finite.

    Example:
        >>> import pathlib, tempfile
        >>> from flash_attention_jax.data import load_text
        >>> out = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (out / "text.txt").write_bytes(b"to be or not to be, " * 100)
        >>> text = load_text(out / "text.txt", cache=out, seq_len=16)
        >>> config = Config(
        ...     data=text.fingerprint,
        ...     similarity="cosine",
        ...     attention="auto",
        ...     dtype="float32",
        ...     dim=16,
        ...     depth=1,
        ...     heads=1,
        ...     seq_len=16,
        ...     batch=2,
        ...     accumulate=1,
        ...     steps=3,
        ...     lr=1e-3,
        ...     warmup=1,
        ...     clip=1.0,
        ...     seed=0,
        ... )
        >>> fit(config, text, out)["step"]
        3
        >>> len((out / "log.csv").read_text().splitlines())  # a header, and a row for each step
        4
    """
    fleet = fleet or Fleet()
    with saving.writing(out, lock=fleet.first):
        return fit_alone(
            config,
            text,
            out,
            resume=resume,
            label=label,
            save_every=save_every,
            validate_every=validate_every,
            sample_every=sample_every,
            fleet=fleet,
        )


def fit_alone(
    config: Config,
    text: Text,
    out: Path,
    *,
    resume: bool,
    label: str,
    save_every: int,
    validate_every: int,
    sample_every: int,
    fleet: Fleet,
) -> dict[str, Any]:
    """`fit` for a caller who has made `out` its own by `_training.saving.writing`."""
    options, checkpoints = dataclasses.asdict(config), out / "checkpoints"
    state = config.initial_state()
    if resume:
        state = saving.restore(checkpoints, state, options)
    held_out = text.validation(
        windows=max(config.batch, VALID_BYTES // config.seq_len), seq_len=config.seq_len
    )
    saved, saved_at = state["step"] if resume else -1, time.monotonic()
    state = fleet.place(state)

    def save() -> None:
        nonlocal saved, saved_at
        whole = fleet.host(state)
        if fleet.first:
            curves.sync()
            saving.save(checkpoints, state["step"], whole, options)
        saved, saved_at = state["step"], time.monotonic()

    with (
        saving.interruptions() as interrupted,
        Curves(out, done=state["step"]) if fleet.first else _Silent() as curves,
        _progress(config, state["step"], label, fleet.first) as progress,
    ):
        while state["step"] < config.steps and not fleet.agree(interrupted())[0]:
            start = time.perf_counter()
            state, row = _step(config, fleet, text, state)
            row["tokens_per_second"] = round(progress(row, time.perf_counter() - start), 1)
            step = state["step"]
            if validate_every and (step % validate_every == 0 or step == config.steps):
                row["validation"] = round(evaluate(config, state["params"], held_out, fleet), 6)
            curves.add(step=step, **row)
            if sample_every and step % sample_every == 0:
                params = fleet.host(state["params"])
                if fleet.first:
                    _note_sample(out / "samples.txt", step, sample(config, params, held_out))
            late = fleet.agree(time.monotonic() - saved_at > SAVE_SECONDS)[0]
            if late or (save_every and step % save_every == 0):
                save()
        if state["step"] != saved:
            save()
        return fleet.host(state)


class _Silent:
    """The curves of a process that does not write."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(self, **row: Any) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


def evaluate(
    config: Config,
    params: PyTree,
    tokens: Int[np.ndarray, "windows length"],
    fleet: Fleet | None = None,
) -> float:
    """Bits per byte of the model on `tokens`, each window read on its own.

    Args:
        config: the configuration of the model.
        params: its parameters.
        tokens: (windows, seq_len + 1) integers, from `Text.validation`.
        fleet: where the parameters lie; None = one device.

    Returns:
        The mean over all predicted bytes.
    """
    total, fleet = 0.0, fleet or Fleet()
    for start in range(0, len(tokens), config.batch):
        part = tokens[start : start + config.batch]
        # One shape for all parts: a second one would compile again.
        filled = np.resize(part, (config.batch, part.shape[1]))
        total += float(
            np.asarray(_bits(config, fleet, params, fleet.tokens(filled)))[: len(part)].sum()
        )
    return total / tokens[:, 1:].size


def sample(
    config: Config, params: PyTree, tokens: Int[np.ndarray, "windows length"]
) -> tuple[str, str]:
    """How the model goes on from a text.

    Args:
        config: the configuration of the model.
        params: its parameters.
        tokens: (windows, seq_len + 1) integers; the beginning of the first is given.

    Returns:
        What was given, and what the model drew, both safe to print.
    """
    prompt = tokens[:1, :SAMPLE_PROMPT]
    drawn = generate(
        config.model,
        params,
        prompt,
        SAMPLE_LENGTH,
        key=jax.random.key(config.seed),
        temperature=SAMPLE_TEMPERATURE,
        top_k=SAMPLE_TOP_K,
    )
    return _printable(prompt[0]), _printable(np.asarray(drawn)[0])


def _step(
    config: Config, fleet: Fleet, text: Text, state: dict[str, Any]
) -> tuple[dict[str, Any], dict]:
    """The state after one step more, and the numbers of that step."""
    step = state["step"]
    tokens = text.batch(
        seed=config.seed,
        step=step,
        batch=config.batch * config.accumulate,
        seq_len=config.seq_len,
    ).reshape(config.accumulate, config.batch, -1)
    params, optimizer, measured = _update(
        config, fleet, state["params"], state["optimizer"], fleet.tokens(tokens), np.int32(step)
    )
    row = {name: np.asarray(value) for name, value in measured.items()}
    if not np.isfinite(row["bits_per_byte"]):
        raise InputError(
            f"`--lr` must keep the loss finite, got {config.lr} and a loss of "
            f"{row['bits_per_byte']} at step {step}. Take a smaller one."
        )
    return {"step": step + 1, "params": params, "optimizer": optimizer}, row


@contextlib.contextmanager
def _progress(config: Config, done: int, label: str, shown: bool) -> Iterator[Any]:
    """Progress on stderr: a function of a step's numbers and seconds, which returns tokens/s.

    A terminal gets a bar that is redrawn; a pipe or a log gets a line now and then.
    """
    bar_shown = shown and on_terminal()
    step, said_at = done, time.monotonic()
    tokens = config.batch * config.accumulate * config.seq_len
    losses: list[float] = []
    times: list[float] = []
    with tqdm(
        total=config.steps, initial=done, desc=label, unit="step", disable=not bar_shown
    ) as bar:

        def advance(row: dict, seconds: float) -> float:
            nonlocal step, said_at
            losses.append(float(row["bits_per_byte"]))
            times.append(seconds)
            # The first step compiles, which says nothing about those to come.
            recent = times[1:][-SPEED_STEPS:] or times
            del losses[:-SPEED_STEPS], times[1:-SPEED_STEPS]
            speed = tokens * len(recent) / sum(recent)
            bits = sum(losses) / len(losses)
            text = f"{speed:,.0f} tokens/s, {bits:.3f} bits/byte"
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            step += 1
            due = step % math.ceil(config.steps / LINES) == 0 or step == config.steps
            if shown and not bar_shown and (due or time.monotonic() - said_at > LINE_SECONDS):
                print(
                    f"{label}: step {step} of {config.steps}, {text}", file=sys.stderr, flush=True
                )
                said_at = time.monotonic()
            return tokens / seconds

        yield advance


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: Config) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state of step 0."""
    params = config.model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    return params, config.optimizer.init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bits(
    config: Config, fleet: Fleet, params: PyTree, tokens: Int[Array | np.ndarray, "batch length"]
) -> Float[Array, " batch"]:
    """Bits that each sequence takes: the sum over its bytes but the first."""
    model = config.model.clone(placement=fleet.placement)
    read, wanted = (fleet.along(x, "data", "context") for x in (tokens[:, :-1], tokens[:, 1:]))
    logits: Any = fleet.along(model.apply(params, read), "data", "context")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return fleet.along(losses.sum(axis=1) / math.log(2))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(
    config: Config,
    fleet: Fleet,
    params: PyTree,
    optimizer: PyTree,
    tokens: Int[Array | np.ndarray, "accumulate batch length"],
    step: Int[Array | np.integer, ""],
) -> tuple[PyTree, PyTree, dict[str, Float[Array, ""]]]:
    """One step of the optimizer on the mean bits per byte."""

    def loss(params: PyTree, tokens: Int[Array, "batch length"]) -> Float[Array, ""]:
        return _bits(config, fleet, params, tokens).mean() / config.seq_len

    def add(sums: PyTree, tokens: Int[Array, "batch length"]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, tokens)), None

    if config.accumulate == 1:
        value, gradients = jax.value_and_grad(loss)(params, tokens[0])
    else:
        # One batch after another, so that memory is that of one; the sums are in float32.
        zeros = jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add, (jnp.float32(0), zeros), jnp.asarray(tokens))
        value, gradients = jax.tree.map(lambda x: x / config.accumulate, sums)
    # optax adds numbers of different dtypes, which a caller may have made an error.
    with jax.numpy_dtype_promotion("standard"):
        measured = {
            "bits_per_byte": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(config.schedule(step), jnp.float32),
        }
        updates, optimizer = config.optimizer.update(gradients, optimizer, params)
    params = fleet.keep(optax.apply_updates(params, updates))
    return params, fleet.keep(optimizer), jax.tree.map(fleet.along, measured)


def _note_sample(path: Path, step: int, texts: tuple[str, str]) -> None:
    """Appends a sample to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"--- after {step} steps; the text before the bar was given:\n")
        file.write("|".join(texts) + "\n\n")


def _printable(tokens: Int[np.ndarray, " n"]) -> str:
    """Bytes as text; what a terminal would take for a command becomes a question mark."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "?" for c in text)
