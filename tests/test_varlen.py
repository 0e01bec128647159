"""Packed sequences: against a loop over the sequences, written in NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax.varlen import (
    flash_attention_varlen,
    flash_attention_varlen_qkvpacked,
    pad_input,
    unpad_input,
)

Q_SPARE, K_SPARE = 3, 2  # tokens past the last sequence

LENGTHS = {
    "self": ([5, 0, 1, 13, 0], None),
    "cross": ([3, 0, 5, 1, 11, 4, 0], [7, 2, 0, 13, 3, 1, 0]),
    "one": ([7], None),
    "all empty": ([0, 0], [0, 0]),
    "no sequence": ([], []),
}
EMPTY = "all empty", "no sequence"
# Tokens of "cross" whose sequence is empty on the other side, or that are in no sequence.
NO_KEYS = np.r_[3:8, 24:27]
NO_QUERIES = np.r_[7:9, 26:28]

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (3, -1)},
    "window to the right": {"window": (None, 0)},
    "causal window": {"causal": True, "window": 2},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 1.0, 0.0])},
    "causal alibi": {"causal": True, "alibi_slopes": np.array([0.5, 0.25, 1.0, 0.0])},
    "softcap": {"softcap": 1.5, "causal": True},
    "sinks": {"sinks": np.array([0.0, 1.0, -1.0, 3.0]), "causal": True},
    "scale": {"scale": 0.7},
    "cosine": {"similarity": "cosine", "causal": True},
    "all": {
        "similarity": "cosine",
        "scale": 3.0,
        "causal": True,
        "window": (5, 0),
        "softcap": 4.0,
        "sinks": np.array([0.0, 1.0, -1.0, 3.0]),
        "alibi_slopes": np.array([0.5, 0.25, 1.0, 0.0]),
    },
}


def starts(lengths):
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int32)


def packed(lengths, heads=(4, 2), dims=(8, 6), dtype=np.float64, seed=0):
    """q, k, v and the two cu_seqlens (the second None for self-attention)."""
    rng = np.random.default_rng(seed)
    q_lengths, k_lengths = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    total_q = sum(q_lengths) + Q_SPARE
    total_k = total_q if k_lengths is None else sum(k_lengths) + K_SPARE
    q = rng.standard_normal((total_q, heads[0], dims[0]))
    k = rng.standard_normal((total_k, heads[1], dims[0]))
    # Logits that grow along the keys: a running maximum that is not kept up shows.
    k += 0.1 * np.arange(total_k)[:, None, None]
    v = rng.standard_normal((total_k, heads[1], dims[1]))
    cu_k = None if k_lengths is None else starts(k_lengths)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), starts(q_lengths), cu_k


def oracle(
    q,
    k,
    v,
    cu_q,
    cu_k=None,
    *,
    similarity="dot",
    causal=False,
    window=None,
    scale=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
):
    """Output and lse, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    cu_k = cu_q if cu_k is None else cu_k
    group = q.shape[1] // k.shape[1]
    left, right = window if isinstance(window, tuple) else (window, window)
    if similarity == "cosine":
        q = q / np.linalg.norm(q, axis=-1, keepdims=True)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    if scale is None:
        scale = 10.0 if similarity == "cosine" else q.shape[-1] ** -0.5
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    lse = np.full(q.shape[:2], -np.inf)
    if sinks is not None:
        lse[:] = sinks
    for s in range(len(cu_q) - 1):
        q_len, k_len = cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
        for i in range(q_len):
            diagonal = i + k_len - q_len
            j = np.arange(k_len)
            seen = np.ones(k_len, bool)
            if causal:
                seen &= j <= diagonal
            if left not in (None, -1):
                seen &= j >= diagonal - left
            if right not in (None, -1):
                seen &= j <= diagonal + right
            j = j[seen]
            if not len(j):
                continue
            for n in range(q.shape[1]):
                at = cu_q[s] + i, n
                logits = k[cu_k[s] + j, n // group] @ q[at] * scale
                if alibi_slopes is not None:
                    logits = logits - alibi_slopes[n] * np.abs(diagonal - j)
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
                out[at] = weights @ v[cu_k[s] + j, n // group] / total
                lse[at] = np.log(total)
    return out, lse


def slope(function, x, direction):
    """Derivative of a float64 function along a direction, by a difference of fourth order."""
    step = 1e-3

    def value(steps):
        return function(np.asarray(x) + steps * step * direction)

    return (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)


def dotted(out, lse, cotangents):
    """One number from output and lse; rows without a key (lse -inf) leave theirs out."""
    finite = jnp.isfinite(lse)
    return (out * cotangents[0]).sum() + jnp.where(
        finite, jnp.where(finite, lse, 0.0) * cotangents[1], 0.0
    ).sum()


@pytest.mark.parametrize(
    ("lengths", "features"),
    [(lengths, features) for lengths in ("self", "cross") for features in FEATURES]
    + [(lengths, features) for lengths in ("one", *EMPTY) for features in ("plain", "all")],
)
def test_equals_a_loop_over_the_sequences(lengths, features):
    q, k, v, cu_q, cu_k = packed(lengths)
    out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **FEATURES[features])
    expected, expected_lse = oracle(q, k, v, cu_q, cu_k, **FEATURES[features])
    assert out.shape == (len(q), 4, 6)
    assert lse.shape == (len(q), 4)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", ["plain", "causal", "window", "causal alibi", "all"])
@pytest.mark.parametrize("lengths", ["self", "cross"])
def test_gradients_equal_those_of_the_loop(lengths, features):
    q, k, v, cu_q, cu_k = packed(lengths)
    rng = np.random.default_rng(1)
    cotangents = rng.standard_normal((len(q), 4, 6)), rng.standard_normal((len(q), 4))

    def loss(q, k, v):
        return dotted(
            *flash_attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **FEATURES[features]),
            cotangents,
        )

    gradients = jax.grad(loss, (0, 1, 2))(q, k, v)
    arrays = {"q": q, "k": k, "v": v}
    for (name, x), gradient in zip(arrays.items(), gradients, strict=True):

        def moved(x, name=name):
            found = oracle(*({**arrays, name: x}).values(), cu_q, cu_k, **FEATURES[features])
            return float(dotted(*found, cotangents))

        direction = rng.standard_normal(x.shape)
        expected = slope(moved, x, direction)
        np.testing.assert_allclose(
            np.vdot(gradient, direction), expected, rtol=1e-7, atol=1e-8, err_msg=f"d{name}"
        )


