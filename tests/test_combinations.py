"""All features together, drawn at random: engines against plain NumPy, every gradient too."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from flash_attention_jax import dot_product_attention, flash_attention, flash_cosine_sim_attention
from flash_attention_jax._conformance.reference import Problem
from flash_attention_jax._conformance.subject import QUICK, Subject


def _cosine(q, k, v, mask=None, *, bias=None, **options):
    return flash_cosine_sim_attention(q, k, v, mask, bias, **options)


@st.composite
def problems(draw) -> Problem:
    """A problem with any of the features in any combination; its numbers come from one seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed"))
    chance = functools.partial(draw, st.booleans())
    batch, kv_heads, group = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
    )
    heads = kv_heads * group
    q_len, k_len = draw(st.tuples(st.integers(1, 23), st.integers(1, 23)), label="lengths")
    dim, v_dim = draw(st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([1, 3, 8])))

    def sizes(*full: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from([n, 1])) for n in full)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(low, high, shape, endpoint=True).astype(np.int32)

    options = {}
    if chance():
        options["mask"] = rng.random(sizes(batch, heads, q_len, k_len)) < 0.7
        if chance():
            options["mask"] = options["mask"].astype(np.int32) * 3
    if chance():
        options["causal"] = True
    if chance():
        side = st.integers(-1, k_len + 1)
        options["window"] = draw(st.tuples(side, side), label="window")
    offset = draw(st.sampled_from(["none", "number", "traced", "batch", "token"]), label="offset")
    if offset != "none":
        shape = {"token": (batch, q_len), "batch": (batch, 1)}.get(offset, ())
        options["q_offset"] = integers(-6, 6, shape)
        if offset == "number":
            options["q_offset"] = int(options["q_offset"])
    if chance():
        if chance():
            options["q_lengths"] = integers(0, q_len, (batch,))
        options["kv_lengths"] = integers(0, k_len, (batch,))
    if chance():
        ids = [integers(0, 2, (*sizes(batch), n)) for n in (q_len, k_len)]
        ids = [np.sort(x) for x in ids] if chance() else ids
        options["q_segment_ids"], options["kv_segment_ids"] = ids
    if chance():
        options["bias"] = rng.standard_normal(sizes(batch, heads, q_len, k_len))
    if chance():
        options["softcap"] = 2.0
    if chance():
        options["sinks"] = rng.standard_normal(sizes(heads))
    if chance():
        options["alibi_slopes"] = rng.random(sizes(heads))
    if chance():
        options["relative_bias"] = rng.standard_normal((*sizes(heads), q_len + k_len - 1))
    scale = draw(st.sampled_from(["default", "number", "array"]), label="scale")
    if scale == "number":
        options["scale"] = draw(st.sampled_from([0.5, 20.0]))
    elif scale == "array":
        options["scale"] = rng.random(sizes(heads)) * 2
    if chance():
        options["dropout_rate"] = 0.3
        options["dropout_key"] = jax.random.key(7)
    if chance():
        options["return_lse"] = True
    cosine = chance()
    return Problem(
        rng.standard_normal((batch, heads, q_len, dim)),
        rng.standard_normal((batch, kv_heads, k_len, dim)),
        rng.standard_normal((batch, kv_heads, k_len, v_dim)),
        options,
        cosine=cosine,
        groups=2 if cosine and chance() else 1,
    )


def subject(problem: Problem, dtype: str, layout: str, **fixed) -> Subject:
    make = functools.partial(Subject, dtype=dtype, compiler_options=QUICK, fixed=fixed)
    if layout == "heads_last":
        return make(dot_product_attention, default_scale=10.0 if problem.cosine else None)
    if problem.cosine:
        return make(_cosine, layout=layout, cosine=True, default_scale=8.0)
    return make(flash_attention, layout=layout)


@functools.cache
def _coins(heads: int) -> np.ndarray:
    """Which probabilities the key above keeps, for as many heads and the longest lengths."""
    units = np.broadcast_to(np.eye(23), (3, heads, 23, 23)).copy()
    zeros = np.zeros((3, heads, 23, 2))
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(7)}
    dense = Subject(
        flash_attention, layout="heads_first", fixed={"implementation": "dense"}, dtype="float32"
    )
    return dense.run(Problem(zeros, zeros, units, options), gradients=False).out != 0


def check(problem: Problem, dtype: str, layout: str, **fixed) -> None:
    keep = None
    if "dropout_rate" in problem.options:
        b, h, i, _ = problem.q.shape
        keep = _coins(h)[:b, :, :i, : problem.k.shape[2]]
    subject(problem, dtype, layout, **fixed).check(problem, keep=keep)


BLOCKS = st.tuples(st.integers(1, 12), st.integers(1, 12))
LAYOUTS = st.sampled_from(["heads_first", "heads_last"])

_settings = functools.partial(settings, suppress_health_check=list(HealthCheck), derandomize=True)


@_settings(max_examples=12)
@given(problem=problems(), layout=LAYOUTS)
def test_the_oracle_agrees_with_the_reference(problem, layout):
    check(problem, "float64", layout, implementation="dense")


@pytest.mark.slow
@_settings(max_examples=25)
@given(problem=problems(), layout=LAYOUTS, blocks=BLOCKS)
def test_blocked_in_float64(problem, layout, blocks):
    check(
        problem,
        "float64",
        layout,
        implementation="blocked",
        block_q=blocks[0],
        block_kv=blocks[1],
    )


@pytest.mark.slow
@_settings(max_examples=12)
@given(problem=problems(), layout=LAYOUTS, blocks=BLOCKS)
def test_checkpointed_in_float64(problem, layout, blocks):
    check(
        problem,
        "float64",
        layout,
        implementation="checkpointed",
        differentiation="any",
        block_q=blocks[0],
        block_kv=blocks[1],
    )


@pytest.mark.slow
@_settings(max_examples=8)
@given(
    problem=problems(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    implementation=st.sampled_from(["blocked", "checkpointed"]),
    layout=LAYOUTS,
    blocks=BLOCKS,
)
def test_lower_precision_is_within_twice_the_error_of_the_oracle(
    problem, dtype, implementation, layout, blocks
):
    check(
        problem,
        dtype,
        layout,
        implementation=implementation,
        block_q=blocks[0],
        block_kv=blocks[1],
    )
