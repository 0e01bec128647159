"""The cache: any cut of the sequence is the whole pass, written in place, compiled once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import dot_product_attention
from flash_attention_jax.cache import KVCache, append, cached_attention, init_cache

LENGTH = 23
FLOAT = jnp.float64


def inputs(rng, length=LENGTH, batch=2, kv_heads=2, dtype=FLOAT):
    """Queries of four heads; values have a dimension of their own."""
    shapes = (4, 8), (kv_heads, 8), (kv_heads, 5)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, *s)), dtype) for s in shapes)


def whole_pass(q, k, v, window=None, **options):
    window = None if window is None else (window, 0)
    return dot_product_attention(q, k, v, is_causal=True, local_window_size=window, **options)


def in_chunks(chunks, q, k, v, cache, **options):
    """Attention to the cache, chunk after chunk, each size of them compiled once."""

    @jax.jit
    def step(q, k, v, cache):
        return cached_attention(q, k, v, cache, **options)

    outs, start = [], 0
    for size in chunks:
        out, cache = step(*(x[:, start : start + size] for x in (q, k, v)), cache)
        outs.append(out)
        start += size
    return jnp.concatenate(outs, axis=1), cache


ONE_BY_ONE = [1] * LENGTH
MANY = [9, 1, 9, 1, 1, 1, 1]  # 9 is more than a ring of 4 holds, and less than one of 11


@pytest.mark.parametrize("window", [None, 0, 3, 10, 100])
@pytest.mark.parametrize("chunks", [ONE_BY_ONE, MANY], ids=["single", "many"])
def test_any_cut_of_the_sequence_is_the_whole_pass(rng, window, chunks):
    q, k, v = inputs(rng)
    cache = init_cache(2, LENGTH, 2, 8, v_dim=5, window=window, dtype=FLOAT)
    assert cache.is_ring == (window in (0, 3, 10))
    out, cache = in_chunks(chunks, q, k, v, cache)
    np.testing.assert_allclose(out, whole_pass(q, k, v, window), atol=1e-12)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


OPTIONS = {
    "cosine": {"similarity": "cosine", "groups": 2, "scale": 6.0},
    "alibi, softcap": {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]), "logits_soft_cap": 3.0},
    "sinks, scale": {"sinks": np.array([0.1, -0.2, 0.3, 1.0]), "scale": np.linspace(0.5, 1, 4)},
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_what_they_mean_in_the_whole_pass(rng, window, options):
    options = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    options["implementation"] = "dense"
    q, k, v = inputs(rng, kv_heads=1)
    cache = init_cache(2, LENGTH, 1, 8, v_dim=5, window=window, dtype=FLOAT)
    out, _ = in_chunks(MANY, q, k, v, cache, **options)
    np.testing.assert_allclose(out, whole_pass(q, k, v, window, **options), atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_sequences_of_different_lengths_are_each_as_alone(rng, window):
    # Two padded chunks and a single token: 9 + 2 + 1 tokens, 4 + 0 + 1 tokens, 0 + 5 + 0 tokens.
    counts = [[9, 4, 0], [2, 0, 5], [1, 1, 0]]
    sizes = [9, 5, 1]
    q, k, v = inputs(rng, batch=3)
    cache = init_cache(3, LENGTH, 2, 8, v_dim=5, window=window, dtype=FLOAT)
    got = [[], [], []]
    starts = np.zeros(3, int)
    for size, count in zip(sizes, counts, strict=True):
        chunk = []
        for x in (q, k, v):
            # What pads a chunk must not matter, whatever it is.
            padded = np.full((3, size, *x.shape[2:]), np.nan)
            for row in range(3):
                padded[row, : count[row]] = x[row, starts[row] : starts[row] + count[row]]
            chunk.append(jnp.asarray(padded))
        lengths = jnp.asarray(count, jnp.int32)
        out, cache = cached_attention(*chunk, cache, lengths=lengths, implementation="dense")
        for row in range(3):
            got[row].append(out[row, : count[row]])
            np.testing.assert_array_equal(out[row, count[row] :], 0.0)
        starts += count
    assert cache.lengths.tolist() == [12, 5, 5]
    for row in range(3):
        alone = (x[row : row + 1, : starts[row]] for x in (q, k, v))
        expected = whole_pass(*alone, window, implementation="dense")[0]
        np.testing.assert_allclose(np.concatenate(got[row]), expected, atol=1e-12)


def test_mask_and_bias_run_along_the_slots(rng):
    q, k, v = inputs(rng, length=6)
    bias = jnp.asarray(rng.normal(size=(4, 6, 8)))
    mask = jnp.asarray(rng.random((2, 1, 6, 8)) < 0.7)
    cache = append(init_cache(2, 8, 2, 8, v_dim=5, dtype=FLOAT), k[:, :2], v[:, :2])
    options = {"implementation": "dense"}
    out, _ = cached_attention(
        q[:, 2:], k[:, 2:], v[:, 2:], cache, bias=bias[:, 2:], mask=mask[:, :, 2:], **options
    )
    expected = whole_pass(q, k, v, bias=bias[..., :6], mask=mask[..., :6], **options)
    np.testing.assert_allclose(out, expected[:, 2:], atol=1e-12)


@pytest.mark.parametrize("window", [None, 2**16 - 1])
def test_donated_cache_is_written_in_place(rng, window):
    q, k, v = inputs(rng, length=1, dtype=jnp.float32)
    cache = init_cache(2, 2**16 + (window is not None), 2, 8, v_dim=5, window=window)
    assert (cache.capacity, cache.is_ring) == (2**16, window is not None)
    step = jax.jit(cached_attention, donate_argnums=3).lower(q, k, v, cache).compile()
    size = sum(x.nbytes for x in (cache.key, cache.value, cache.lengths))
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 10  # blocks of logits: nothing as long as the cache
    before = cache.key.unsafe_buffer_pointer(), cache.value.unsafe_buffer_pointer()
    _, after = step(q, k, v, cache)
    assert (after.key.unsafe_buffer_pointer(), after.value.unsafe_buffer_pointer()) == before


def test_steps_compile_once_and_scan(rng):
    q, k, v = inputs(rng)
    traces = []

    @jax.jit
    def step(cache, qkv):
        traces.append(1)
        out, cache = cached_attention(*(x[:, None] for x in qkv), cache)
        return cache, out[:, 0]

    start = cache = init_cache(2, LENGTH, 2, 8, v_dim=5, window=3, dtype=FLOAT)
    outs = []
    for i in range(LENGTH):
        cache, out = step(cache, (q[:, i], k[:, i], v[:, i]))
        outs.append(out)
    assert len(traces) == 1
    expected = whole_pass(q, k, v, window=3)
    np.testing.assert_allclose(jnp.stack(outs, axis=1), expected, atol=1e-12)
    _, scanned = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
    np.testing.assert_allclose(jnp.moveaxis(scanned, 0, 1), expected, atol=1e-12)


def test_bfloat16_is_as_near_as_the_whole_pass(rng):
    q, k, v = inputs(rng)
    exact = whole_pass(q, k, v)
    half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    cache = init_cache(2, LENGTH, 2, 8, v_dim=5, dtype=jnp.bfloat16)
    out, cache = in_chunks(MANY, *half, cache)
    assert out.dtype == cache.key.dtype == jnp.bfloat16
    error, budget = (
        float(jnp.abs(x.astype(FLOAT) - exact).max()) for x in (out, whole_pass(*half))
    )
    assert error <= 2 * budget


def test_cache_is_a_pytree_of_three_arrays():
    cache = init_cache(2, 8, 1, 4, window=3)
    leaves, structure = jax.tree.flatten(cache)
    assert [leaf.shape for leaf in leaves] == [(2, 4, 1, 4), (2, 4, 1, 4), (2,)]
    assert jax.tree.unflatten(structure, leaves).window == 3
    assert isinstance(jax.eval_shape(lambda: cache), KVCache)


# --- a relative bias ---


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [(), (1,), (4,)], ids=str)
def test_relative_bias_is_that_of_the_whole_pass(rng, window, rows):
    q, k, v = inputs(rng)
    relative = jnp.asarray(rng.normal(size=(*rows, 2 * LENGTH - 1)))
    cache = init_cache(2, LENGTH, 2, 8, v_dim=5, window=window, dtype=FLOAT)
    options = {"relative_bias": relative, "implementation": "dense"}
    expected = whole_pass(q, k, v, window, **options)
    out, _ = in_chunks(MANY, q, k, v, cache, **options)
    np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("implementation", ["blocked", "dense"])
def test_relative_bias_counts_from_each_sequence_s_own_length(rng, implementation):
    # 2 and 5 tokens, then 4 and 3, then one each, with the other terms that batch and heads have.
    q, k, v = inputs(rng)
    cache = init_cache(2, 13, 2, 8, v_dim=5, dtype=FLOAT)  # fewer slots than the bias has diagonals
    terms = {
        "relative_bias": jnp.asarray(rng.normal(size=(4, 2 * 20 - 1))),
        "sinks": jnp.asarray(rng.normal(size=4)),
        "implementation": implementation,
    }
    bias = jnp.asarray(rng.normal(size=(2, 1, 23, 13)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, 23, 13)) < 0.7)
    starts, got = np.zeros(2, int), [[], []]
    for counts in ([2, 5], [4, 3], [1, 1]):
        size = max(counts)

        def cut(x, starts=starts, size=size):
            return jnp.stack([x[row, starts[row] : starts[row] + size] for row in (0, 1)])

        own = {
            name: jnp.moveaxis(cut(jnp.moveaxis(x, 2, 1)), 1, 2)
            for name, x in (("bias", bias), ("mask", mask))
        }
        lengths = jnp.asarray(counts, jnp.int32)
        out, cache = cached_attention(
            cut(q), cut(k), cut(v), cache, lengths=lengths, **own, **terms
        )
        for row in (0, 1):
            got[row].append(out[row, : counts[row]])
        starts = starts + counts
    for row, n in enumerate(starts):
        alone = (x[row : row + 1, :n] for x in (q, k, v))
        whole = {
            **terms,
            "relative_bias": terms["relative_bias"][:, 20 - n : 19 + n],
            "bias": bias[row : row + 1, :, :n, :n],
            "mask": mask[row : row + 1, :, :n, :n],
            "implementation": "dense",
        }
        expected = whole_pass(*alone, **whole)[0]
        np.testing.assert_allclose(np.concatenate(got[row]), expected, atol=1e-12)


@pytest.mark.parametrize("new", [1, 64])
def test_relative_bias_takes_no_memory_that_grows_with_both_lengths(rng, new):
    slots = 2**14
    cache = init_cache(2, slots, 2, 8)
    x = jnp.zeros((2, new, 2, 8), jnp.float32)
    relative = jnp.zeros((2, 2 * slots - 1), jnp.float32)

    def step(x, cache, relative):
        return cached_attention(
            x, x, x, cache, relative_bias=relative, implementation="blocked", block_kv=128
        )

    memory = jax.jit(step, donate_argnums=1).lower(x, cache, relative).compile().memory_analysis()
    # Rows of biases for each sequence and head; the logits would be 64 of them.
    copied = 0 if new == 1 else cache.key.nbytes + cache.value.nbytes
    assert memory.temp_size_in_bytes < copied + 6 * relative.nbytes


@pytest.mark.parametrize("window", [None, 2])
def test_gradient_of_a_relative_bias_is_that_of_the_whole_pass(rng, window):
    q, k, v = inputs(rng, length=4)
    cotangent = jnp.asarray(rng.normal(size=(2, 4, 4, 5)))
    relative = jnp.asarray(rng.normal(size=(4, 2 * 4 - 1)))
    cache = init_cache(2, 4, 2, 8, v_dim=5, window=window, dtype=FLOAT)

    def whole(relative):
        out = whole_pass(q, k, v, window, relative_bias=relative, implementation="dense")
        return (cotangent * out).sum()

    def cut(relative):
        options = {"relative_bias": relative, "implementation": "blocked"}
        return (cotangent * in_chunks([3, 1], q, k, v, cache, **options)[0]).sum()

    expected = jax.grad(whole)(relative)
    np.testing.assert_allclose(jax.grad(cut)(relative), expected, atol=1e-12)


def test_dropout_beside_a_relative_bias_differs_between_sequences(rng):
    x = jnp.broadcast_to(jnp.asarray(rng.normal(size=(1, 3, 1, 8)), jnp.float32), (2, 3, 1, 8))
    options = {"relative_bias": jnp.zeros(15, jnp.float32), "implementation": "dense"}
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        dropped, _ = cached_attention(
            x, x, x, init_cache(2, 8, 1, 8), dropout_rate=0.5, dropout_key=key, **options
        )
        assert (dropped[0] != dropped[1]).any()


def test_bias_of_numpy_s_float64_beside_a_relative_bias_is_float32_without_x64(rng):
    with jax.enable_x64(False):
        x = jnp.asarray(rng.normal(size=(2, 1, 1, 8)), jnp.float32)
        options = {"relative_bias": jnp.zeros(15, jnp.float32), "implementation": "dense"}
        bias, cache = rng.normal(size=(2, 1, 1, 8)), init_cache(2, 8, 1, 8)
        out, _ = cached_attention(x, x, x, cache, bias=bias, **options)
        expected, _ = cached_attention(x, x, x, cache, bias=bias, implementation="dense")
    np.testing.assert_allclose(out, expected, atol=1e-6)


# --- tokens taken out again ---


def test_trimmed_tokens_were_never_there(rng):
    q, k, v = inputs(rng)
    cache = init_cache(2, LENGTH, 2, 8, v_dim=5, dtype=FLOAT)
    before = append(cache, k[:, :9], v[:, :9])
    draft = append(before, k[:, 9:14] + jnp.inf, v[:, 9:14] * jnp.nan)  # and what they were is gone
    for n, refused in (
        (5, draft),
        (jnp.asarray([5, 3], jnp.int32), append(before, k[:, 9:14], v[:, 9:14])),
    ):
        trimmed = jax.jit(KVCache.trim)(refused, n)
        np.testing.assert_array_equal(refused.trim(n).lengths, trimmed.lengths)
        for row, length in enumerate(trimmed.lengths.tolist()):
            rows, new = slice(row, row + 1), slice(length, length + 2)
            one = jax.tree.map(lambda x, rows=rows: x[rows], trimmed)
            out, _ = cached_attention(q[rows, new], k[rows, new], v[rows, new], one)
            expected = whole_pass(q[rows], k[rows], v[rows])[:, new]
            np.testing.assert_allclose(out, expected, atol=1e-12)
    assert before.trim(0).lengths.tolist() == [9, 9]
    assert jax.jit(KVCache.trim)(before, 100).lengths.tolist() == [0, 0]


TRIMS = {
    "ring": (
        init_cache(2, 8, 1, 4, window=2),
        1,
        "`cache` must hold every token where it is trimmed, got a ring of 3 slots (window=2). "
        "The last tokens lie where older ones lay",
    ),
    "too many": (
        init_cache(2, 8, 1, 4),
        np.asarray([0, 1]),
        "`n` must be within 0 and the 0 tokens that are there, got 1 in sequence 1.",
    ),
    "far too many": (
        init_cache(2, 8, 1, 4),
        2**40,
        "`n` must be within 0 and the 0 tokens that are there, got 2147483647 in sequence 0.",
    ),
    "negative": (init_cache(2, 8, 1, 4), -1, "`n` must be at least 0, got -1."),
    "negatives": (
        init_cache(2, 8, 1, 4),
        np.asarray([0, -2]),
        "`n` must be within 0 and the 0 tokens that are there, got -2 in sequence 1.",
    ),
    "shape": (init_cache(2, 8, 1, 4), np.asarray([1]), "`n` must have shape () or (batch,) = (2,)"),
    "float": (init_cache(2, 8, 1, 4), 1.0, "`n` must be an array, got float."),
}


@pytest.mark.parametrize(("cache", "n", "message"), TRIMS.values(), ids=TRIMS)
def test_trims_that_cannot_be_are_refused(cache, n, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        cache.trim(n)


# --- a narrower cache ---


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("stored", ["bfloat16", "float8_e5m2"])
def test_cache_narrower_than_the_tokens_rounds_them_and_nothing_else(rng, window, stored):
    q, k, v = inputs(rng, dtype=jnp.float32)
    cache = init_cache(2, LENGTH, 2, 8, v_dim=5, window=window, dtype=stored)
    out, cache = in_chunks(MANY, q, k, v, cache)
    assert (out.dtype, cache.key.dtype) == (jnp.float32, stored)
    rounded = (x.astype(stored).astype(jnp.float32) for x in (k, v))
    np.testing.assert_allclose(out, whole_pass(q, *rounded, window), atol=2e-6)


# --- the end of the cache ---


def test_overrun_is_an_error_where_the_lengths_are_known(rng):
    q, k, v = inputs(rng, length=3)
    cache = init_cache(2, 4, 2, 8, v_dim=5, dtype=FLOAT)
    cache = append(cache, k[:, :2], v[:, :2], jnp.asarray([1, 2], jnp.int32))
    message = (
        "`cache` must have room for the new tokens, 4 in all, got 3 new ones after 2 in "
        "sequence 1. Give init_cache a larger `length`, or a `window`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cached_attention(q, k, v, cache)


def test_overrun_inside_jit_drops_the_tokens_beyond_the_end(rng):
    q, k, v = inputs(rng, length=6)
    cache = init_cache(2, 4, 2, 8, v_dim=5, dtype=FLOAT)
    outs, cache = in_chunks([3, 3], q, k, v, cache, implementation="dense")
    np.testing.assert_array_equal(cache.key, k[:, :4])
    np.testing.assert_array_equal(cache.value, v[:, :4])
    assert cache.lengths.tolist() == [4, 4]
    # The queries beyond the end see what is stored, all of it.
    expected = dot_product_attention(q, k[:, :4], v[:, :4], is_causal=True, implementation="dense")
    np.testing.assert_allclose(outs, expected, atol=1e-12)


# --- bad input ---


def call(**change):
    """A call that is right, but for what is changed."""
    x = jnp.ones((2, 3, 1, 4), jnp.float32)
    arguments = {"query": x, "key": x, "value": x, "cache": init_cache(2, 8, 1, 4), **change}
    return cached_attention(**arguments)


ONES = jnp.ones((2, 3, 1, 4), jnp.float32)
RELATIVE = jnp.ones((15,), jnp.float32)
BAD = {
    "dim": (
        {"key": ONES[..., :3]},
        "`key` must have the axes (batch, new, kv_heads, dim) = (2, 'new', 1, 4) of the cache, "
        "got (2, 3, 1, 3). Make the cache for these sizes with init_cache.",
    ),
    "batch": (
        {"value": ONES[:1]},
        "`value` must have the axes (batch, new, kv_heads, dim) = (2, 'new', 1, 4) of the cache, "
        "got (1, 3, 1, 4). Make the cache for these sizes with init_cache.",
    ),
    "length": (
        {"value": ONES[:, :2]},
        "`key` and `value` must agree in length, got key (2, 3, 1, 4) and value (2, 2, 1, 4). "
        "Pass both of the same tokens.",
    ),
    "dtype": (
        {"key": ONES.astype(jnp.bfloat16)},
        "`key` must have the dtype of the cache, float32, or a wider one, got bfloat16. "
        "Give `dtype` to init_cache.",
    ),
    "lengths' shape": (
        {"lengths": jnp.asarray([1], jnp.int32)},
        "`lengths` must have shape (batch,) = (2,), got shape (1,). One per sequence.",
    ),
    "lengths": (
        {"lengths": jnp.asarray([1, 4], jnp.int32)},
        "`lengths` must be within 0 and the array's length 3, got 4. "
        "Lengths count tokens per sequence.",
    ),
    "relative bias": (
        {"relative_bias": jnp.ones((1, 13), jnp.float32)},
        "`relative_bias` must have shape (heads, 2 * n - 1) with heads=1 and n at least the "
        "cache's capacity 8, or without the heads, got shape (1, 13). "
        "Entry j - i + n - 1 is that of positions i and j.",
    ),
    "relative bias of even length": (
        {"relative_bias": jnp.ones((16,), jnp.float32)},
        "`relative_bias` must have shape (heads, 2 * n - 1)",
    ),
    "relative bias without axes": (
        {"relative_bias": jnp.ones((), jnp.float32)},
        "`relative_bias` must have shape (heads, 2 * n - 1)",
    ),
    "query beside a relative bias": (
        {"query": ONES[0], "relative_bias": RELATIVE},
        "`query` must have the axes (batch, new, heads, dim), got shape (3, 1, 4).",
    ),
    "mask beside a relative bias": (
        {"mask": jnp.ones((3, 1, 3, 8), bool), "relative_bias": RELATIVE},
        "`mask` must broadcast to (b, h, i, j) = (2, 1, 3, 8), got shape (3, 1, 3, 8). "
        "An axis may be 1; that of the keys is as long as the cache.",
    ),
    "a list as mask beside a relative bias": (
        {"mask": [True], "relative_bias": RELATIVE},
        "`mask` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "ids beside a relative bias": (
        {"kv_segment_ids": jnp.ones((2, 3), jnp.int32), "relative_bias": RELATIVE},
        "`kv_segment_ids` must broadcast to (batch, length) = (2, 8), got shape (2, 3).",
    ),
    "bias of one token beside a relative bias": (
        {
            **dict.fromkeys(("query", "key", "value"), ONES[:, :1]),
            "bias": jnp.ones((1, 1, 7), jnp.float32),
            "relative_bias": RELATIVE,
        },
        "`bias` must broadcast to (b, h, i, j) = (2, 1, 1, 8), got shape (1, 1, 7).",
    ),
    "causal": (
        {"is_causal": False},
        "`is_causal` must be left out beside a cache, got bool False. "
        "Attention to a cache is always causal.",
    ),
    "window": (
        {"local_window_size": 3},
        "`local_window_size` must be left out beside a cache, got int 3. "
        "Give `window` to init_cache.",
    ),
    "mask of a ring": (
        {"cache": init_cache(2, 8, 1, 4, window=2), "mask": jnp.ones((2, 1, 3, 3), bool)},
        "`mask` must be None beside a ring, got bool[2, 1, 3, 3]. Make a cache without a window.",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_the_cache_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        call(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "`length` must be at least 1, got 0."),
        ({"window": -1}, "`window` must be at least 0, got -1. Use None for all tokens."),
        ({"dtype": "int8"}, "`dtype` must be a float, got int8. Keys and values are stored by"),
        ({"batch": 2.0}, "`batch` must be an integer known when the function is traced, got"),
    ],
)
def test_sizes_of_a_cache_are_checked(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        init_cache(**{"batch": 2, "length": 8, "kv_heads": 1, "dim": 4, **change})
