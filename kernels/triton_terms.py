"""Backward of what a call adds to its logits or scales them by, and of its sinks.

As `triton_backward`: each sum belongs to one program, which walks what it sums over in a fixed
order. `triton_shares` owns blocks of queries, `triton_dbias` tiles of the bias, `triton_drelative`
diagonals.
"""

# Triton's language only looks like Python: a checker sees neither its constants nor its tensors.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from flash_attention_jax.kernels.triton_backward import load_block, load_sums, scores_of_keys
from flash_attention_jax.kernels.triton_tile import (
    Refs,
    along,
    block_of,
    first_of,
    load_queries,
    load_rows,
    logit_gradients,
    product,
    route_of,
    some,
    visible,
)

# --- what each query gives the gradients of its head's numbers ---


@triton.jit
def triton_shares(
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
    dp,
    dslopes,
    dslopes_weight,
    dscale,
    dscale_weight,
    spec: tl.constexpr,
):
    """The sums over the keys of a query that `join` makes dslopes, dscale and dsinks of.

    A kernel of its own, which a compiler leaves out where slopes, scale and sinks are constants.
    Grid (blocks * heads * batch,).
    """
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    BLOCK_Q: tl.constexpr = spec.block_q
    OUTERS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    INNERS: tl.constexpr = (spec.k_len + spec.block_kv - 1) // spec.block_kv
    b, h, block, queries, sums, rows, cotangent = load_block(refs, spec, dout, lse2, delta, OUTERS)
    zero = tl.zeros([BLOCK_Q], tl.float32)
    shares = zero, zero, zero, zero, zero
    route = route_of(refs, spec, b, block, OUTERS, INNERS)
    if spec.order is not None:
        for n in range(route.partial):
            key_block = tl.load(route.order + n)
            shares = _add_shares(
                refs, spec, b, h, queries, sums, rows, cotangent, key_block, shares, True
            )
    first = first_of(route, spec, INNERS)
    for n in range(route.partial, route.last):
        key_block = block_of(route, spec, n, first)
        shares = _add_shares(
            refs, spec, b, h, queries, sums, rows, cotangent, key_block, shares, False
        )
    own = (b * spec.heads + h).to(tl.int64) * spec.q_len + queries.i
    tl.store(dp + own, shares[0], mask=queries.inside)
    if spec.diagonal is not None:
        tl.store(dslopes + own, shares[1], mask=queries.inside)
        tl.store(dslopes_weight + own, shares[2], mask=queries.inside)
    if spec.scale:
        tl.store(dscale + own, shares[3], mask=queries.inside)
        tl.store(dscale_weight + own, shares[4], mask=queries.inside)


@triton.jit
def _add_shares(
    refs,
    spec: tl.constexpr,
    b,
    h,
    queries,
    sums,
    rows,
    cotangent,
    key_block,
    shares,
    MASKED: tl.constexpr,
):
    dp, dslope, dslope_weight, dscale, dscale_weight = shares
    _, j, scores, unweighted, p, ds, weight = scores_of_keys(
        refs, spec, b, h, queries, sums, rows, cotangent, key_block, MASKED
    )
    dp += tl.sum(p * unweighted, 1)
    if spec.diagonal is not None:
        distance = tl.abs(along(queries.diagonal, 0) - along(j, 1)).to(tl.float32)
        dslope -= tl.sum(ds * distance, 1)
        dslope_weight -= tl.sum(weight * distance, 1)
    if spec.scale:
        dscale += tl.sum(ds * scores, 1)
        dscale_weight += tl.sum(weight * scores, 1)
    return dp, dslope, dslope_weight, dscale, dscale_weight


# --- the gradients of what is added to the logits ---


@triton.jit
def _tile_gradient(
    refs, spec: tl.constexpr, dout, lse2, delta, b, h, start, key_start, KEYS: tl.constexpr
):
    """Gradients of the logits of one tile, (queries, keys), wherever it lies; 0 where hidden."""
    BLOCK_Q: tl.constexpr = spec.block_q
    queries = load_queries(refs, spec, b, h, start, BLOCK_Q)
    j = key_start + tl.arange(0, KEYS)
    inside = along((j >= 0) & (j < spec.k_len), 1)
    if spec.ranges is None:
        seen = inside & along(queries.inside, 0)
    else:
        seen = inside & visible(refs, spec, b, h, queries, j, 0)
    at = b, h, start
    key_at = b, h // spec.group, key_start
    rows, used = some(seen, 0), some(seen, 1)
    q = load_rows(refs.q, spec, "q", at, rows, BLOCK_Q, True)
    do = load_rows(dout, spec, "out", at, rows, BLOCK_Q, True)
    k = load_rows(refs.k, spec, "k", key_at, used, KEYS, True)
    v = load_rows(refs.v, spec, "v", key_at, used, KEYS, True)
    sums = load_sums(lse2, delta, spec, b, h, queries)
    scores = product(q, tl.trans(k), spec)
    dp = product(do, tl.trans(v), spec)
    _, ds, _ = logit_gradients(refs, spec, b, h, queries, sums, j, scores, dp, seen, 0, True)
    return ds


