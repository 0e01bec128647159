"""Generation: ties are cut by rank, prompts differ in length, and a broken input is an error."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax.transformer import CausalTransformer, CosineSimCausalTransformer, generate

SIZES = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "implementation": "dense"}
MODELS = {
    "plain": CausalTransformer(num_tokens=64, **SIZES),
    "window": CausalTransformer(num_tokens=64, window=2, kv_heads=1, **SIZES),
    "cosine": CosineSimCausalTransformer(num_tokens=64, max_seq_len=32, **SIZES),
}
PROMPT = jnp.asarray([[36, 37, 38, 3, 9], [33, 34, 35, 36, 1]], jnp.int32)
KEY = jax.random.key(0)


@functools.cache
def initial(name):
    return jax.jit(MODELS[name].init)(jax.random.key(0), PROMPT)


class Fixed:
    """A model that expects the same distribution after every token."""

    def __init__(self, *logits):
        self.logits = jnp.asarray(logits, jnp.float32)

    def apply(self, params, tokens):
        return jnp.broadcast_to(self.logits, (*tokens.shape, self.logits.size))


def drawn_from(*probs, **options):
    """Which tokens are ever drawn."""
    prompt = jnp.zeros((400, 1), jnp.int32)
    model = Fixed(*np.log(probs))
    return set(np.unique(generate(model, {}, prompt, 2, key=KEY, window=1, **options)).tolist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 0}),
        ({"top_p": 0.8}, {1, 3}),
        ({"top_p": 0.85}, {1, 3, 0}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.95}, {1, 3, 0}),
        ({"temperature": 1e-9}, {1}),
    ],
    ids=str,
)
def test_equal_tokens_widen_no_cut(options, expected):
    assert drawn_from(0.1, 0.5, 0.1, 0.3, **options) == expected


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.2}, {"temperature": 0.0}], ids=str)
def test_the_first_of_equally_likely_tokens_is_the_likeliest(options):
    assert drawn_from(0.2, 0.4, 0.4, **options) == {1}


def test_large_logits_do_not_overflow_by_a_small_temperature():
    prompt = jnp.zeros((3, 1), jnp.int32)
    model = Fixed(-1e34, 1e34, 2e34)
    drawn = generate(model, {}, prompt, 2, key=KEY, window=1, temperature=1e-6, top_p=0.9)
    np.testing.assert_array_equal(drawn, 2)


# --- prompts of different lengths ---


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_each_prompt_goes_on_as_if_it_were_alone(name, window):
    model, params = MODELS[name], initial(name)
    lengths = jnp.asarray([5, 2], jnp.int32)
    options = {"key": KEY, "temperature": 0.0, "window": window}
    # What pads a prompt may be no token at all.
    padded = PROMPT.at[1, 2:].set(-1)
    drawn = generate(model, params, padded, 4, lengths=lengths, **options)
    read = jax.jit(model.apply)
    for row in (0, 1):
        tokens = PROMPT[row, : int(lengths[row])].tolist()
        for token in drawn[row].tolist():
            seen = tokens if window is None else tokens[-window:]
            filled = jnp.asarray([seen + [0] * (9 - len(seen))], jnp.int32)
            assert token == int(read(params, filled)[0, len(seen) - 1].argmax())
            tokens.append(token)


def test_whole_lengths_change_no_draw():
    model, params = MODELS["plain"], initial("plain")
    whole = generate(model, params, PROMPT, 4, key=KEY)
    for lengths in (jnp.asarray([5, 5], jnp.int32), np.asarray([5, 5])):
        given = model.generate(params, PROMPT, 4, key=KEY, lengths=lengths)
        np.testing.assert_array_equal(given, whole)


# --- what is broken ---


@pytest.mark.parametrize("logits", [(0.0, np.nan, 1.0), (-np.inf, -np.inf)], ids=str)
def test_logits_that_cannot_be_drawn_from_are_an_error(logits):
    prompt = jnp.zeros((2, 1), jnp.int32)
    message = (
        "`model` must give logits that can be drawn from, got NaN, or no token to draw, at drawn "
        "token 0 of sequence 0. Look for NaN in `params`"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        generate(Fixed(*logits), {}, prompt, 3, key=KEY, window=1)


def test_nan_parameters_are_an_error_of_the_model():
    params = jax.tree.map(lambda x: x * jnp.nan, initial("plain"))
    with pytest.raises(ValueError, match=r"^`model` must give logits that can be drawn from"):
        generate(MODELS["plain"], params, PROMPT, 3, key=KEY)


class BreaksAfter:
    """A counter whose logits are NaN after token 5."""

    def apply(self, params, tokens):
        logits = 50.0 * jax.nn.one_hot(tokens + 1, 16, dtype=jnp.float32)
        return jnp.where(tokens[..., None] == 5, jnp.nan, logits)


def test_inside_jit_a_broken_sequence_alone_goes_on_with_minus_one():
    prompt = jnp.asarray([[3], [8]], jnp.int32)

    @jax.jit
    def call(prompt):
        return generate(BreaksAfter(), {}, prompt, 5, key=KEY, window=1)

    np.testing.assert_array_equal(call(prompt), [[4, 5, -1, -1, -1], [9, 10, 11, 12, 13]])


def test_nan_after_the_stop_token_is_no_error():
    prompt = jnp.asarray([[3], [2]], jnp.int32)
    drawn = generate(BreaksAfter(), {}, prompt, 4, key=KEY, window=1, stop_token=5)
    np.testing.assert_array_equal(drawn, [[4, 5, 5, 5], [3, 4, 5, 5]])


@pytest.mark.parametrize("name", ["plain", "cosine"])
@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_out_of_range_are_refused_and_nan_where_they_cannot_be_seen(name, token):
    model, params = MODELS[name], initial(name)
    tokens = PROMPT.at[1, 2].set(token)
    message = f"must hold tokens in [0, num_tokens=64), got {token}. Look at the tokenizer"
    with pytest.raises(ValueError, match=f"^{re.escape('`tokens` ' + message)}"):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match=f"^{re.escape('`prompt` ' + message)}"):
        generate(model, params, tokens, 1, key=KEY)
    logits = jax.jit(model.apply)(params, tokens)
    assert np.isnan(logits[1, 2:]).all()
    assert np.isfinite(logits[0]).all()


def test_padding_out_of_range_reaches_no_gradient():
    model, params = MODELS["plain"], initial("plain")
    lengths = jnp.asarray([5, 2], jnp.int32)

    @jax.jit
    def gradient(params, tokens):
        def loss(params):
            logits = model.apply(params, tokens, lengths=lengths)
            return logits[0].sum() + jnp.square(logits[1, :2]).sum()

        return jax.grad(loss)(params)

    clean, padded = (gradient(params, PROMPT.at[1, 2:].set(pad)) for pad in (0, -1))
    jax.tree.map(np.testing.assert_array_equal, padded, clean)


BAD = {
    "a list": (
        {"prompt": [[1, 2]]},
        TypeError,
        "`prompt` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "floats": (
        {"prompt": jnp.ones((1, 2), jnp.float32)},
        TypeError,
        "`prompt` must be of an integer dtype, got float32. Cast it: prompt.astype(jnp.int32).",
    ),
    "one axis": (
        {"prompt": jnp.ones((2,), jnp.int32)},
        ValueError,
        "`prompt` must have shape (batch, n) with n at least 1, got (2,).",
    ),
    "temperature": (
        {"temperature": "1"},
        TypeError,
        "`temperature` must be a number known when the function is traced, got str '1'.",
    ),
    "temperature is NaN": (
        {"temperature": float("nan")},
        ValueError,
        "`temperature` must be finite, got nan.",
    ),
    "negative temperature": (
        {"temperature": -1.0},
        ValueError,
        "`temperature` must not be negative, got -1.0. Pass 0 or more.",
    ),
    "top_p": ({"top_p": "0.5"}, TypeError, "`top_p` must be a number known when"),
    "key": (
        {"key": 1},
        TypeError,
        "`key` must be an array, got int. Pass jax.random.key(seed).",
    ),
    "keys": (
        {"key": jax.random.split(KEY, 2)},
        TypeError,
        "`key` must be one JAX random key, got key<fry>[2]. Pass jax.random.key(seed).",
    ),
    "lengths": (
        {"lengths": jnp.asarray([0], jnp.int32)},
        ValueError,
        "`lengths` must be within 1 and the prompt's length 2, got 0. "
        "Every prompt needs a token to go on from.",
    ),
    "lengths' shape": (
        {"lengths": jnp.asarray([1, 1], jnp.int32)},
        ValueError,
        "`lengths` must have shape (batch,) = (1,), got shape (2,). One per prompt.",
    ),
    "lengths' type": ({"lengths": [1]}, TypeError, "`lengths` must be an array, got list."),
    "stop_token": (
        {"stop_token": 64},
        ValueError,
        "`stop_token` must be under num_tokens=64, got 64. It would never be drawn: use None",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_what_generation_cannot_use_is_refused(change, error, message):
    options = {"prompt": jnp.ones((1, 2), jnp.int32), "length": 3, "key": KEY, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        generate(MODELS["plain"], initial("plain"), **options)


@pytest.mark.parametrize("array", [jnp.float32, np.float64, np.asarray])
def test_temperature_may_be_an_array_without_axes(array):
    options = {"key": jax.random.PRNGKey(3), "window": 1}
    prompt = jnp.zeros((4, 1), jnp.int32)
    drawn, expected = (
        generate(Fixed(0.0, 1.0, 2.0), {}, prompt, 3, temperature=t, **options)
        for t in (array(0.5), 0.5)
    )
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("shape", "lengths", "says"),
    [
        ((5,), None, r"`tokens` must have the axes \(batch, length\), got shape \(5,\)"),
        ((2, 5), (3,), r"`lengths` must have shape \(batch,\) = \(2,\), got shape \(3,\)"),
        ((2, 5), (), r"`lengths` must have shape \(batch,\) = \(2,\), got shape \(\)"),
    ],
)
def test_tokens_and_lengths_of_another_shape_are_refused(name, shape, lengths, says):
    lengths = None if lengths is None else jnp.ones(lengths, jnp.int32)
    with pytest.raises(ValueError, match=says):
        MODELS[name].apply(initial(name), jnp.ones(shape, jnp.int32), lengths=lengths)


def test_prompt_beyond_int32_is_refused_where_nothing_says_how_many_tokens_there_are():
    with pytest.raises(ValueError, match=r"`prompt` must fit int32, got 4294967297\. Look at"):
        generate(Fixed(0.0, 0.0), {}, np.asarray([[2**32 + 1]]), 1, key=KEY, window=1)


def test_bytes_are_tokens_of_a_model_of_256():
    model = CausalTransformer(num_tokens=256, **SIZES)
    prompt = np.frombuffer(b"\xff def", np.uint8)[None]
    params = model.init(KEY, prompt)
    np.testing.assert_array_equal(
        model.apply(params, prompt), model.apply(params, prompt.astype(np.int32))
    )