@pytest.mark.parametrize("implementation", ["dense", "blocked", "checkpointed"])
@pytest.mark.parametrize("features", ["causal", "window", "causal alibi"])
@pytest.mark.parametrize("lengths", ["self", "cross"])
def test_every_engine_keeps_each_sequence_its_diagonal(implementation, lengths, features):
    # Blocks far smaller than the arrays, so that whole blocks lie between two sequences.
    q, k, v, cu_q, cu_k = packed(lengths)
    options = {"block_q": 4, "block_kv": 4, "implementation": implementation}
    expected = oracle(q, k, v, cu_q, cu_k, **FEATURES[features])
    got = flash_attention_varlen(
        q, k, v, cu_q, cu_k, return_lse=True, **options, **FEATURES[features]
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_keeps_its_dtype_and_a_wide_lse(dtype):
    q, k, v, cu_q, cu_k = packed("cross", dtype=dtype)
    out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    expected, expected_lse = oracle(q, k, v, cu_q, cu_k, causal=True)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    atol = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)


def test_gradients_of_tokens_that_meet_nobody_are_zero():
    q, k, v, cu_q, cu_k = packed("cross")
    cotangent = np.random.default_rng(1).standard_normal((len(q), 4, 6))
    _, pullback = jax.vjp(
        lambda q, k, v: flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True), q, k, v
    )
    dq, dk, dv = pullback(jnp.asarray(cotangent))
    assert not np.asarray(dq)[NO_KEYS].any()
    assert not np.asarray(dk)[NO_QUERIES].any()
    assert not np.asarray(dv)[NO_QUERIES].any()
    assert all(np.asarray(gradient).any() for gradient in (dq, dk, dv))


