"""Measure what it costs to call JAX from PyTorch, and how our attention does there beside torch's.

python benchmarks/crossing.py --out benchmarks/results/crossing.json
python benchmarks/crossing.py --lengths 256 512 --rounds 5

Each row is (1, 8, length, 64) tensors, forward or forward and backward. A crossing is the time of a
function that reads three tensors and returns one number, called through `jax2torch`, less that of
the same function jitted and called on JAX arrays, in the same round. Memory is not copied, so the
length should not show. With backward it is measured on tensors of length 16 in every row: the
gradients are three arrays of zeros, and making long ones would drown it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import measure
import peers_torch
import record as records
import suite
import tables

import flash_attention_jax

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
HEADS, DIM = 8, 64
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SECONDS = 8.0  # per row, beyond which no round is begun that is not needed
SHORT = 16  # tokens, where the crossing is measured with backward
CALLS = 20  # of the empty function per round: one is too short for a clock
PASSES = (suite.name_pass(False), suite.name_pass(True))


def probe(q: Any, k: Any, v: Any) -> Any:
    """A function of three arrays that does nothing to speak of."""
    return q[0, 0, 0, 0] + k[0, 0, 0, 0] + v[0, 0, 0, 0]


def why_not(device: str) -> str | None:
    """Why nothing can be measured on a device."""
    torch, reason = peers_torch.torch_or_reason()
    if torch is None:
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and jax.default_backend() != "gpu":
        return "JAX has no CUDA here: pip install 'flash-attention-jax[cuda13]'"
    return None


def make_cases(device: str, length: int, backward: bool) -> dict[str, Callable[[], None]]:
    """What is timed; each returns when its work is done."""
    from flash_attention_jax.torch import jax2torch

    torch: Any = peers_torch.torch_or_reason()[0]
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (1, HEADS, length, DIM), getattr(torch, DTYPES[device])
    q, k, v, ct = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    short = [x[:, :, :SHORT].clone() if backward else x for x in (q, k, v)]
    operands = {False: [q, k, v], True: short}  # by whether the function is the empty one

    def of_torch(function: Callable[..., Any], calls: int = 1) -> Callable[[], None]:
        qkv = [x.detach().requires_grad_(backward) for x in operands[calls > 1]]

        def run() -> None:
            for _ in range(calls):
                out = function(*qkv)
                if backward:
                    torch.autograd.grad(out, qkv, ct if out.dim() else None)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def of_jax(function: Callable[..., Any], calls: int = 1) -> Callable[[], None]:
        arrays = [jax.dlpack.from_dlpack(x) for x in operands[calls > 1]]
        jitted = jax.jit(function)
        weights = jax.dlpack.from_dlpack(ct)
        with_gradients = jax.jit(lambda q, k, v, ct: jax.vjp(function, q, k, v)[1](ct))

        def run() -> None:
            for _ in range(calls):
                if backward:
                    weight = weights if function is not probe else weights[0, 0, 0, 0]
                    done = with_gradients(*arrays, weight)
                else:
                    done = jitted(*arrays)
                jax.block_until_ready(done)

        return run

    ours = flash_attention_jax.flash_attention
    return {
        "empty, crossing": of_torch(jax2torch(probe), CALLS),
        "empty, JAX alone": of_jax(probe, CALLS),
        "ours, from torch": of_torch(jax2torch(ours)),
        "ours, JAX alone": of_jax(ours),
        "torch SDPA": of_torch(torch.nn.functional.scaled_dot_product_attention),
    }


def measure_row(device: str, length: int, backward: bool, rounds: int) -> dict[str, Any]:
    """Measure one length and pass, in microseconds."""
    cases = make_cases(device, length, backward)
    for run in cases.values():
        run()  # compiles

    def make_timer(run: Callable[[], None]) -> Callable[[], float]:
        return lambda: measure.time_call(run)

    timers = {name: make_timer(run) for name, run in cases.items()}
    least = min(suite.AT_LEAST, rounds)
    times = list(measure.interleave(timers, rounds, at_least=least, seconds=SECONDS))
    crossing = [(t["empty, crossing"] - t["empty, JAX alone"]) / CALLS for t in times]
    columns: dict[str, Any] = {"device": device, "length": length, "pass": PASSES[backward]}
    columns |= {"dtype": DTYPES[device], "rounds": len(times), "crossing": _micro(crossing)}
    for name in ("ours, from torch", "ours, JAX alone", "torch SDPA"):
        columns[name] = _micro([t[name] for t in times])
    ratio = measure.ratio([t["torch SDPA"] for t in times], [t["ours, from torch"] for t in times])
    columns["torch SDPA / ours"] = round(ratio.median, 2)
    return columns


def _micro(seconds: Sequence[float]) -> dict[str, float]:
    summary = measure.summarize(seconds)
    return {name: round(1e6 * getattr(summary, name), 1) for name in ("median", "low", "high")}


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown, times in microseconds; what was not measured has its reason."""
    header = ("device", "length", "pass", "crossing, µs", "its quartiles", "ours from torch, µs")
    header += ("ours in JAX, µs", "torch SDPA, µs", "torch SDPA / ours")
    lines = []
    for row in record["rows"]:
        if "reason" in row:
            lines.append((row["device"], "–", f"not measured: {row['reason']}", *["–"] * 6))
            continue
        crossing = row["crossing"]
        lines.append(
            (
                row["device"],
                str(row["length"]),
                row["pass"],
                f"{crossing['median']:.0f}",
                f"{crossing['low']:.0f} – {crossing['high']:.0f}",
                *(
                    f"{row[name]['median']:.0f}"
                    for name in ("ours, from torch", "ours, JAX alone", "torch SDPA")
                ),
                f"{row['torch SDPA / ours']:.2f}x",
            )
        )
    return tables.markdown(header, lines)


def page(record: dict[str, Any]) -> str:
    """The caption and the table, as Markdown."""
    return f"{tables.caption(record)}\n\n{table(record)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what a call from PyTorch to JAX costs.")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N")
    parser.add_argument("--devices", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15, help="fewer where they take long")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    for name, least in (("lengths", min(options.lengths)), ("rounds", options.rounds)):
        if least < 1:
            print(f"crossing.py: --{name} must be at least 1, got {least}.", file=sys.stderr)
            return 2

    rows: list[dict[str, Any]] = []
    for device in options.devices:
        if reason := why_not(device):
            rows.append({"device": device, "reason": reason})
            continue
        for length in options.lengths:
            for backward in (False, True):
                rows.append(measure_row(device, length, backward, options.rounds))
                print(f"{device} {length} {PASSES[backward]} done", file=sys.stderr, flush=True)
    words = ["python benchmarks/crossing.py"]
    if tuple(options.lengths) != LENGTHS:
        words.append("--lengths " + " ".join(map(str, options.lengths)))
    words += [f"--rounds {options.rounds}"] if options.rounds != 15 else []
    record = records.describe_run("crossing", " ".join(words)) | {"rows": rows}
    print(table(record))
    if options.out is not None:
        records.write(record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
