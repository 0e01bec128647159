"""The Flax nnx shell against Flax's own layer, and against the linen shell of the same core."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from flash_attention_jax import linen as our_linen
from flash_attention_jax.nnx import Attention, attention_fn, make_attention_fn

FLOAT = jnp.float64


def array(rng, *shape, dtype=FLOAT):
    return jnp.asarray(rng.normal(size=shape), dtype)


def layers(**options):
    """The same layer with the same parameters twice: with Flax's attention and with ours."""
    # A rate, of no effect here, keeps Flax's off jax.nn's function, which computes in float32.
    options = {"dropout_rate": 0.1, "deterministic": True, "decode": False, **options}
    options = {"num_heads": 4, "in_features": 32, "param_dtype": FLOAT, **options}
    return (
        nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0)),
        nnx.MultiHeadAttention(**options, attention_fn=attention_fn, rngs=nnx.Rngs(0)),
    )


def assert_layers_agree(rng, inputs, call=None, **options):
    """Same outputs, and the same gradients for a random cotangent."""
    call = call or {}

    @nnx.jit
    def results(layer, cotangent, *inputs):
        def loss(layer, *inputs):
            out = layer(*inputs, **call)
            return (out * cotangent).sum(), out

        return nnx.grad(loss, argnums=tuple(range(len(inputs) + 1)), has_aux=True)(layer, *inputs)

    cotangent = array(rng, *inputs[0].shape)
    expected, actual = (results(layer, cotangent, *inputs) for layer in layers(**options))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), actual, expected)


CASES = {
    "self": ([(2, 11)], {}, {}),
    "cross": ([(2, 7), (2, 13)], {}, {}),
    "causal": ([(2, 11)], {}, {"is_causal": True}),
    "two batch axes": ([(3, 2, 5)], {}, {}),
    "grouped heads": ([(2, 11)], {"num_kv_heads": 2}, {}),
    "precision": ([(2, 11)], {"precision": "highest"}, {}),
}


@pytest.mark.parametrize(("shapes", "options", "call"), CASES.values(), ids=CASES)
def test_layer_agrees_with_flax(rng, shapes, options, call):
    assert_layers_agree(rng, [array(rng, *shape, 32) for shape in shapes], call, **options)


@jax.numpy_dtype_promotion("standard")  # Flax's own layers promote
def test_layer_agrees_with_the_function_of_jax_that_flax_calls(rng):
    x = array(rng, 2, 11, 32, dtype=jnp.float32)
    theirs, ours = layers(param_dtype=jnp.float32, dropout_rate=0.0)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)


@jax.numpy_dtype_promotion("standard")  # Flax's own layers promote
def test_query_key_norm_agrees_with_flax(rng):
    assert_layers_agree(rng, [array(rng, 2, 11, 32)], normalize_qk=True)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_masks_from_flax_agree_with_flax(rng, dtype):
    x = array(rng, 2, 11, 32)
    tokens = jnp.arange(11, dtype=jnp.int32) < jnp.asarray([[11], [4]], jnp.int32)
    mask = nnx.combine_masks(
        nnx.make_causal_mask(x[..., 0]), nnx.make_attention_mask(jnp.ones_like(tokens), tokens)
    )
    assert mask.dtype == jnp.float32
    assert_layers_agree(rng, [x], {"mask": mask.astype(dtype)})


