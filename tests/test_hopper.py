"""The Hopper kernels without a GPU: interpreted with race detection, chosen, lowered, declined."""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import flash_attention_jax
from flash_attention_jax import explain, flash_attention
from flash_attention_jax._api import read
from flash_attention_jax._conformance.subject import difference
from flash_attention_jax._core import masks, platform
from flash_attention_jax._core.tiles import Tile
from flash_attention_jax._engines import blocked
from flash_attention_jax.kernels import (
    hopper_attention,
    hopper_config,
    hopper_decode,
    hopper_support,
    operands,
)
from flash_attention_jax.testing import CLAIMS, Subject, check

ROOT = Path(__file__).parents[1]

needs_interpreter = pytest.mark.skipif(
    hopper_support._pallas_why_not(interpret=True) is not None,
    reason=f"{hopper_support._pallas_why_not(interpret=True)}",
)


@pytest.fixture
def interpreted():
    """Calls run on the interpreted kernels, with 32-bit types: its threads know no others."""
    with _x64_off(), platform.interpreted():
        yield


@contextlib.contextmanager
def _x64_off():
    # The interpreter lowers in threads of its own, which a context manager does not reach.
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


HOPPER = {"platform": "gpu", "capability": (9, 0)}


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


# --- conformance ---

DECLINED = {
    "a relative bias": "does not add a `relative_bias`",
    "an axis of size 0": "nothing to compute",
    "a wide dtype": "computes in bfloat16 and float16",
    "forward mode": "no forward mode",
    "tile sizes": "tile sizes are its own",
}
"""What the kernels decline, by the words of the reason: everything else has to pass."""

QUICK = {
    "output_is_the_softmax_average_of_the_values",
    "logits_that_grow_along_the_keys_are_exact",
    "window_and_causal_hold_together",
    "offset_may_differ_between_sequences",
    "segments_need_not_be_sorted",
    "lengths_may_be_zero",
    "nan_beyond_the_lengths_stays_there",
    "sinks_join_the_denominator_alone",
    "softcap_bounds_the_logits",
    "alibi_falls_with_the_distance_from_the_diagonal",
    "scale_per_head_is_learned",
    "cosine_ignores_the_length_of_vectors",
    "cosine_does_not_underflow_at_scale_100",
    "groups_of_query_heads_share_a_key_head",
    "values_may_have_a_dimension_of_their_own",
    "lse_is_differentiable",
}
"""Claims that stand for a part of the kernels each; the others are marked slow."""


WIDE = {
    "float64_is_computed_in_float64",
    "results_have_the_dtypes_of_their_arguments",
    "lse_is_float32_for_16_bit_inputs",
}
"""Claims that make float64 arrays, which the interpreter's threads do not know."""


def claims():
    for claim in CLAIMS:
        if claim.name in WIDE:
            continue
        marks = [] if claim.name in QUICK else [pytest.mark.slow]
        yield pytest.param(claim, id=claim.name, marks=marks)


# NumPy, which multiplies for the interpreter, warns of NaN in what is then hidden.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@needs_interpreter
@pytest.mark.parametrize("claim", list(claims()))
def test_claim_holds_in_the_kernels_or_they_decline(claim, interpreted):
    tried = Subject(
        flash_attention_jax.dot_product_attention,
        dtype="bfloat16",
        fixed={"implementation": "hopper"},
        x64=False,
    )
    outcome, why = check(claim, tried)
    if outcome == "not offered":
        assert any(words in why for words in DECLINED.values()), why
    else:
        assert (outcome, why) == ("passed", "")


# --- several blocks, which the claims' lengths do not fill ---


def gradients(function, q, k, v, dout):
    (out, lse), pull = jax.vjp(lambda q, k, v: function(q, k, v, return_lse=True), q, k, v)
    dlse = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    return {"out": out, "lse": lse} | dict(
        zip(("dq", "dk", "dv"), pull((dout.astype(out.dtype), dlse)), strict=True)
    )


