"""The Flax linen shell against Flax's own layers and against the formula written out."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flash_attention_jax
from flash_attention_jax._flax.layer import _alibi_slopes
from flash_attention_jax.linen import Attention, attention_fn, make_attention_fn

FLOAT = jnp.float64


def layers(**options):
    """The same layer twice: with Flax's attention and with ours."""
    options = {"num_heads": 4, "param_dtype": FLOAT, **options}
    return (
        nn.MultiHeadDotProductAttention(**options),
        nn.MultiHeadDotProductAttention(**options, attention_fn=attention_fn),
    )


def assert_same(rng, function, other, inputs, gradients=True):
    """Outputs, and the gradients of all inputs for one random cotangent."""
    if not gradients:
        actual, expected = jax.jit(lambda inputs: (function(*inputs), other(*inputs)))(inputs)
        np.testing.assert_allclose(actual, expected, atol=1e-11)
        return
    shape = jax.eval_shape(function, *inputs).shape
    cotangent = jnp.asarray(rng.normal(size=shape), FLOAT)

    @jax.jit
    def both(inputs):
        return tuple(
            (out, pull_back(cotangent))
            for out, pull_back in (jax.vjp(f, *inputs) for f in (function, other))
        )

    actual, expected = both(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), actual, expected)


def assert_layers_agree(rng, inputs, layers=layers, call=None, gradients=True, **options):
    """Same parameters, same outputs, and the same gradients for a random cotangent."""
    theirs, ours = layers(**options)
    call = call or {}
    params = theirs.init(jax.random.key(0), *inputs, **call)
    assert_same(
        rng,
        lambda p, *x: ours.apply(p, *x, **call),
        lambda p, *x: theirs.apply(p, *x, **call),
        (params, *inputs),
        gradients,
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
    assert_layers_agree(rng, [x], call={"mask": mask}, gradients=dtype == "float32")


def test_padding_mask_agrees_with_flax(rng):
    x = array(rng, 2, 11, 32)
    tokens = jnp.arange(11, dtype=jnp.int32) < jnp.asarray([[11], [4]], jnp.int32)
    mask = nn.make_attention_mask(jnp.ones_like(tokens), tokens)
    assert mask.dtype == jnp.float32
    assert_layers_agree(rng, [x], call={"mask": mask})


@pytest.mark.parametrize("mask_axes", [(3, 2, 1), (2, 1), ()])
def test_any_number_of_batch_axes_agrees_with_flax(rng, mask_axes):
    x = array(rng, 3, 2, 5, 32)
    mask = jnp.asarray(rng.random((*mask_axes, 5, 5)) < 0.5) | jnp.eye(5, dtype=bool)
    assert_layers_agree(rng, [x], call={"mask": mask}, gradients=False)


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
    assert_same(
        rng,
        lambda b: attention_fn(q, k, v, b),
        lambda b: nn.dot_product_attention(q, k, v, b),
        (bias,),
    )


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


def dropped(key, shape, **options):
    """Which weights the attention_fn keeps, (batch, heads, i, j); values are one-hot."""
    batch, i, heads, j = shape
    q, k = (jnp.zeros((batch, n, heads, 4), FLOAT) for n in (i, j))
    v = jnp.broadcast_to(jnp.eye(j, dtype=FLOAT)[None, :, None], (batch, j, heads, j))
    out = attention_fn(q, k, v, dropout_rng=key, dropout_rate=0.5, **options)
    return jnp.moveaxis(out, 2, 1) > 0


def test_dropout_is_broadcast_as_flax_does_it(rng):
    key, shape = jax.random.key(5), (3, 40, 2, 50)
    shared, own = (dropped(key, shape, broadcast_dropout=flag) for flag in (True, False))
    assert (shared == shared[:1, :1]).all()
    assert float(shared[0, 0].mean()) == pytest.approx(0.5, abs=0.03)
    for other in (own[1, 0], own[0, 1]):
        assert float((own[0, 0] == other).mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_is_flax_s_with_other_bits(rng, broadcast):
    # With the mask read off, Flax's formula gives the same outputs and gradients, whatever else
    # there is.
    key, kv_heads = jax.random.key(5), 2
    q, k, v = array(rng, 3, 7, 4, 8), *(array(rng, 3, 9, kv_heads, 8) for _ in range(2))
    kept = dropped(key, (3, 7, 4, 9), broadcast_dropout=broadcast)
    terms = {
        "bias": array(rng, 3, 4, 7, 9),
        "mask": jnp.asarray(rng.random((1, 4, 1, 9)) < 0.8),
        "scale": array(rng, 4),
        "sinks": array(rng, 4),
        "relative_bias": array(rng, 1, 15),
        "alibi_slopes": array(rng, 4),
        "q_offset": jnp.asarray(rng.integers(0, 5, (3, 7)), jnp.int32),
        "key_value_seq_lengths": jnp.asarray([9, 8, 7], jnp.int32),
        "q_segment_ids": jnp.asarray(rng.integers(0, 2, (3, 7)), jnp.int32),
        "kv_segment_ids": jnp.asarray(rng.integers(0, 2, (1, 9)), jnp.int32),
        "is_causal": True,
    }
    constants = {name: terms.pop(name) for name in list(terms)[6:]}
    options = {"dropout_rng": key, "dropout_rate": 0.5, "broadcast_dropout": broadcast}

    def ours(q, v, terms):
        mask = terms["mask"] > 0
        return attention_fn(q, k, v, **{**terms, "mask": mask}, **constants, **options)

    def theirs(q, v, terms):
        eye = jnp.broadcast_to(jnp.eye(9, dtype=FLOAT)[None, :, None], (3, 9, kv_heads, 9))
        mask = terms["mask"] > 0
        weights = attention_fn(q, k, eye, **{**terms, "mask": mask}, **constants)
        weights = jnp.moveaxis(weights, 2, 1) * kept.astype(FLOAT) / 0.5
        return jnp.einsum("bnts,bsnd->btnd", weights, jnp.repeat(v, 4 // kv_heads, axis=2))

    terms["mask"] = terms["mask"].astype(FLOAT)
    assert_same(rng, ours, theirs, (q, v, terms))


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
        "as an array: use Flax's own dot_product_attention to look at them."
    )


def test_another_einsum_is_refused(rng):
    q = array(rng, 2, 5, 4, 8)
    with pytest.raises(NotImplementedError, match="`qk_attn_weights_einsum` must be None"):
        attention_fn(q, q, q, qk_attn_weights_einsum=jnp.einsum)


def test_mask_with_too_many_axes_is_refused(rng):
    q = array(rng, 2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"^`mask` must broadcast to \(2, 4, 5, 5\), got shape"):
        attention_fn(q, q, q, mask=jnp.ones((1, 2, 4, 5, 5), bool))


# --- the layer ---


def small(**options):
    """A layer in float64, by the engine that compiles fastest: engines have their own tests."""
    options = {"implementation": "dense", "param_dtype": FLOAT, **options}
    return Attention(dim=24, heads=4, dim_head=8, **options)


def unit(x, groups):
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return (parts / jnp.linalg.norm(parts, axis=-1, keepdims=True)).reshape(x.shape)


def written_out(layer, weights, x, context=None, mask=None, attn_bias=None, seen=None):
    """The layer as its formula; `seen` is what segment ids and lengths leave, (b, 1, i, j)."""
    source = x if context is None else context
    heads, dim_head = layer.heads, layer.dim_head
    q, k, v = (
        jnp.einsum("btd,dnh->bnth", inputs, weights[f"{name}_kernel"])
        for name, inputs in (("query", x), ("key", source), ("value", source))
    )
    if layer.use_bias:
        q, k, v = (
            y + weights[f"{name}_bias"][:, None]
            for name, y in (("query", q), ("key", k), ("value", v))
        )
    if layer.qk_norm:
        q, k = (
            y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}_gain"]
            for name, y in (("query", q), ("key", k))
        )
    if layer.rotary:
        angles = {"base": layer.rotary_base, "scaling": layer.rotary_scaling}
        q, k = (flash_attention_jax.apply_rotary(y, **angles) for y in (q, k))
    if layer.similarity == "cosine":
        q, k = (unit(y, layer.groups) for y in (q, k))
    scale = layer.scale or (10.0 if layer.similarity == "cosine" else dim_head**-0.5)
    if layer.learned_scale:
        scale = weights["head_scale"][:, None, None]
    k, v = (jnp.repeat(y, heads // y.shape[1], axis=1) for y in (k, v))
    logits = jnp.einsum("bnih,bnjh->bnij", q, k) * scale
    i = jnp.arange(x.shape[1])[:, None] + source.shape[1] - x.shape[1]
    distance = i - jnp.arange(source.shape[1])
    if layer.alibi:
        slopes = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads)
        logits -= slopes[:, None, None] * jnp.abs(distance)
    if attn_bias is not None:
        logits += attn_bias
    if layer.softcap:
        logits = layer.softcap * jnp.tanh(logits / layer.softcap)
    visible = jnp.ones(logits.shape, bool) if seen is None else jnp.broadcast_to(seen, logits.shape)
    if mask is not None:
        visible &= (mask[:, None, None] if mask.ndim == 2 else mask).astype(bool)
    if layer.causal:
        visible &= distance >= 0
    if layer.window:
        visible &= (distance <= layer.window[0]) & (-distance <= layer.window[1])
    probs = jnp.where(visible, jnp.exp(logits), 0.0)
    total = probs.sum(-1, keepdims=True)
    if layer.sinks:
        total += jnp.exp(weights["sink_logits"])[:, None, None]
    out = jnp.einsum("bnij,bnjh->bnih", probs / jnp.where(total == 0, 1.0, total), v)
    y = jnp.einsum("bnih,nhd->bid", out, weights["out_kernel"])
    return y + weights["out_bias"] if layer.use_bias else y


def assert_is_its_formula(rng, layer, x, *inputs, seen=None, gradients=False, **options):
    """Outputs and parameter gradients, at parameters that are all random."""
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x, *inputs, **options)
        assert_same(
            rng,
            lambda weights: layer.apply({"params": weights}, x, *inputs, **options),
            lambda weights: written_out(layer, weights, x, *inputs, seen=seen),
            (jax.tree.map(lambda s: 0.3 * array(rng, *s.shape), shapes["params"]),),
            gradients,
        )


LAYERS = {
    "plain": {},
    "causal, cosine": {"causal": True, "similarity": "cosine"},
    "groups, learned scale": {"similarity": "cosine", "groups": 2, "learned_scale": True},
    "scale": {"scale": 0.7},
    "grouped heads, biases": {"kv_heads": 2, "use_bias": True},
    "single key head, window": {"kv_heads": 1, "window": (2, 1)},
    "rotary": {"rotary": True, "rotary_base": 50.0, "rotary_scaling": 2.0, "causal": True},
    "qk norm, softcap": {"qk_norm": True, "softcap": 2.0},
    "alibi, sinks": {"alibi": True, "sinks": True, "causal": True},
    "blocks": {"q_bucket_size": 3, "k_bucket_size": 4, "implementation": "blocked"},
    "no choice": {"implementation": None, "memory_efficient": True, "causal": True},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_attention_is_its_formula(rng, options):
    layer = small(**options)
    assert_is_its_formula(rng, layer, array(rng, 2, 7, 24), gradients=True)


@pytest.mark.parametrize("options", [{}, {"causal": True, "alibi": True}, {"window": (3, 0)}])
def test_attention_to_a_context_is_its_formula_and_end_aligned(rng, options):
    layer = small(**options)
    x, context = array(rng, 2, 5, 24), array(rng, 2, 9, 24)
    mask = jnp.asarray(rng.random((2, 9)) < 0.7)
    bias = array(rng, 4, 5, 9)
    assert_is_its_formula(rng, layer, x, context, mask, bias)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bool", (2, 7)), ("float32", (2, 7)), ("float32", (2, 1, 7, 7)), ("int32", (4, 7, 7))],
)
def test_attention_takes_masks_of_any_dtype_for_keys_or_for_pairs(rng, dtype, shape):
    mask = jnp.asarray(rng.random(shape) < 0.7).astype(dtype)
    assert_is_its_formula(rng, small(), array(rng, 2, 7, 24), None, mask)


def test_attention_keeps_to_segments_and_lengths(rng):
    layer = small(causal=True)
    x, context = array(rng, 2, 7, 24), array(rng, 2, 9, 24)
    ids, other = (jnp.asarray(rng.integers(0, 2, (2, n)), jnp.int32) for n in (7, 9))
    same = ids[:, None, :, None] == ids[:, None, None, :]
    assert_is_its_formula(rng, layer, x, seen=same, segment_ids=ids)
    across = ids[:, None, :, None] == other[:, None, None, :]
    options = {"segment_ids": ids, "context_segment_ids": other}
    assert_is_its_formula(rng, layer, x, context, seen=across, **options)
    lengths = jnp.asarray([7, 3], jnp.int32)
    real = jnp.arange(7, dtype=jnp.int32) < lengths[:, None]
    seen = real[:, None, :, None] & real[:, None, None, :]
    assert_is_its_formula(rng, layer, x, seen=seen, lengths=lengths)


def test_attention_turns_by_the_positions_given(rng):
    layer = Attention(dim=24, heads=2, dim_head=8, rotary=True, param_dtype=FLOAT)
    x = array(rng, 2, 7, 24)
    params = layer.init(jax.random.key(0), x)
    order = jnp.asarray(rng.permutation(7), jnp.int32)
    shuffled = layer.apply(params, x[:, order], positions=order)
    np.testing.assert_allclose(shuffled, layer.apply(params, x)[:, order], atol=1e-12)


def test_alibi_slopes_of_heads_that_are_no_power_of_two():
    # The authors' rule for 6 heads: the four slopes of 4, and the first and third of 8.
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(_alibi_slopes(6), expected)
    np.testing.assert_allclose(_alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(_alibi_slopes(1), [2.0**-8])


def test_attention_computes_in_its_dtype(rng):
    layer = Attention(dim=24, heads=2, dim_head=8, dtype=jnp.bfloat16, sinks=True, qk_norm=True)
    x = array(rng, 2, 7, 24, dtype=jnp.float32)
    y, params = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    wide = layer.clone(dtype=jnp.float32).apply(params, x)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, atol=0.03)


def test_attention_starts_with_unit_variance(rng):
    layer = Attention(dim=256, heads=4, dim_head=64)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 1, 256), jnp.float32))["params"]
    for name, weight in params.items():
        assert float(weight.std()) == pytest.approx(1 / 16, rel=0.03), name
    twice = layer.clone(out_init=lambda *a: 2 * nn.initializers.lecun_normal()(*a))
    params = twice.init(jax.random.key(0), jnp.zeros((1, 1, 256), jnp.float32))["params"]
    assert float(params["out_kernel"].std()) == pytest.approx(1 / 8, rel=0.03)