@jax.numpy_dtype_promotion("standard")
def test_bfloat16_agrees_with_flax_to_its_rounding(rng):
    x = array(rng, 2, 11, 32, dtype=jnp.bfloat16)
    theirs, ours = layers(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert ours(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ours(x).astype(jnp.float32), theirs(x).astype(jnp.float32), atol=0.03
    )


@jax.numpy_dtype_promotion("standard")
def test_decoding_agrees_with_flax(rng):
    x = array(rng, 2, 6, 32)
    theirs, ours = layers(decode=True)
    for layer in (theirs, ours):
        layer.init_cache(x.shape, dtype=FLOAT)
    step = nnx.jit(lambda layer, x: layer(x))
    for i in range(6):
        out, expected = (step(layer, x[:, i : i + 1]) for layer in (ours, theirs))
        np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("broadcast", [True, False])
def test_layer_draws_dropout_from_flax(rng, broadcast):
    x = array(rng, 2, 11, 32)
    _, layer = layers(dropout_rate=0.5, deterministic=False, broadcast_dropout=broadcast)
    first, again, other = (layer(x, rngs=nnx.Rngs(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(np.asarray(first) - np.asarray(other)) > 1e-3).any()
    theirs, _ = layers(dropout_rate=0.5, deterministic=True)
    np.testing.assert_allclose(layer(x, deterministic=True), theirs(x), atol=1e-12)


def test_promotion_of_flax_is_used_where_given(rng):
    q = array(rng, 2, 5, 4, 8)

    def promote(arrays, *, dtype=None):
        assert dtype is None
        return [x.astype(jnp.float32) for x in arrays]

    assert attention_fn(q, q, q, promote_dtype=promote).dtype == jnp.float32


def test_made_attention_fn_runs_in_a_layer(rng):
    made = make_attention_fn(similarity="cosine", window=(2, 0), is_causal=True)
    options = {"num_heads": 4, "in_features": 32, "decode": False, "param_dtype": FLOAT}
    layer = nnx.MultiHeadAttention(**options, attention_fn=made, rngs=nnx.Rngs(0))
    x = array(rng, 1, 9, 32)
    before, after = layer(x), layer(x.at[:, 2].add(1.0))
    changed = (np.abs(np.asarray(before - after)) > 1e-9).any(-1)[0]
    assert changed.tolist() == [False, False, True, True, True, False, False, False, False]


def test_sown_weights_are_refused(rng):
    _, layer = layers()
    with pytest.raises(NotImplementedError, match=r"^`sow_weights` must be False"):
        layer(array(rng, 2, 5, 32), sow_weights=True)


# --- the layer ---

EVERYTHING = {
    "kv_heads": 2,
    "rotary": True,
    "qk_norm": True,
    "similarity": "cosine",
    "learned_scale": True,
    "sinks": True,
    "alibi": True,
    "use_bias": True,
    "causal": True,
    "implementation": "dense",
}


def both(rng, **options):
    """The layer of nnx and that of linen with its parameters, all random."""
    options = {"dim": 24, "heads": 4, "dim_head": 8, "param_dtype": FLOAT, **options}
    layer, other = Attention(**options, rngs=nnx.Rngs(0)), our_linen.Attention(**options)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    shapes = jax.eval_shape(other.init, rngs, jnp.ones((1, 1, 24), FLOAT))
    params = jax.tree.map(lambda s: array(rng, *s.shape), shapes)
    for name, value in params["params"].items():
        getattr(layer, name)[...] = value
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == set(
        params["params"]
    )
    return layer, other, params


def test_attention_is_that_of_linen(rng):
    layer, other, params = both(rng, **EVERYTHING)
    x = array(rng, 2, 7, 24)
    mask = jnp.asarray(rng.random((2, 7)) < 0.8)
    np.testing.assert_array_equal(layer(x, mask=mask), other.apply(params, x, mask=mask))
    cotangent = array(rng, *x.shape)
    gradients = nnx.grad(lambda layer: (layer(x) * cotangent).sum())(layer)
    expected = jax.grad(lambda params: (other.apply(params, x) * cotangent).sum())(params)
    for name, gradient in expected["params"].items():
        np.testing.assert_allclose(gradients[name][...], gradient, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_under_jit_is_the_whole_causal_pass(rng, window):
    layer, _, _ = both(rng, **EVERYTHING, window=window)
    x = array(rng, 2, 9, 24)
    whole = layer(x)
    traces = []

    @nnx.jit
    def step(layer, x):
        traces.append(x.shape[1])
        return layer(x, decode=True)

    layer.init_cache(batch=2, length=9)
    outs = [step(layer, x[:, :4])] + [step(layer, x[:, i : i + 1]) for i in range(4, 9)]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, atol=1e-12)
    assert traces == [4, 1]
    assert layer.kv.get_value().lengths.tolist() == [9, 9]


def test_attention_draws_its_own_dropout_until_it_evaluates(rng):
    layer, other, params = both(rng, dropout=0.5, deterministic=False, implementation="dense")
    x = array(rng, 2, 9, 24)
    layer.train()
    first, second = layer(x), layer(x)
    assert (np.abs(np.asarray(first) - np.asarray(second)) > 1e-3).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), other.apply(params, x, deterministic=True))


def test_attention_splits_and_merges(rng):
    layer, _, _ = both(rng, **EVERYTHING)
    layer.init_cache(batch=2, length=9)
    x = array(rng, 2, 9, 24)
    definition, state = nnx.split(layer)
    again = nnx.merge(definition, state)
    np.testing.assert_array_equal(again(x), layer(x))
    np.testing.assert_allclose(again(x, decode=True), layer(x), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "l2"}, "`similarity` must be one of 'dot', 'cosine', got 'l2'."),
        (
            {"kv_heads": 3},
            "`heads` must be a multiple of `kv_heads`, got 4 with kv_heads=3. Change one of them.",
        ),
    ],
)
def test_attention_refuses_attributes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Attention(**{"dim": 24, "heads": 4, **options}, rngs=nnx.Rngs(0))


