"""Memory grows with the length, programs do not, and excluded blocks are never visited."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import flash_attention
from flash_attention_jax._api import read
from flash_attention_jax._conformance.subject import QUICK
from flash_attention_jax._core import masks, tiles
from flash_attention_jax._engines import blocked_backward, online

D = 16
SHORT, LONG = 4096, 16384


def problem(n, kind):
    """Shapes of the arrays of a call of this length, and its static options."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    arrays = dict.fromkeys("qkv", shape((1, 2, n, D)))
    extra = {
        "plain": ({}, {}),
        "causal": ({}, {"causal": True}),
        "window": ({}, {"window": (200, 0)}),
        "key mask": ({"mask": jax.ShapeDtypeStruct((1, n), jnp.bool_)}, {}),
        "segments": ({"q_segment_ids": ids, "kv_segment_ids": ids}, {}),
        "lengths": ({"kv_lengths": jax.ShapeDtypeStruct((1,), jnp.int32)}, {"causal": True}),
        "dropout": (
            {"dropout_key": jax.ShapeDtypeStruct((2,), jnp.uint32)},
            {"dropout_rate": 0.1},
        ),
        "terms": ({"sinks": shape((2,)), "alibi_slopes": shape((2,))}, {"softcap": 20.0}),
        "relative bias": ({"relative_bias": shape((2, 2 * n - 1))}, {}),
        "key bias": ({"bias": shape((1, 2, 1, n))}, {}),
        "bias": ({"bias": shape((1, 1, n, n))}, {}),
    }[kind]
    return {**arrays, **extra[0]}, extra[1]


def program(n, kind, mode, **options):
    """The lowered program of a call."""
    arrays, static = problem(n, kind)

    def out(arrays):
        q, k, v = (arrays[name] for name in "qkv")
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        return flash_attention(q, k, v, **rest, **static, **options)

    def loss(moving, arrays):
        # Not the sum of out, whose cotangent would be one number.
        return jnp.sin(out({**arrays, **moving})).sum()

    moving = {name: x for name, x in arrays.items() if x.dtype == jnp.float32}
    if mode == "forward":
        return jax.jit(out).lower(arrays)
    if mode == "jvp":

        def tangent(moving, arrays):
            return jax.jvp(lambda moving: loss(moving, arrays), (moving,), (moving,))

        return jax.jit(tangent).lower(moving, arrays)
    return jax.jit(jax.value_and_grad(loss)).lower(moving, arrays)


def temporary(lowered):
    """Bytes that the compiled program needs beside its arguments and results."""
    return lowered.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes


def grows_linearly(kind, mode, **options):
    short, long = (temporary(program(n, kind, mode, **options)) for n in (SHORT, LONG))
    assert long <= LONG / SHORT * short * 1.15
    # Nor is it one big constant: the logits of one head would be 1 GiB.
    assert long < 4 * LONG * LONG / 16


