"""Rotary embedding: against rotations written with complex numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax.rotary import apply_rotary

LAYOUTS = ["heads_first", "heads_last"]


def oracle(x, positions, *, base=10000.0, scaling=1.0, dim=None, interleaved=False):
    """Rotates float64 (b, h, n, d) by positions (b, n), one complex factor per pair."""
    x = np.asarray(x, np.float64)
    dim = x.shape[-1] if dim is None else dim
    out = x.copy()
    for c in range(dim // 2):
        first, second = (2 * c, 2 * c + 1) if interleaved else (c, c + dim // 2)
        pair = x[..., first] + 1j * x[..., second]
        turn = np.exp(1j * np.asarray(positions, np.float64) / scaling * base ** (-2 * c / dim))
        pair = pair * turn[:, None, :]
        out[..., first], out[..., second] = pair.real, pair.imag
    return out


def random(shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def laid_out(x, layout):
    """(b, h, n, d) in the layout; its own inverse."""
    return x if layout == "heads_first" else x.swapaxes(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 2, 6])
def test_rotates_each_pair_as_a_complex_number(layout, interleaved, dim):
    x = random((2, 3, 11, 8))
    out = apply_rotary(
        laid_out(x, layout),
        dim=dim,
        interleaved=interleaved,
        base=500.0,
        scaling=4.0,
        layout=layout,
    )
    expected = oracle(
        x,
        np.tile(np.arange(11), (2, 1)),
        dim=dim,
        interleaved=interleaved,
        base=500.0,
        scaling=4.0,
    )
    np.testing.assert_allclose(laid_out(out, layout), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_defaults_are_base_10000_and_every_feature(interleaved):
    x = random((1, 1, 7, 16))
    out = apply_rotary(x, interleaved=interleaved)
    expected = oracle(x, np.arange(7)[None], base=10000.0, interleaved=interleaved)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 2, 3, 5, 4)])
def test_takes_any_number_of_leading_axes(shape):
    x = random(shape)
    expected = oracle(x.reshape(-1, 1, 5, 4), np.tile(np.arange(5), (x.size // 20, 1)))
    np.testing.assert_allclose(apply_rotary(x), expected.reshape(shape), rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4])
def test_dot_products_depend_on_the_distance_only(interleaved, dim):
    q, k = random((8,), seed=1), random((8,), seed=2)
    n = 23
    options = {"interleaved": interleaved, "dim": dim, "base": 100.0}
    qs = apply_rotary(jnp.tile(q, (n, 1)), **options)
    ks = apply_rotary(jnp.tile(k, (n, 1)), **options)
    logits = np.asarray(qs @ ks.T)
    for distance in range(-n + 1, n):
        diagonal = np.diagonal(logits, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=1e-12)
    # Not the trivial case in which no distance matters.
    assert np.ptp(logits[:, 0]) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "offset", [5, np.int64(5), jnp.int32(5), np.full(2, 5, np.uint8), jnp.full(2, 5, jnp.int64)]
)
def test_offset_gives_the_rest_of_the_longer_computation(layout, offset):
    x = random((2, 3, 11, 8))
    whole = laid_out(apply_rotary(laid_out(x, layout), layout=layout), layout)
    tail = laid_out(x[:, :, 5:], layout)
    np.testing.assert_array_equal(
        laid_out(apply_rotary(tail, offset=offset, layout=layout), layout), whole[:, :, 5:]
    )
    traced = jax.jit(lambda x, offset: apply_rotary(x, offset=offset, layout=layout))(tail, offset)
    np.testing.assert_allclose(laid_out(traced, layout), whole[:, :, 5:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offset_per_batch_moves_each_row_by_its_own(layout):
    x = random((3, 2, 5, 8))
    offsets = np.array([7, 0, 1000], np.int32)
    out = laid_out(apply_rotary(laid_out(x, layout), offset=offsets, layout=layout), layout)
    expected = oracle(x, offsets[:, None] + np.arange(5))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


def test_offset_per_batch_also_without_a_head_axis():
    x = random((3, 5, 8))
    offsets = jnp.array([7, 0, 1000], jnp.int32)
    expected = oracle(x[:, None], np.asarray(offsets)[:, None] + np.arange(5))[:, 0]
    np.testing.assert_allclose(apply_rotary(x, offset=offsets), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 3, np.array([3, 4], np.int32)])
@pytest.mark.parametrize(
    "positions",
    [
        np.array([0, 1, 0, 1, 2], np.int32),
        np.array([[4, 3, 2, 1, 0], [9, 9, 0, 0, 50]], np.int64),
        np.array([0.0, 0.5, 1.0, 1.5, 2.0], np.float32),
        np.array([[0.25] * 5, [-1.0, 0.0, 1.0, 2.0, 3.5]], np.float64),
    ],
    ids=["restarting", "per batch", "fractional", "fractional per batch"],
)
def test_positions_replace_counting_and_offset_adds_to_them(layout, offset, positions):
    x = random((2, 3, 5, 8))
    out = apply_rotary(laid_out(x, layout), positions=positions, offset=offset, layout=layout)
    where = np.broadcast_to(positions, (2, 5)) + np.reshape(offset, (-1, 1))
    np.testing.assert_allclose(laid_out(out, layout), oracle(x, where), rtol=0, atol=1e-12)


def test_scaling_divides_the_positions():
    x = random((1, 2, 8, 4))
    stretched = apply_rotary(x, scaling=4.0, offset=8)
    expected = apply_rotary(x, positions=np.arange(8, 16) / 4.0)
    np.testing.assert_allclose(stretched, expected, rtol=0, atol=1e-13)


def test_features_past_dim_pass_unchanged():
    x = random((2, 5, 8), jnp.float32)
    np.testing.assert_array_equal(apply_rotary(x, dim=6)[..., 6:], x[..., 6:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_result_has_the_dtype_of_x_and_angles_at_least_float32(dtype):
    # Far from 0, where an angle in the dtype of a bfloat16 `x` would be off by several radians.
    x = random((1, 2, 64, 32), dtype)
    out = apply_rotary(x, offset=10**6)
    assert out.dtype == dtype
    expected = oracle(x, 10**6 + np.arange(64)[None])
    rounding = np.abs(expected) * float(jnp.finfo(dtype).eps)
    angles = 4e6 * 2.0**-52 if dtype == jnp.float64 else FLOAT32
    assert np.all(np.abs(np.asarray(out, np.float64) - expected) <= rounding + angles * lengths(x))


FAR = [1000, 10**6, 2**24 - 64, 2**30, 2**31 - 65, -(10**6)]
FLOAT32 = 4e-7  # of a pair's length: the tables' 2e-7, and the rounding of a sum of two products


def lengths(x):
    """Of the pairs in halves, for each of their features."""
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return np.tile(np.hypot(first, second), 2)


@pytest.mark.parametrize(
    "given", ["offset", "NumPy", "concrete", "traced offset", "traced", "offset per batch"]
)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_float32_is_exact_at_any_position(far, given, base):
    x = random((2, 3, 64, 32), jnp.float32)
    steps = far + np.arange(64, dtype=np.int32)
    rotate = functools.partial(apply_rotary, base=base)
    out = {
        "offset": lambda: rotate(x, offset=far),
        "NumPy": lambda: rotate(x, positions=steps),
        "concrete": lambda: rotate(x, positions=jnp.asarray(steps)),
        "traced offset": lambda: jax.jit(lambda o: rotate(x, offset=o))(np.int32(far)),
        "traced": lambda: jax.jit(lambda p: rotate(x, positions=p))(np.stack([steps, steps])),
        "offset per batch": lambda: jax.jit(lambda o: rotate(x, offset=o))(np.full(2, far)),
    }[given]()
    error = np.abs(np.asarray(out, np.float64) - oracle(x, np.stack([steps] * 2), base=base))
    # Beyond 2**24 the frequency's own rounding, in float64, begins to show.
    assert np.all(error <= (FLOAT32 if abs(far) < 2**24 else 1e-6) * lengths(x))


@pytest.mark.parametrize("scaling", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("offset", [0, 10**6])
def test_fractional_positions_are_as_exact(offset, scaling, rng):
    x = random((1, 2, 64, 32), jnp.float32)
    steps = rng.uniform(-(10**6), 10**6, 64)
    with jax.enable_x64(False):  # NumPy's float64 keeps its digits all the same
        out = apply_rotary(x, positions=steps, offset=offset, scaling=scaling)
        short = apply_rotary(x, positions=jnp.asarray(steps), offset=offset, scaling=scaling)
    for found, where in ((out, steps), (short, steps.astype(np.float32))):
        expected = oracle(x, offset + where.astype(np.float64)[None], scaling=scaling)
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert np.all(error <= FLOAT32 * max(1, 1 / scaling) * lengths(x))


def test_gradient_is_as_exact_far_from_zero():
    x, cotangent = (random((1, 2, 64, 32), jnp.float32, seed=seed) for seed in (1, 2))
    rotate = functools.partial(apply_rotary, offset=jnp.int32(2**24 - 64))
    (dx,) = jax.vjp(rotate, x)[1](cotangent)
    expected = oracle(cotangent, -(2**24 - 64 + np.arange(64)[None]))
    error = np.abs(np.asarray(dx, np.float64) - expected)
    assert np.all(error <= FLOAT32 * lengths(cotangent))


def test_positions_have_gradients_far_from_zero_too():
    x, cotangent = (random((5, 8), jnp.float32, seed=seed) for seed in (1, 2))
    where = jnp.asarray(10**6 + np.array([0.25, 0.5, 3.0, 7.75, -2.5]), jnp.float32)

    def loss(where):
        return jnp.vdot(apply_rotary(x, positions=where), cotangent)

    def right(where):  # in float64
        return jnp.vdot(apply_rotary(x.astype(jnp.float64), positions=where), cotangent64)

    cotangent64 = cotangent.astype(jnp.float64)
    for nth in (jax.grad, lambda f: jax.grad(lambda p: jax.grad(f)(p).sum())):
        expected = nth(right)(where.astype(jnp.float64))
        np.testing.assert_allclose(nth(loss)(where), expected, rtol=0, atol=5e-6)
        assert np.abs(expected).min() > 1e-3


def test_position_that_is_nan_gives_nan_and_leaves_the_others_alone():
    x = random((2, 4), jnp.float32)
    for positions in (np.array([np.nan, 1.0]), jnp.array([jnp.nan, 1.0], jnp.float32)):
        out = apply_rotary(x, positions=positions)
        assert bool(jnp.isnan(out[0]).all())
        np.testing.assert_array_equal(out[1], apply_rotary(x)[1])


def test_layers_see_distances_only_far_from_zero():
    linen = pytest.importorskip("flash_attention_jax.linen", reason="needs flax")
    layer = linen.Attention(dim=16, heads=2, dim_head=16, causal=True, rotary=True)
    x = random((1, 12, 16), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    near = layer.apply(params, x)
    far = jax.jit(lambda p: layer.apply(params, x, positions=p))(10**6 + jnp.arange(12))
    np.testing.assert_allclose(far, near, rtol=0, atol=2e-6)


def test_offset_and_integer_positions_add_as_integers():
    # 2**24 + 1 is no float32: added as floats, the sum would be one position, a radian, too small.
    x = random((1, 1, 1, 2), jnp.float32)
    out = apply_rotary(x, offset=2**24 + 1, positions=np.array([-1], np.int32))
    np.testing.assert_allclose(out, oracle(x, np.array([[2**24]])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_turns_the_cotangent_back(layout, interleaved):
    # A rotation's transpose is its inverse, so rotating the gradient gives the cotangent.
    x = random((2, 3, 5, 8))
    options = {"offset": 9, "dim": 6, "interleaved": interleaved, "layout": layout}
    cotangent = laid_out(random((2, 3, 5, 8), seed=3), layout)
    _, pullback = jax.vjp(lambda x: apply_rotary(x, **options), laid_out(x, layout))
    (dx,) = pullback(cotangent)
    np.testing.assert_allclose(apply_rotary(dx, **options), cotangent, rtol=0, atol=1e-13)
    assert not np.allclose(dx, cotangent, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_is_finite_in_low_precision(dtype):
    x = random((2, 3, 5, 8), dtype)
    dx = jax.grad(lambda x: (apply_rotary(x, offset=100_000) * x).sum().astype(jnp.float32))(x)
    assert dx.dtype == dtype
    assert bool(jnp.isfinite(dx).all())


def test_vmap_over_offsets_equals_offset_per_batch():
    x = random((3, 2, 5, 8))
    offsets = jnp.array([7, 0, 1000], jnp.int32)
    out = jax.vmap(lambda x, offset: apply_rotary(x, offset=offset))(x, offsets)
    np.testing.assert_allclose(out, apply_rotary(x, offset=offsets), rtol=0, atol=1e-13)


def test_offset_does_not_retrace():
    traces = []

    @jax.jit
    def rotate(x, offset):
        traces.append(offset)
        return apply_rotary(x, offset=offset)

    for offset in range(3):
        rotate(random((2, 5, 8)), offset)
    assert len(traces) == 1


def test_numpy_arrays_and_empty_lengths_are_welcome():
    x = np.ones((2, 0, 4), np.float32)
    assert apply_rotary(x).shape == (2, 0, 4)
    np.testing.assert_array_equal(
        apply_rotary(np.ones((5, 4), np.float32)), apply_rotary(jnp.ones((5, 4), jnp.float32))
    )


X = np.ones((2, 3, 5, 8), np.float32)
BAD_CALLS = {
    "x not an array": (
        ([1.0, 2.0], {}),
        TypeError,
        "`x` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "x integer": (
        (np.ones((5, 8), np.int32), {}),
        TypeError,
        (
            "`x` must have one of the dtypes float64, float32, bfloat16, float16, got int32. "
            "Cast it: x.astype(...)."
        ),
    ),
    "x of rank 1": (
        (X[0, 0, 0], {}),
        ValueError,
        (
            "`x` must have at least 2 axes (..., n, d) with layout='heads_first', got shape (8,). "
            "Add the missing axes."
        ),
    ),
    "x of rank 2, heads last": (
        (X[0, 0], {"layout": "heads_last"}),
        ValueError,
        (
            "`x` must have at least 3 axes (..., n, h, d) with layout='heads_last', "
            "got shape (5, 8). Add the missing axes."
        ),
    ),
    "odd dimension": (
        (X[0, 0, :, :7], {}),
        ValueError,
        (
            "`x` must have an even last axis, got shape (5, 7). "
            "Give `dim`, an even number of features to rotate."
        ),
    ),
    "no dimension": (
        (X[..., :0], {}),
        ValueError,
        (
            "`x` must have an even last axis, got shape (2, 3, 5, 0). "
            "Give `dim`, an even number of features to rotate."
        ),
    ),
    "layout": (
        (X, {"layout": "bhnd"}),
        ValueError,
        "`layout` must be one of 'heads_first', 'heads_last', got 'bhnd'. Pass one of these.",
    ),
    "dim odd": (
        (X, {"dim": 3}),
        ValueError,
        (
            "`dim` must be even and at most the last axis of `x`, got 3 with `x` (2, 3, 5, 8). "
            "Choose how many of the first features to rotate."
        ),
    ),
    "dim too large": (
        (X, {"dim": 10}),
        ValueError,
        (
            "`dim` must be even and at most the last axis of `x`, got 10 with `x` (2, 3, 5, 8). "
            "Choose how many of the first features to rotate."
        ),
    ),
    "dim float": (
        (X, {"dim": 4.0}),
        TypeError,
        (
            "`dim` must be an integer known when the function is traced, got float 4.0. "
            "Pass a Python int."
        ),
    ),
    "base 0": (
        (X, {"base": 0}),
        ValueError,
        "`base` must be positive, got 0. The default is 10000.0.",
    ),
    "scaling negative": (
        (X, {"scaling": -2.0}),
        ValueError,
        "`scaling` must be positive, got -2.0. The default is 1.0.",
    ),
    "scaling nan": (
        (X, {"scaling": float("nan")}),
        ValueError,
        "`scaling` must be finite, got nan. Look for where it was computed.",
    ),
    "scaling text": (
        (X, {"scaling": "linear"}),
        TypeError,
        (
            "`scaling` must be a number known when the function is traced, got str 'linear'. "
            "Pass a Python float."
        ),
    ),
    "offset float": (
        (X, {"offset": 1.5}),
        TypeError,
        (
            "`offset` must be an integer or an integer array, got float 1.5. "
            "Fractional positions go in `positions`."
        ),
    ),
    "offset float array": (
        (X, {"offset": np.ones(2, np.float32)}),
        TypeError,
        (
            "`offset` must be an integer or an integer array, got float32[2]. "
            "Fractional positions go in `positions`."
        ),
    ),
    "offset of 33 bits": (
        (X, {"offset": 2**31}),
        ValueError,
        "`offset` must fit into 32 bits, got 2147483648. Count from a later token.",
    ),
    "offset per head": (
        (X, {"offset": np.ones(3, np.int32)}),
        ValueError,
        (
            "`offset` must have shape () or (2,) with `x` (2, 3, 5, 8), got (3,). "
            "Pass one offset, or one for each row of the batch (the first axis of `x`)."
        ),
    ),
    "offset per batch without one": (
        (X[0, 0], {"offset": np.ones(5, np.int32)}),
        ValueError,
        (
            "`offset` must have shape () with `x` (5, 8), got (5,). "
            "Pass one offset, or one for each row of the batch (the first axis of `x`)."
        ),
    ),
    "positions boolean": (
        (X, {"positions": np.ones(5, bool)}),
        TypeError,
        (
            "`positions` must be an integer or floating array, got bool[5]. "
            "Pass one position for each token."
        ),
    ),
    "positions list": (
        (X, {"positions": [0, 1]}),
        TypeError,
        (
            "`positions` must be an integer or floating array, got list [0, 1]. "
            "Pass one position for each token."
        ),
    ),
    "positions short": (
        (X, {"positions": np.arange(4, dtype=np.int32)}),
        ValueError,
        (
            "`positions` must have shape (5,) or (2, 5) with `x` (2, 3, 5, 8), got (4,). "
            "Pass one position for each token."
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_error_says_what_was_wrong_and_what_to_do(name):
    (x, options), error, message = BAD_CALLS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        apply_rotary(x, **options)


def test_traced_base_is_an_error():
    message = "`base` must be a number known when the function is traced, got float"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        jax.jit(lambda base: apply_rotary(X, base=base))(10.0)