def test_attention_draws_dropout_from_flax_where_it_is_not_deterministic(rng):
    x = array(rng, 2, 9, 24, dtype=jnp.float32)
    layer = Attention(dim=24, heads=2, dim_head=8, dropout=0.5, deterministic=True)
    y, params = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, layer.clone(dropout=0.0).apply(params, x))
    first, again, other = (
        layer.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.abs(np.asarray(first) - np.asarray(other)) > 1e-3).any()
    assert (np.abs(np.asarray(first) - np.asarray(y)) > 1e-3).any()


# What the README of memory-efficient-attention-pytorch shows, at lengths that take a second here.
SELF = {"causal": True}
BUCKETS = {"memory_efficient": True, "q_bucket_size": 1024, "k_bucket_size": 2048}


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_arguments_of_memory_efficient_attention(rng, cross):
    options = {} if cross else SELF
    layer = Attention(dim=64, dim_head=16, heads=4, **options, **BUCKETS)
    x = array(rng, 1, 2500, 64, dtype=jnp.float32)
    inputs = (x[:, ::-1], jnp.ones((1, 2500), bool)) if cross else ()
    y, params = layer.init_with_output(jax.random.key(0), x, *inputs)
    assert y.shape == x.shape
    for override in ({"memory_efficient": False}, {"q_bucket_size": 100, "k_bucket_size": 300}):
        other = layer.apply(params, x, *inputs, **override)
        np.testing.assert_allclose(y, other, atol=1e-5)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_memory_of_65536_tokens_by_compiling_alone(cross):
    # The logits of one dense pass would be 8 * 65536**2 * 4 bytes = 128 GiB.
    layer = Attention(dim=512, dim_head=64, heads=8, **({} if cross else SELF), **BUCKETS)
    x = jax.ShapeDtypeStruct((1, 65536, 512), jnp.float32)
    inputs = (x, x, jax.ShapeDtypeStruct((1, 65536), bool)) if cross else (x,)
    params = jax.eval_shape(layer.init, jax.random.key(0), *inputs)

    def loss(params, *inputs):
        return layer.apply(params, *inputs).sum()

    for function, limit in ((layer.apply, 0.5), (jax.grad(loss), 1.25)):
        memory = jax.jit(function).lower(params, *inputs).compile().memory_analysis()
        # Queries, keys, values and the output alone are 4 * 128 MiB.
        assert memory.temp_size_in_bytes < limit * 2**30


