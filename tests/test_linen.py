"""The Flax linen shell against Flax's own layers and against the formula written out."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flash_attention_jax
from flash_attention_jax.linen import Attention, attention_fn, make_attention_fn

FLOAT = jnp.float64


def layers(**options):
    """The same layer twice: with Flax's attention and with ours."""
    options = {"num_heads": 4, "param_dtype": FLOAT, **options}
    return (
        nn.MultiHeadDotProductAttention(**options),
        nn.MultiHeadDotProductAttention(**options, attention_fn=attention_fn),
    )


def assert_layers_agree(rng, inputs, layers=layers, call=None, **options):
    """Same parameters, same outputs, and the same gradients for a random cotangent."""
    theirs, ours = layers(**options)
    call = call or {}
    params = theirs.init(jax.random.key(0), *inputs, **call)
    expected, pull_back = jax.vjp(lambda p, *x: theirs.apply(p, *x, **call), params, *inputs)
    actual, our_pull_back = jax.vjp(lambda p, *x: ours.apply(p, *x, **call), params, *inputs)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), expected.dtype)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11),
        our_pull_back(cotangent),
        pull_back(cotangent),
    )


def array(rng, *shape, dtype=FLOAT):
    return jnp.asarray(rng.normal(size=shape), dtype)


def test_self_attention_agrees_with_flax(rng):
    assert_layers_agree(rng, [array(rng, 2, 11, 32)])


def test_cross_attention_agrees_with_flax(rng):
    assert_layers_agree(rng, [array(rng, 2, 7, 32), array(rng, 2, 13, 32)])


@pytest.mark.parametrize("dtype", ["float32", "bool", "int32", "bfloat16"])
def test_causal_mask_of_any_dtype_agrees_with_flax(rng, dtype):
    x = array(rng, 2, 11, 32)
    mask = nn.make_causal_mask(x[..., 0], dtype=jnp.dtype(dtype))
    assert mask.dtype == dtype
    assert_layers_agree(rng, [x], call={"mask": mask})


def test_padding_mask_agrees_with_flax(rng):
    x = array(rng, 2, 11, 32)
    tokens = jnp.arange(11, dtype=jnp.int32) < jnp.asarray([[11], [4]], jnp.int32)
    mask = nn.make_attention_mask(jnp.ones_like(tokens), tokens)
    assert mask.dtype == jnp.float32
    assert_layers_agree(rng, [x], call={"mask": mask})


@pytest.mark.parametrize("mask_axes", [(3, 2, 1), (2, 1), (1, 1), (1,), ()])
def test_any_number_of_batch_axes_agrees_with_flax(rng, mask_axes):
    x = array(rng, 3, 2, 5, 32)
    mask = jnp.asarray(rng.random((*mask_axes, 5, 5)) < 0.5) | jnp.eye(5, dtype=bool)
    assert_layers_agree(rng, [x], call={"mask": mask})


def test_no_batch_axis_agrees_with_flax(rng):
    assert_layers_agree(rng, [array(rng, 9, 32)])


@jax.numpy_dtype_promotion("standard")  # Flax's own layers promote
def test_query_key_norm_agrees_with_flax(rng):
    assert_layers_agree(rng, [array(rng, 2, 11, 32)], normalize_qk=True)


def test_bfloat16_agrees_with_flax_to_its_rounding(rng):
    x = array(rng, 2, 11, 32, dtype=jnp.bfloat16)
    theirs, ours = layers(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    params = theirs.init(jax.random.key(0), x)
    actual = ours.apply(params, x)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        actual.astype(jnp.float32), theirs.apply(params, x).astype(jnp.float32), atol=0.03
    )


@jax.numpy_dtype_promotion("standard")
def test_decoding_agrees_with_the_whole_causal_pass(rng):
    x = array(rng, 2, 6, 32)
    _, layer = layers()
    _, decoder = layers(decode=True)
    params = layer.init(jax.random.key(0), x)
    whole = layer.apply(params, x, mask=nn.make_causal_mask(x[..., 0]))
    cache = decoder.init(jax.random.key(0), x)["cache"]
    for i in range(6):
        out, cache = decoder.apply({**params, "cache": cache}, x[:, i : i + 1], mutable="cache")
        cache = cache["cache"]
        np.testing.assert_allclose(out, whole[:, i : i + 1], atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 4, 1, 9), (4, 7, 9), (7, 9)])
def test_bias_agrees_with_flax(rng, shape):
    q, k, v = array(rng, 2, 7, 4, 8), array(rng, 2, 9, 4, 8), array(rng, 2, 9, 4, 5)
    bias = array(rng, *shape)
    expected, pull_back = jax.vjp(lambda b: nn.dot_product_attention(q, k, v, b), bias)
    actual, our_pull_back = jax.vjp(lambda b: attention_fn(q, k, v, b), bias)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    cotangent = array(rng, *expected.shape)
    np.testing.assert_allclose(our_pull_back(cotangent)[0], pull_back(cotangent)[0], atol=1e-12)


def test_deterministic_switches_dropout_off(rng):
    x = array(rng, 2, 11, 32)
    assert_layers_agree(rng, [x], dropout_rate=0.5, call={"deterministic": True})


