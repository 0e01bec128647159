"""Backward on any NVIDIA GPU from Ampere on, bit for bit the same each time.

FlashAttention-2 (Dao 2023), algorithm 2, split so that each gradient is summed by the program that
owns it, in a fixed order: `triton_dq` owns blocks of queries, `triton_dkv` blocks of keys. Each
makes the scores of its tiles anew; in return nothing is added in memory, and nothing depends on
which program ran first. The gradients of what a call adds to its logits are in `triton_terms`.
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
    load_queries,
    load_rows,
    logit_gradients,
    product,
    rounded,
    route_of,
    some,
    store_rows,
    used_keys,
    visible,
)


@triton.jit
def load_sums(lse2, delta, spec: tl.constexpr, b, h, queries):
    """log2(e) * lse and delta of some queries; one past the end has no probabilities."""
    at = (b * spec.heads + h).to(tl.int64) * spec.q_len
    lse2 = tl.load(lse2 + at + queries.i, mask=queries.inside, other=float("inf"))
    return lse2, tl.load(delta + at + queries.i, mask=queries.inside, other=0.0)


# --- dq ---


@triton.jit
def load_block(refs, spec: tl.constexpr, dout, lse2, delta, OUTERS: tl.constexpr):
    """Which block of queries a program owns, and all that it reads of it."""
    BLOCK_Q: tl.constexpr = spec.block_q
    program = tl.program_id(0)
    block = program % OUTERS
    h = program // OUTERS % spec.heads
    b = program // (OUTERS * spec.heads)
    if spec.causal:
        block = OUTERS - 1 - block  # the longest first
    at = b, h, block * BLOCK_Q
    queries = load_queries(refs, spec, b, h, block * BLOCK_Q, BLOCK_Q)
    sums = load_sums(lse2, delta, spec, b, h, queries)
    rows = load_rows(refs.q, spec, "q", at, queries.inside, BLOCK_Q, True)
    cotangent = load_rows(dout, spec, "out", at, queries.inside, BLOCK_Q, True)
    return b, h, block, queries, sums, rows, cotangent


@triton.jit
def scores_of_keys(
    refs,
    spec: tl.constexpr,
    b,
    h,
    queries,
    sums,
    rows,
    cotangent,
    key_block,
    MASKED: tl.constexpr,
):
    """The keys of a tile and their positions, both products, and what `logit_gradients` finds."""
    BLOCK_KV: tl.constexpr = spec.block_kv
    j = key_block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    at = b, h // spec.group, key_block * BLOCK_KV
    seen = True
    used = True
    if MASKED:
        seen = visible(refs, spec, b, h, queries, j, 0)
        used = used_keys(spec, queries, j, seen)
    k = load_rows(refs.k, spec, "k", at, used, BLOCK_KV, MASKED)
    v = load_rows(refs.v, spec, "v", at, used, BLOCK_KV, MASKED)
    scores = product(rows, tl.trans(k), spec)
    dp = product(cotangent, tl.trans(v), spec)
    p, ds, weight = logit_gradients(refs, spec, b, h, queries, sums, j, scores, dp, seen, 0, MASKED)
    if MASKED:
        scores = tl.where(seen, scores, 0.0)
        dp = tl.where(seen, dp, 0.0)
    return k, j, scores, dp, p, ds, weight


@triton.jit
def triton_dq(
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
    dout,
    lse2,
    delta,
    dq,
    spec: tl.constexpr,
):
    """Dq of one block of queries of one head.

    Grid (blocks * heads * batch,).
    """
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_Q: tl.constexpr = spec.block_q
    BLOCK_D: tl.constexpr = spec.block_d
    OUTERS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    INNERS: tl.constexpr = (spec.k_len + spec.block_kv - 1) // spec.block_kv
    b, h, block, queries, sums, rows, cotangent = load_block(refs, spec, dout, lse2, delta, OUTERS)
    at = b, h, block * BLOCK_Q
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    route = route_of(refs, spec, b, block, OUTERS, INNERS)
    if spec.order is not None:
        for n in range(route.partial):
            key_block = tl.load(route.order + n)
            acc = _step_over_keys(
                refs, spec, b, h, queries, sums, rows, cotangent, key_block, acc, True
            )
    first = first_of(route, spec, INNERS)
    for n in range(route.partial, route.last):
        key_block = block_of(route, spec, n, first)
        acc = _step_over_keys(
            refs, spec, b, h, queries, sums, rows, cotangent, key_block, acc, False
        )
    if spec.scale:
        acc *= tl.load(scale + h)
    else:
        acc *= spec.factor * LN2
    store_rows(dq, spec, "q", at, queries.inside, acc, BLOCK_Q)


@triton.jit
def _step_over_keys(
    refs,
    spec: tl.constexpr,
    b,
    h,
    queries,
    sums,
    rows,
    cotangent,
    key_block,
    acc,
    MASKED: tl.constexpr,
):
    k, _, _, _, _, ds, _ = scores_of_keys(
        refs, spec, b, h, queries, sums, rows, cotangent, key_block, MASKED
    )
    return added(rounded(ds, k.dtype, spec), k, acc, spec)


# --- dk and dv ---


@triton.jit
def triton_dkv(
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
    dout,
    lse2,
    delta,
    dk,
    dv,
    spec: tl.constexpr,
):
    """Dk and dv of one block of keys of one key head, summed over the query heads that share it.

    Grid (blocks * kv_heads * batch,). Tiles are (keys, queries).
    """
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    BLOCK_KV: tl.constexpr = spec.block_kv
    BLOCK_D: tl.constexpr = spec.block_d
    BLOCK_E: tl.constexpr = spec.block_e
    OUTERS: tl.constexpr = (spec.k_len + spec.block_kv - 1) // spec.block_kv
    INNERS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    program = tl.program_id(0)
    block = program % OUTERS
    group = program // OUTERS % spec.kv_heads
    b = program // (OUTERS * spec.kv_heads)
    at = b, group, block * BLOCK_KV
    j = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    inside = j < spec.k_len
    keys = load_rows(k, spec, "k", at, inside, BLOCK_KV, True)
    values = load_rows(v, spec, "v", at, inside, BLOCK_KV, True)
    dkeys = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    dvalues = tl.zeros([BLOCK_KV, BLOCK_E], tl.float32)
    route = route_of(refs, spec, b, block, OUTERS, INNERS)
    first = first_of(route, spec, INNERS)
    for member in range(spec.group):
        h = group * spec.group + member
        if spec.order is not None:
            for n in range(route.partial):
                query_block = tl.load(route.order + n)
                dkeys, dvalues = _step_over_queries(
                    refs, spec, dout, lse2, delta, b, h, j, keys, values, query_block, dkeys,
                    dvalues, True,
                )  # fmt: skip
        for n in range(route.partial, route.last):
            query_block = block_of(route, spec, n, first)
            dkeys, dvalues = _step_over_queries(
                refs, spec, dout, lse2, delta, b, h, j, keys, values, query_block, dkeys, dvalues,
                False,
            )  # fmt: skip
    if not spec.scale:
        dkeys *= spec.factor * LN2
    store_rows(dk, spec, "k", at, inside, dkeys, BLOCK_KV)
    store_rows(dv, spec, "v", at, inside, dvalues, BLOCK_KV)


@triton.jit
def _step_over_queries(
    refs,
    spec: tl.constexpr,
    dout,
    lse2,
    delta,
    b,
    h,
    j,
    keys,
    values,
    query_block,
    dkeys,
    dvalues,
    MASKED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = spec.block_q
    start = query_block * BLOCK_Q
    queries = load_queries(refs, spec, b, h, start, BLOCK_Q)
    at = b, h, start
    seen = True
    used = True
    if MASKED:
        seen = visible(refs, spec, b, h, queries, j, 1)
        used = some(seen, 1)
    q = load_rows(refs.q, spec, "q", at, used, BLOCK_Q, MASKED)
    do = load_rows(dout, spec, "out", at, used, BLOCK_Q, MASKED)
    sums = load_sums(lse2, delta, spec, b, h, queries)
    scores = product(keys, tl.trans(q), spec)
    dp = product(values, tl.trans(do), spec)
    p, ds, _ = logit_gradients(refs, spec, b, h, queries, sums, j, scores, dp, seen, 1, MASKED)
    dvalues = added(rounded(p, do.dtype, spec), do, dvalues, spec)
    if spec.scale:
        ds *= tl.load(refs.scale + h)
    dkeys = added(rounded(ds, q.dtype, spec), q, dkeys, spec)
    return dkeys, dvalues