# --- decoding with the layer ---


DECODERS = {
    "rotary, grouped heads": {"rotary": True, "kv_heads": 2},
    "cosine, alibi": {"similarity": "cosine", "alibi": True},
    "ring": {"rotary": True, "window": 3},
    "ring, alibi, sinks": {"alibi": True, "window": (3, 0), "sinks": True},
}


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_decoding_is_the_whole_causal_pass(rng, options):
    layer = small(causal=True, **options)
    x = array(rng, 2, 9, 24)
    whole, params = layer.init_with_output(jax.random.key(0), x)
    step = jax.jit(functools.partial(layer.apply, decode=True, mutable="cache"))
    cache, outs = layer.init_cache(2, 9), []
    for new in np.split(np.asarray(x), [4, 5, 6], axis=1):
        out, changed = step({**params, "cache": cache}, new)
        cache = changed["cache"]
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-12)


def test_initialised_while_decoding_the_layer_has_a_cache_of_its_input(rng):
    layer = Attention(dim=24, heads=4, dim_head=8, causal=True)
    x = array(rng, 2, 9, 24, dtype=jnp.float32)
    variables = layer.init(jax.random.key(0), x, decode=True)
    assert variables["cache"]["kv"].key.shape == (2, 9, 4, 8)
    assert variables["cache"]["kv"].lengths.tolist() == [0, 0]