def test_nan_in_tokens_that_meet_nobody_stays_there():
    q, k, v, cu_q, cu_k = packed("cross")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((len(q), 4, 6)))

    def run(*arrays):
        out, pullback = jax.vjp(lambda *x: flash_attention_varlen(*x, cu_q, cu_k), *arrays)
        return out, *pullback(cotangent)

    clean = run(q, k, v)
    q = q.at[NO_KEYS].set(jnp.nan)
    k, v = (x.at[NO_QUERIES].set(jnp.nan) for x in (k, v))
    for got, expected in zip(run(q, k, v), clean, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("features", ["plain", "causal", "causal window", "alibi"])
def test_self_attention_is_the_same_however_it_is_said(features):
    q, k, v, cu, _ = packed("self")
    expected = flash_attention_varlen(q, k, v, cu, **FEATURES[features])
    for again in (cu, cu.copy(), jnp.asarray(cu, jnp.int64)):
        out = flash_attention_varlen(q, k, v, cu, again, **FEATURES[features])
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


def test_one_cu_seqlens_may_serve_arrays_of_different_length():
    q, k, v, cu, _ = packed("self")
    k, v = (jnp.concatenate([x, x]) for x in (k, v))
    out = flash_attention_varlen(q, k, v, cu, cu, causal=True)
    np.testing.assert_allclose(out, oracle(q, k, v, cu, causal=True)[0], rtol=0, atol=1e-12)


def test_max_seqlen_changes_nothing():
    q, k, v, cu_q, cu_k = packed("cross")
    expected = flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True)
    for longest in ((11, 13), (100, np.int32(100))):
        out = flash_attention_varlen(q, k, v, cu_q, cu_k, *longest, causal=True)
        np.testing.assert_array_equal(out, expected)


def test_traced_lengths_do_not_retrace():
    traces = []

    @jax.jit
    def attend(q, k, v, cu_q, cu_k):
        traces.append(q)
        return flash_attention_varlen(q, k, v, cu_q, cu_k, 12, 12, causal=True)

    q, k, v, _, _ = packed(([3, 0, 9], [1, 8, 4]))
    for q_lengths, k_lengths in (([3, 0, 9], [1, 8, 4]), ([4, 4, 4], [0, 13, 0]), ([0, 0, 1],) * 2):
        cu_q, cu_k = starts(q_lengths), starts(k_lengths)
        expected, _ = oracle(q, k, v, cu_q, cu_k, causal=True)
        np.testing.assert_allclose(attend(q, k, v, cu_q, cu_k), expected, rtol=0, atol=1e-12)
    assert len(traces) == 1


def test_lengths_are_checked_while_tracing_where_they_are_constants():
    q, k, v, _, _ = packed("one")
    cu = np.array([0, 5, 4], np.int32)
    with pytest.raises(ValueError, match="`cu_seqlens_q` must not decrease, got 4 after 5"):
        jax.jit(lambda q, k, v: flash_attention_varlen(q, k, v, cu))(q, k, v)
    with pytest.raises(ValueError, match="`max_seqlen_q` must be at least the longest sequence"):
        jax.jit(lambda q, k, v: flash_attention_varlen(q, k, v, cu[:2], None, 4))(q, k, v)


def test_vmap_over_packs():
    packs = [packed(lengths, seed=seed)[:3] for seed, lengths in enumerate([([3, 0, 9], None)] * 2)]
    cu = np.stack([starts([3, 0, 9]), starts([5, 6, 1])])
    q, k, v = (jnp.stack(x) for x in zip(*packs, strict=True))
    out = jax.vmap(lambda *x: flash_attention_varlen(*x, causal=True))(q, k, v, cu)
    for row in range(2):
        expected, _ = oracle(q[row], k[row], v[row], cu[row], causal=True)
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=1e-12)


def test_forward_mode_is_there_with_differentiation_any():
    q, k, v, cu_q, cu_k = packed("cross")
    rng = np.random.default_rng(1)
    tangents = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in (q, k, v))

    def attend(q, k, v):
        return flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True, differentiation="any")

    _, tangent = jax.jvp(attend, (q, k, v), tangents)

    def moved(t):
        moved_arrays = (
            np.asarray(x) + t * np.asarray(y) for x, y in zip((q, k, v), tangents, strict=True)
        )
        return oracle(*moved_arrays, cu_q, cu_k, causal=True)[0]

    np.testing.assert_allclose(tangent, slope(moved, np.float64(0), 1.0), rtol=0, atol=1e-8)