@triton.jit
def triton_dbias(
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
    dbias,
    spec: tl.constexpr,
):
    """One tile of the bias's gradient, summed over every axis along which the bias broadcasts.

    Grid (tiles of queries * tiles of keys * heads * batch,), each 1 where the bias has no such
    axis.
    """
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    BLOCK_Q: tl.constexpr = spec.block_q
    BLOCK_KV: tl.constexpr = spec.block_kv
    Q_BLOCKS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    KV_BLOCKS: tl.constexpr = (spec.k_len + spec.block_kv - 1) // spec.block_kv
    # What the grid counts, and what a program walks.
    OWN_Q: tl.constexpr = Q_BLOCKS if spec.bias.query != 0 else 1
    OWN_KV: tl.constexpr = KV_BLOCKS if spec.bias.key != 0 else 1
    OWN_H: tl.constexpr = spec.heads if spec.bias.head != 0 else 1
    WALK_Q: tl.constexpr = Q_BLOCKS // OWN_Q
    WALK_KV: tl.constexpr = KV_BLOCKS // OWN_KV
    WALK_H: tl.constexpr = spec.heads // OWN_H
    WALK_B: tl.constexpr = spec.batch if spec.bias.batch == 0 else 1
    program = tl.program_id(0)
    own_kv = program % OWN_KV
    own_q = program // OWN_KV % OWN_Q
    own_h = program // (OWN_KV * OWN_Q) % OWN_H
    own_b = program // (OWN_KV * OWN_Q * OWN_H)
    acc = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for n in range(WALK_Q * WALK_KV * WALK_H * WALK_B):
        kv_block = own_kv + n % WALK_KV
        q_block = own_q + n // WALK_KV % WALK_Q
        h = own_h + n // (WALK_KV * WALK_Q) % WALK_H
        b = own_b + n // (WALK_KV * WALK_Q * WALK_H)
        acc += _tile_gradient(
            refs, spec, dout, lse2, delta, b, h, q_block * BLOCK_Q, kv_block * BLOCK_KV, BLOCK_KV
        )
    base = dbias + tl.cast(own_b, tl.int64) * spec.bias.batch
    base += tl.cast(own_h, tl.int64) * spec.bias.head
    i = own_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = own_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    rows, columns = tl.cast(i, tl.int64) * spec.bias.query, j * spec.bias.key
    if (spec.bias.query == 0) & (spec.bias.key == 0):
        tl.store(base, tl.sum(tl.sum(acc, 1), 0))
    elif spec.bias.query == 0:
        tl.store(base + columns, tl.sum(acc, 0), mask=j < spec.k_len)
    elif spec.bias.key == 0:
        tl.store(base + rows, tl.sum(acc, 1), mask=i < spec.q_len)
    else:
        within = along(i < spec.q_len, 0) & along(j < spec.k_len, 1)
        tl.store(base + along(rows, 0) + along(columns, 1), acc, mask=within)


@triton.jit
def triton_drelative(
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
    drelative,
    spec: tl.constexpr,
):
    """The gradient of some diagonals of the relative bias, summed over queries, batch and heads.

    A tile of queries meets twice as many keys, in which every row has all of the diagonals. Grid
    (blocks of diagonals * heads,), heads 1 where all share the bias.
    """
    refs = Refs(
        q, k, v, low, high, q_segments, kv_segments, mask, bias, diagonal, slopes, relative, scale,
        words, origin, order, counts,
    )  # fmt: skip
    BLOCK_Q: tl.constexpr = spec.block_q
    COUNT: tl.constexpr = spec.q_len + spec.k_len - 1
    OUTERS: tl.constexpr = (COUNT + spec.block_q - 1) // spec.block_q
    Q_BLOCKS: tl.constexpr = (spec.q_len + spec.block_q - 1) // spec.block_q
    OWN_H: tl.constexpr = spec.heads if spec.relative != 0 else 1
    WALK_H: tl.constexpr = spec.heads // OWN_H
    program = tl.program_id(0)
    g = program % OUTERS * BLOCK_Q
    own_h = program // OUTERS
    local = tl.arange(0, BLOCK_Q)
    skew = along(local, 0) + along(local, 1)
    acc = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(Q_BLOCKS * WALK_H * spec.batch):
        start = n % Q_BLOCKS * BLOCK_Q
        h = own_h + n // Q_BLOCKS % WALK_H
        b = n // (Q_BLOCKS * WALK_H)
        key_start = start + g - (spec.q_len - 1)
        if (key_start < spec.k_len) & (key_start + 2 * BLOCK_Q > 0):
            ds = _tile_gradient(refs, spec, dout, lse2, delta, b, h, start, key_start, 2 * BLOCK_Q)
            acc += tl.sum(tl.gather(ds, skew, 1), 0)
    tl.store(drelative + own_h * COUNT + g + local, acc, mask=g + local < COUNT)