def test_dropout_follows_its_key_and_keeps_the_mean(rng):
    # Equal logits and one-hot values: the outputs are the dropped weights, times their number.
    q, k = jnp.zeros((8, 16, 2, 4), jnp.float32), jnp.zeros((8, 16, 2, 4), jnp.float32)
    v = jnp.broadcast_to(16 * jnp.eye(16, dtype=jnp.float32)[None, :, None], (8, 16, 2, 16))
    first, again, other = (
        attention_fn(q, k, v, dropout_rng=jax.random.key(seed), dropout_rate=0.25)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    np.testing.assert_allclose(np.unique(first.round(5)), [0.0, 1 / 0.75], atol=1e-5)
    assert abs(float(first.mean()) - 1.0) < 0.05


def test_layer_draws_dropout_from_flax(rng):
    x = array(rng, 2, 11, 32)
    _, layer = layers(dropout_rate=0.5, deterministic=False)
    rngs = [{"params": jax.random.key(0), "dropout": jax.random.key(seed)} for seed in (1, 2)]
    params = layer.init(rngs[0], x)
    first, again, other = (layer.apply(params, x, rngs=r) for r in (rngs[0], rngs[0], rngs[1]))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_made_attention_fn_has_the_options_of_the_function(rng):
    q, k, v = (array(rng, 2, 9, 4, 8) for _ in range(3))
    options = {"similarity": "cosine", "scale": 4.0, "is_causal": True, "logits_soft_cap": 3.0}
    made = make_attention_fn(window=(2, 0), **options)
    expected = flash_attention_jax.dot_product_attention(
        q, k, v, local_window_size=(2, 0), **options
    )
    np.testing.assert_array_equal(made(q, k, v), expected)
    assert (np.abs(np.asarray(attention_fn(q, k, v)) - np.asarray(expected)) > 1e-3).any()


def test_made_attention_fn_runs_in_a_layer_with_a_mask_from_flax(rng):
    x = array(rng, 2, 11, 32)
    mask = nn.make_causal_mask(x[..., 0])

    def both(**options):
        options = {"num_heads": 4, "param_dtype": FLOAT, **options}
        masked = nn.MultiHeadDotProductAttention(
            **options, attention_fn=lambda q, k, v, mask: attention_fn(q, k, v, mask=mask)
        )
        made = make_attention_fn(is_causal=True)
        return masked, nn.MultiHeadDotProductAttention(**options, attention_fn=made)

    assert_layers_agree(rng, [x], layers=both, call={"mask": mask})


def test_sown_weights_are_refused(rng):
    _, layer = layers()
    x = array(rng, 2, 5, 32)
    with pytest.raises(NotImplementedError) as error:
        layer.init(jax.random.key(0), x, sow_weights=True)
    assert str(error.value) == (
        "`sow_weights` must be False with this attention_fn, got True. The weights never exist "
        "as an array: use flax.linen.dot_product_attention to look at them."
    )


def test_another_einsum_is_refused(rng):
    q = array(rng, 2, 5, 4, 8)
    with pytest.raises(NotImplementedError, match="`qk_attn_weights_einsum` must be None"):
        attention_fn(q, q, q, qk_attn_weights_einsum=jnp.einsum)


def test_mask_with_too_many_axes_is_refused(rng):
    q = array(rng, 2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"^`mask` must broadcast to \(2, 4, 5, 5\), got shape"):
        attention_fn(q, q, q, mask=jnp.ones((1, 2, 4, 5, 5), bool))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_is_its_formula(rng, similarity, causal, rotary):
    x = array(rng, 2, 7, 24)
    layer = Attention(
        dim=24,
        heads=3,
        dim_head=8,
        causal=causal,
        similarity=similarity,
        rotary=rotary,
        param_dtype=FLOAT,
    )
    actual, variables = layer.init_with_output(jax.random.key(0), x)
    weights = variables["params"]
    q, k, v = jnp.einsum("btc,cphd->pbhtd", x, weights["qkv"]["kernel"])
    if rotary:
        q, k = (
            flash_attention_jax.rotary.apply_rotary(q),
            flash_attention_jax.rotary.apply_rotary(k),
        )
    if similarity == "cosine":
        q, k = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    logits = jnp.einsum("bhid,bhjd->bhij", q, k) * (10.0 if similarity == "cosine" else 8**-0.5)
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones((7, 7), bool)), logits, -jnp.inf)
    out = jnp.einsum("bhij,bhjd->bihd", jax.nn.softmax(logits), v)
    expected = jnp.einsum("bihd,hdc->bic", out, weights["out"]["kernel"])
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_attention_refuses_an_input_of_another_dimension(rng):
    message = (
        "`x` must have 24 features, got shape (2, 7, 32). "
        "Set the `dim` of this Attention to the features of its input."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Attention(dim=24).init(jax.random.key(0), array(rng, 2, 7, 32))


def run_python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_absent_flax_is_a_clear_error_of_the_shell_alone():
    code = """
import sys
sys.modules["flax"] = None
import flash_attention_jax
for name in ("linen", "transformer", "train"):
    try:
        __import__(f"flash_attention_jax.{name}")
    except ImportError as error:
        print(error)
"""
    assert run_python(code).splitlines() == [
        "flash_attention_jax.linen needs flax: pip install 'flash-attention-jax[flax]'",
        "flash_attention_jax.transformer needs flax: pip install 'flash-attention-jax[train]'",
        "flash_attention_jax.train needs flax: pip install 'flash-attention-jax[train]'",
    ]


def test_broken_flax_is_a_clear_error_with_its_cause(tmp_path):
    (tmp_path / "flax.py").write_text("import jax\njax.something_that_went_away\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import flash_attention_jax.linen
except ImportError as error:
    print(error)
"""
    assert run_python(code) == (
        "flash_attention_jax.linen needs flax, and it does not import here: AttributeError: "
        "module 'jax' has no attribute 'something_that_went_away'. "
        "Try pip install 'flash-attention-jax[flax]' --upgrade"
    )