def test_dropout_drops_a_share_from_a_key_and_keeps_the_mean():
    lengths = [40, 0, 60]
    q, k, _, cu, _ = packed((lengths, None), heads=(4, 4))
    v = jnp.ones((len(q), 4, 6))
    key = jax.random.key(0)
    out = flash_attention_varlen(q, k, v, cu, dropout_rate=0.25, dropout_key=key)
    again = flash_attention_varlen(q, k, v, cu, dropout_rate=0.25, dropout_key=key)
    other = flash_attention_varlen(q, k, v, cu, dropout_rate=0.25, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(out, again)
    assert not np.allclose(out, other)
    assert float(jnp.ptp(out[: cu[-1]])) > 0.1
    assert abs(float(out[: cu[-1]].mean()) - 1.0) < 0.05


@pytest.mark.parametrize("features", ["plain", "all"])
def test_qkvpacked_equals_its_three_parts(features):
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((22, 3, 4, 8)))
    cu = starts([5, 0, 1, 13])
    out, lse = flash_attention_varlen_qkvpacked(qkv, cu, 13, return_lse=True, **FEATURES[features])
    expected = oracle(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu, **FEATURES[features])
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], rtol=0, atol=1e-12)


# --- padding ----------------------------------------------------------------------------------

MASK = np.array(
    [
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 7],  # kept tokens need not be at the start
        [1, 1, 1, 1, 1],
    ]
)


