"""Forward on any NVIDIA GPU from Ampere on: one kernel, one body for softmax and cosine.

FlashAttention-2 (Dao 2023), algorithm 1. A program owns a block of queries of one head and walks
the blocks of keys of its route: first those that need a mask, then those that do not, which are
most of them and test nothing. With bounded logits (cosine similarity) no maximum is kept and
nothing in the loop touches what was summed before.
"""

# Triton's language only looks like Python: a checker sees neither its constants nor its tensors.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from flash_attention_jax.kernels.triton_tile import (
    Refs,
    added,
    block_of,
    first_of,
    kept,
    load_queries,
    load_rows,
    logits2,
    place,
    product,
    rounded,
    route_of,
    store_rows,
    used_keys,
    visible,
)


@triton.jit
def triton_forward(
    q,
    k,
    v,
    low,
    high,
    q_segments,
    kv_segments,
    mask,
    bias,
    diagonal,
    slopes,
    relative,
    scale,
    words,
    origin,
    order,
    counts,
    sinks,
    out,
    top,
    total,
    spec: tl.constexpr,
):
    """Out and sums of one block of queries of one head; grid (blocks * heads * batch,)."""
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    BLOCK_Q: tl.constexpr = spec.block_q
    BLOCK_E: tl.constexpr = spec.block_e
    OUTERS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    INNERS: tl.constexpr = (spec.k_len + spec.block_kv - 1) // spec.block_kv
    program = tl.program_id(0)
    block = program % OUTERS
    h = program // OUTERS % spec.heads
    b = program // (OUTERS * spec.heads)
    if spec.causal:
        block = OUTERS - 1 - block  # the longest first
    at = b, h, block * BLOCK_Q
    queries = load_queries(refs, spec, b, h, block * BLOCK_Q, BLOCK_Q)
    rows = load_rows(q, spec, "q", at, queries.inside, BLOCK_Q, True)
    m = tl.full([BLOCK_Q], float("-inf") if spec.running else 0.0, tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    route = route_of(refs, spec, b, block, OUTERS, INNERS)
    if spec.order is not None:
        for n in range(route.partial):
            key_block = tl.load(route.order + n)
            m, l, acc = _step(refs, spec, b, h, queries, rows, key_block, m, l, acc, True)
    first = first_of(route, spec, INNERS)
    for n in range(route.partial, route.last):
        key_block = block_of(route, spec, n, first)
        m, l, acc = _step(refs, spec, b, h, queries, rows, key_block, m, l, acc, False)
    seen = l != 0.0
    m = tl.where(seen, m, float("-inf"))
    if spec.sinks:
        sink = tl.load(sinks + h)
        most = tl.maximum(m, sink)
        safe = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.exp2(sink - safe)
        acc = acc * tl.expand_dims(shrink, 1)
        m = most
    weight = spec.growth / tl.where(l == 0.0, 1.0, l)
    acc = acc * tl.expand_dims(weight, 1)
    store_rows(out, spec, "out", at, queries.inside, acc, BLOCK_Q)
    rows = place(spec, "lse", b, h, block * BLOCK_Q) + tl.arange(0, BLOCK_Q) * spec.lse.row
    tl.store(top + rows, m, mask=queries.inside)
    tl.store(total + rows, l, mask=queries.inside)


@triton.jit
def _step(
    refs, spec: tl.constexpr, b, h, queries, rows, key_block, m, l, acc, MASKED: tl.constexpr
):
    """The sums with one block of keys more."""
    BLOCK_KV: tl.constexpr = spec.block_kv
    j = key_block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    at = b, h // spec.group, key_block * BLOCK_KV
    seen = True
    used = True
    if MASKED:
        # What nobody in the tile sees is not even read: 0 * NaN cannot arise.
        seen = visible(refs, spec, b, h, queries, j, 0)
        used = used_keys(spec, queries, j, seen)
    k = load_rows(refs.k, spec, "k", at, used, BLOCK_KV, MASKED)
    v = load_rows(refs.v, spec, "v", at, used, BLOCK_KV, MASKED)
    scores = product(rows, tl.trans(k), spec)
    x = logits2(refs, spec, b, h, queries, j, scores, seen, 0, MASKED)
    if MASKED:
        x = tl.where(seen, x, float("-inf"))
    if spec.running:
        top = tl.maximum(m, tl.max(x, 1))
        safe = top
        if MASKED | (spec.bias is not None):
            # A row that has seen no key yet: exp2(-inf - -inf) must not arise.
            safe = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(m - safe)
        p = tl.exp2(x - tl.expand_dims(safe, 1))
        l = l * shrink + tl.sum(p, 1)
        acc = acc * tl.expand_dims(shrink, 1)
        m = top
    else:
        p = tl.exp2(x)
        l = l + tl.sum(p, 1)
    if spec.threshold is not None:
        p = tl.where(kept(spec, queries, j, 0), p, 0.0)
    return m, l, added(rounded(p, v.dtype, spec), v, acc, spec)
