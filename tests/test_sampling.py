"""Which tokens `generate` draws from, and what it refuses to draw from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flash_attention_jax.transformer import CausalTransformer, CosineSimCausalTransformer, generate

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A model with the same logits after every token."""

    logits: tuple[float, ...]
    num_tokens: int = 4

    def apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        del params
        return jnp.broadcast_to(jnp.float32(self.logits), (*tokens.shape, len(self.logits)))


def drawn(model, count=64, **options):
    prompt = jnp.zeros((8, 1), jnp.int32)
    tokens = generate(model, {}, prompt, count, key=KEY, window=1, **options)
    return sorted(set(np.asarray(tokens).ravel().tolist()))


def log(*probs):
    return Fixed(tuple(np.log(probs).tolist()))


@pytest.mark.parametrize("logits", [(1.0, 1.0, 1.0, 1.0), (0.0, 2.0, 2.0, -1.0)])
def test_top_k_of_one_is_greedy_where_tokens_tie(logits):
    model = Fixed(logits)
    greedy = drawn(model, temperature=0.0)
    assert greedy == [int(np.argmax(logits))]
    assert drawn(model, top_k=1) == greedy


def test_top_k_keeps_no_more_than_k_of_equal_tokens():
    assert drawn(Fixed((0.0, 3.0, 3.0, 3.0)), top_k=2) == [1, 2]


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ((0.5, 0.3, 0.1, 0.1), 0.8, [0, 1]),
        ((0.5, 0.3, 0.1, 0.1), 0.81, [0, 1, 2]),
        ((0.1, 0.5, 0.1, 0.3), 0.85, [0, 1, 3]),
        ((0.25, 0.25, 0.25, 0.25), 0.5, [0, 1]),
        ((0.5, 0.3, 0.1, 0.1), 1e-9, [0]),
        ((0.5, 0.3, 0.1, 0.1), 1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(probs, top_p, kept):
    assert drawn(log(*probs), top_p=top_p) == kept


def test_top_p_is_of_what_top_k_leaves():
    assert drawn(log(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5) == [0]
    assert drawn(log(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.6) == [0, 1]


def test_model_of_nan_is_an_error_that_says_when():
    with pytest.raises(ValueError, match="`model` must give logits, got NaN for token 0 after"):
        drawn(Fixed((0.0, float("nan"), 0.0, 0.0)))


@pytest.mark.parametrize("token", [-1, 4, 1000])
def test_token_that_the_model_does_not_have_is_an_error(token):
    prompt = jnp.array([[0, token, 1]], jnp.int32)
    says = f"must hold tokens from 0 to num_tokens - 1 = 3, got {token}"
    with pytest.raises(ValueError, match="`prompt` " + says):
        generate(Fixed((0.0,) * 4), {}, prompt, 2, key=KEY)
    for kind in (CausalTransformer, CosineSimCausalTransformer):
        more = {"max_seq_len": 8} if kind is CosineSimCausalTransformer else {}
        model = kind(num_tokens=4, dim=8, depth=1, heads=1, dim_head=8, **more)
        with pytest.raises(ValueError, match="`tokens` " + says):
            model.init(KEY, prompt)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"prompt": [[1, 2]]}, TypeError, "`prompt` must be an array, got list"),
        ({"prompt": jnp.ones((1, 2))}, TypeError, "`prompt` must be of an integer dtype"),
        ({"prompt": jnp.ones(3, jnp.int32)}, ValueError, r"`prompt` must have shape \(batch, n\)"),
        ({"temperature": "1"}, TypeError, "`temperature` must be a number"),
        ({"temperature": float("nan")}, ValueError, "`temperature` must be finite"),
        ({"temperature": -0.5}, ValueError, "`temperature` must not be negative"),
        ({"key": 1}, TypeError, r"`key` must be an array, got int. Pass jax.random.key\(seed\)"),
        ({"key": jnp.ones(3)}, TypeError, "`key` must be one JAX random key"),
    ],
)
def test_bad_arguments_are_refused_in_full_words(changed, error, says):
    given = {"prompt": jnp.ones((1, 2), jnp.int32), "key": KEY, "window": 1} | changed
    prompt = given.pop("prompt")
    with pytest.raises(error, match=says):
        generate(Fixed((0.0,) * 4), {}, prompt, 2, **given)