def padded(features=(4, 3), dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((4, 5, *features)), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("features", [(), (3,), (4, 3)])
@pytest.mark.parametrize("mask_dtype", [bool, np.int32, np.uint8])
def test_unpad_keeps_the_masked_tokens_and_pad_puts_them_back(features, dtype, mask_dtype):
    x, mask = 10 * padded(features), MASK.astype(mask_dtype)
    x = x.astype(dtype)
    packed, indices, cu_seqlens, max_seqlen = unpad_input(x, mask)
    np.testing.assert_array_equal(packed, np.asarray(x)[MASK != 0])
    np.testing.assert_array_equal(indices, np.flatnonzero(MASK))
    np.testing.assert_array_equal(cu_seqlens, [0, 3, 3, 5, 10])
    assert max_seqlen == 5
    assert isinstance(max_seqlen, int)
    assert (packed.dtype, indices.dtype, cu_seqlens.dtype) == (dtype, jnp.int32, jnp.int32)
    back = pad_input(packed, indices, 4, 5)
    kept = (MASK != 0).reshape(4, 5, *(1,) * len(features))
    np.testing.assert_array_equal(back, np.where(kept, np.asarray(x), 0))
    assert back.dtype == dtype


@pytest.mark.parametrize("total", [10, 13, 20, 31])
def test_unpad_to_a_static_total_adds_tokens_that_pad_drops(total):
    x = padded()
    for unpad in (unpad_input, jax.jit(unpad_input, static_argnames="total")):
        packed, indices, cu_seqlens, max_seqlen = unpad(x, MASK, total=total)
        assert packed.shape == (total, 4, 3)
        np.testing.assert_array_equal(packed[:10], np.asarray(x)[MASK != 0])
        assert not np.asarray(packed[10:]).any()
        np.testing.assert_array_equal(indices[:10], np.flatnonzero(MASK))
        assert bool((indices[10:] >= MASK.size).all())
        assert len(set(indices.tolist())) == total
        np.testing.assert_array_equal(cu_seqlens, [0, 3, 3, 5, 10])
        assert max_seqlen == 5
        back = pad_input(jnp.ones_like(packed), indices, 4, 5)
        np.testing.assert_array_equal(back[..., 0, 0], MASK != 0)


def test_max_seqlen_is_a_static_bound_where_the_mask_is_traced():
    bounds = []

    @jax.jit
    def unpad(x, mask):
        packed, _, _, max_seqlen = unpad_input(x, mask, total=10)
        bounds.append(max_seqlen)
        return packed

    unpad(padded(), np.eye(4, 5, dtype=bool))
    assert bounds == [5]


def test_unpad_works_inside_jit_with_a_mask_that_is_a_constant():
    packed, _, cu_seqlens, _ = jax.jit(lambda x: unpad_input(x, MASK))(padded())
    assert packed.shape == (10, 4, 3)
    np.testing.assert_array_equal(cu_seqlens, [0, 3, 3, 5, 10])


def test_traced_mask_over_the_total_is_cut_at_the_end():
    unpad = jax.jit(unpad_input, static_argnames="total")
    x = padded()
    packed, indices, cu_seqlens, _ = unpad(x, MASK, total=4)
    np.testing.assert_array_equal(packed, np.asarray(x)[MASK != 0][:4])
    np.testing.assert_array_equal(indices, np.flatnonzero(MASK)[:4])
    np.testing.assert_array_equal(cu_seqlens, [0, 3, 3, 4, 4])


def test_mask_that_keeps_nothing():
    packed, indices, cu_seqlens, max_seqlen = unpad_input(padded(), np.zeros((4, 5), bool))
    assert (packed.shape, indices.shape, max_seqlen) == ((0, 4, 3), (0,), 0)
    np.testing.assert_array_equal(cu_seqlens, [0] * 5)
    out = flash_attention_varlen(packed, packed, packed, cu_seqlens, None, max_seqlen)
    np.testing.assert_array_equal(pad_input(out, indices, 4, 5), np.zeros((4, 5, 4, 3)))


@pytest.mark.parametrize("total", [None, 16])
def test_gradients_of_unpad_and_pad_go_to_the_kept_tokens(total):
    # NaN where the mask is 0: what is dropped reaches nothing.
    x = jnp.where((MASK != 0)[..., None, None], padded(), jnp.nan)
    packed, pullback = jax.vjp(lambda x: unpad_input(x, MASK, total=total)[0], x)
    cotangent = np.random.default_rng(1).standard_normal(packed.shape)
    (dx,) = pullback(jnp.asarray(cotangent))
    expected = np.zeros((4, 5, 4, 3))
    expected[MASK != 0] = cotangent[:10]
    np.testing.assert_array_equal(dx, expected)

    _, indices, _, _ = unpad_input(x, MASK, total=total)
    _, pullback = jax.vjp(lambda packed: pad_input(packed, indices, 4, 5), packed)
    cotangent = np.random.default_rng(2).standard_normal((4, 5, 4, 3))
    (dpacked,) = pullback(jnp.asarray(cotangent))
    np.testing.assert_array_equal(dpacked[:10], cotangent[MASK != 0])
    assert not np.asarray(dpacked[10:]).any()


def test_padded_batch_through_the_packed_form_under_jit():
    """unpad, attend, pad, with a static total: values and gradients of each row attended alone."""
    x = padded((3, 4, 8))  # q, k and v of four heads
    cotangent = np.random.default_rng(1).standard_normal((4, 5, 4, 8))

    @jax.jit
    def attend(x, mask):
        qkv, indices, cu_seqlens, max_seqlen = unpad_input(x, mask, total=17)
        out = flash_attention_varlen_qkvpacked(qkv, cu_seqlens, max_seqlen, causal=True)
        return pad_input(out, indices, 4, 5)

    def alone(x):
        rows = []
        for row, keep in zip(x, MASK, strict=True):
            places = np.flatnonzero(keep)
            q, k, v = (row[places, part] for part in range(3))
            logits = jnp.einsum("ind,jnd->nij", q, k) / np.sqrt(8)
            logits = jnp.where(np.tri(len(places), dtype=bool), logits, -1e30)
            out = jnp.einsum("nij,jnd->ind", jax.nn.softmax(logits, -1), v)
            rows.append(jnp.zeros((5, 4, 8)).at[places].set(out))
        return jnp.stack(rows)

    out, pullback = jax.vjp(lambda x: attend(x, MASK), x)
    expected, expected_pullback = jax.vjp(jax.jit(alone), x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    cotangent = jnp.asarray(cotangent)
    np.testing.assert_allclose(
        pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=0, atol=1e-12
    )


# --- errors -----------------------------------------------------------------------------------

Q = np.ones((10, 4, 8), np.float32)
K = np.ones((12, 2, 8), np.float32)
CU = np.array([0, 3, 10], np.int32)
CUMULATIVE = "Pass 0 and the cumulative sum of the lengths, such as [0, 3, 7]."

BAD_CALLS = {
    "q of rank 4": (
        lambda: flash_attention_varlen(Q[None], Q, Q, CU),
        ValueError,
        (
            "`q` must have shape (tokens, heads, dimension), got (1, 10, 4, 8). "
            "Pack the batch into the tokens, as `unpad_input` does."
        ),
    ),
    "v a list": (
        lambda: flash_attention_varlen(Q, Q, [1.0], CU),
        TypeError,
        "`v` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "k and v of different length": (
        lambda: flash_attention_varlen(Q, K, K[:9], CU, CU),
        ValueError,
        (
            "`k` and `v` must agree in batch, length and heads, got k (12, 2, 8) and v (9, 2, 8). "
            "Only the dimension may differ."
        ),
    ),
    "heads that don't divide": (
        lambda: flash_attention_varlen(Q[:, :3], K, K, CU, CU),
        ValueError,
        (
            "`q` must have a multiple of the heads of `k`, got 3 heads and 2 key heads. "
            "Query head n reads key head n // (heads // key heads)."
        ),
    ),
    "window negative": (
        lambda: flash_attention_varlen(Q, Q, Q, CU, window=(-2, 0)),
        ValueError,
        "`window` must not be negative, got (-2, 0). Use None or -1 for an unbounded side.",
    ),
    "one cu_seqlens for two lengths": (
        lambda: flash_attention_varlen(Q, K, K, CU),
        ValueError,
        (
            "`k` must have as many tokens as `q` without `cu_seqlens_k`, "
            "got q (10, 4, 8) and k (12, 2, 8). Pass `cu_seqlens_k`."
        ),
    ),
    "cu_seqlens a list": (
        lambda: flash_attention_varlen(Q, Q, Q, [0, 3, 10]),
        TypeError,
        "`cu_seqlens_q` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "cu_seqlens floating": (
        lambda: flash_attention_varlen(Q, K, K, CU, CU.astype(np.float32)),
        TypeError,
        (
            "`cu_seqlens_k` must be of an integer dtype, got float32. "
            "Cast it: cu_seqlens_k.astype(jnp.int32)."
        ),
    ),
    "cu_seqlens of rank 2": (
        lambda: flash_attention_varlen(Q, Q, Q, CU[None]),
        ValueError,
        f"`cu_seqlens_q` must have shape (sequences + 1,), got (1, 3). {CUMULATIVE}",
    ),
    "cu_seqlens empty": (
        lambda: flash_attention_varlen(Q, Q, Q, CU[:0]),
        ValueError,
        f"`cu_seqlens_q` must have shape (sequences + 1,), got (0,). {CUMULATIVE}",
    ),
    "lengths in place of cu_seqlens": (
        lambda: flash_attention_varlen(Q, Q, Q, CU[1:]),
        ValueError,
        f"`cu_seqlens_q` must start with 0, got 3. {CUMULATIVE}",
    ),
    "cu_seqlens not sorted": (
        lambda: flash_attention_varlen(Q, K, K, CU, np.array([0, 7, 5], np.uint32)),
        ValueError,
        f"`cu_seqlens_k` must not decrease, got 5 after 7. {CUMULATIVE}",
    ),
    "cu_seqlens_q past the tokens": (
        lambda: flash_attention_varlen(Q, Q, Q, jnp.asarray(CU + CU, jnp.int32)),
        ValueError,
        f"`cu_seqlens_q` must end within the 10 tokens of `q`, got 20. {CUMULATIVE}",
    ),
    "cu_seqlens_k past the tokens": (
        lambda: flash_attention_varlen(Q, K, K, CU, np.array([0, 3, 13], np.int32)),
        ValueError,
        f"`cu_seqlens_k` must end within the 12 tokens of `k`, got 13. {CUMULATIVE}",
    ),
    "another number of sequences": (
        lambda: flash_attention_varlen(Q, K, K, CU, CU[:2]),
        ValueError,
        (
            "`cu_seqlens_q` and `cu_seqlens_k` must count the same sequences, got shapes (3,) and "
            "(2,). Give an empty sequence an entry that repeats the one before it."
        ),
    ),
    "max_seqlen floating": (
        lambda: flash_attention_varlen(Q, Q, Q, CU, None, 7.0),
        TypeError,
        (
            "`max_seqlen_q` must be an integer known when the function is traced, got float 7.0. "
            "Pass a Python int."
        ),
    ),
    "max_seqlen negative": (
        lambda: flash_attention_varlen(Q, K, K, CU, CU, None, -1),
        ValueError,
        "`max_seqlen_k` must be at least 0, got -1.",
    ),
    "max_seqlen_q too small": (
        lambda: flash_attention_varlen(Q, K, K, CU, CU, 6),
        ValueError,
        (
            "`max_seqlen_q` must be at least the longest sequence of `cu_seqlens_q`, 7, got 6. "
            "Pass 7, or None."
        ),
    ),
    "max_seqlen_k too small": (
        lambda: flash_attention_varlen(Q, Q, Q, CU, None, None, 6),
        ValueError,
        (
            "`max_seqlen_k` must be at least the longest sequence of `cu_seqlens_q`, 7, got 6. "
            "Pass 7, or None."
        ),
    ),
    "qkv of four parts": (
        lambda: flash_attention_varlen_qkvpacked(np.ones((10, 4, 4, 8), np.float32), CU),
        ValueError,
        (
            "`qkv` must have shape (total, 3, heads, dimension), got (10, 4, 4, 8). "
            "Stack the queries, keys and values on axis 1."
        ),
    ),
    "qkvpacked, cu_seqlens past the tokens": (
        lambda: flash_attention_varlen_qkvpacked(np.ones((9, 3, 4, 8), np.float32), CU),
        ValueError,
        f"`cu_seqlens` must end within the 9 tokens of `qkv`, got 10. {CUMULATIVE}",
    ),
    "qkvpacked, max_seqlen too small": (
        lambda: flash_attention_varlen_qkvpacked(np.ones((10, 3, 4, 8), np.float32), CU, 3),
        ValueError,
        (
            "`max_seqlen` must be at least the longest sequence of `cu_seqlens`, 7, got 3. "
            "Pass 7, or None."
        ),
    ),
    "unpad, mask floating": (
        lambda: unpad_input(Q, np.ones((10, 4), np.float32)),
        TypeError,
        (
            "`attention_mask` must be boolean or integer (nonzero = keep), got float32. "
            "Compare it with 0 first."
        ),
    ),
    "unpad, mask of another length": (
        lambda: unpad_input(Q, np.ones((10, 5), bool)),
        ValueError,
        (
            "`attention_mask` must have the first two axes (batch, length) of `hidden_states`, "
            "got (10, 5) with `hidden_states` (10, 4, 8). Pass one entry per token."
        ),
    ),
    "unpad, total too small": (
        lambda: unpad_input(Q, np.ones((10, 4), bool), total=39),
        ValueError,
        (
            "`total` must be at least the 40 tokens that `attention_mask` keeps, got 39. "
            "Pass a larger one, or None for exactly as many."
        ),
    ),
    "pad, indices of another length": (
        lambda: pad_input(Q, np.arange(9), 4, 5),
        ValueError,
        (
            "`indices` must have one entry for each token of `packed`, got (9,) "
            "with `packed` (10, 4, 8). Pass those of `unpad_input`."
        ),
    ),
    "pad, indices floating": (
        lambda: pad_input(Q, np.ones(10), 4, 5),
        TypeError,
        "`indices` must be of an integer dtype, got float64. Cast it: indices.astype(jnp.int32).",
    ),
    "pad, batch boolean": (
        lambda: pad_input(Q, np.arange(10), True, 5),
        TypeError,
        (
            "`batch` must be an integer known when the function is traced, got bool True. "
            "Pass a Python int."
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_error_says_what_was_wrong_and_what_to_do(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=rf"^{re.escape(message)}\s*$"):
        call()


def test_traced_mask_without_a_total_is_an_error():
    message = (
        "`total` must be given where `attention_mask` is traced, got None. "
        "Pass a static bound on the kept tokens, such as 20."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):  # JAX adds a note of its own
        jax.jit(unpad_input)(padded(), MASK)


def test_traced_max_seqlen_is_an_error():
    message = "`max_seqlen_q` must be an integer known when the function is traced, got int"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        jax.jit(lambda longest: flash_attention_varlen(Q, Q, Q, CU, None, longest))(7)
