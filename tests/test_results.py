"""What an engine leaves besides out: lse and what it lacks, for merging, backward and remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import (
    attention,
    dot_product_attention,
    flash_attention,
    flash_cosine_sim_attention,
    memory_efficient_attention,
    merge_attention,
)
from flash_attention_jax._conformance.claims import equations
from flash_attention_jax._core.results import lse_of
from flash_attention_jax._engines import blocked_backward
from flash_attention_jax._flax.attention_fn import attention_fn

ENGINES = ("blocked", "checkpointed", "dense")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# --- lse and what it lacks ---


@pytest.mark.parametrize("m", [0.0, 1.0, -40.0, 3e4, 1e9, -1e10, -3.4e38, -np.inf])
def test_lse_and_its_rest_are_the_log_of_the_denominator(m):
    l = jnp.array([1.0, 1.5, 7.0, 1e6, 3e-9], jnp.float32)
    lse, low = jax.jit(lse_of)(jnp.full_like(l, m), l)
    base = 0.0 if m == -np.inf else np.float64(np.float32(m))
    # lse is a few float32 numbers from the base, so its difference to it is exact in float64.
    rest = (np.asarray(lse, np.float64) - base) + np.asarray(low, np.float64)
    np.testing.assert_allclose(rest, np.log(np.asarray(l, np.float64)), rtol=1e-7, atol=3e-7)


def test_row_without_a_key_has_no_denominator():
    lse, low = lse_of(jnp.array([-jnp.inf]), jnp.array([0.0]))
    assert (lse[0], low[0]) == (-jnp.inf, 0)


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(("queries", "keys"), [(256, 8), (64, 20)])
def test_gradients_of_ordinary_logits_are_as_exact_as_the_plain_formula(
    implementation, queries, keys
):
    # Logits of about 18 in float32: the last bit of lse or of a product that is added up in another
    # order than the forward's shows. The mean over seeds: single errors are chance.
    engine = functools.partial(flash_attention, implementation=implementation)
    errors = np.mean([_errors(engine, queries, keys, seed) for seed in range(8)], axis=0)
    plain = np.mean([_errors(attention, queries, keys, seed) for seed in range(8)], axis=0)
    theirs = np.mean([_errors(_jax_nn, queries, keys, seed) for seed in range(8)], axis=0)
    assert (errors[1:] <= 1.3 * np.maximum(plain, theirs)[1:]).all(), (errors, plain, theirs)


def _jax_nn(q, k, v):
    q, k, v = (x[:, None] for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v)[:, 0]


def _errors(function, queries, keys, seed):
    """Largest errors of dq, dk and dv against float64."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.uniform(1, 2, (n, 64)).astype(np.float32) for n in (queries, keys, keys))
    dout = rng.standard_normal(q.shape).astype(np.float32)
    found = _pulled(function, q, k, v, dout)
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    logits = q @ k.T / 8
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (p * dp).sum(1, keepdims=True)) / 8
    want = ds @ k, ds.T @ q, p.T @ dout
    return [np.abs(np.asarray(x) - y).max() for x, y in zip(found, want, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _pulled(function, q, k, v, dout):
    return jax.vjp(function, q, k, v)[1](dout)


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(("size", "scale"), [(1e2, None), (1e3, None), (1e12, None), (1e3, 0.3)])
def test_large_activations_keep_the_sum_of_the_probabilities(implementation, size, scale):
    # Logits of 4e4, 4e6 and 4e24: were they rounded otherwise in the backward, rows of p would not
    # add up to 1. 300 queries and 100 keys in two kinds of blocks.
    q, k, v = normal(300, 128) * size, normal(100, 128, seed=1) * size, normal(100, 16, seed=2)
    dout = normal(300, 16, seed=3)
    scale = None if scale is None else jnp.float32(scale)
    engine = functools.partial(
        flash_attention, implementation=implementation, block_q=128, scale=scale
    )
    dq, dk, dv = _pulled(engine, q, k, v, dout)
    np.testing.assert_allclose(dv.sum(0), dout.sum(0), rtol=0, atol=1e-4)
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("implementation", ENGINES)
def test_float64_gradients_of_float32_terms_are_rounded_once(implementation):
    rng = np.random.default_rng(0)
    terms = {
        "scale": rng.uniform(0.1, 0.4, 2),
        "alibi_slopes": rng.uniform(0.01, 0.1, 2),
        "relative_bias": rng.standard_normal((2, 119)),
        "sinks": rng.standard_normal(2),
        "bias": rng.standard_normal((1, 1, 60, 1)),
    }
    narrow = {name: x.astype(np.float32) for name, x in terms.items()}
    q, k, v, dout = (rng.standard_normal((2, 2, 60, 8)) for _ in range(4))

    def gradients(terms, dtype):
        def run(terms):
            options = {"implementation": implementation, "block_q": 7, "block_kv": 11}
            terms = {name: x.astype(dtype) for name, x in terms.items()}
            return flash_attention(q, k, v, causal=True, **options, **terms)

        return jax.jit(lambda terms, dout: jax.vjp(run, terms)[1](dout)[0])(terms, dout)

    with jax.enable_x64(True):
        found = gradients(narrow, np.float32)
        want = gradients({name: x.astype(np.float64) for name, x in narrow.items()}, np.float64)
        for name, x in want.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], x.astype(np.float32), err_msg=name)


