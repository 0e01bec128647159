"""The two transformers, their caches, and generation: one loop that draws what was asked for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import transformer
from flash_attention_jax.transformer import CausalTransformer, CosineSimCausalTransformer, generate

PROMPT = jnp.asarray([[36, 37, 38, 0], [33, 34, 35, 36]], jnp.int32)

# The dense engine compiles fastest; which one runs is no matter here.
SMALL = {
    "num_tokens": 64,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 8,
    "implementation": "dense",
}
COSINE = {**SMALL, "max_seq_len": 32}
MODELS = {
    "plain": CausalTransformer(**SMALL),
    "grouped, window, swiglu": CausalTransformer(**SMALL, kv_heads=1, window=3, swiglu=True),
    "cosine": CosineSimCausalTransformer(**COSINE, attn_l2norm_groups=2),
    "dot product, pre-norm": CosineSimCausalTransformer(
        **{**COSINE, "depth": 1}, non_cosine_sim_attn=True, pre_norm=True
    ),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@functools.cache
def initial(model):
    return jax.jit(model.init)(jax.random.key(0), PROMPT)


def tokens_of(rng, batch, length):
    return jnp.asarray(rng.integers(0, 64, (batch, length)), jnp.int32)


@models
def test_decoding_in_any_chunks_is_the_whole_pass(rng, model):
    tokens = tokens_of(rng, 2, 9)
    params = initial(model)

    @jax.jit
    def chunks(params, tokens):
        cache, outs = model.init_cache(2, 9), []
        for new in (slice(0, 5), slice(5, 6), slice(6, 9)):
            variables = {**params, "cache": cache}
            out, changed = model.apply(variables, tokens[:, new], decode=True, mutable="cache")
            cache = changed["cache"]
            outs.append(out)
        return jnp.concatenate(outs, axis=1), model.apply(params, tokens)

    decoded, whole = chunks(params, tokens)
    np.testing.assert_allclose(decoded, whole, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "cosine"])
def test_padded_prompts_decode_as_each_alone(rng, name):
    model = MODELS[name]
    tokens = tokens_of(rng, 2, 6)
    params = initial(model)
    lengths = jnp.asarray([5, 3], jnp.int32)

    @jax.jit
    def decoded(params, tokens):
        variables = {**params, "cache": model.init_cache(2, 6)}
        options = {"decode": True, "mutable": "cache"}
        _, changed = model.apply(variables, tokens[:, :5], lengths=lengths, **options)
        return model.apply({**params, **changed}, tokens[:, 5:], **options)[0][:, 0]

    # What comes after a token changes nothing before it, so both rows may be of one length.
    alone = tokens.at[1, 3].set(tokens[1, 5])
    logits = jax.jit(model.apply)(params, alone)
    expected = jnp.stack([logits[0, 5], logits[1, 3]])
    np.testing.assert_allclose(decoded(params, tokens), expected, atol=2e-5)


@models
def test_generation_with_a_cache_takes_what_the_whole_pass_finds_likeliest(model):
    params = initial(model)
    drawn = model.generate(params, PROMPT, 7, key=jax.random.key(1), temperature=0.0)
    assert drawn.dtype == jnp.int32
    logits = jax.jit(model.apply)(params, jnp.concatenate([PROMPT, drawn], axis=1))
    np.testing.assert_array_equal(drawn, logits[:, 3:-1].argmax(-1))


def test_cached_and_reread_generation_draw_the_same_tokens():
    model = MODELS["plain"]
    params = initial(model)
    options = {"key": jax.random.key(1), "top_k": 20, "top_p": 0.9, "temperature": 0.7}
    cached = generate(model, params, PROMPT, 9, **options)

    class Uncached:
        """The same model, of which generate knows no cache."""

        def apply(self, params, tokens):
            return model.apply(params, tokens)

    np.testing.assert_array_equal(cached, generate(Uncached(), params, PROMPT, 9, **options))


def test_generation_beyond_the_last_position_reads_the_last_tokens():
    model = CosineSimCausalTransformer(**{**COSINE, "max_seq_len": 6})
    params = initial(model)
    prompt = tokens_of(np.random.default_rng(0), 2, 6)
    drawn = model.generate(params, prompt, 4, key=jax.random.key(0), temperature=0.0)
    tokens, read = prompt, jax.jit(model.apply)
    for _ in range(4):
        last = read(params, tokens[:, -6:])[:, -1].argmax(-1).astype(jnp.int32)
        tokens = jnp.concatenate([tokens, last[:, None]], axis=1)
    np.testing.assert_array_equal(drawn, tokens[:, 6:])


class Fixed:
    """A model that expects the same distribution after every token."""

    def __init__(self, *probs):
        self.logits = jnp.log(jnp.asarray(probs, jnp.float32))

    def apply(self, params, tokens):
        return jnp.broadcast_to(self.logits, (*tokens.shape, self.logits.size))


def frequencies(model, **options):
    prompt = jnp.zeros((2000, 1), jnp.int32)
    drawn = generate(model, {}, prompt, 3, key=jax.random.key(0), window=1, **options)
    return np.bincount(np.ravel(drawn), minlength=model.logits.size) / drawn.size


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    model = Fixed(0.1, 0.5, 0.1, 0.3)
    for top_p, expected in (
        (1.0, [0.1, 0.5, 0.1, 0.3]),
        (0.75, [0, 0.625, 0, 0.375]),
        (0.51, [0, 0.625, 0, 0.375]),
        (0.45, [0, 1, 0, 0]),
        (0.01, [0, 1, 0, 0]),
    ):
        np.testing.assert_allclose(frequencies(model, top_p=top_p), expected, atol=0.03)


def test_top_p_counts_after_top_k_and_temperature():
    model = Fixed(0.1, 0.5, 0.1, 0.3)
    # Squared, the probabilities are 1/36, 25/36, 1/36 and 9/36.
    squared = frequencies(model, top_p=0.9, temperature=0.5)
    np.testing.assert_allclose(squared, [0, 25 / 34, 0, 9 / 34], atol=0.03)
    # Of the two likeliest alone, the first has 0.625.
    np.testing.assert_array_equal(frequencies(model, top_p=0.6, top_k=2), [0, 1, 0, 0])


def test_what_follows_the_stop_token_is_the_stop_token():
    class Counter:
        def apply(self, params, tokens):
            return 50.0 * jax.nn.one_hot(tokens + 1, 64, dtype=jnp.float32)

    prompt = jnp.asarray([[1], [4], [20]], jnp.int32)
    drawn = generate(Counter(), {}, prompt, 6, key=jax.random.key(0), window=1, stop_token=6)
    np.testing.assert_array_equal(
        drawn, [[2, 3, 4, 5, 6, 6], [5, 6, 6, 6, 6, 6], [21, 22, 23, 24, 25, 26]]
    )


def test_generation_ends_when_every_sequence_has_stopped():
    reads = []

    class Stopping:
        def apply(self, params, tokens):
            jax.debug.callback(lambda: reads.append(1))
            return jax.nn.one_hot(tokens * 0 + 3, 8, dtype=jnp.float32) * 50.0

    prompt = jnp.zeros((2, 1), jnp.int32)
    drawn = generate(Stopping(), {}, prompt, 500, key=jax.random.key(0), window=1, stop_token=3)
    jax.effects_barrier()
    np.testing.assert_array_equal(drawn, np.full((2, 500), 3))
    assert len(reads) == 1


def test_generation_compiles_once_for_any_options():
    model = MODELS["dot product, pre-norm"]
    before = transformer._generate._cache_size()
    for seed, temperature, top_p, stop in ((0, 1.0, 0.9, 3), (1, 0.5, 0.5, 4), (2, 0.0, 1.0, 5)):
        options = {"temperature": temperature, "top_p": top_p, "stop_token": stop, "top_k": 5}
        generate(model, initial(model), PROMPT, 6, key=jax.random.key(seed), **options)
    assert transformer._generate._cache_size() == before + 1


def test_generation_is_one_loop_with_the_cache_in_place():
    model = CausalTransformer(**{**SMALL, "implementation": "blocked", "depth": 1})

    def loop(params, prompt, keys):
        one = jnp.float32(1)
        return transformer._generate(model, None, None, params, prompt, None, keys, one, None, None)

    keys = jax.random.split(jax.random.key(0), 30_000)
    (call,) = jax.make_jaxpr(loop)(initial(model), PROMPT, keys).eqns
    inner = [equation.primitive.name for equation in call.params["jaxpr"].eqns]
    assert (call.primitive.name, inner.count("while")) == ("jit", 1)
    memory = jax.jit(loop).lower(initial(model), PROMPT, keys).compile().memory_analysis()
    cache = jax.eval_shape(lambda: model.init_cache(2, 30_003))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    # Keys and values, and the zeros that both start as; in the loop nothing of their size.
    assert size < memory.temp_size_in_bytes < 1.6 * size


def test_plain_transformer_has_the_parameters_it_says():
    names = set(initial(MODELS["plain"])["params"])
    parts = ("attention", "attention_norm", "norm", "expand", "contract")
    assert names == {f"{part}_{n}" for part in parts for n in (0, 1)} | {"embed", "norm", "readout"}
    gated = initial(MODELS["grouped, window, swiglu"])["params"]
    assert gated["gate_0"]["kernel"].shape == gated["expand_0"]["kernel"].shape == (16, 42)
    assert gated["attention_0"]["key_kernel"].shape == (16, 1, 8)


def test_swiglu_is_its_formula(rng):
    model = CausalTransformer(**{**SMALL, "depth": 1}, swiglu=True)
    params = initial(model)["params"]
    x = params["embed"]["embedding"][PROMPT]

    def norm(x, name):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]

    attention = transformer.Attention(**model._attention())
    x += attention.apply({"params": params["attention_0"]}, norm(x, "attention_norm_0"))
    y = norm(x, "norm_0")
    gate, expand, contract = (params[f"{n}_0"]["kernel"] for n in ("gate", "expand", "contract"))
    gated = y @ gate / (1 + jnp.exp(-(y @ gate))) * (y @ expand)
    expected = norm(x + gated @ contract, "norm") @ params["readout"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, PROMPT), expected, atol=2e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_cosine_transformer_is_its_formula(pre_norm):
    model = CosineSimCausalTransformer(**COSINE, pre_norm=pre_norm, attn_scale=5.0)
    params = initial(model)["params"]
    tokens = PROMPT
    x = params["embed"]["embedding"][tokens] + params["positions"]["embedding"][:4]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def attend(x, layer):
        w = params[f"attention_{layer}"]
        q, k, v = (
            jnp.einsum("btd,dnh->bnth", x, w[f"{n}_kernel"]) for n in ("query", "key", "value")
        )
        q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
        logits = 5.0 * jnp.einsum("bnih,bnjh->bnij", q, k)
        logits = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), logits, -jnp.inf)
        out = jnp.einsum("bnij,bnjh->bnih", jax.nn.softmax(logits), v)
        return jnp.einsum("bnih,nhd->bid", out, w["out_kernel"])

    def feed(x, layer):
        hidden = jax.nn.gelu(x @ params[f"expand_{layer}"]["kernel"])
        return hidden @ params[f"contract_{layer}"]["kernel"]

    for layer in (0, 1):
        for part, name in ((attend, "attention_norm"), (feed, "norm")):
            if pre_norm:
                x = x + part(norm(x, name), layer)
            else:
                x = norm(4**0.25 * x + part(x, layer), name)
    x = norm(x, "norm") if pre_norm else x
    expected = x @ params["readout"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=2e-5)
    # Glorot's spread, smaller by (8 * depth) ** -0.25 = 1 / 2 where DeepNet says so.
    spread = float(params["attention_0"]["value_kernel"].std())
    gain = 1.0 if pre_norm else 0.5
    assert spread == pytest.approx(gain * (2 / (16 + 16)) ** 0.5, rel=0.15)
    assert float(params["attention_0"]["query_kernel"].std()) == pytest.approx(0.25, rel=0.15)


def test_cosine_transformer_draws_from_the_likeliest_tenth():
    model = CosineSimCausalTransformer(**COSINE)
    prompt = tokens_of(np.random.default_rng(0), 300, 1)
    params = initial(model)
    drawn = model.generate(params, prompt, 1, key=jax.random.key(0), temperature=50.0)
    logits = model.apply(params, prompt)[:, -1]
    rank = (logits > jnp.take_along_axis(logits, drawn, 1)).sum(-1)
    assert set(np.unique(rank)) == set(range(6))  # int(0.1 * 64) = 6
    wide = model.generate(
        params, prompt, 1, key=jax.random.key(0), temperature=50.0, filter_thres=0.5
    )
    assert ((logits > jnp.take_along_axis(logits, wide, 1)).sum(-1)).max() > 20


BAD = {
    "too many tokens": (
        lambda model, params: model.apply(params, jnp.zeros((2, 33), jnp.int32)),
        "`tokens` must have at most max_seq_len=32 tokens in a sequence, got shape (2, 33). "
        "Cut them, or build a model with more positions.",
    ),
    "too long a cache": (
        lambda model, params: model.init_cache(2, 33),
        "`length` must be at most max_seq_len=32, got 33. "
        "That is how many positions there are: build a model with more.",
    ),
    "no cache": (
        lambda model, params: model.apply(params, PROMPT, decode=True),
        "`decode` must find a cache where it is True, got none. "
        'Make one: pass {**params, "cache": model.init_cache(batch, length)} to apply.',
    ),
    "top_p": (
        lambda model, params: model.generate(params, PROMPT, 1, key=jax.random.key(0), top_p=0.0),
        "`top_p` must be in (0, 1], got 0.0. None draws among all tokens.",
    ),
    "stop_token": (
        lambda model, params: generate(
            model, params, PROMPT, 1, key=jax.random.key(0), stop_token=-1
        ),
        "`stop_token` must be at least 0, got -1. Use None for none.",
    ),
    "filter_thres": (
        lambda model, params: model.generate(
            params, PROMPT, 1, key=jax.random.key(0), filter_thres=1.0
        ),
        "`filter_thres` must be in [0, 1), got 1.0.",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_what_a_model_cannot_do_is_refused(call, message):
    model = MODELS["cosine"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(model, initial(model))


def test_decoding_without_a_cache_is_refused_by_the_plain_transformer_too():
    model = MODELS["plain"]
    with pytest.raises(ValueError, match=r"^`decode` must find a cache where it is True, got none"):
        model.apply(initial(model), PROMPT, decode=True)
