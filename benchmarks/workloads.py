"""Named workloads: the shapes and terms that are measured, their random inputs, and what is right.

Every workload is one call of attention on (batch, heads, length, dim) float32 arrays. The answer
that a peer's result is compared with is computed here in float64 NumPy from the formula, so that it
shares no code with any peer.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

TERMS = ("key mask", "segments", "dropout")
COSINE_SCALE = 8.0  # flash_cosine_sim_attention's default
DROPOUT_RATE = 0.1
QUICK = 32  # by how much the quick run is shorter
ORACLE_ROWS = 1024  # queries at a time: 128 MiB of float64 logits at 16384 keys


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of attention.

    Attributes:
        name: what the command line and the tables call it.
        source: why it is measured.
        length: queries and keys.
        batch: sequences.
        heads: query heads, and as many key heads.
        dim: of queries, keys and values.
        similarity: "dot" or "cosine".
        causal: query i sees the keys up to i.
        window: keys seen on either side of the diagonal; None = all.
        term: one of TERMS, or None. Calls with a term are compiled, and not run.
    """

    name: str
    source: str
    length: int
    batch: int = 1
    heads: int = 8
    dim: int = 64
    similarity: str = "dot"
    causal: bool = False
    window: int | None = None
    term: str | None = None

    def at(self, length: int) -> Workload:
        """The same call at another length."""
        return dataclasses.replace(self, length=length)

    def quick(self) -> Workload:
        """A call so small that it proves nothing but that it runs."""
        window = None if self.window is None else max(self.window // QUICK, 1)
        return dataclasses.replace(
            self, length=max(self.length // QUICK, 1), heads=2, window=window
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, length, dim)."""
        return self.batch, self.heads, self.length, self.dim

    @property
    def words(self) -> str:
        """The call in words, without its length."""
        words = [self.similarity] if self.similarity != "dot" else []
        words += ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window is not None else []
        words += [self.term] if self.term else []
        return " ".join(words) or "full"


_SPEED = "the usual shape of a small transformer's layer, at a length where memory starts to matter"
_SKIP = "what a mask excludes must not be paid for"
_MEMORY = "each way to mask, and dropout: temporary memory and compile time by length"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("full-4k", _SPEED, 4096),
        Workload("causal-4k", _SPEED, 4096, causal=True),
        Workload("cosine-4k", _SPEED, 4096, similarity="cosine"),
        Workload("cosine-causal-4k", _SPEED, 4096, similarity="cosine", causal=True),
        Workload("full-8k", _SKIP, 8192),
        Workload("causal-8k", _SKIP, 8192, causal=True),
        Workload("full-16k", _SKIP, 16384),
        Workload("window-16k", _SKIP, 16384, window=256),
        Workload("key-mask-4k", _MEMORY, 4096, term="key mask"),
        Workload("segments-4k", _MEMORY, 4096, term="segments"),
        Workload("dropout-4k", _MEMORY, 4096, term="dropout"),
    )
}


def inputs(workload: Workload) -> dict[str, np.ndarray]:
    """Random q, k, v and weights, the cotangent of the output.

    The same numbers for every peer, and for every workload of the same shape.
    """
    rng = np.random.default_rng(zlib.crc32(str(workload.shape).encode()))
    return {
        name: rng.standard_normal(workload.shape, np.float32) for name in ("q", "k", "v", "weights")
    }


def reference(
    workload: Workload, arrays: dict[str, np.ndarray], *, batch: int, head: int, backward: bool
) -> dict[str, np.ndarray]:
    """One head's answer in float64, some rows of logits at a time.

        logits = scale * q k^T,  P = softmax(logits),  out = P v
        dv = P^T dout,  dP = dout v^T,  dS = P * (dP - rowsum(P * dP))
        dq = scale * dS k,  dk = scale * dS^T q

    Args:
        workload: without a term.
        arrays: what `inputs` returned for it.
        batch: which sequence.
        head: which head.
        backward: whether to add the gradients of sum(weights * out).

    Returns:
        "out" (length, dim), and with `backward` "dq", "dk" and "dv".

    Raises:
        ValueError: If the workload has a term.
    """
    if workload.term is not None:
        raise ValueError(f"`workload` must have no term, got {workload.term!r}.")
    q, k, v, dout = (
        arrays[name][batch, head].astype(np.float64) for name in ("q", "k", "v", "weights")
    )
    norms = {}
    scale = workload.dim**-0.5
    if workload.similarity == "cosine":
        norms = {"dq": np.linalg.norm(q, axis=1), "dk": np.linalg.norm(k, axis=1)}
        q, k = q / norms["dq"][:, None], k / norms["dk"][:, None]
        scale = COSINE_SCALE
    results = {
        name: np.zeros_like(q) for name in ("out", *(("dq", "dk", "dv") if backward else ()))
    }
    keys = np.arange(workload.length)
    for start in range(0, workload.length, ORACLE_ROWS):
        rows = slice(start, start + ORACLE_ROWS)
        ahead = keys - keys[rows, None]
        seen = np.ones_like(ahead, bool)
        if workload.causal:
            seen &= ahead <= 0
        if workload.window is not None:
            seen &= np.abs(ahead) <= workload.window
        logits = np.where(seen, scale * (q[rows] @ k.T), -np.inf)
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        results["out"][rows] = probs @ v
        if backward:
            dprobs = dout[rows] @ v.T
            dlogits = probs * (dprobs - (probs * dprobs).sum(axis=1, keepdims=True))
            results["dq"][rows] = scale * (dlogits @ k)
            results["dk"] += scale * (dlogits.T @ q[rows])
            results["dv"] += probs.T @ dout[rows]
    if backward:
        for name, unit in (("dq", q), ("dk", k)):
            if name in norms:  # through x / |x|
                grad = results[name]
                along = (grad * unit).sum(axis=1, keepdims=True)
                results[name] = (grad - along * unit) / norms[name][:, None]
    return results
