"""Measure the kernels on an NVIDIA GPU, against cuDNN, tokamax and torch, in one run.

    python benchmarks/gpu.py                                      what fits into nine minutes
    python benchmarks/gpu.py --out benchmarks/results/gpu.json    and keep it; again: goes on

For each workload every implementation first has to be right (relative error of the output and of
each gradient to the blocked engine in float32), then all are timed in turn; rows are written as
they are done, and those that a file of the same commit and versions holds are not measured again.
TFLOP/s by the usual count: 4 B H N M D forward, half when causal, 2.5 times that backward. The rate
of a matrix product and of a copy are measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import measure
import numpy as np

import flash_attention_jax as fa

ROUNDS = 7
CALLS = 10  # enqueued before the clock is read
TOKENS = 16384
WIDTH = 2048  # heads * dim


@dataclasses.dataclass(frozen=True)
class Work:
    """One shape: 16384 tokens and a width of 2048, however they are cut."""

    dim: int
    length: int
    causal: bool

    @property
    def batch(self) -> int:
        """Sequences."""
        return TOKENS // self.length

    @property
    def heads(self) -> int:
        """Heads."""
        return WIDTH // self.dim

    def name(self) -> str:
        """What the table calls it."""
        return f"d{self.dim} n{self.length} {'causal' if self.causal else 'full'}"

    def flops(self, *, backward: bool) -> float:
        """Operations of the two products forward, or of the five backward."""
        count = 4.0 * self.batch * self.heads * self.length**2 * self.dim
        return count * (0.5 if self.causal else 1.0) * (2.5 if backward else 1.0)


WORK = [
    Work(dim, length, causal)
    for length in (16384, 2048, 512)
    for dim in (128, 64, 256)
    for causal in (False, True)
]

Attend = Callable[..., Any]


def _ours(similarity: Literal["dot", "cosine"], implementation: str) -> Attend:
    def attend(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        return fa.dot_product_attention(
            q, k, v, is_causal=causal, similarity=similarity, implementation=implementation
        )

    return attend


def _cudnn(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def _tokamax(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    tokamax = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(q, k, v, is_causal=causal, implementation="mosaic")


JAX_PEERS: dict[str, Attend] = {
    "ours, softmax": _ours("dot", "hopper"),
    "ours, cosine": _ours("cosine", "hopper"),
    "jax.nn cuDNN": _cudnn,
    "tokamax": _tokamax,
}
PEERS = (*JAX_PEERS, "torch SDPA", "torch FlexAttention")


def inputs(work: Work, seed: int = 0) -> list[jax.Array]:
    """q, k, v and dout (batch, length, heads, dim), bfloat16."""
    shape = (work.batch, work.length, work.heads, work.dim)
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(seed), 4)
    ]


def _both(attend: Attend, work: Work) -> Callable[..., Any]:
    def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, causal=work.causal), q, k, v)
        return out, *pull(dout)

    return run


def errors(work: Work, found: Sequence[Any], attend: Attend) -> float:
    """Largest relative error of the output and the gradients of one head, to float32."""
    head = [x[:1, :, :1].astype(jnp.float32) for x in inputs(work)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(_both(attend, work))(*head)
    return max(
        measure.relative_error(np.asarray(x[:1, :, :1], np.float64), np.asarray(want, np.float64))
        for x, want in zip(found, exact, strict=True)
    )


class Prepared:
    """One implementation on one workload: how to time it, and how right it is."""

    def __init__(self, peer: str, work: Work, *, backward: bool) -> None:
        if peer.startswith("torch"):
            self._prepare_torch(peer, work, backward)
        else:
            self._prepare_jax(peer, work, backward)

    def _prepare_jax(self, peer: str, work: Work, backward: bool) -> None:
        attend = JAX_PEERS[peer]
        given = inputs(work)
        both = jax.jit(_both(attend, work))
        self.error = errors(
            work, both(*given), _ours("cosine" if "cosine" in peer else "dot", "blocked")
        )
        forward = jax.jit(lambda q, k, v, _: attend(q, k, v, causal=work.causal))
        run = both if backward else forward
        jax.block_until_ready(run(*given))

        def seconds() -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                result = run(*given)
            jax.block_until_ready(result)
            return (time.perf_counter() - start) / CALLS

        self.seconds = seconds

    def _prepare_torch(self, peer: str, work: Work, backward: bool) -> None:
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            raise NotImplementedError("this torch sees no GPU")
        host = [np.asarray(x.astype(jnp.float32)).swapaxes(1, 2) for x in inputs(work)]
        q, k, v, dout = (torch.tensor(x).to("cuda", torch.bfloat16) for x in host)
        for x in (q, k, v):
            x.requires_grad_(True)
        attend = _torch_attend(torch, peer, work)
        out = attend(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        found = [x.detach().float().cpu().numpy().swapaxes(1, 2) for x in (out, *gradients)]
        self.error = errors(work, found, _ours("dot", "blocked"))

        def once() -> None:
            if backward:
                torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
            else:
                with torch.no_grad():
                    attend(q, k, v)

        def seconds() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                once()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / CALLS

        seconds()
        self.seconds = seconds


def _torch_attend(torch: Any, peer: str, work: Work) -> Callable[..., Any]:
    if peer == "torch SDPA":
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=work.causal
        )
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    mask = None
    if work.causal:
        sizes = (None, None, work.length, work.length)
        mask = flex.create_block_mask(lambda b, h, i, j: i >= j, *sizes, device="cuda")
    compiled = torch.compile(flex.flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product, and TB/s of a copy, of this run."""
    n = 8192
    a, b = (
        jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(1))
    )
    x = jax.random.normal(jax.random.key(2), (2**28,), jnp.bfloat16)

    def best(run: Callable[..., Any], *given: Any) -> float:
        run = jax.jit(run)
        jax.block_until_ready(run(*given))
        taken = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                result = run(*given)
            jax.block_until_ready(result)
            taken.append((time.perf_counter() - start) / CALLS)
        return statistics.median(taken)

    product = best(lambda a, b: a @ b, a, b)
    copy = best(lambda x: x + jnp.bfloat16(1), x)
    return {"matmul": 2.0 * n**3 / product / 1e12, "copy": 2.0 * x.size * 2 / copy / 1e12}