SEVERAL = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (70, None)},
    "gqa": {"causal": True, "kv_heads": 1},
    "more keys": {"causal": True, "kv_len": 333},
    "more queries": {"causal": True, "kv_len": 150},
    "unlike dimensions": {"dim": 72, "v_dim": 136},
    "200 dimensions and a softcap": {"causal": True, "dim": 200, "softcap": 5.0},
    "segments": {"segments": True},
    "heads last": {"heads_last": True, "causal": True},
}


@needs_interpreter
@pytest.mark.parametrize(
    ("case", "similarity"),
    [(case, "dot") for case in SEVERAL] + [(case, "cosine") for case in ("full", "window", "gqa")],
)
def test_kernels_agree_with_the_formula_over_several_blocks(case, similarity, interpreted):
    options = dict(SEVERAL[case])
    n, heads = 270, 2
    m = options.pop("kv_len", n)
    dim, kv_heads = options.pop("dim", 16), options.pop("kv_heads", heads)
    v_dim = options.pop("v_dim", dim)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((1, heads, n, dim), (1, kv_heads, m, dim), (1, kv_heads, m, v_dim))
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=False))
    k = k + jnp.linspace(0, 2, m, dtype=k.dtype)[:, None]  # the maximum keeps running
    dout = jax.random.normal(keys[3], (1, heads, n, v_dim))
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in (q, k, v, dout))
    if options.pop("segments", False):
        ids = (jnp.arange(n, dtype=jnp.int32) // 60)[None]
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    heads_last = options.pop("heads_last", False)

    def run(implementation, *arrays):
        def function(q, k, v, return_lse):
            extra = {"implementation": implementation, "return_lse": return_lse, **options}
            if similarity == "cosine":
                return flash_attention_jax.flash_cosine_sim_attention(q, k, v, **extra)
            if heads_last:
                del extra["return_lse"], extra["causal"]
                q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
                out, lse = flash_attention_jax.dot_product_attention(
                    q, k, v, is_causal=True, return_residual=True, **extra
                )
                return out.swapaxes(1, 2), lse.swapaxes(1, 2)
            return flash_attention(q, k, v, **extra)

        return gradients(function, *arrays)

    exact = run("dense", *(x.astype(jnp.float32) for x in (q, k, v, dout)))
    plain = run("dense", q, k, v, dout)
    found = run("hopper", q, k, v, dout)
    for name, want in exact.items():
        error, allowed = (
            difference(np.asarray(x[name], np.float32), np.asarray(want)) for x in (found, plain)
        )
        half_unit = 1e-5 if name == "lse" else 2.0**-8 * float(np.abs(want).max())
        assert error <= 2 * allowed + half_unit, (name, error, allowed)


PAIRS = {
    "bias of its own per head and batch": {"bias": (2, 2, 70, 150)},
    "bias shared by the batches, causal": {"bias": (1, 2, 70, 150), "causal": True},
    "bias shared by the heads, grouped": {"bias": (2, 1, 70, 150), "kv_heads": 1},
    "bias of keys": {"bias": (1, 2, 1, 150), "kv_heads": 1},
    "bias of queries": {"bias": (1, 2, 70, 1)},
    "mask per head": {"mask": (2, 2, 70, 150), "causal": True},
    "mask and bias": {"mask": (1, 2, 70, 150), "bias": (2, 1, 70, 150), "softcap": 5.0},
}


@needs_interpreter
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if "and" in case else pytest.mark.slow) for case in PAIRS]
)
def test_terms_of_pairs_agree_with_the_formula_over_several_blocks(case, interpreted):
    options = dict(PAIRS[case])
    keys = jax.random.split(jax.random.key(1), 6)
    kv_heads = options.pop("kv_heads", 2)
    shapes = ((2, 2, 70, 16), (2, kv_heads, 150, 16), (2, kv_heads, 150, 16), (2, 2, 70, 16))
    q, k, v, dout = (
        jax.random.normal(key, sizes, jnp.bfloat16)
        for key, sizes in zip(keys, shapes, strict=False)
    )
    given = {"q": q, "k": k, "v": v}
    if "bias" in options:
        given["bias"] = jax.random.normal(keys[4], options.pop("bias"), jnp.bfloat16)
    if "mask" in options:
        options["mask"] = jax.random.bernoulli(keys[5], 0.6, options["mask"])

    def run(implementation, dtype):
        def function(arrays):
            return flash_attention(**arrays, **options, implementation=implementation)

        out, pull = jax.vjp(function, jax.tree.map(lambda x: x.astype(dtype), given))
        return {"out": out} | pull(dout.astype(dtype))[0]

    exact, plain = run("dense", jnp.float32), run("dense", jnp.bfloat16)
    for name, found in run("hopper", jnp.bfloat16).items():
        want = np.asarray(exact[name])
        error, allowed = (difference(np.asarray(x, np.float32), want) for x in (found, plain[name]))
        assert found.shape == want.shape
        assert error <= 2 * allowed + 2.0**-8 * np.abs(want).max(), (name, error, allowed)


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 128])
def test_bias_that_hides_a_whole_first_block_hides_no_more(rows, interpreted):
    # Left padding by an additive mask: no mask says that the 128 keys of the first block are
    # hidden, and every block is whole. Two rows have an offset besides, and one sees no key.
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = ((1, 2, 128, 16), (1, 2, 256, 16), (1, 2, 256, 16), (1, 2, 128, 16))
    q, k, v, dout = (
        jax.random.normal(key, sizes, jnp.bfloat16) for key, sizes in zip(keys, shapes, strict=True)
    )
    bias = jnp.zeros((1, 1, rows, 256), jnp.float32).at[..., :128].set(-jnp.inf)
    if rows > 1:
        q = q.at[:, :, 3:5].set(0)
        bias = bias.at[:, :, 3].add(-1e9).at[:, :, 4].add(1e9).at[:, :, 5].set(-jnp.inf)

    def run(implementation, dtype):
        def function(q, k, v, bias):
            return flash_attention(q, k, v, bias=bias, implementation=implementation)

        out, pull = jax.vjp(function, *(x.astype(dtype) for x in (q, k, v)), bias)
        return out, *pull(dout.astype(dtype))

    exact, plain = run("dense", jnp.float32), run("dense", jnp.bfloat16)
    for x, want, rounded in zip(run("hopper", jnp.bfloat16), exact, plain, strict=True):
        error, allowed = (difference(np.asarray(y, np.float32), want) for y in (x, rounded))
        assert error <= 2 * allowed + 2.0**-8 * np.abs(want).max(), (error, allowed)