def _heads_last(function):
    def run(q, k, v, bias):
        return function(q[:, None], k[:, None], v[:, None], bias)[:, 0]

    return run


FUNCTIONS = {
    "flash_attention": lambda q, k, v, bias: flash_attention(q, k, v, bias=bias),
    "dot_product_attention": _heads_last(dot_product_attention),
    "attention_fn": lambda q, k, v, bias: attention_fn(
        q[None, :, None], k[None, :, None], v[None, :, None], bias
    )[0, :, 0],
    "memory_efficient_attention": lambda q, k, v, bias: memory_efficient_attention(
        q, k, v, attn_bias=bias
    ),
    "flash_cosine_sim_attention": lambda q, k, v, bias: flash_cosine_sim_attention(
        q, k, v, attn_bias=bias
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("offset", [-1e9, -1e10, float(np.finfo(np.float32).min), 1e9])
def test_keys_of_a_row_with_an_offset_share_its_gradient(name, offset):
    q, k, v = normal(2, 4) * 0, normal(11, 4) * 0, normal(11, 4)
    bias = jnp.full((2, 11), offset, jnp.float32)
    dv = jax.grad(lambda v: FUNCTIONS[name](q, k, v, bias).sum())(v)
    np.testing.assert_allclose(dv, np.full((11, 4), 2 / 11), rtol=1e-6)


# --- merging ---


@pytest.mark.parametrize("offset", [-1e9, 1e9, -3e38])
def test_parts_of_one_huge_lse_merge_to_their_mean(offset):
    outs, lse = normal(2, 5, 4), jnp.full((5,), offset, jnp.float32)
    out, merged = merge_attention((outs[0], lse), (outs[1], lse))
    np.testing.assert_allclose(out, outs.mean(0), rtol=1e-6)
    assert (merged == lse).all()


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_part_without_keys_adds_nothing_whatever_its_out_holds(fill):
    out, lse = normal(5, 4), normal(5)
    nothing = jnp.full((5, 4), fill, jnp.float32), jnp.full((5,), -jnp.inf, jnp.float32)

    def loss(out, lse, other):
        merged, total = merge_attention((out, lse), (other, nothing[1]))
        return (merged * normal(5, 4, seed=1)).sum() + total.sum()

    merged, total = merge_attention((out, lse), nothing)
    assert (merged == out).all()
    assert (total == lse).all()
    dout, dlse, dother = jax.grad(loss, argnums=(0, 1, 2))(out, lse, nothing[0])
    np.testing.assert_allclose(dout, normal(5, 4, seed=1), rtol=1e-6)
    assert np.isfinite(dlse).all()
    assert (dother == 0).all()
    none, least = merge_attention(nothing, nothing)
    assert (none == 0).all()
    assert (least == -jnp.inf).all()


# --- remat by name ---


@pytest.mark.parametrize("jitted", [False, True])
def test_policy_that_keeps_the_results_by_name_runs_no_forward_again(jitted):
    q = k = v = normal(2, 64, 8)

    def products(policy):
        def layer(q, k, v):
            out = flash_attention(jnp.sin(q), k, v, causal=True, implementation="blocked")
            return jnp.cos(out).sum()

        layer = jax.checkpoint(jax.jit(layer) if jitted else layer, policy=policy)
        compiled = jax.jit(jax.grad(layer, argnums=(0, 1, 2)))
        jaxpr = jax.make_jaxpr(compiled)(q, k, v).jaxpr
        return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))

    policies = jax.checkpoint_policies
    everything = products(policies.everything_saveable)
    named = products(policies.save_only_these_names("flash_attention_out", "flash_attention_lse"))
    assert named == everything
    assert named < products(policies.nothing_saveable)


# --- long calls ---


@pytest.mark.parametrize("small", [2**22, 0], ids=["a copy of dout", "low in each logit"])
def test_long_calls_and_short_ones_give_the_gradients_of_dense(small, rng, monkeypatch):
    monkeypatch.setattr(blocked_backward, "_SMALL", small)
    jax.clear_caches()  # so that what is traced reads it, here and not in the next test
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((2, 2, 9, 4), np.float32)) for _ in range(4)
    )
    weights = weights.at[..., 8, 0].set(jnp.nan)  # of the row that the bias hides
    offsets = jnp.asarray([0, -1e9, 1e9, -1e4, 1e6, 0, -1e10, 3, -jnp.inf], jnp.float32)
    rows = (jnp.abs(offsets) < 1e3).astype(jnp.float32)[:, None]  # the others round their logits
    bias = jnp.broadcast_to(offsets[:, None], (1, 1, 9, 9))

    def gradients(implementation, bias, order=1):
        def loss(q, k, v):
            out = flash_attention(q, k, v, bias=bias, implementation=implementation)
            return (jnp.sin(out) * weights).sum()

        first = jax.grad(loss, (0, 1, 2))
        if order == 1:
            return first(q * rows, k, v)
        return jax.grad(lambda *arrays: sum((x**2).sum() for x in first(*arrays)), (0, 1, 2))(
            q * rows, k, v
        )

    try:
        for order in (1, 2):
            got, want = gradients("blocked", bias, order), gradients("dense", bias, order)
            for x, y in zip(got, want, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))
    finally:
        jax.clear_caches()
