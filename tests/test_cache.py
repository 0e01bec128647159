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
        "`key` must have the dtype of the cache, float32, got bfloat16. "
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
        ({"batch": 2.0}, "`batch` must be an integer known when the function is traced, got"),
    ],
)
def test_sizes_of_a_cache_are_checked(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        init_cache(**{"batch": 2, "length": 8, "kv_heads": 1, "dim": 4, **change})