DECODED = {
    "one query": {},
    "three causal queries, heads last": {"n": 3, "is_causal": True, "heads_last": True},
    "window": {"n": 2, "causal": True, "window": (300, None)},
    "lengths and sinks": {
        "kv_lengths": np.array([0, 333], np.int32),
        "sinks": np.ones(4, np.float32),
    },
}


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if "window" in case else pytest.mark.slow) for case in DECODED],
)
def test_keys_split_among_programs_give_what_whole_keys_give(case, interpreted):
    options = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in DECODED[case].items()
    }
    n, heads_last = options.pop("n", 1), options.pop("heads_last", False)
    shapes = ((2, 4, n, 16), (2, 2, 700, 16), (2, 2, 700, 16), (2, 4, n, 16))
    keys = jax.random.split(jax.random.key(2), 4)
    given = [jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)]
    if heads_last:
        given = [x.swapaxes(1, 2) for x in given]

    def run(implementation, dtype):
        def function(q, k, v, return_lse):
            how = {"implementation": implementation, **options}
            if heads_last:
                return flash_attention_jax.dot_product_attention(
                    q, k, v, return_residual=return_lse, **how
                )
            return flash_attention(q, k, v, return_lse=return_lse, **how)

        return gradients(function, *(x.astype(dtype) for x in given))

    exact, plain = run("dense", jnp.float32), run("dense", jnp.bfloat16)
    for name, found in run("hopper", jnp.bfloat16).items():
        want = np.asarray(exact[name])
        error, allowed = (difference(np.asarray(x, np.float32), want) for x in (found, plain[name]))
        largest = np.abs(np.where(np.isfinite(want), want, 0)).max()
        assert error <= 2 * allowed + 2.0**-8 * largest, (name, error, allowed)


