"""What a changing Python number compiles, and what is said of it."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from flash_attention_jax import attention, dot_product_attention, flash_attention
from flash_attention_jax._api import run


def queries(length):
    return jax.random.normal(jax.random.key(0), (length, 4), jnp.float32)


def compilations(function):
    before = run._run._cache_size()
    function()
    return run._run._cache_size() - before


@pytest.mark.parametrize("implementation", ["blocked", "checkpointed", "dense"])
def test_changing_offset_compiles_once(implementation):
    q = queries(21)

    def decode(offsets):
        options = {"causal": True, "implementation": implementation}
        return [flash_attention(q, q, q, q_offset=offset, **options)[0] for offset in offsets]

    decode([0])
    assert compilations(lambda: decode([1, -3, 7])) == 0
    found = decode([0, 5, 20])
    want = [attention(q[:1], q[: n + 1], q[: n + 1])[0] for n in (0, 5, 20)]
    assert jnp.allclose(jnp.stack(found), jnp.stack(want), atol=1e-5)


def test_third_scale_is_told_to_be_an_array():
    q = queries(22)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(q, q, q, scale=0.5)
        flash_attention(q, q, q, scale=0.25)
        flash_attention(q, q, q, scale=0.25)
    with pytest.warns(UserWarning, match=r"`scale` took 3 values .* jnp\.asarray\(scale\)"):
        flash_attention(q, q, q, scale=0.125)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(q, q, q, scale=0.0625)  # said once


def test_gradient_counts_and_jit_does_not():
    q = queries(23)

    def loss(q, rate):
        options = {"dropout_rate": rate, "dropout_key": jax.random.key(0)}
        return dot_product_attention(q[:, None], q[:, None], q[:, None], **options).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.1, 0.2, 0.3, 0.4):
            jax.jit(jax.grad(loss), static_argnums=1)(q, rate)
        jax.grad(loss)(q, 0.5)
        jax.grad(loss)(q, 0.6)
    with pytest.warns(UserWarning, match=r"`dropout_rate` took 3 values .* Keep it fixed"):
        jax.grad(loss)(q, 0.7)


def test_scale_as_an_array_compiles_once():
    q = queries(24)

    def anneal():
        for scale in (0.1, 0.2, 0.3, 0.4):
            flash_attention(q, q, q, scale=jnp.asarray(scale))

    anneal()
    assert compilations(anneal) == 0