def measure_all(record: dict[str, Any], save: Callable[[], None], deadline: float) -> None:
    """Measure what the record does not hold yet, until the deadline."""
    done = {(row["work"], row["pass"], row["peer"]) for row in record["rows"]}
    for work in WORK:
        for backward in (False, True):
            kind = "forward+backward" if backward else "forward"
            ready: dict[str, Prepared] = {}
            for peer in PEERS:
                if (work.name(), kind, peer) in done:
                    continue
                if time.monotonic() > deadline:
                    print("Out of time: run the command again to go on.")
                    return
                row = {"work": work.name(), "pass": kind, "peer": peer}
                try:
                    ready[peer] = Prepared(peer, work, backward=backward)
                except Exception as error:  # noqa: BLE001 (a peer that fails is a row that says so)
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    record["rows"].append(row | {"reason": reason})
                    save()
            taken: dict[str, list[float]] = {peer: [] for peer in ready}
            for _ in range(ROUNDS):
                for peer, prepared in ready.items():
                    taken[peer].append(prepared.seconds())
            for peer, seconds in taken.items():
                middle = statistics.median(seconds)
                flops = work.flops(backward=False) + (work.flops(backward=True) if backward else 0)
                record["rows"].append(
                    {
                        "work": work.name(),
                        "pass": kind,
                        "peer": peer,
                        "seconds": seconds,
                        "tflops": flops / middle / 1e12,
                        "error": ready[peer].error,
                    }
                )
                print(_line(record["rows"][-1]), flush=True)
            save()


def _line(row: dict[str, Any]) -> str:
    start = f"{row['work']:<18} {row['pass']:<17} {row['peer']:<20}"
    if "reason" in row:
        return f"{start} {row['reason']}"
    wrong = "  WRONG" if not row["error"] < 2e-2 else ""
    middle = statistics.median(row["seconds"]) * 1e3
    return f"{start} {middle:9.3f} ms {row['tflops']:7.1f} TFLOP/s  error {row['error']:.1e}{wrong}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep; the exit status is 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write, and to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting rows after these")
    args = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"`benchmarks/gpu.py` needs an NVIDIA GPU that JAX can use, got {jax.devices()}.")
        return 1
    record: dict[str, Any] = {
        "format": 1,
        "name": "gpu",
        "device": jax.devices()[0].device_kind,
        "date": measure.now(),
        "git": measure.commit(),
        "versions": measure.versions(),
        "rows": [],
    }
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if all(before.get(name) == record[name] for name in ("device", "git", "versions")):
            record["rows"] = before["rows"]
    record["ceilings"] = ceilings()
    print(record["device"], {name: round(x, 1) for name, x in record["ceilings"].items()})

    def save() -> None:
        if args.out is not None:
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
            partial.replace(args.out)

    measure_all(record, save, time.monotonic() + 60 * args.minutes)
    save()
    print()
    for row in record["rows"]:
        print(_line(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