@pytest.mark.parametrize(
    ("q", "k", "options", "count"),
    [
        ((1, 32, 1, 128), (1, 8, 65536, 128), {}, 32),  # enough programs for two waves
        ((64, 32, 1, 128), (64, 8, 65536, 128), {}, 1),  # enough without: grouped rows alone
        ((64, 8, 1, 128), (64, 8, 65536, 128), {}, None),
        ((1, 32, 1, 128), (1, 8, 256, 128), {}, None),  # too few keys to split
        ((1, 8, 4096, 128), (1, 8, 4096, 128), {}, None),
        ((1, 32, 1, 128), (1, 8, 65536, 128), {"alibi_slopes": (32,)}, None),
    ],
)
def test_few_queries_against_many_keys_are_split(q, k, options, count):
    options = {name: shape(*sizes, dtype=jnp.float32) for name, sizes in options.items()}
    reading = read.read(shape(*q), shape(*k), shape(*k), None, options, **HOPPER)
    assert hopper_decode.parts(reading.call) == count


@needs_interpreter
def test_gradients_from_one_kernel_are_those_from_three(interpreted):
    keys = jax.random.split(jax.random.key(4), 4)
    shapes = ((1, 2, 150, 16), (1, 1, 270, 16), (1, 1, 270, 16), (1, 2, 150, 16))
    q, k, v, dout = (
        jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)
    )

    def run(*, deterministic_backward):
        def function(q, k, v, return_lse):
            return flash_attention(
                q,
                k,
                v,
                causal=True,
                return_lse=return_lse,
                implementation="hopper",
                deterministic_backward=deterministic_backward,
            )

        return gradients(function, q, k, v, dout)

    found, want = run(deterministic_backward=False), run(deterministic_backward=True)
    for name in want:
        have, exact = (np.asarray(results[name], np.float32) for results in (found, want))
        assert np.abs(have - exact).max() <= 2.0**-7 * np.abs(exact).max(), name
    assert np.array_equal(np.asarray(found["dk"]), np.asarray(want["dk"]))


@needs_interpreter
def test_dropout_of_a_part_has_the_bits_of_the_whole(interpreted):
    # Equal logits, and values that are unit vectors: the output shows which keys were kept.
    q, v = jnp.zeros((1, 1, 16, 8), jnp.bfloat16), jnp.eye(16, dtype=jnp.bfloat16)[None, None]
    reading = read.read(
        q, q, v, None, {"dropout_rate": 0.4, "dropout_key": jax.random.key(7)}, **HOPPER
    )
    arrays = read.arrays(reading.call, reading.given)
    arrays = arrays._replace(dropout_origin=jnp.array([6, 2, 3, 40, 50], jnp.int32))
    call = dataclasses.replace(reading.call, interpret=True)
    found = hopper_attention.attend(blocked.attend, call, arrays).out
    want = blocked.attend(call, arrays).out
    alone = blocked.attend(call, arrays._replace(dropout_origin=None)).out
    kept = [np.asarray(x, np.float32) != 0 for x in (found, want, alone)]
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[1], kept[2])


@needs_interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_and_gradients_have_the_dtypes_of_their_arguments(dtype, interpreted):
    q = jax.random.normal(jax.random.key(0), (1, 2, 20, 8)).astype(dtype)
    bias = jnp.ones((2, 20, 20), jnp.float32)

    def function(q, bias, sinks):
        return flash_attention(
            q, q, q, bias=bias, sinks=sinks, return_lse=True, implementation="hopper"
        )

    arrays = (q, bias, jnp.zeros(2, dtype))
    (out, lse), pull = jax.vjp(function, *arrays)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    assert [x.dtype for x in pull((out, lse))] == [x.dtype for x in arrays]
    want = flash_attention(*(q.astype(jnp.float32),) * 3, bias=bias, sinks=jnp.zeros(2))
    unit = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(out, np.float32) - np.asarray(want)).max() < 4 * unit


