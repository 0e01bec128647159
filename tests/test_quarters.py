"""Large blocks on a CPU: head by head, and by quarters where they are partly masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import dot_product_attention, flash_attention, flash_cosine_sim_attention
from flash_attention_jax._engines import blocked_plan, online

B, N, T, S, D = 2, 4, 16, 24, 6
BLOCK = 8
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 3, (B, S))).astype(np.int32)
DENSE = RANDOM.random((B, N, T, S)) < 0.7
DENSE[:, :, 8:, :8] = True
DENSE[:, :, :8, 12:] = False
CALLS = {
    "causal": {"causal": True},
    "causal, start-aligned": {"causal": True, "q_offset": 0},
    "queries at an offset": {"causal": True, "q_offset": np.array([3, 8], np.int32)},
    "window": {"window": (5, 9)},
    "lengths": {"kv_lengths": np.array([24, 13], np.int32)},
    "segments": {"q_segment_ids": SEGMENTS[:, :T], "kv_segment_ids": SEGMENTS},
    "a mask per head": {"mask": DENSE},
    "a mask of keys": {"mask": DENSE[:, :1, :1]},
    "a mask that hides everything": {"mask": np.zeros((1, 1, T, S), bool)},
    "queries and keys of no length": {
        "q_lengths": np.array([16, 0], np.int32),
        "kv_lengths": np.array([0, 24], np.int32),
    },
    "sinks, slopes and dropout": {
        "causal": True,
        "sinks": np.linspace(-1, 1, N),
        "alibi_slopes": np.linspace(0.1, 1, N),
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(1),
    },
    "softcap": {"causal": True, "softcap": 3.0},
    "cosine": {"causal": True, "groups": 2},
    "heads that share a key head": {"causal": True, "kv_heads": 2},
}


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(blocked_plan, "LARGE", BLOCK * BLOCK // 2)
    jax.clear_caches()
    yield
    jax.clear_caches()


def run(options, implementation, key_nan=None):
    options = dict(options)
    kv_heads = options.pop("kv_heads", N)
    attention = flash_cosine_sim_attention if "groups" in options else flash_attention
    mask = options.pop("mask", None)
    shapes = (B, N, T, D), (B, kv_heads, S, D), (B, kv_heads, S, D + 2), (B, N, T, D + 2)
    q, k, v, ct = (np.random.default_rng(2).normal(size=shape) for shape in shapes)
    if key_nan is not None:
        k[key_nan], v[key_nan] = np.nan, np.nan

    def loss(q, k, v):
        out, lse = attention(
            q,
            k,
            v,
            mask,
            **options,
            return_lse=True,
            implementation=implementation,
            block_q=BLOCK,
            block_kv=BLOCK,
        )
        return (out * ct).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum(), (out, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("name", list(CALLS))
def test_quarters_give_what_the_oracle_gives(name):
    got, want = run(CALLS[name], "blocked"), run(CALLS[name], "dense")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, want)


@pytest.mark.usefixtures("everything_is_large")
def test_a_key_that_a_quarter_hides_may_be_nan():
    options = {"kv_lengths": np.array([24, 13], np.int32)}
    got, want = run(options, "blocked", np.s_[1, :, 13:]), run(options, "dense")
    keep = np.arange(S)[None, :] < options["kv_lengths"][:, None]
    np.testing.assert_allclose(got[0][1][0], want[0][1][0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got[1][0], want[1][0], rtol=0, atol=1e-12)
    for a, b in zip(got[1][1:], want[1][1:], strict=True):
        np.testing.assert_allclose(a, np.where(keep[:, None, :, None], b, 0), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("everything_is_large")
def test_under_vmap_each_example_has_its_lengths(rng):
    q, k = rng.normal(size=(2, 3, 1, 2, 16, 4))
    lengths = np.array([[16], [3], [9]], np.int32)

    def attend(implementation):
        def one(q, k, lengths):
            options = {"implementation": implementation, "block_q": BLOCK, "block_kv": BLOCK}
            return flash_attention(q, k, k, causal=True, kv_lengths=lengths, **options)

        return jax.vmap(one)(q, k, lengths)

    np.testing.assert_allclose(attend("blocked"), attend("dense"), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(("dtype", "budget"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_heads_last_in_lower_precision(rng, dtype, budget):
    q, k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(3, 1, 32, 2, 8)))

    def attend(implementation, *inputs):
        options = {"implementation": implementation, "block_q": BLOCK, "block_kv": BLOCK}
        return dot_product_attention(*inputs, is_causal=True, **options)

    want = attend("dense", *(x.astype(jnp.float64) for x in (q, k, v)))
    got = attend("blocked", q, k, v)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float64), want, rtol=0, atol=budget)


@pytest.mark.usefixtures("everything_is_large")
def test_second_derivatives_are_those_of_the_oracle(rng):
    q, k, ct = rng.normal(size=(3, 1, 2, 32, 8))

    def gradient(implementation):
        # In blocks of 8 LLVM aborts here, quarters or not (jaxlib 0.10.2: "Cannot select").
        options = {"implementation": implementation, "block_q": 16, "block_kv": 16}

        def loss(q):
            return jnp.sin(flash_attention(q, k, k, causal=True, **options)).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q) * ct).sum())(q)

    np.testing.assert_allclose(gradient("blocked"), gradient("dense"), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("everything_is_large")
def test_three_quarters_of_a_diagonal_block_are_visited_and_two_are_masked(monkeypatch):
    visits = []
    step = online.step

    def counted(call, arrays, tile, *rest, masked):
        size = tile.queries[1], tile.keys[1]
        jax.debug.callback(lambda: visits.append((*size, masked)))
        return step(call, arrays, tile, *rest, masked=masked)

    monkeypatch.setattr(online, "step", counted)
    q = jnp.ones((1, 2, 32, 4))
    flash_attention(
        q, q, q, causal=True, implementation="blocked", block_q=BLOCK, block_kv=BLOCK
    ).block_until_ready()
    jax.effects_barrier()
    heads, blocks = 2, 32 // BLOCK
    assert sorted(visits) == sorted(
        heads
        * (
            [(BLOCK, BLOCK, False)] * (blocks * (blocks - 1) // 2)
            + [(BLOCK // 2, BLOCK // 2, True)] * (2 * blocks)
            + [(BLOCK // 2, BLOCK // 2, False)] * blocks
        )
    )
