"""Measure training: dense attention against ours, and cosine similarity against the dot product.

python benchmarks/training.py --out benchmarks/results/training.json     measure, in minutes

Every run is one of `flash_attention_jax.train.fit` on the text that `flash-attention-jax train`
reads where it is given none. The models are small, so that dense attention fits at length 8192.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import measure
import numpy as np
import record as records
import tables

if TYPE_CHECKING:  # what they need is only there to train, and not to draw what was measured
    from flash_attention_jax.data import Text
    from flash_attention_jax.train import Config

STEPS = 50  # dense against ours
SIMILARITY_STEPS, SEEDS = 400, (0, 1)  # cosine against dot
MEMORY_LENGTHS, MEMORY_STEPS = (2048, 8192), 2
VALID_WINDOWS = 256
SMALL = {
    "similarity": "dot",
    "attention": "auto",
    "dtype": "float32",
    "dim": 64,
    "depth": 2,
    "heads": 1,
    "seq_len": 128,
    "batch": 8,
    "accumulate": 1,
    "lr": 4e-3,
    "clip": 1.0,
    "seed": 0,
}
KINDS = ("temp_bytes", "peak_bytes")
RESULTS = Path(__file__).parent / "results" / "training.json"


def configure(text: Text, *, steps: int, **changes: Any) -> Config:
    """A configuration of the small model."""
    from flash_attention_jax.train import Config

    values = {**SMALL, "data": text.fingerprint, "steps": steps, "warmup": max(1, steps // 20)}
    return Config(**{**values, **changes})


def train(config: Config, text: Text, folder: Path) -> tuple[np.ndarray, float]:
    """Bits per byte of each step of a run, and on held-out text after it."""
    from flash_attention_jax._training import curves as drawing
    from flash_attention_jax.train import evaluate, fit

    with tempfile.TemporaryDirectory(dir=folder) as out:
        state = fit(config, text, Path(out), label=f"{config.attention}, {config.similarity}")
        held_out = text.validation(windows=VALID_WINDOWS, seq_len=config.seq_len)
        bits = evaluate(config, state["params"], held_out)
        return drawing.read(Path(out))["bits_per_byte"], bits


def compare_curves(text: Text, folder: Path, steps: int) -> dict[str, Any]:
    """The losses of dense attention and of ours, step by step."""
    curves = {
        name: train(configure(text, steps=steps, attention=name), text, folder)[0]
        for name in ("dense", "blocked")
    }
    apart = np.abs(curves["blocked"] / curves["dense"] - 1)
    return {
        "steps": steps,
        "largest_relative_difference": float(apart.max()),
        "bits_per_byte": {name: curve.tolist() for name, curve in curves.items()},
    }


def compare_similarities(
    text: Text, folder: Path, steps: int, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Held-out bits per byte of both similarities after equally many steps, for some seeds."""
    curves: dict[str, list[float]] = {}
    held_out: dict[str, list[float]] = {"dot": [], "cosine": []}
    for seed in seeds:
        for name, bits in held_out.items():
            config = configure(text, steps=steps, similarity=name, seed=seed)
            curve, last = train(config, text, folder)
            bits.append(last)
            curves.setdefault(name, curve.tolist())
    return {"steps": steps, "seeds": list(seeds), "held_out": held_out, "bits_per_byte": curves}


def measure_memory(lengths: tuple[int, ...], data: str | None) -> list[dict[str, Any]]:
    """What training takes at each length, each in a process of its own."""
    rows = []
    for length in lengths:
        for name in ("dense", "blocked"):
            command = [sys.executable, __file__, "--one", name, str(length)]
            command += [] if data is None else ["--data", data]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def one(attention: str, length: int, data: str | None) -> dict[str, Any]:
    """Trains on single sequences; the peak of this process, and what the compiler sets aside."""
    from flash_attention_jax._training import loop
    from flash_attention_jax._training.fleet import Fleet
    from flash_attention_jax.data import load_text
    from flash_attention_jax.train import fit

    with tempfile.TemporaryDirectory() as folder:
        text = load_text(data, cache=Path(folder), seq_len=length)
        config = configure(text, steps=MEMORY_STEPS, attention=attention, seq_len=length, batch=1)
        state = fit(config, text, Path(folder))
        peak = measure.peak_bytes()
        tokens = text.batch(seed=0, step=0, batch=1, seq_len=length)[None]
        arguments = state["params"], state["optimizer"], tokens, np.int32(0)
        build = loop._update.lower(config, Fleet(), *arguments).compile()  # noqa: SLF001
        analysis: Any = build.memory_analysis()
    return {
        "attention": attention,
        "length": length,
        "peak_bytes": peak,
        "temp_bytes": int(analysis.temp_size_in_bytes),
    }


def page(record: dict[str, Any]) -> str:
    """The caption and the tables, as Markdown."""
    curve, similar = record["same_curve"], record["similarities"]
    start, end = (
        {name: f"{bits[i]:.6f}" for name, bits in curve["bits_per_byte"].items()} for i in (0, -1)
    )
    training = tables.markdown(
        ("attention", "bits per byte at step 1", f"at step {curve['steps']}"),
        [(name, start[name], end[name]) for name in start],
    )
    apart = curve["largest_relative_difference"]
    memories = tables.markdown(
        ("length", "attention", "temporary memory of a step", "peak of the process"),
        [
            (str(m["length"]), m["attention"], *(f"{m[k] / 2**20:.0f} MiB" for k in KINDS))
            for m in record["memory"]
        ],
    )
    compared = tables.markdown(
        ("similarity", *(f"seed {seed}" for seed in similar["seeds"])),
        [(name, *(f"{b:.3f}" for b in bits)) for name, bits in similar["held_out"].items()],
    )
    steps = similar["steps"]
    return "\n\n".join(
        [
            tables.caption(record),
            f"Dense attention and ours, {curve['steps']} steps from one seed; the largest relative "
            f"difference of a loss is {apart:.1e}:",
            training,
            "One sequence at a time, dense attention against ours:",
            memories,
            f"Cosine similarity against the dot product, bits per byte on held-out text after "
            f"{steps} steps:",
            compared,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure training on this CPU.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--data", help="a text, as flash-attention-jax train takes it")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--one", nargs=2, metavar=("ATTENTION", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.one is not None:
        print(json.dumps(one(options.one[0], int(options.one[1]), options.data)))
        return 0
    from flash_attention_jax.data import load_text

    quick = options.quick
    command = "python benchmarks/training.py --out benchmarks/results/training.json"
    record = records.describe_run("training", command, quick=quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = load_text(options.data, cache=folder, seq_len=SMALL["seq_len"])
        record["same_curve"] = compare_curves(text, folder, 3 if quick else STEPS)
        steps, seeds = (3, (0,)) if quick else (SIMILARITY_STEPS, SEEDS)
        record["similarities"] = compare_similarities(text, folder, steps, seeds)
    record["memory"] = measure_memory((256,) if quick else MEMORY_LENGTHS, options.data)
    print(page(record))
    if options.out is not None:
        records.write(record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
