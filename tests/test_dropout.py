"""The dropout mask: a function of (key, b, h, i, j) alone, and as good as random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import flash_attention
from flash_attention_jax._core import dropout

KEY = jax.random.key(11)
B, H, T, S = 2, 3, 13, 17


def kept(rate, key=KEY, *, q_len=T, k_len=S, heads=H, kv_heads=None, **options):
    """Which probabilities are kept (b, h, i, j): values that are unit vectors show them."""
    q = jnp.zeros((B, heads, q_len, 4), jnp.float32)
    k = jnp.zeros((B, kv_heads or heads, k_len, 4), jnp.float32)
    v = jnp.broadcast_to(jnp.eye(k_len, dtype=jnp.float32), (*k.shape[:3], k_len))
    out = flash_attention(q, k, v, dropout_rate=rate, dropout_key=key, **options)
    return np.asarray(out != 0)


def bits(b, h, i, j, heads, words):
    """The 32 bits of one probability in plain Python integers, as the module's formula says."""
    wrap, golden = 0xFFFFFFFF, 0x9E3779B9

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & wrap
        x ^= x >> 15
        x = x * 0x846CA68B & wrap
        return x ^ x >> 16

    unit = b * heads + h
    first = mix(mix(words[0] + unit * golden & wrap) + i * golden & wrap)
    second = mix(mix(words[1] ^ mix(unit)) ^ mix(i))
    return mix(mix(j * golden + first & wrap) ^ second)


def test_mask_is_the_formula():
    words = [int(word) for word in jax.random.key_data(KEY)]
    got = kept(0.3, implementation="dense")
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 12, 16), (1, 0, 7, 3), (0, 1, 3, 16), (0, 2, 11, 9)]:
        assert got[b, h, i, j] == (bits(b, h, i, j, H, words) >= round(0.3 * 2**32))


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "blocked"},
        {"implementation": "blocked", "block_q": 4, "block_kv": 5},
        {"implementation": "blocked", "block_q": 1, "block_kv": 16},
        {"implementation": "checkpointed", "block_q": 5, "block_kv": 4},
        {"implementation": "checkpointed", "differentiation": "any"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_mask_is_the_same_in_every_engine_and_for_any_block_size(options):
    np.testing.assert_array_equal(kept(0.3, **options), kept(0.3, implementation="dense"))


def test_mask_does_not_depend_on_how_heads_share_keys():
    np.testing.assert_array_equal(kept(0.3, kv_heads=1), kept(0.3))


def test_mask_does_not_depend_on_the_lengths():
    np.testing.assert_array_equal(kept(0.3, q_len=7, k_len=10), kept(0.3)[:, :, :7, :10])


def test_backward_drops_what_the_forward_dropped():
    # With values of dimension 1, dv is the sum over queries of the kept probabilities times the
    # cotangent.
    q = jnp.zeros((B, H, T, 4), jnp.float32)
    k, v = jnp.zeros((B, H, S, 4), jnp.float32), jnp.ones((B, H, S, 1), jnp.float32)
    cotangent = np.random.default_rng(0).standard_normal((B, H, T, 1)).astype(np.float32)
    options = {"dropout_rate": 0.3, "dropout_key": KEY, "block_q": 4, "block_kv": 5}
    _, pull = jax.vjp(lambda v: flash_attention(q, k, v, **options), v)
    mask = kept(0.3)
    want = np.einsum("bhij,bhie->bhje", mask / (S * 0.7), cotangent.astype(np.float64))
    np.testing.assert_allclose(np.asarray(pull(cotangent)[0]), want, rtol=1e-5, atol=1e-6)


def test_same_mask_for_every_example_under_vmap():
    # Counted within the call: an example's mask is that of the call without vmap.
    q = jnp.zeros((3, H, T, 4), jnp.float32)
    v = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32), (3, H, S, S))
    k = jnp.zeros((3, H, S, 4), jnp.float32)

    def one(q, k, v):
        return flash_attention(q[None], k[None], v[None], dropout_rate=0.3, dropout_key=KEY)[0]

    got = np.asarray(jax.vmap(one)(q, k, v) != 0)
    np.testing.assert_array_equal(got, np.broadcast_to(kept(0.3)[:1], got.shape))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_share_is_the_rate(rate):
    share = 1 - kept(rate, q_len=128, k_len=128).mean()
    # 98304 coins: the standard error is at most 0.0016.
    assert abs(share - rate) < 0.007


