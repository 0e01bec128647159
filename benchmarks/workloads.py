"""Workloads: the calls that are measured, each with its source, their inputs and right answers.

A workload says what is asked, not who computes it; heads come first in its arrays. The answer that
a result is compared with is computed here in float64 from the formula, by NumPy (or by JAX's own on
a GPU), so that it shares no code with anything that is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes  # a dependency of jax
import numpy as np

COSINE_SCALE = 8.0  # flash_cosine_sim_attention's default
QUICK = 32  # by how much the quick run is shorter
ORACLE_LOGITS = 2**24  # at a time: 128 MiB in float64
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of attention.

    Attributes:
        name: what the command line and the tables call it.
        source: why it is measured, and where it comes from.
        length: queries, and keys unless `kv_length` says otherwise.
        batch: sequences.
        heads: query heads.
        dim: of queries, keys and values.
        kv_heads: key heads; None = as many as query heads.
        kv_length: keys; None = as many as queries.
        dtype: of all arrays.
        similarity: "dot" or "cosine".
        causal: query i sees the keys up to i.
        window: keys seen on either side of the diagonal, with `causal` on the left; None = all.
        softcap: of the logits; None = none.
        sinks: whether each head has a logit in the denominator.
        bias: whether a bias (1, heads, length, length) is added, with its gradient.
        mask_prob: the share of the keys that a (batch, keys) mask hides.
        documents: sequences packed into one by segment ids; 1 = no segment ids.
        dropout: rate, which only some peers have; never compared with the answer.
        decode: whether only the forward pass is of use.
    """

    name: str
    source: str
    length: int
    batch: int = 1
    heads: int = 8
    dim: int = 64
    kv_heads: int | None = None
    kv_length: int | None = None
    dtype: str = "float32"
    similarity: str = "dot"
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    mask_prob: float = 0.0
    documents: int = 1
    dropout: float = 0.0
    decode: bool = False

    def at(self, length: int) -> Workload:
        """The same call at another length."""
        return dataclasses.replace(self, length=length)

    def quick(self) -> Workload:
        """A call so small that it proves nothing but that it runs."""
        window = None if self.window is None else max(self.window // QUICK, 1)
        group = self.heads // (self.kv_heads or self.heads)
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            length=max(min(self.length // QUICK, 128), 1),
            kv_length=None if self.kv_length is None else max(self.kv_length // QUICK, 8),
            heads=2 * group,
            kv_heads=None if self.kv_heads is None else 2,
            dim=min(self.dim, 32),
            window=window,
            documents=min(self.documents, 2),
        )

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.length if self.kv_length is None else self.kv_length

    @property
    def key_heads(self) -> int:
        """How many heads the keys have."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the queries: (batch, heads, length, dim)."""
        return self.batch, self.heads, self.length, self.dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """Of the keys and values: (batch, key heads, keys, dim)."""
        return self.batch, self.key_heads, self.keys, self.dim

    @property
    def sides(self) -> tuple[int, int] | None:
        """How many keys a window leaves to the left and to the right."""
        return None if self.window is None else (self.window, 0 if self.causal else self.window)

    @property
    def words(self) -> str:
        """The call in words, without its lengths, heads and dtype."""
        words = [self.similarity] if self.similarity != "dot" else []
        words += ["decode"] if self.decode else []
        words += ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window is not None else []
        words += ["softcap"] if self.softcap else []
        words += ["sinks"] if self.sinks else []
        words += ["bias"] if self.bias else []
        words += ["key mask"] if self.mask_prob else []
        words += ["segments"] if self.documents > 1 else []
        words += ["dropout"] if self.dropout else []
        return " ".join(words) or "full"

    @property
    def features(self) -> tuple[str, ...]:
        """What a peer must be able to do, beside dot products and causal masks."""
        there = {
            "cosine similarity": self.similarity == "cosine",
            "grouped heads": self.key_heads != self.heads,
            "window": self.window is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "bias": self.bias,
            "key mask": self.mask_prob > 0,
            "segments": self.documents > 1,
            "dropout": self.dropout > 0,
        }
        return tuple(name for name, needed in there.items() if needed)

    def pairs(self) -> float:
        """Pairs of a query and a key that count.

        Half of them where causal, and what a window or segments leave; a key mask is counted as if
        it hid nothing, as is usual.
        """
        if self.documents > 1:
            sizes = np.diff(documents(self))
            return float((sizes.astype(float) ** 2).sum()) * (0.5 if self.causal else 1.0)
        if self.sides is not None:
            rows = np.arange(self.length) + self.keys - self.length
            left, right = self.sides
            first, last = np.maximum(rows - left, 0), np.minimum(rows + right, self.keys - 1)
            return float(np.maximum(last - first + 1, 0).sum())
        return self.length * self.keys * (0.5 if self.causal else 1.0)

    def flops(self, *, backward: bool) -> float:
        """Operations by the usual count: two products forward, and five backward after them."""
        forward = 4.0 * self.batch * self.heads * self.dim * self.pairs()
        return forward * (3.5 if backward else 1.0)

    def bytes(self, *, backward: bool) -> float:
        """The least that must be moved: each array read or written once."""
        rows, columns = np.prod(self.shape, dtype=float), np.prod(self.kv_shape, dtype=float)
        bias = float(self.heads * self.length * self.keys) if self.bias else 0.0
        count = 2 * rows + 2 * columns + bias
        if backward:  # q, k, v, out, dout and bias once more, and the gradients
            count += 4 * rows + 4 * columns + 2 * bias
        return count * np.dtype(DTYPES[self.dtype]).itemsize


# --- the named ones --------------------------------------------------------------------------

_SPEED = "the usual shape of a small transformer's layer, at a length where memory starts to matter"
_SKIP = "what a mask excludes must not be paid for"
_MEMORY = "each way to mask, and dropout: temporary memory and compile time by length"
_SEED = "flash-cosine-sim-attention's benchmark: batch 4, 8 heads of 64, lengths 128 to 8192"
_BERT = "FlashAttention's benchmark of BERT-like layers: batch 8, 12 heads of 64, dropout and masks"
_SWEEP = "FlashAttention-2 and 3's benchmark: 16384 tokens, a width of 2048, however they are cut"
_LLAMA = "Llama 3 8B (arXiv:2407.21783): 32 query heads of 128 on 8 key heads, causal"
_GEMMA = "Gemma 2 9B (arXiv:2408.00118): 16 heads of 256 on 8, softcap 50, a window of 4096"
_OSS = "gpt-oss-20b (arXiv:2508.10925): 64 heads of 64 on 8, sinks, a window of 128"
_FOLD = "AlphaFold 2 (Nature 596, 583): triangle attention, 4 heads of 32, pair bias with gradient"
_VIT = "ViT-B/16 (arXiv:2010.11929): 12 heads of 64, 197 patches of a 224 image or 577 of a 384 one"
_PACKED = "documents packed into one sequence, as language models are trained"
_DECODE = "one new token against a cache: 32 query heads of 128 on 8, bound by memory bandwidth"

SEED_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_LENGTHS = tuple(1024 * 2**n for n in range(8))


def said(length: int) -> str:
    """A length in a name: 4096 is 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _named() -> Iterable[Workload]:
    yield from (
        Workload("full-4k", _SPEED, 4096),
        Workload("causal-4k", _SPEED, 4096, causal=True),
        Workload("cosine-4k", _SPEED, 4096, similarity="cosine"),
        Workload("cosine-causal-4k", _SPEED, 4096, similarity="cosine", causal=True),
        Workload("full-8k", _SKIP, 8192),
        Workload("causal-8k", _SKIP, 8192, causal=True),
        Workload("full-16k", _SKIP, 16384),
        Workload("window-16k", _SKIP, 16384, window=256),
        Workload("key-mask-4k", _MEMORY, 4096, mask_prob=0.2),
        Workload("segments-4k", _MEMORY, 4096, documents=4),
        Workload("dropout-4k", _MEMORY, 4096, dropout=0.1),
    )
    for n in SEED_LENGTHS:
        yield Workload(f"seed-{said(n)}", _SEED, n, batch=4)
    for n in SEED_LENGTHS[:6]:
        bert = Workload(f"bert-{said(n)}", _BERT, n, batch=8, heads=12)
        yield bert
        yield dataclasses.replace(bert, name=f"bert-masked-{said(n)}", mask_prob=0.2)
        yield dataclasses.replace(bert, name=f"bert-dropout-{said(n)}", dropout=0.1)
    for dim in (64, 128, 256):
        for n in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                for similarity in ("dot", "cosine"):
                    cosine = "cosine-" if similarity == "cosine" else ""
                    kind = "causal" if causal else "full"
                    yield Workload(
                        f"sweep-{cosine}d{dim}-{kind}-{said(n)}",
                        _SWEEP,
                        n,
                        batch=16384 // n,
                        heads=2048 // dim,
                        dim=dim,
                        dtype="bfloat16",
                        causal=causal,
                        similarity=similarity,
                    )
    for n in (1024, 2048, 8192):
        k = said(n)
        llama = Workload(f"llama-{k}", _LLAMA, n, heads=32, kv_heads=8, dim=128, causal=True)
        yield llama
        yield dataclasses.replace(llama, name=f"packed-{k}", source=_PACKED, documents=8)
        yield Workload(
            f"gemma-{k}",
            _GEMMA,
            n,
            heads=16,
            kv_heads=8,
            dim=256,
            causal=True,
            window=min(4096, n // 2),
            softcap=50.0,
        )
        yield Workload(
            f"gpt-oss-{k}", _OSS, n, heads=64, kv_heads=8, causal=True, window=128, sinks=True
        )
    for batch, n in ((16, 256), (256, 256), (384, 384)):
        yield Workload(f"alphafold-{batch}x{n}", _FOLD, n, batch=batch, heads=4, dim=32, bias=True)
    for batch in (4, 64):
        for n in (197, 577):
            yield Workload(f"vit-{batch}x{n}", _VIT, n, batch=batch, heads=12)
    for n in DECODE_LENGTHS:
        yield Workload(
            f"decode-{said(n)}",
            _DECODE,
            1,
            heads=32,
            kv_heads=8,
            dim=128,
            kv_length=n,
            decode=True,
        )


WORKLOADS = {workload.name: workload for workload in _named()}


def named(name: str) -> Workload:
    """The workload of a name.

    Raises:
        ValueError: If there is none; the message lists those that there are.
    """
    if name not in WORKLOADS:
        raise ValueError(
            f"`workload` must be the name of a workload, got {name!r}. "
            f"Known: {', '.join(WORKLOADS)}."
        )
    return WORKLOADS[name]


# --- their arrays ----------------------------------------------------------------------------


def _random(workload: Workload) -> np.random.Generator:
    seed = (workload.shape, workload.kv_shape, workload.dtype)
    return np.random.default_rng(zlib.crc32(str(seed).encode()))


def documents(workload: Workload) -> np.ndarray:
    """Where each document begins, and where the last one ends: (documents + 1,)."""
    count = min(workload.documents, workload.length)
    rng = np.random.default_rng(count)
    cuts = np.sort(rng.choice(np.arange(1, workload.length), count - 1, replace=False))
    return np.concatenate([[0], cuts, [workload.length]])


@functools.lru_cache(maxsize=2)
def inputs(workload: Workload) -> dict[str, np.ndarray]:
    """Random q, k, v and weights, the cotangent of the output, and what else the call has.

    The same numbers for every peer, and for every workload of the same shape and dtype. Arrays are
    float32, but hold only values of the workload's dtype.
    """
    rng = _random(workload)
    dtype = DTYPES[workload.dtype]

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        found = rng.standard_normal(shape, np.float32)
        return found if dtype is np.float32 else found.astype(dtype).astype(np.float32)

    shapes = {"q": workload.shape, "k": workload.kv_shape, "v": workload.kv_shape}
    arrays = {name: normal(shape) for name, shape in shapes.items()}
    arrays["weights"] = normal(workload.shape)
    if workload.bias:
        arrays["bias"] = normal((1, workload.heads, workload.length, workload.keys))
    if workload.sinks:
        arrays["sinks"] = normal((workload.heads,))
    if workload.mask_prob:
        mask = rng.random((workload.batch, workload.keys)) >= workload.mask_prob
        mask[:, 0] = True  # peers differ in what a query gets that sees nothing
        arrays["mask"] = mask
    if workload.documents > 1:
        starts = documents(workload)[1:-1]
        ids = np.searchsorted(starts, np.arange(workload.length), side="right")
        arrays["segment_ids"] = np.tile(ids.astype(np.int32), (workload.batch, 1))
    return arrays


def gradients(workload: Workload) -> tuple[str, ...]:
    """The arrays whose gradients the backward pass computes."""
    return ("q", "k", "v", *(["bias"] if workload.bias else []))


# --- the right answer ------------------------------------------------------------------------


def reference(workload: Workload, *, backward: bool, xp: Any = np) -> dict[str, np.ndarray]:
    """The answer for the last key head and its query heads in float64, some rows at a time.

        logits = softcap(scale * q k^T + bias), -inf where masked
        P = exp(logits) / (sum exp(logits) + exp(sink)),  out = P v
        dv = P^T dout,  dP = dout v^T,  dS = P * (dP - rowsum(P * dP)) * softcap'
        dbias = dS,  dq = scale * dS k,  dk = scale * dS^T q

    Args:
        workload: without dropout.
        backward: whether to add the gradients of sum(weights * out).
        xp: NumPy, or jax.numpy with 64 bits enabled.

    Returns:
        "out" (batch, group, length, dim), and with `backward` "dq" as that, "dk" and "dv" (batch,
        keys, dim), "dbias" (group, length, keys). Of the batch only the last sequence, unless there
        is a bias, whose gradient is a sum over all of them.

    Raises:
        ValueError: If the workload has dropout, which is random.
    """
    if workload.dropout:
        raise ValueError(f"`workload` must have no dropout, got {workload.dropout}.")
    batches = range(workload.batch if workload.bias else 1)
    first = 0 if workload.bias else workload.batch - 1
    parts = [_one(workload, first + b, backward, xp) for b in batches]
    found = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    if "dbias" in found:
        found["dbias"] = found["dbias"].sum(0)
    return found


def _one(workload: Workload, batch: int, backward: bool, xp: Any) -> dict[str, np.ndarray]:
    """One sequence's last key head, and the query heads that read it."""
    arrays, group = inputs(workload), workload.heads // workload.key_heads
    q, dout = (xp.asarray(arrays[n][batch, -group:], xp.float64) for n in ("q", "weights"))
    k, v = (xp.asarray(arrays[n][batch, -1], xp.float64) for n in ("k", "v"))
    scale, norms = workload.dim**-0.5, {}
    if workload.similarity == "cosine":
        scale, norms = COSINE_SCALE, {"dq": _norm(q, xp), "dk": _norm(k, xp)}
        q, k = q / norms["dq"], k / norms["dk"]
    sink = None
    if workload.sinks:
        sink = xp.asarray(arrays["sinks"][-group:], xp.float64)[:, None, None]
    rows = max(1, ORACLE_LOGITS // (group * workload.keys))
    pieces: dict[str, list[Any]] = {"out": [], "dq": [], "dbias": []}
    dk, dv = xp.zeros_like(k), xp.zeros_like(v)
    for start in range(0, workload.length, rows):
        part = slice(start, min(start + rows, workload.length))
        logits = scale * (q[:, part] @ k.T)
        if workload.bias:
            logits = logits + xp.asarray(arrays["bias"][0, -group:, part], xp.float64)
        slope = None
        if workload.softcap is not None:
            capped = xp.tanh(logits / workload.softcap)
            logits, slope = workload.softcap * capped, 1 - capped**2
        logits = xp.where(xp.asarray(seen(workload, batch, part)), logits, -np.inf)
        largest = logits.max(-1, keepdims=True)
        largest = largest if sink is None else xp.maximum(largest, sink)
        probs = xp.exp(logits - largest)
        total = probs.sum(-1, keepdims=True)
        probs = probs / (total if sink is None else total + xp.exp(sink - largest))
        pieces["out"].append(probs @ v)
        if backward:
            dprobs = dout[:, part] @ v.T
            dlogits = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
            dlogits = dlogits if slope is None else dlogits * slope
            pieces["dq"].append(scale * (dlogits @ k))
            pieces["dbias"] += [dlogits] if workload.bias else []
            dk = dk + scale * (dlogits.swapaxes(-1, -2) @ q[:, part]).sum(0)
            dv = dv + (probs.swapaxes(-1, -2) @ dout[:, part]).sum(0)
    found = {name: xp.concatenate(each, 1) for name, each in pieces.items() if each}
    if backward:
        found |= {"dk": dk, "dv": dv}
    for name, unit in (("dq", q), ("dk", k)):
        if name in norms and name in found:  # through x / |x|
            along = (found[name] * unit).sum(-1, keepdims=True)
            found[name] = (found[name] - along * unit) / norms[name]
    return {name: np.asarray(array) for name, array in found.items()}


def _norm(x: Any, xp: Any) -> Any:
    return xp.sqrt((x * x).sum(-1, keepdims=True))


def seen(workload: Workload, batch: int, rows: slice) -> np.ndarray:
    """Which keys some queries of a sequence see: (rows, keys)."""
    arrays = inputs(workload)
    keys = np.arange(workload.keys)
    queries = np.arange(rows.start, rows.stop) + workload.keys - workload.length
    ahead = keys - queries[:, None]
    found = np.ones(ahead.shape, bool)
    if workload.causal:
        found &= ahead <= 0
    if workload.sides is not None:
        found &= (-workload.sides[0] <= ahead) & (ahead <= workload.sides[1])
    if "mask" in arrays:
        found &= arrays["mask"][batch]
    if "segment_ids" in arrays:
        ids = arrays["segment_ids"][batch]
        found &= ids[rows, None] == ids
    return found


def part_of(results: dict[str, np.ndarray], workload: Workload) -> dict[str, np.ndarray]:
    """What `reference` answers, cut from the results of the whole call."""
    group = workload.heads // workload.key_heads
    batch = slice(None) if workload.bias else slice(-1, None)
    cuts = {
        "out": lambda x: x[batch, -group:],
        "dq": lambda x: x[batch, -group:],
        "dk": lambda x: x[batch, -1],
        "dv": lambda x: x[batch, -1],
        "dbias": lambda x: x.reshape(workload.heads, workload.length, workload.keys)[-group:],
    }
    return {name: cuts[name](np.asarray(array)) for name, array in results.items()}