@needs_interpreter
@pytest.mark.parametrize("length", [1, 13])
def test_lengths_under_a_tile_agree_with_the_formula(length, interpreted):
    q, k, v = (
        jax.random.normal(key, (1, 1, n, 8), jnp.bfloat16)
        for key, n in zip(jax.random.split(jax.random.key(0), 3), (length, 17, 17), strict=True)
    )

    def run(implementation):
        def loss(q, k, v):
            out = flash_attention(q, k, v, causal=True, implementation=implementation)
            return jnp.sin(out.astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for found, want in zip(run("hopper"), run("dense"), strict=True):
        error = np.abs(np.asarray(found, np.float32) - np.asarray(want, np.float32)).max()
        assert error <= 2.0**-6 * np.abs(np.asarray(want, np.float32)).max()


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": lambda f: lambda q: jax.vmap(f)(q[None])[0],
    "scan": lambda f: lambda q: jax.lax.scan(lambda c, x: (c, f(x)), 0, q[None])[1][0],
}


@needs_interpreter
@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_kernels_pass_through_transformations(name, deterministic, interpreted):
    q = jax.random.normal(jax.random.key(0), (1, 1, 20, 8), jnp.bfloat16)
    how = {"implementation": "hopper", "deterministic_backward": deterministic}

    def function(q):
        return flash_attention(q, q, q, causal=True, **how)

    def gradient(function):
        return jax.grad(lambda q: jnp.sin(function(q).astype(jnp.float32)).sum())(q)

    want, found = gradient(function), gradient(TRANSFORMS[name](function))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(want))


@needs_interpreter
def test_second_derivative_is_that_of_the_reference(interpreted):
    q = jax.random.normal(jax.random.key(0), (1, 1, 20, 8)).astype(jnp.bfloat16)

    def twice(implementation):
        def loss(q):
            out = flash_attention(q, q, q, causal=True, implementation=implementation)
            return jnp.sin(out.astype(jnp.float32)).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q).astype(jnp.float32) ** 2).sum())(q)

    want = np.asarray(twice("blocked"), np.float32)
    assert np.abs(np.asarray(twice("hopper"), np.float32) - want).max() < 0.05 * np.abs(want).max()


# --- what the kernels read ---


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (3, 5)},
        {"causal": True, "window": 4, "q_offset": -6},
        {"kv_lengths": np.array([4, 0], np.int32), "q_lengths": np.array([9, 5], np.int32)},
        {"causal": True, "q_offset": np.array([2, -3], np.int32)},
    ],
)
def test_ranges_of_keys_say_what_the_mask_by_element_says(options):
    q, k = np.zeros((2, 1, 9, 4), np.float32), np.zeros((2, 1, 13, 4), np.float32)
    options = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
    }
    reading = read.read(q, k, k, None, options)
    arrays = read.arrays(reading.call, reading.given)
    tile = Tile.whole(reading.call)
    at = masks.positions(reading.call, arrays, tile, "bhrij")
    visible = np.asarray(masks.visible(reading.call, arrays, tile, at, "bhrij"))[:, 0, 0]
    low, high = (np.asarray(x)[..., None] for x in masks.key_ranges(reading.call, arrays))
    j = np.arange(13)
    assert (((j >= low) & (j < high)) == np.broadcast_to(visible, (2, 9, 13))).all()