def test_kept_probabilities_are_rescaled():
    q, k = jnp.zeros((S, 4), jnp.float32), jnp.zeros((S, 4), jnp.float32)
    out = flash_attention(q, k, jnp.eye(S, dtype=jnp.float32), dropout_rate=0.25, dropout_key=KEY)
    values = np.asarray(out)
    np.testing.assert_allclose(values[values != 0], 1 / (0.75 * S), rtol=1e-6)


def test_neighbours_are_uncorrelated():
    coins = kept(0.5, q_len=96, k_len=96) * 2.0 - 1
    pairs = {
        "along the keys": (coins[..., 1:], coins[..., :-1]),
        "along the queries": (coins[:, :, 1:], coins[:, :, :-1]),
        "along the diagonal": (coins[:, :, 1:, 1:], coins[:, :, :-1, :-1]),
        "between heads": (coins[:, 1:], coins[:, :-1]),
        "between sequences": (coins[1:], coins[:-1]),
        "two keys apart": (coins[..., 2:], coins[..., :-2]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / a.size**0.5, name


def test_rows_and_columns_are_neither_full_nor_empty():
    coins = kept(0.5, q_len=96, k_len=96)
    for axis in (2, 3):
        share = coins.mean(axis=axis)  # of 96 coins: the standard error is 0.05
        assert share.min() > 0.22
        assert share.max() < 0.78


def test_no_row_is_another_row_shifted():
    # One word per row would allow it: bits(row, j) = f(j * golden + word) repeats where two words
    # differ by a multiple of golden.
    rows = kept(0.5, q_len=64, k_len=64)[0, 0]
    windows = {tuple(row[start : start + 40]) for row in rows for start in range(25)}
    assert len(windows) == 64 * 25


def test_bits_of_a_word_are_fair():
    at = [np.arange(n, dtype=np.int32) for n in (2, 2, 32, 64)]
    b, h, i, j = np.meshgrid(*at, indexing="ij")
    words = jnp.array([1, 2], jnp.uint32)  # a poor key: nothing but low bits
    first, second = dropout.row_words(words, 2, *(jnp.asarray(x) for x in (b, h, i)))
    for bit in range(1, 8):
        # Thresholds at each power of two: a biased high bit would show.
        share = np.asarray(dropout.keep((first, second), jnp.asarray(j), 0.5**bit)).mean()
        assert abs(share - (1 - 0.5**bit)) < 0.02


def test_new_and_old_style_keys_agree():
    np.testing.assert_array_equal(kept(0.3, jax.random.key(5)), kept(0.3, jax.random.PRNGKey(5)))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_any_kind_of_key_gives_two_words(implementation):
    words = [
        np.asarray(dropout.key_words(jax.random.key(seed, impl=implementation)))
        for seed in range(8)
    ]
    assert all(w.shape == (2,) and w.dtype == np.uint32 for w in words)
    assert len({tuple(w) for w in words}) == 8


def test_keys_differ_by_every_word():
    for key in ([1, 0], [0, 1], [0, 0]):
        for other in ([1, 0], [0, 1], [0, 0]):
            a, b = (kept(0.5, jnp.array(x, jnp.uint32)) for x in (key, other))
            assert (a == b).all() == (key == other)


def test_rate_of_zero_needs_no_key_and_drops_nothing():
    assert kept(0.0, None).all()