KINDS = ["plain", "causal", "window", "key mask", "segments", "lengths", "dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_forward_doubles_when_the_length_doubles(kind):
    grows_linearly(kind, "forward")


@pytest.mark.parametrize("kind", [*KINDS, "terms", "relative bias", "key bias"])
def test_memory_of_value_and_grad_doubles_when_the_length_doubles(kind):
    grows_linearly(kind, "value_and_grad")


@pytest.mark.parametrize("mode", ["forward", "value_and_grad", "jvp"])
def test_memory_of_checkpointed_doubles_when_the_length_doubles(mode):
    grows_linearly("causal", mode, implementation="checkpointed", differentiation="any")


def test_memory_of_the_oracle_does_not():
    # The measure itself would show it.
    with pytest.raises(AssertionError):
        grows_linearly("plain", "forward", implementation="dense")


def test_bias_gradient_takes_no_more_memory_than_the_bias():
    bias = 4 * LONG * LONG
    without = temporary(program(LONG, "plain", "value_and_grad"))
    assert temporary(program(LONG, "bias", "value_and_grad")) < without + 1.1 * bias


@pytest.mark.parametrize("implementation", ["blocked", "checkpointed"])
@pytest.mark.parametrize("kind", ["causal", "segments"])
def test_program_does_not_grow_with_the_length(kind, implementation):
    short, long = (
        program(n, kind, "value_and_grad", implementation=implementation).as_text()
        # Both so long that the backward makes no copy of dout.
        for n in (16 * LONG, 256 * LONG)
    )
    # Longer by the digits of its numbers alone.
    assert long.count("\n") == short.count("\n")


# --- blocks ---

T, S = 61, 83
BLOCK_Q, BLOCK_KV = 8, 7


def arange(n):
    return np.arange(n, dtype=np.int32)


I, J = arange(T)[:, None], arange(S)[None, :]
IDS = [np.repeat(arange(4), n)[None] for n in ((10, 25, 6, 20), (33, 1, 29, 20))]
RAGGED = ((3 * I + 5 * J) % 7 != 0) & (J < 40)  # whole in no block, and empty in some
BLOCKY = (I // 16 + J // 21) % 2 == 0  # of whole blocks


def routes():
    """Name, options, and which entries are visible (b, h, i, j), by the definition."""
    two = np.ones((2, 1, 1, 1), bool)
    tokens = np.array([3, 40], np.int32).reshape(2, 1, 1, 1)
    return {
        "full": ({}, two & (I >= 0) & (J >= 0)),
        "causal": ({"causal": True}, two & (J <= I + S - T)),
        "causal, start-aligned": ({"causal": True, "q_offset": 0}, two & (J <= I)),
        "causal, mostly blind": ({"causal": True, "q_offset": -50}, two & (J <= I - 50)),
        "window": ({"window": (9, 4)}, two & (abs(2 * (J - I - S + T) + 5) <= 13)),
        "left window": ({"window": (9, None)}, two & (J >= I + S - T - 9)),
        "causal window": (
            {"window": (12, 0), "causal": True},
            two & (J <= I + S - T) & (J >= I + S - T - 12),
        ),
        "lengths": (
            {"kv_lengths": np.array([30, 30], np.int32), "q_lengths": np.array([20, 20], np.int32)},
            two & (I < 20) & (J < 30),
        ),
        "different lengths": ({"kv_lengths": tokens.reshape(2)}, two & (I >= 0) & (tokens > J)),
        "different offsets": (
            {"causal": True, "q_offset": tokens.reshape(2)},
            two & (I + tokens >= J),
        ),
        "segments": (
            {"q_segment_ids": np.repeat(IDS[0], 2, 0), "kv_segment_ids": np.repeat(IDS[1], 2, 0)},
            two & (IDS[1] == IDS[0].T),
        ),
        "packed causal": (
            {
                "q_segment_ids": np.repeat(IDS[0], 2, 0),
                "kv_segment_ids": np.repeat(IDS[1], 2, 0),
                "causal": True,
            },
            two & (IDS[1] == IDS[0].T) & (J <= I + S - T),
        ),
        "dense mask": ({"mask": BLOCKY[None, None]}, two & BLOCKY),
        "ragged mask": ({"mask": RAGGED[None, None]}, two & RAGGED),
        "key mask": ({"mask": np.repeat(J < 30, 2, 0)}, two & (I >= 0) & (J < 30)),
        "mask and causal": (
            {"mask": BLOCKY[None, None], "causal": True},
            two & BLOCKY & (J <= I + S - T),
        ),
    }


def classes(visible, queries, keys, *, repeated_queries_count):
    """EMPTY, PARTIAL or FULL of every pair of blocks, by looking at every entry."""
    found = np.zeros((queries.count, keys.count), np.int8)
    for a, b in np.ndindex(found.shape):
        i = int(queries.start(a)) if repeated_queries_count else a * queries.block
        i_end = min(a * queries.block + queries.block, T)
        j, j_end = b * keys.block, min(b * keys.block + keys.block, S)
        block = visible[:, :, i:i_end, j:j_end]
        # A block that holds a position twice has to be masked, even where it is visible.
        hides = j + keys.block > S or (not repeated_queries_count and i + queries.block > T)
        found[a, b] = 0 if not block.any() else 2 if block.all() and not hides else 1
    return found


@pytest.mark.parametrize("name", list(routes()))
@pytest.mark.parametrize("sums_queries", [False, True], ids=["forward", "backward"])
def test_blocks_on_the_route_are_those_that_hold_a_visible_entry(name, sums_queries):
    options, visible = routes()[name]
    mask = options.pop("mask", None)
    q, k = jnp.zeros((2, 2, T, 4), jnp.float32), jnp.zeros((2, 2, S, 4), jnp.float32)
    options |= {"block_q": BLOCK_Q, "block_kv": BLOCK_KV}
    reading = read.read(q, k, k, mask, options)
    steps = tiles.plan(reading.call, 1, 1, 2**30, sums_queries=sums_queries)
    assert (steps.queries.block, steps.keys.block, steps.units) == (BLOCK_Q, BLOCK_KV, 1)
    visits = masks.Visits.of(steps, read.arrays(reading.call, reading.given))
    want = classes(visible, steps.queries, steps.keys, repeated_queries_count=not sums_queries)

    got = np.zeros_like(want)
    outer = steps.keys if sums_queries else steps.queries
    for n in range(outer.count):
        if sums_queries:
            order, partial, last = visits.along_queries(steps.tile(0, 0, n), n)
            line = got[:, n]
        else:
            order, partial, last = visits.along_keys(steps.tile(0, n, 0), n)
            line = got[n]
        assert sorted(np.asarray(order)) == list(range(line.size))
        line[np.asarray(order[: int(partial)])] = masks.PARTIAL
        line[np.asarray(order[int(partial) : int(last)])] = masks.FULL
    np.testing.assert_array_equal(got != 0, want != 0)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "share"), [("causal, start-aligned", 0.5), ("window", 0.4), ("lengths", 0.2)]
)
def test_excluded_blocks_are_not_visited_when_the_program_runs(name, share, monkeypatch):
    options, visible = routes()[name]
    counts = {"forward": 0, "backward": 0}

    def counting(function, direction):
        def wrapped(*args, **kwargs):
            def count():
                counts[direction] += 1

            jax.debug.callback(count)
            return function(*args, **kwargs)

        return wrapped

    gradients = blocked_backward._Gradients
    monkeypatch.setattr(online, "step", counting(online.step, "forward"))
    monkeypatch.setattr(gradients, "__call__", counting(gradients.__call__, "backward"))
    jax.clear_caches()  # so that the counting functions are traced, here and not in the next test
    q, k = jnp.ones((1, 1, T, 4), jnp.float32), jnp.ones((1, 1, S, 4), jnp.float32)
    options = {key: x[:1] if isinstance(x, np.ndarray) else x for key, x in options.items()} | {
        "block_q": BLOCK_Q,
        "block_kv": BLOCK_KV,
    }
    try:
        jax.jit(jax.grad(lambda q: jnp.sin(flash_attention(q, k, k, **options)).sum()))(q)
        jax.effects_barrier()
    finally:
        jax.clear_caches()
    axes = tiles.balanced(T, BLOCK_Q), tiles.balanced(S, BLOCK_KV)
    for direction, repeated in (("forward", True), ("backward", False)):
        ideal = (classes(visible[:1], *axes, repeated_queries_count=repeated) != 0).sum()
        assert counts[direction] == ideal
        assert ideal < share * axes[0].count * axes[1].count


def test_vmap_visits_what_any_example_needs():
    lengths = jnp.array([[10], [40]], jnp.int32)
    q, k = jnp.zeros((1, 1, T, 4), jnp.float32), jnp.zeros((1, 1, S, 4), jnp.float32)

    def visited(lengths):
        options = {"kv_lengths": lengths, "block_q": BLOCK_Q, "block_kv": BLOCK_KV}
        reading = read.read(q, k, k, None, options)
        steps = tiles.plan(reading.call, 1, 1, 2**30, sums_queries=False)
        visits = masks.Visits.of(steps, read.arrays(reading.call, reading.given))
        return visits.along_keys(steps.tile(0, 0, 0), 0)[1:]

    partial, last = jax.vmap(visited)(lengths)
    # 40 = 5 * 7 + 5: six blocks hold a visible key of the second example, the first of them whole
    # in both.
    np.testing.assert_array_equal(last, [6, 6])
    np.testing.assert_array_equal(partial, [5, 5])
