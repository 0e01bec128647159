"""The polynomial that stands for exp on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax._core.exponential import exponential

X = np.concatenate([np.linspace(-87.3, 87.9, 400_001), np.linspace(-1, 1, 200_001)])


def on_cpu(x):
    return exponential(jnp.asarray(x), "cpu")


@pytest.mark.parametrize("run", [on_cpu, jax.jit(on_cpu)], ids=["eager", "jit"])
def test_it_is_within_two_units_in_the_last_place(run):
    x = X.astype(np.float32)
    error = np.asarray(run(x), np.float64) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 2e-7


def test_what_is_too_small_is_zero():
    x = np.append(-np.geomspace(87.4, 3e38, 10_001), -np.inf).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(on_cpu)(x), 0)


def test_nan_stays_nan_whatever_its_bits():
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F8000FF, 0xFFFFFFFF], np.uint32)
    assert np.isnan(jax.jit(on_cpu)(bits.view(np.float32))).all()


def test_it_is_its_own_derivative_in_every_order_and_mode():
    x = jnp.float32(-1.25)
    value = on_cpu(x)
    for derivative in (
        jax.grad(on_cpu),
        jax.jacfwd(jax.grad(on_cpu)),
        jax.grad(jax.jacfwd(jax.grad(on_cpu))),
    ):
        np.testing.assert_array_equal(derivative(x), value)


@pytest.mark.parametrize(("dtype", "platform"), [("float64", "cpu"), ("float32", "gpu")])
def test_elsewhere_it_is_exp(dtype, platform):
    x = jnp.asarray(X[:100], dtype)
    np.testing.assert_array_equal(exponential(x, platform), jnp.exp(x))