def test_padded_prompts_of_different_lengths_decode_as_each_alone(rng):
    layer = small(causal=True, rotary=True)
    x = array(rng, 2, 6, 24)
    params = layer.init(jax.random.key(0), x)
    lengths = jnp.asarray([5, 3], jnp.int32)

    @jax.jit
    def decoded(params, x):
        variables = {**params, "cache": layer.init_cache(2, 8)}
        _, changed = layer.apply(variables, x[:, :5], decode=True, lengths=lengths, mutable="cache")
        return layer.apply({**params, **changed}, x[:, 5:6], decode=True, mutable="cache")[0]

    # What comes after a token changes nothing before it, so both rows may be of one length.
    whole = jax.jit(layer.apply)(params, x.at[1, 3].set(x[1, 5]))
    expected = jnp.stack([whole[0, 5:], whole[1, 3:4]])
    np.testing.assert_allclose(decoded(params, x), expected, atol=1e-12)


# --- bad input ---


BAD_LAYERS = {
    "similarity": (
        {"similarity": "cosin"},
        "`similarity` must be one of 'dot', 'cosine', got 'cosin'. Did you mean 'cosine'?",
    ),
    "kv_heads": (
        {"kv_heads": 3},
        "`heads` must be a multiple of `kv_heads`, got 4 with kv_heads=3. Change one of them.",
    ),
    "dim": (
        {"dim_head": None, "heads": 5},
        "`dim` must be a multiple of `heads` where dim_head=None, got 24 with heads=5. "
        "Change one of them, or give `dim_head`.",
    ),
    "rotary": (
        {"dim_head": 7, "rotary": True},
        "`dim_head` must be even where `rotary`, got 7. "
        "Rotation turns pairs of features: use an even number, or rotary=False.",
    ),
    "groups": (
        {"groups": 3, "similarity": "cosine"},
        "`groups` must divide `dim_head`, got 3 with dim_head=8. Use a divisor of it.",
    ),
    "dropout rate": (
        {"dropout": 1.0},
        "`dropout` must be in [0, 1), got 1.0. It is the share of probabilities that are dropped.",
    ),
    "deterministic": (
        {"dropout": 0.5},
        "`deterministic` must be True or False where there is dropout, got None with dropout=0.5. "
        "Pass False to train and True to evaluate, to the layer or to the call.",
    ),
    "implementation": (
        {"memory_efficient": False, "implementation": "blocked"},
        "`implementation` must be None or 'dense', got 'blocked' with memory_efficient=False. "
        "Leave one of them out.",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_attention_refuses_attributes_that_do_not_fit(options, message):
    layer = Attention(**{"dim": 24, "heads": 4, "dim_head": 8, **options})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer.init(jax.random.key(0), jnp.ones((2, 7, 24), jnp.float32))


X = jnp.ones((2, 7, 24), jnp.float32)
IDS = jnp.zeros((2, 7), jnp.int32)
BAD_CALLS = {
    "dim": (
        {},
        {"x": X[..., :20]},
        "`x` must have shape (batch, length, dim) with dim=24, got shape (2, 7, 20). "
        "Set the `dim` of this Attention to the features of `x`.",
    ),
    "context's dim": (
        {},
        {"x": X, "context": X[..., :20]},
        "`context` must have shape (batch, length, dim) with dim=24, got shape (2, 7, 20). "
        "Set the `dim` of this Attention to the features of `context`.",
    ),
    "rotary context": (
        {"rotary": True},
        {"x": X, "context": X},
        "`context` must be None where `rotary`, got float32[2, 7, 24]. "
        "Positions in two sequences are not comparable: use rotary=False here.",
    ),
    "segments of nothing": (
        {},
        {"x": X, "segment_ids": IDS, "context_segment_ids": IDS},
        "`context_segment_ids` must be None without `context`, got int32[2, 7]. "
        "Pass `segment_ids` alone for self-attention.",
    ),
    "no cache": (
        {"causal": True},
        {"x": X, "decode": True},
        "`decode` must find a cache where it is True, got none. "
        'Make one: pass {**params, "cache": layer.init_cache(batch, length)} to apply.',
    ),
}


@pytest.mark.parametrize(("options", "call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_attention_refuses_calls_that_do_not_fit(options, call, message):
    layer = Attention(dim=24, heads=4, dim_head=8, **options)
    params = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer.apply(params, **call)


BAD_DECODING = {
    "not causal": (
        {"causal": False},
        {},
        "`causal` must be True where decode=True, got False. "
        "A cache grows by tokens that those before them do not see.",
    ),
    "context": (
        {},
        {"context": X},
        "`context` must be None where decode=True, got float32[2, 7, 24]. "
        "Keys of a context do not grow: leave decode out.",
    ),
    "segments": (
        {},
        {"segment_ids": IDS},
        "`segment_ids` must be None where decode=True, got int32[2, 7]. "
        "Give each sequence a row of the batch, with `lengths`.",
    ),
    "another window": (
        {"window": 2},
        {},
        "`cache` must have the window of the layer, got None with window=2. "
        "Make the cache with this layer's init_cache.",
    ),
    "overrun": (
        {},
        {"x": jnp.ones((2, 9, 24), jnp.float32)},
        "`cache` must have room for the new tokens, 8 in all, got 9 new ones after 0 in "
        "sequence 0. Give init_cache a larger `length`, or a `window`.",
    ),
}


@pytest.mark.parametrize(("options", "call", "message"), BAD_DECODING.values(), ids=BAD_DECODING)
def test_attention_refuses_to_decode_what_it_cannot(options, call, message):
    layer = Attention(dim=24, heads=4, dim_head=8, **{"causal": True, **options})
    cache = layer.clone(window=None).init_cache(2, 8)
    variables = {**layer.init(jax.random.key(0), X), "cache": cache}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer.apply(variables, **{"x": X, "decode": True, "mutable": "cache", **call})


def test_decoding_asks_for_a_cache_that_can_change():
    layer = Attention(dim=24, heads=4, dim_head=8, causal=True)
    variables = {**layer.init(jax.random.key(0), X), "cache": layer.init_cache(2, 8)}
    with pytest.raises(ValueError, match=r'^`mutable` must hold "cache" where decode=True, got'):
        layer.apply(variables, X, decode=True)


def test_attention_refuses_arguments_that_it_does_not_know():
    message = "`Attention` got an unexpected keyword argument 'is_causal'. Known: segment_ids, "
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        Attention(dim=24).init(jax.random.key(0), X, is_causal=True)


def test_made_attention_fn_refuses_what_no_layer_can_use():
    with pytest.raises(ValueError, match=r"^`similarity` must be one of 'dot', 'cosine', got 'l2'"):
        make_attention_fn(similarity="l2")
    with pytest.raises(ValueError, match=r"^`return_residual` must be False in an attention_fn"):
        make_attention_fn(return_residual=True)
    with pytest.raises(ValueError, match=r"`dropout_rate` must be .*, got -0\.1"):
        make_attention_fn(dropout_rate=-0.1)
    layer = nn.MultiHeadDotProductAttention(2, attention_fn=make_attention_fn(dropout_rate=0.1))
    with pytest.raises(TypeError, match=r"`dropout_rate` must be given once, got float 0\.1 from"):
        layer.init(jax.random.key(0), jnp.ones((1, 4, 8), jnp.float32))


def run_python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_absent_flax_is_a_clear_error_of_the_shell_alone():
    code = """
import sys
sys.modules["flax"] = None
import flash_attention_jax
for name in ("linen", "nnx", "transformer"):
    try:
        __import__(f"flash_attention_jax.{name}")
    except ImportError as error:
        print(error)
"""
    assert run_python(code).splitlines() == [
        "flash_attention_jax.linen needs flax: pip install 'flash-attention-jax[flax]'",
        "flash_attention_jax.nnx needs flax: pip install 'flash-attention-jax[flax]'",
        "flash_attention_jax.transformer needs flax: pip install 'flash-attention-jax[train]'",
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


# --- what Flax does with its own layers ---


@pytest.mark.parametrize("mark", [nn.with_partitioning, nn.with_logical_partitioning])
def test_partitioning_metadata_stays_with_the_parameters(rng, mark):
    init = nn.initializers.lecun_normal()
    sizes = {"dim": 24, "heads": 4, "dim_head": 6, "param_dtype": FLOAT}
    bare = Attention(**sizes)
    x = array(rng, 2, 5, 24)
    expected, plain = bare.init_with_output(jax.random.key(0), x)
    for names in (("embed", "heads"), ("embed", "heads", None)):
        inits = {"kernel_init": mark(init, names), "out_init": mark(init, ("heads", "embed"))}
        layer = Attention(**sizes, **inits)
        out, params = layer.init_with_output(jax.random.key(0), x)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(layer.apply(params, x), expected)
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(params), plain)
        specs = nn.get_partition_spec(params)["params"]
        spec = jax.sharding.PartitionSpec
        for name in ("query", "key", "value"):
            assert specs[f"{name}_kernel"] == spec("embed", "heads", None)
        assert specs["out_kernel"] == spec("heads", None, "embed")


def test_partitioned_parameters_are_made_on_a_mesh(rng):
    mesh = jax.make_mesh((1, 1), ("embed", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mark = functools.partial(nn.with_partitioning, nn.initializers.lecun_normal(), mesh=mesh)
    layer = Attention(dim=24, heads=4, kernel_init=mark(("embed", "heads")), param_dtype=FLOAT)
    x = array(rng, 2, 5, 24)
    _, params = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    specs = nn.get_partition_spec(params)["params"]
    assert specs["query_kernel"] == jax.sharding.PartitionSpec("embed", "heads", None)


@jax.numpy_dtype_promotion("standard")  # the parameters are not of the input's dtype
def test_cache_made_by_init_has_the_dtype_computed_in(rng):
    layer = Attention(dim=24, heads=4, causal=True, param_dtype=jnp.bfloat16)
    x = array(rng, 2, 5, 24, dtype=jnp.bfloat16)
    for given, expected in ((x, "bfloat16"), (x.astype(jnp.float32), "float32")):
        variables = layer.init(jax.random.key(0), given, decode=True)
        assert variables["cache"]["kv"].key.dtype == expected
        out, _ = layer.apply(variables, given, decode=True, mutable="cache")
        whole = layer.apply({"params": variables["params"]}, given)
        assert out.dtype == whole.dtype
        np.testing.assert_allclose(out.astype(FLOAT), whole.astype(FLOAT), atol=0.02)
