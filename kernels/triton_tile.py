"""One tile inside a Triton kernel: what it reads, its logits in base 2, its mask and its dropout.

The forward pass and dq hold a tile as (queries, keys); dk and dv hold it as (keys, queries), so
that probabilities feed the next product from registers. `Q`, a constant of every function here, is
the axis of the queries; all else is written once.

    logits2 = log2(e) * softcap(scale * product + alibi + relative_bias + bias),  -inf where hidden

Everything static is in one constant, `spec`; Triton compiles a kernel for each value of it. What a
call does not have is None there, and the pointer in its place is never read.
"""

# Triton's language only looks like Python: a checker sees neither its constants nor its tensors.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flash_attention_jax._core.dropout import GOLDEN

GOLDEN_RATIO = tl.constexpr(int(GOLDEN))


class Strides(NamedTuple):
    """Elements between batches, heads and rows of an array."""

    batch: int
    head: int
    row: int


class PairStrides(NamedTuple):
    """Elements between the axes of a mask or bias, 0 along those where it broadcasts."""

    batch: int
    head: int
    query: int
    key: int


class Spec(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        batch: B.
        heads: N.
        kv_heads: K.
        group: Query heads per key head.
        q_len: T.
        k_len: S.
        dim: Dimension of q and k.
        v_dim: Dimension of v and out.
        block_q: Queries of a tile.
        block_kv: Keys of a tile.
        block_d: `dim` as a tile holds it, a power of two.
        block_e: `v_dim` as a tile holds it.
        q: Strides of q.
        k: Strides of k.
        v: Strides of v.
        out: Strides of out and dout.
        lse: Strides of lse, in the call's layout.
        factor: What makes base-2 logits of a product where the scale is no array.
        softcap: log2(e) * softcap, or None.
        running: Whether a running maximum is needed.
        causal: Whether the last blocks of queries have the most work.
        precision: `input_precision` of the products.
        threshold: Bits below it are dropped; None = no dropout.
        growth: 1 / (1 - dropout_rate).
        origin: Whether the call is a part of a larger one, for dropout.
        ranges: Elements between batches of `low`, and of `high`; None where nothing is hidden.
        segments: Elements between batches of the ids of queries, and of those of keys, or None.
        diagonal: Elements between batches of `diagonal`, or None; with ALiBi alone.
        scale: Whether the scale is an array.
        sinks: Whether there are sinks.
        relative: Elements between heads of `relative`, or None.
        mask: Strides of the mask, or None.
        bias: Strides of the bias, or None.
        order: Elements between batches of the routes; None where every block is visited unmasked.
        contiguous: Whether the blocks of a route that need no mask follow one another.
        interpreted: Whether the kernel is interpreted on the CPU.
    """

    batch: int
    heads: int
    kv_heads: int
    group: int
    q_len: int
    k_len: int
    dim: int
    v_dim: int
    block_q: int
    block_kv: int
    block_d: int
    block_e: int
    q: Strides
    k: Strides
    v: Strides
    out: Strides
    lse: Strides
    factor: float
    softcap: float | None
    running: bool
    causal: bool
    precision: str
    threshold: int | None
    growth: float
    origin: bool
    ranges: tuple[int, int] | None
    segments: tuple[int, int] | None
    diagonal: int | None
    scale: bool
    sinks: bool
    relative: int | None
    mask: PairStrides | None
    bias: PairStrides | None
    order: int | None
    contiguous: bool
    interpreted: bool


class Refs(NamedTuple):
    """Pointers to what every kernel reads; see `triton_attention` for shapes."""

    q: Any
    k: Any
    v: Any
    low: Any
    high: Any
    q_segments: Any
    kv_segments: Any
    mask: Any
    bias: Any
    diagonal: Any
    slopes: Any
    relative: Any
    scale: Any
    words: Any
    origin: Any
    order: Any
    counts: Any


class Queries(NamedTuple):
    """What a tile needs of its queries; zeros stand for what the call does not have."""

    i: Any
    inside: Any  # within the array
    low: Any
    high: Any
    segment: Any
    diagonal: Any
    first: Any  # words of dropout
    second: Any


class Route(NamedTuple):
    """Which blocks a program visits: `order` holds `partial` that need a mask, then the others."""

    order: Any
    partial: Any
    last: Any


@triton.jit
def product(a, b, spec: tl.constexpr):
    """A tile of a b, summed in float32."""
    return added(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32), spec)


@triton.jit
def added(a, b, acc, spec: tl.constexpr):
    """`acc` and a tile of a b."""
    if spec.interpreted:
        # The interpreter would multiply the bits of a bfloat16; its numbers are float32 ones.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=spec.precision)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, spec: tl.constexpr):
    """Float32 in the dtype of an operand or result."""
    if spec.interpreted and tl.bfloat16 == DTYPE:
        # The interpreter cuts off what GPUs round to the nearest, ties to even.
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


# --- reading ---


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector along one axis of a tile."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.constexpr_function
def step(spec, array, axis):
    """Elements between neighbours along an axis of an array that has strides in `spec`.

    Looked up by name: a tuple that is handed on loses the names of its fields in Triton 3.6.
    """
    return getattr(getattr(spec, array), axis)


@triton.constexpr_function
def row_size(spec, array):
    """Dimension of the rows of q, k, v or out."""
    return spec.dim if array in ("q", "k") else spec.v_dim


@triton.constexpr_function
def row_block(spec, array):
    """`row_size` as a tile holds it."""
    return spec.block_d if array in ("q", "k") else spec.block_e


@triton.jit
def place(spec: tl.constexpr, ARRAY: tl.constexpr, b, h, row):
    """Where a row of an array lies."""
    wide = tl.cast(b, tl.int64) * step(spec, ARRAY, "batch")
    wide += tl.cast(h, tl.int64) * step(spec, ARRAY, "head")
    return wide + tl.cast(row, tl.int64) * step(spec, ARRAY, "row")


@triton.jit
def offsets(stride: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile of whole rows."""
    return along(tl.arange(0, ROWS) * stride, 0) + along(tl.arange(0, COLUMNS), 1)


@triton.jit
def load_rows(
    x,
    spec: tl.constexpr,
    ARRAY: tl.constexpr,
    at,
    keep,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows `at` (batch, head, first row) of an array that lies as `ARRAY`; zero where not kept."""
    SIZE: tl.constexpr = row_size(spec, ARRAY)
    COLUMNS: tl.constexpr = row_block(spec, ARRAY)
    b, h, row = at
    pointers = x + place(spec, ARRAY, b, h, row) + offsets(step(spec, ARRAY, "row"), ROWS, COLUMNS)
    if SIZE < COLUMNS:
        within = along(tl.arange(0, COLUMNS) < SIZE, 1)
        if MASKED:
            within = within & along(keep, 0)
        rows = tl.load(pointers, mask=within, other=0.0)
    elif MASKED:
        rows = tl.load(pointers, mask=along(keep, 0), other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def store_rows(x, spec: tl.constexpr, ARRAY: tl.constexpr, at, keep, rows, ROWS: tl.constexpr):
    """Write rows, those kept, in the dtype of an array that lies as `ARRAY`."""
    SIZE: tl.constexpr = row_size(spec, ARRAY)
    COLUMNS: tl.constexpr = row_block(spec, ARRAY)
    b, h, row = at
    pointers = x + place(spec, ARRAY, b, h, row) + offsets(step(spec, ARRAY, "row"), ROWS, COLUMNS)
    within = along(tl.arange(0, COLUMNS) < SIZE, 1) & along(keep, 0)
    tl.store(pointers, rounded(rows, x.dtype.element_ty, spec), mask=within)


@triton.jit
def load_pairs(
    x,
    spec: tl.constexpr,
    ARRAY: tl.constexpr,
    b,
    h,
    i,
    j,
    seen,
    OTHER: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """A tile of the mask or bias, read where seen; a vector where it broadcasts along an axis."""
    QUERY: tl.constexpr = step(spec, ARRAY, "query")
    KEY: tl.constexpr = step(spec, ARRAY, "key")
    base = x + tl.cast(b, tl.int64) * step(spec, ARRAY, "batch")
    base += tl.cast(h, tl.int64) * step(spec, ARRAY, "head")
    if QUERY == 0:
        some = tl.max(seen.to(tl.int32), axis=Q) != 0
        found = along(tl.load(base + j * KEY, mask=some, other=OTHER), K)
    elif KEY == 0:
        some = tl.max(seen.to(tl.int32), axis=K) != 0
        found = along(tl.load(base + i * QUERY, mask=some, other=OTHER), Q)
    else:
        rows = along(tl.cast(i, tl.int64) * QUERY, Q)
        found = tl.load(base + rows + along(j * KEY, K), mask=seen, other=OTHER)
    return found


# --- dropout ---


@triton.jit
def mix(x):
    """`_core.dropout.mix`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_words(refs, spec: tl.constexpr, b, h, i):
    """`_core.dropout.row_words`, of the queries `i` of one head."""
    heads = spec.heads
    if spec.origin:
        heads = tl.load(refs.origin)
        b += tl.load(refs.origin + 1)
        h += tl.load(refs.origin + 2)
        i += tl.load(refs.origin + 3)
    unit = tl.cast(b * heads + h, tl.uint32)
    row = i.to(tl.uint32)
    first = mix(
        mix(tl.load(refs.words).to(tl.uint32, bitcast=True) + unit * GOLDEN_RATIO)
        + row * GOLDEN_RATIO
    )
    second = mix(mix(tl.load(refs.words + 1).to(tl.uint32, bitcast=True) ^ mix(unit)) ^ mix(row))
    if spec.origin:
        first += tl.cast(tl.load(refs.origin + 4), tl.uint32) * GOLDEN_RATIO
    return first, second


@triton.jit
def kept(spec: tl.constexpr, queries, j, Q: tl.constexpr):
    """Which probabilities dropout keeps: `_core.dropout.keep`."""
    columns = along(j.to(tl.uint32) * GOLDEN_RATIO, 1 - Q)
    bits = mix(mix(columns + along(queries.first, Q)) ^ along(queries.second, Q))
    return bits >= spec.threshold


# --- logits ---


@triton.jit
def load_queries(refs, spec: tl.constexpr, b, h, start, ROWS: tl.constexpr):
    """Vectors of the `ROWS` queries from `start`; one past the end sees nothing."""
    i = start + tl.arange(0, ROWS)
    inside = i < spec.q_len
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32)
    segment = tl.zeros([ROWS], tl.int32)
    diagonal = tl.zeros([ROWS], tl.int32)
    first = tl.zeros([ROWS], tl.uint32)
    second = tl.zeros([ROWS], tl.uint32)
    if spec.ranges is not None:
        low = tl.load(refs.low + b * spec.ranges[0] + i, mask=inside, other=0)
        high = tl.load(refs.high + b * spec.ranges[1] + i, mask=inside, other=0)
    if spec.segments is not None:
        segment = tl.load(refs.q_segments + b * spec.segments[0] + i, mask=inside, other=0)
    if spec.diagonal is not None:
        diagonal = tl.load(refs.diagonal + b * spec.diagonal + i, mask=inside, other=0)
    if spec.threshold is not None:
        first, second = row_words(refs, spec, b, h, i)
    return Queries(
        i=i,
        inside=inside,
        low=low,
        high=high,
        segment=segment,
        diagonal=diagonal,
        first=first,
        second=second,
    )


@triton.jit
def visible(refs, spec: tl.constexpr, b, h, queries, j, Q: tl.constexpr):
    """Which elements of a tile may be seen: none past the end of the queries or of the keys."""
    K: tl.constexpr = 1 - Q
    if spec.ranges is not None:
        seen = along(j, K) < along(queries.high, Q)
        seen = seen & (along(j, K) >= along(queries.low, Q))
    else:
        seen = along(j < spec.k_len, K) & along(queries.inside, Q)
    if spec.segments is not None:
        within = (j >= 0) & (j < spec.k_len)
        segment = tl.load(refs.kv_segments + b * spec.segments[1] + j, mask=within, other=0)
        seen = seen & (along(segment, K) == along(queries.segment, Q))
    if spec.mask is not None:
        seen = seen & (load_pairs(refs.mask, spec, "mask", b, h, queries.i, j, seen, 0, Q, K) != 0)
    return seen


@triton.jit
def some(seen, AXIS: tl.constexpr):
    """Along `AXIS`, whether a row or column of a tile has anything that is seen."""
    return tl.max(seen.to(tl.int32), axis=1 - AXIS) != 0


@triton.jit
def used_keys(spec: tl.constexpr, queries, j, seen):
    """Which keys of a tile to read: none that no query of the tile sees."""
    if (spec.ranges is not None) & spec.contiguous:
        # The ranges of neighbours leave no gap: their hull says it without the tile.
        sees = queries.low < queries.high
        first = tl.min(tl.where(sees, queries.low, spec.k_len))
        last = tl.max(tl.where(sees, queries.high, 0))
        used = (j >= tl.maximum(first, 0)) & (j < last)
    else:
        used = some(seen, 1)
    return used


@triton.jit
def logits2(
    refs,
    spec: tl.constexpr,
    b,
    h,
    queries,
    j,
    product,
    seen,
    Q: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Logits in base 2 of q . k, before the mask; what is hidden adds no term."""
    LOG2E: tl.constexpr = 1.4426950408889634
    K: tl.constexpr = 1 - Q
    if spec.scale:
        x = product * (tl.load(refs.scale + h) * LOG2E)
    elif spec.factor == 1.0:
        x = product
    else:
        x = product * spec.factor
    if spec.diagonal is not None:
        distance = tl.abs(along(queries.diagonal, Q) - along(j, K)).to(tl.float32)
        x -= distance * (tl.load(refs.slopes + h) * LOG2E)
    if (spec.relative is not None) | (spec.bias is not None):
        if not MASKED:
            seen = along(queries.inside, Q) & along(j < spec.k_len, K)
        if spec.relative is not None:
            g = along(j, K) - along(queries.i, Q) + (spec.q_len - 1)
            relative = tl.load(refs.relative + h * spec.relative + g, mask=seen, other=0.0)
            x += in_base_2(relative)
        if spec.bias is not None:
            bias = load_pairs(refs.bias, spec, "bias", b, h, queries.i, j, seen, 0.0, Q, K)
            bias = in_base_2(bias.to(tl.float32))
            if MASKED:
                bias = tl.where(seen, bias, 0.0)
            x += bias
    if spec.softcap is not None:
        # tanh by exp2, which saturates where it should.
        x = spec.softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / spec.softcap)) + 1.0))
    return x


@triton.jit
def in_base_2(term):
    """A term of the logits. What was finite stays so: masks by the lowest float32 are common."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scaled = term * LOG2E
    return tl.where(tl.abs(scaled) == float("inf"), term, scaled)


@triton.jit
def logit_gradients(
    refs,
    spec: tl.constexpr,
    b,
    h,
    queries,
    sums,
    j,
    product,
    dp,
    seen,
    Q: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Probabilities of a tile after dropout; the gradients of its logits; what delta takes of them.

    Args:
        refs: Pointers.
        spec: What is static.
        b: Batch.
        h: Query head.
        queries: Of `load_queries`.
        sums: log2(e) * lse, and delta, of the queries.
        j: Positions of the keys.
        product: q . k.
        dp: dout . v.
        seen: Of `visible`, where `MASKED`.
        Q: Axis of the queries.
        MASKED: Whether anything of the tile is hidden.
    """
    x = logits2(refs, spec, b, h, queries, j, product, seen, Q, MASKED)
    lse2, delta = sums
    if MASKED:
        p = tl.exp2(tl.where(seen, x, float("-inf")) - along(lse2, Q))
    else:
        p = tl.exp2(x - along(lse2, Q))
    dropped = p
    if spec.threshold is not None:
        stays = kept(spec, queries, j, Q)
        dropped = tl.where(stays, p * spec.growth, 0.0)
        dp = tl.where(stays, dp * spec.growth, 0.0)
    ds = p * (dp - along(delta, Q))
    weight = p
    if spec.softcap is not None:
        t = x / spec.softcap
        ds *= 1.0 - t * t
        weight *= 1.0 - t * t
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
        weight = tl.where(seen, weight, 0.0)
    return dropped, ds, weight


# --- the way through the blocks ---


@triton.jit
def route_of(refs, spec: tl.constexpr, b, outer, OUTERS: tl.constexpr, INNERS: tl.constexpr):
    """The route of an outer block."""
    if spec.order is None:
        route = Route(order=refs.order, partial=0, last=INNERS)
    else:
        counts = refs.counts + (b * (2 * OUTERS) * (spec.order != 0) + 2 * outer)
        order = refs.order + tl.cast(b, tl.int64) * spec.order + outer * INNERS
        route = Route(order=order, partial=tl.load(counts), last=tl.load(counts + 1))
    return route


@triton.jit
def first_of(route, spec: tl.constexpr, INNERS: tl.constexpr):
    """What has to be added to a step's number to give its block, where those follow one another."""
    first = 0
    if (spec.order is not None) & spec.contiguous:
        first = tl.load(route.order + tl.minimum(route.partial, INNERS - 1)) - route.partial
    return first


@triton.jit
def block_of(route, spec: tl.constexpr, n, first):
    """The block of a step that needs no mask."""
    if spec.order is None:
        block = n
    elif spec.contiguous:
        block = first + n
    else:
        block = tl.load(route.order + n)
    return block