def test_routes_visit_what_the_mask_leaves_partial_blocks_first():
    x = np.zeros((1, 1, 512, 64), np.float32)
    reading = read.read(x, x, x, None, {"causal": True})
    arrays = read.arrays(reading.call, reading.given)
    found = operands.routes(reading.call, arrays, 128, 128, over_keys=True)
    assert np.asarray(found["counts"]).tolist() == [[[1, 1], [1, 2], [1, 3], [1, 4]]]
    assert np.asarray(found["order"])[0, 2, :3].tolist() == [2, 0, 1]
    over_queries = operands.routes(reading.call, arrays, 128, 128, over_keys=False)
    assert np.asarray(over_queries["counts"]).tolist() == [[[1, 4], [1, 3], [1, 2], [1, 1]]]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (9, 0)}])
def test_what_no_array_decides_is_computed_while_tracing(options):
    def primitives(**arrays):
        x = shape(1, 2, 300, 64)

        def prepared(x, arrays):
            reading = read.read(x, x, x, None, {**options, **arrays}, **HOPPER)
            call, given = reading.call, read.arrays(reading.call, reading.given)
            seen = operands.keys_that_are_seen(call, given)
            cleaned = operands.clean(call, "k", given.k, seen)
            return cleaned, operands.routes(call, given, 128, 128, over_keys=True)

        return {str(eqn.primitive) for eqn in jax.make_jaxpr(prepared)(x, arrays).eqns}

    assert primitives() == set()
    assert primitives(kv_lengths=shape(1, dtype=jnp.int32)) != set()


def test_keys_are_seen_only_by_their_own_segment():
    ids, others = jnp.array([[3, 9, 1]], jnp.int32), jnp.array([[1, 3, 3, 0]], jnp.int32)
    assert np.asarray(operands._among(ids, others)).tolist() == [[True, False, True]]


# --- choice ---


@pytest.mark.parametrize("dim", [8, 64, 80, 128, 256])
def test_hopper_is_chosen_on_a_hopper(dim):
    q = shape(2, 8, 1024, dim)
    found = explain(q, q, q, causal=True, **HOPPER)
    assert (found.forward, found.backward) == ("hopper", "hopper")


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({}, {"platform": "cpu"}, "this is traced for cpu"),
        ({}, {"platform": "gpu", "capability": (8, 0)}, "needs compute capability 9.0"),
        ({}, {"platform": "gpu"}, "this device's is unknown"),
        ({"dtype": jnp.float32}, HOPPER, "computes in bfloat16 and float16, and this call is f"),
        ({"dim": 264}, HOPPER, "head dimension 264 is over 256"),
        ({"relative_bias": shape(8, 127)}, HOPPER, "does not add a `relative_bias` yet"),
        ({"differentiation": "any"}, HOPPER, "no forward mode"),
        ({"block_q": 64}, HOPPER, "tile sizes are its own"),
    ],
)
def test_hopper_declines_with_a_reason(options, where, reason):
    options = dict(options)
    q = shape(2, 8, 64, options.pop("dim", 64), dtype=options.pop("dtype", jnp.bfloat16))
    found = explain(q, q, q, **options, **where)
    assert found.forward != "hopper"
    assert reason in found.reasons["hopper"]


def test_arrays_on_the_cpu_are_planned_for_the_cpu_whatever_the_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.zeros((1, 2, 16, 8), jnp.bfloat16)
    assert explain(q, q, q).platform.startswith("gpu")
    here = jax.device_put(q, jax.devices("cpu")[0])
    assert explain(here, here, here).platform == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert explain(q, q, q).platform == "cpu"


@pytest.mark.parametrize("version", [12080, 12090])
def test_masked_call_is_declined_on_a_cuda_that_compiles_it_wrongly(version, monkeypatch):
    monkeypatch.setattr(hopper_support, "_cuda_runtime", lambda: version)
    q = shape(2, 8, 64, 64)
    assert "12.9.1 or newer" in explain(q, q, q, causal=True, **HOPPER).reasons["hopper"]
    assert explain(q, q, q, **HOPPER).forward == "hopper"
    monkeypatch.setattr(hopper_support, "_cuda_runtime", lambda: 12091)
    assert explain(q, q, q, causal=True, **HOPPER).forward == "hopper"