def test_attention_refuses_to_decode_without_a_cache_and_beyond_its_end(rng):
    layer, _, _ = both(rng, causal=True)
    x = array(rng, 2, 9, 24)
    message = (
        "`decode` must find a cache where it is True, got none. "
        "Make one: layer.init_cache(batch, length)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer(x, decode=True)
    layer.init_cache(batch=2, length=8)
    message = (
        "`cache` must have room for the new tokens, 8 in all, got 9 new ones after 0 in sequence 0."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer(x, decode=True)


def test_linen_and_nnx_share_their_core():
    assert issubclass(our_linen.Attention, linen.Module)
    assert our_linen.attention_fn is attention_fn
    assert our_linen.make_attention_fn is make_attention_fn
    own = {name for name in vars(Attention) if callable(getattr(Attention, name))}
    assert "__call__" not in own


# --- what Flax does with its own layers ---


def test_view_of_a_model_is_deterministic_and_leaves_the_model_as_it_is(rng):
    class Block(nnx.Module):
        def __init__(self):
            self.attention, _, _ = both(rng, dropout=0.5, deterministic=False)
            self.dropout = nnx.Dropout(0.5)

    block, x = Block(), array(rng, 2, 9, 24)
    view = nnx.view(block, deterministic=True)
    assert (view.attention.deterministic, block.attention.deterministic) == (True, False)
    expected = block.attention(x, deterministic=True)
    np.testing.assert_array_equal(view.attention(x), expected)
    assert (np.asarray(block.attention(x)) != np.asarray(expected)).any()
    alone = nnx.view(block.attention, deterministic=True)
    np.testing.assert_array_equal(alone(x), expected)
    np.testing.assert_array_equal(nnx.view(view.attention)(x), expected)  # None: as it is


@pytest.mark.parametrize("init", [None, jax.nn.initializers.normal(0.02)], ids=["default", "own"])
def test_attention_is_pickled_with_its_parameters_and_cache(rng, init):
    inits = {} if init is None else {"kernel_init": init, "out_init": init}
    layer, _, _ = both(rng, causal=True, dropout=0.1, deterministic=True, **inits)
    layer.init_cache(batch=2, length=9)
    x = array(rng, 2, 9, 24)
    layer(x[:, :4], decode=True)
    again = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(again(x), layer(x))
    np.testing.assert_array_equal(again(x[:, 4:], decode=True), layer(x[:, 4:], decode=True))
    assert "kernel_init" in repr(again)


def test_default_attention_of_linen_is_pickled():
    layer = our_linen.Attention(dim=24)
    assert pickle.loads(pickle.dumps(layer)) == layer


def test_partitioning_metadata_stays_with_the_parameters(rng):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = jax.nn.initializers.lecun_normal()
    marked = nnx.with_metadata(init, note="mine")
    sizes = {"dim": 24, "heads": 4, "dim_head": 6, "use_bias": True}
    bare = Attention(**sizes, kernel_init=init, rngs=nnx.Rngs(0))
    layer = Attention(**sizes, kernel_init=marked, rngs=nnx.Rngs(0))
    assert (
        layer.query_kernel.get_metadata("note") == layer.out_kernel.get_metadata("note") == "mine"
    )
    x = array(rng, 2, 5, 24, dtype=jnp.float32)
    np.testing.assert_array_equal(layer(x), bare(x))
    spec = jax.sharding.PartitionSpec
    for names in ((None, "model"), (None, "model", None), spec(None, "model")):
        with jax.set_mesh(mesh):
            layer = Attention(
                **sizes,
                kernel_init=nnx.with_partitioning(init, names),
                out_init=nnx.with_partitioning(init, ("model", None)),
                rngs=nnx.Rngs(0),
            )
            np.testing.assert_allclose(layer(x), bare(x), atol=1e-6)
        specs = nnx.get_partition_spec(nnx.state(layer, nnx.Param))
        assert specs["query_kernel"].get_value() == spec(None, "model", None)
        assert specs["out_kernel"].get_value() == spec("model", None, None)


@jax.numpy_dtype_promotion("standard")  # the parameters are not of the input's dtype
def test_cache_has_the_dtype_computed_in(rng):
    sizes = {"dim": 24, "heads": 4, "dim_head": 6, "causal": True}
    x = array(rng, 2, 9, 24, dtype=jnp.float32)
    for param_dtype, dtype, given, expected, tolerance in (
        ("bfloat16", None, "float32", "float32", 1e-6),
        ("bfloat16", None, "bfloat16", "float32", 0.02),
        ("float32", "bfloat16", "float32", "bfloat16", 0.02),
    ):
        kinds = {"param_dtype": jnp.dtype(param_dtype), "dtype": dtype and jnp.dtype(dtype)}
        layer = Attention(**sizes, **kinds, rngs=nnx.Rngs(0))
        layer.init_cache(batch=2, length=9)
        assert layer.kv is not None
        assert layer.kv.get_value().key.dtype == expected
        tokens = x.astype(given)
        whole = layer(tokens)
        parts = [layer(tokens[:, new], decode=True) for new in (slice(0, 4), slice(4, 9))]
        assert parts[0].dtype == whole.dtype
        decoded = jnp.concatenate(parts, axis=1).astype(jnp.float32)
        np.testing.assert_allclose(decoded, whole.astype(jnp.float32), atol=tolerance)


def test_cache_of_a_layer_may_be_narrower_than_the_computation(rng):
    layer, _, _ = both(rng, causal=True)
    x = array(rng, 2, 9, 24)
    whole = layer(x)
    layer.init_cache(batch=2, length=9, dtype=jnp.float32)
    out = layer(x, decode=True)
    assert out.dtype == whole.dtype
    error = float(np.abs(np.asarray(out - whole)).max())
    assert 1e-9 < error < 1e-4  # that of keys and values rounded to float32


def test_input_positions_of_flax_are_refused_with_what_to_do(rng):
    q = array(rng, 2, 5, 4, 8)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    message = (
        "`input_positions` must be None with this attention_fn, got int32[1, 5]. Give the layer a "
        "function of your own that rotates query and key first"
    )
    for function in (attention_fn, make_attention_fn(similarity="cosine")):
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            function(q, q, q, input_positions=positions)