def test_pallas_that_moved_or_broke_is_a_reason_and_no_crash(monkeypatch):
    def broken(name):
        raise AttributeError("made for another jax")

    hopper_support._pallas_why_not.cache_clear()
    monkeypatch.setattr(hopper_support.importlib, "import_module", broken)
    q = shape(2, 8, 64, 64)
    try:
        assert "made for another jax" in explain(q, q, q, **HOPPER).reasons["hopper"]
        hopper_support._pallas_why_not.cache_clear()
        monkeypatch.setattr(hopper_support.importlib, "import_module", lambda name: object())
        assert "lacks kernel" in explain(q, q, q, **HOPPER).reasons["hopper"]
    finally:
        hopper_support._pallas_why_not.cache_clear()


def test_tiles_fit_into_shared_memory_and_registers():
    for kernel, by_dim in hopper_config.TABLE.items():
        for dim, tiles in by_dim.items():
            compute, load = tiles.registers
            assert tiles.warpgroups * compute + load <= 512, (kernel, dim)
            assert hopper_config.shared_memory(kernel, dim, tiles) <= hopper_config.SHARED_MEMORY, (
                kernel,
                dim,
            )


# --- lowering and compiling without a GPU ---

LOWERED = {
    "full": {},
    "causal, 128": {"causal": True, "dim": 128},
    "full, 256": {"dim": 256},
    "cosine": {"similarity": "cosine", "default_scale": 10.0},
    "dropout": {"dropout_rate": 0.1, "dropout_key": True},
    "heads last, grouped": {"causal": True, "layout": "heads_last", "kv_heads": 2},
    "alibi, softcap": {"alibi_slopes": True, "softcap": 30.0},
    "float16": {"dtype": jnp.float16},
    "bias": {"bias": (1, 4, 300, 300)},
    "under remat": {"remat": True},  # which the interpreter's effects do not pass through
}


@pytest.mark.parametrize("case", LOWERED)
def test_forward_and_backward_lower_for_cuda(case):
    options = dict(LOWERED[case])
    dim, dtype = options.pop("dim", 64), options.pop("dtype", jnp.bfloat16)
    kv_heads, layout = options.pop("kv_heads", 4), options.pop("layout", "heads_first")
    how = {name: options.pop(name) for name in ("similarity", "default_scale") if name in options}
    arrays = [shape(1, heads, 300, dim, dtype=dtype) for heads in (4, kv_heads, kv_heads)]
    if layout == "heads_last":
        arrays = [shape(1, 300, x.shape[1], dim, dtype=dtype) for x in arrays]
    if options.pop("dropout_key", False):
        options["dropout_key"] = jnp.zeros(2, jnp.uint32)
    if options.pop("alibi_slopes", False):
        options["alibi_slopes"] = jnp.ones(4, jnp.float32)

    wrap = jax.checkpoint if options.pop("remat", False) else lambda function: function
    if "bias" in options:
        options["bias"] = jnp.zeros(options["bias"], dtype)

    def both(q, k, v):
        @wrap
        def forward(q, k, v):
            reading = read.read(q, k, v, None, options, layout=layout, **how, **HOPPER)
            given = read.arrays(reading.call, reading.given)
            return hopper_attention.attend(blocked.attend, reading.call, given)

        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(out)

    facts = {"num_cores": None} if "num_cores" in str(inspect.signature(AbstractDevice)) else {}
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", **facts)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",))
    kernels = {"hopper_forward", "hopper_dq"}
    kernels |= {"hopper_dk", "hopper_dv"} if dim > 128 else {"hopper_dk_dv"}
    text = lowered.as_text()
    assert all(kernel in text for kernel in kernels)


def test_compile_command_says_so_without_the_cuda_plugin_or_finds_no_spill():
    command = ["-m", "flash_attention_jax", "compile", "hopper", "--only", "causal", "--dims", "64"]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        assert "Nothing was compiled for a GPU: jax-cuda13-plugin is not installed." in done.stdout
    else:
        assert "No kernel spills." in done.stdout
