"""What an attention function must do, one named claim each: `testing` runs them.

A claim is a function of the subject whose name reads as a sentence. It returns where the claim
holds, and raises `Failure` where it does not, or `NotOffered` where the subject's function does not
take what the claim is about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._conformance.reference import Problem
from flash_attention_jax._conformance.subject import Failure, Subject, difference, rounded

__all__ = ["CLAIMS", "Claim"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: The claim as words joined by underscores.
        subject: What it belongs to: "masks", "terms", "shapes" and so on.
        check: Raises where it does not hold.
    """

    name: str
    subject: str
    check: Callable[[Subject], Any]


_CLAIMS: list[Claim] = []


def _claim(subject: str) -> Callable[[Callable[[Subject], Any]], Callable[[Subject], Any]]:
    def register(check: Callable[[Subject], Any]) -> Callable[[Subject], Any]:
        _CLAIMS.append(Claim(check.__name__, subject, check))
        return check

    return register


RNG = np.random.default_rng


def plain(
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 11,
    k_len: int = 13,
    dim: int = 8,
    v_dim: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Gaussian queries, keys and values; lengths that no block divides."""
    rng = RNG(seed)
    kv_heads = kv_heads or heads
    return Problem(
        rng.standard_normal((batch, heads, q_len, dim)),
        rng.standard_normal((batch, kv_heads, k_len, dim)),
        rng.standard_normal((batch, kv_heads, k_len, v_dim or dim)),
        options,
    )


def ints(*values: int) -> np.ndarray:
    """An int32 array."""
    return np.array(values, np.int32)


def normal(*shape: int) -> np.ndarray:
    """Gaussian numbers, always the same for a shape."""
    return RNG(len(shape)).standard_normal(shape)


def coins(*shape: int, share: float = 0.6) -> np.ndarray:
    """Random booleans, always the same for a shape."""
    return RNG(len(shape)).random(shape) < share


def fail_unless(holds: Any, message: str) -> None:
    """Raise `Failure` with a message."""
    if not holds:
        raise Failure(message)


# --- the function itself ---


@_claim("definition")
def output_is_the_softmax_average_of_the_values(subject: Subject) -> None:
    subject.check(plain())


@_claim("definition")
def logits_that_grow_along_the_keys_are_exact(subject: Subject) -> None:
    # Every block of keys then moves the running maximum: a missing rescale cannot hide.
    problem = plain(k_len=23)
    ramp = np.linspace(-12, 12, 23)[:, None] * np.ones(8) / 8**0.5
    subject.check(problem.but(q=np.abs(problem.q) + 0.5, k=problem.k * 0.1 + ramp))


@_claim("definition")
def huge_logits_do_not_overflow(subject: Subject) -> None:
    problem = plain()
    got = subject.run(problem.but(q=problem.q * 1e3, k=problem.k * 10))
    for name, x in {"out": got.out, **got.gradients}.items():
        fail_unless(np.isfinite(x).all(), f"{name} is not finite for logits of 1e4")


def _narrow(subject: Subject) -> str:
    """The subject's dtype, or float32 where that is wider: for what float64 has room for."""
    return "float32" if subject.dtype == "float64" else subject.dtype


def _with_rows(bias: np.ndarray, offsets: tuple[float, ...]) -> np.ndarray:
    """Bias (1, 1, i, j) with an offset added to whole rows."""
    return bias + np.resize(np.array(offsets), bias.shape[2])[:, None]


@_claim("definition")
def row_whose_logits_share_an_offset_is_the_row_without_it(subject: Subject) -> None:
    # Of 1e9 a float32 lse is a multiple of 64: what log l was has to be kept elsewhere.
    problem = plain(bias=np.zeros((1, 1, 11, 13)))
    problem = problem.but(q=np.zeros_like(problem.q))  # so that no logit is rounded
    lowest = float(np.finfo(np.float32).min)
    bias = _with_rows(problem.options["bias"], (-1e9, 1e6, 0.0, lowest, 1e9, -1e10, -1e4))
    subject.check(problem.but(bias=bias), dtype=_narrow(subject), like=problem)


@_claim("definition")
def offset_of_a_row_passes_sinks_and_masks(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    problem = plain(bias=np.zeros((1, 1, 11, 13)), mask=mask, sinks=np.full(2, -np.inf))
    problem = problem.but(q=np.zeros_like(problem.q))
    bias = _with_rows(problem.options["bias"], (-1e9, 0.0, 1e9))
    subject.check(problem.but(bias=bias), dtype=_narrow(subject), like=problem)


@_claim("definition")
def probabilities_of_the_backward_add_up_to_one_for_large_logits(subject: Subject) -> None:
    # With logits that differ in their last bits from the forward's they would not. The sum over the
    # keys of dv is the sum over the queries of p dout, so of dout.
    dtype = _narrow(subject)
    problem = rounded(plain(dim=40, q_len=23, k_len=37, heads=1), dtype)
    dout = problem.cotangents[0].astype(jnp.dtype(dtype)).astype(np.float64).sum(axis=2)
    learned = problem.but(scale=np.array([0.17]))
    for case, size in ((problem, 1e2), (problem, 1e4), (learned, 1e4)):  # logits of 4e4 and 4e8
        got = subject.run(case.but(q=case.q * size, k=case.k * size), dtype)
        off = difference(got.gradients["v"].sum(axis=2), dout)
        allowed = 64 * float(jnp.finfo(dtype).eps)
        fail_unless(off <= allowed, f"sum of dv is off by {off:.2g} (allowed {allowed:.2g})")


@_claim("definition")
def same_input_gives_the_same_bits(subject: Subject) -> None:
    problem = plain(k_len=29)
    first, second = subject.run(problem), subject.run(problem)
    fail_unless((first.out == second.out).all(), "out differs between two runs")
    for name, x in first.gradients.items():
        fail_unless((x == second.gradients[name]).all(), f"d{name} differs between two runs")


# --- masks ---


@_claim("masks")
def mask_of_any_broadcast_shape_hides_keys(subject: Subject) -> None:
    subject.check(plain(mask=coins(2, 2, 11, 13)))
    for shape in ((2, 1, 1, 13), (1, 1, 11, 13), (2, 1, 11, 13)):
        subject.check(plain(mask=coins(*shape)), gradients=False)


@_claim("masks")
def mask_without_an_axis_of_keys_hides_whole_queries(subject: Subject) -> None:
    subject.check(plain(mask=coins(1, 2, 11, 1)))


@_claim("masks")
def integer_mask_keeps_where_it_is_not_zero(subject: Subject) -> None:
    mask = np.where(coins(2, 1, 11, 13), RNG(1).integers(-3, 0, (2, 1, 11, 13)), 0)
    subject.check(plain(mask=mask.astype(np.int32)), gradients=False)


@_claim("masks")
def causal_hides_what_lies_beyond_the_diagonal(subject: Subject) -> None:
    subject.check(plain(q_len=13, causal=True))


@_claim("masks")
def causal_diagonal_lies_where_it_is_said_to_for_fewer_queries(subject: Subject) -> None:
    subject.check(plain(q_len=5, k_len=17, causal=True))


@_claim("masks")
def causal_diagonal_lies_where_it_is_said_to_for_more_queries(subject: Subject) -> None:
    subject.check(plain(q_len=17, k_len=5, causal=True))


@_claim("masks")
def offset_moves_the_diagonal(subject: Subject) -> None:
    for offset in (-4, 3):
        subject.check(plain(causal=True, q_offset=offset), gradients=offset < 0)


@_claim("masks")
def offset_may_be_traced(subject: Subject) -> None:
    subject.check(plain(causal=True, q_offset=np.array(3, np.int32)))


@_claim("masks")
def offset_may_differ_between_sequences(subject: Subject) -> None:
    subject.check(plain(causal=True, window=(4, 0), q_offset=ints(-3, 6).reshape(2, 1)))


@_claim("masks")
def offset_may_differ_between_tokens(subject: Subject) -> None:
    offset = RNG(0).integers(-9, 9, (2, 11)).astype(np.int32)
    subject.check(plain(causal=True, q_offset=offset))


@_claim("masks")
def window_reaches_to_both_sides_inclusively(subject: Subject) -> None:
    subject.check(plain(q_len=17, k_len=17, window=(3, 2)))


@_claim("masks")
def window_may_be_one_number(subject: Subject) -> None:
    problem = plain(q_len=17, k_len=17)
    got = subject.run(problem.but(window=2), gradients=False)
    want = subject.run(problem.but(window=(2, 2)), gradients=False)
    fail_unless(difference(got.out, want.out) == 0, "window=2 is not window=(2, 2)")


@_claim("masks")
def window_of_zero_sees_the_diagonal_alone(subject: Subject) -> None:
    problem = plain(q_len=13, k_len=13, window=(0, 0))
    got = subject.check(problem, gradients=False)
    off = difference(got.out, rounded(problem, subject.dtype).v)
    fail_unless(off < 1e-3, f"out is off the value on the diagonal by {off:.2g}")


@_claim("masks")
def window_may_be_unbounded_on_one_side(subject: Subject) -> None:
    for window in ((3, -1), (-1, 2)):
        subject.check(plain(q_len=17, k_len=17, window=window), gradients=False)
    subject.check(plain(q_len=17, k_len=17, window=(-1, 3), causal=True), gradients=False)


@_claim("masks")
def window_and_causal_hold_together(subject: Subject) -> None:
    subject.check(plain(q_len=17, k_len=17, window=(4, 3), causal=True))


@_claim("masks")
def window_follows_the_diagonal_when_lengths_differ(subject: Subject) -> None:
    for q_len, k_len in ((7, 19), (19, 16)):
        subject.check(plain(q_len=q_len, k_len=k_len, window=(4, 1)), gradients=False)


@_claim("masks")
def lengths_hide_the_padding(subject: Subject) -> None:
    subject.check(plain(q_lengths=ints(11, 6), kv_lengths=ints(4, 13)))


@_claim("masks")
def lengths_may_be_zero(subject: Subject) -> None:
    subject.check(plain(q_lengths=ints(0, 11), kv_lengths=ints(5, 0)))


@_claim("masks")
def lengths_do_not_move_the_diagonal(subject: Subject) -> None:
    subject.check(plain(causal=True, kv_lengths=ints(4, 13)))


@_claim("masks")
def segments_see_only_themselves(subject: Subject) -> None:
    ids = np.stack([np.repeat(np.arange(3), (3, 6, 4)), np.repeat(np.arange(2), (9, 4))])
    ids = ids.astype(np.int32)
    subject.check(plain(q_len=13, q_segment_ids=ids, kv_segment_ids=ids, causal=True))


@_claim("masks")
def segments_need_not_be_sorted(subject: Subject) -> None:
    q_ids, kv_ids = (RNG(n).integers(0, 3, (2, n)).astype(np.int32) for n in (11, 13))
    subject.check(plain(q_segment_ids=q_ids, kv_segment_ids=kv_ids))


@_claim("masks")
def everything_that_hides_holds_together(subject: Subject) -> None:
    q_ids, kv_ids = (np.sort(RNG(n).integers(0, 2, (2, n))).astype(np.int32) for n in (19, 23))
    problem = plain(
        q_len=19,
        k_len=23,
        mask=coins(2, 1, 19, 23, share=0.8),
        causal=True,
        window=(9, 0),
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        kv_lengths=ints(20, 23),
    )
    subject.check(problem)


# --- rows without a key, and what nobody sees ---


@_claim("nothing to see")
def row_that_sees_no_key_is_zero(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    mask[:, :, 3:5] = False
    subject.check(plain(mask=mask))


@_claim("nothing to see")
def row_that_sees_no_key_has_lse_of_minus_infinity(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    mask[:, :, 3:5] = False
    subject.check(plain(mask=mask, return_lse=True))


@_claim("nothing to see")
def causal_rows_before_the_first_key_are_zero(subject: Subject) -> None:
    subject.check(plain(q_len=13, k_len=13, causal=True, q_offset=-5, return_lse=True))


@_claim("nothing to see")
def no_keys_at_all_give_zero(subject: Subject) -> None:
    subject.check(plain(k_len=0))


@_claim("nothing to see")
def no_queries_give_an_empty_output(subject: Subject) -> None:
    subject.check(plain(q_len=0))


@_claim("nothing to see")
def empty_batch_gives_an_empty_output(subject: Subject) -> None:
    subject.check(plain(batch=0))


def _hidden_keys() -> tuple[Problem, np.ndarray]:
    """A problem whose keys 2 and 7 of the first batch no query sees, and those keys."""
    mask = coins(2, 1, 11, 13, share=0.8)
    mask[0, :, :, [2, 7]] = False
    return plain(mask=mask), np.array([2, 7])


@_claim("nothing to see")
def nan_in_a_hidden_key_stays_there(subject: Subject) -> None:
    problem, hidden = _hidden_keys()
    k = problem.k.copy()
    k[0, :, hidden] = np.nan
    subject.check(problem.but(k=k))


@_claim("nothing to see")
def nan_in_a_hidden_value_stays_there(subject: Subject) -> None:
    problem, hidden = _hidden_keys()
    v = problem.v.copy()
    v[0, :, hidden[0]], v[0, :, hidden[1]] = np.nan, np.inf
    subject.check(problem.but(v=v))


@_claim("nothing to see")
def nan_beyond_the_lengths_stays_there(subject: Subject) -> None:
    problem = plain(kv_lengths=ints(4, 13))
    k, v = problem.k.copy(), problem.v.copy()
    k[0, :, 4:], v[0, :, 4:] = np.nan, np.inf
    subject.check(problem.but(k=k, v=v))


@_claim("nothing to see")
def nan_beyond_the_diagonal_stays_there(subject: Subject) -> None:
    problem = plain(q_len=5, k_len=13, causal=True)
    seen = 5 + int(subject.aligned(problem).options["q_offset"])
    k, v = problem.k.copy(), problem.v.copy()
    k[:, :, seen:], v[:, :, seen:] = np.nan, np.inf
    subject.check(problem.but(k=k, v=v))


@_claim("nothing to see")
def nan_in_a_masked_entry_of_the_bias_stays_there(subject: Subject) -> None:
    mask = coins(1, 1, 11, 13)
    bias = np.where(mask, normal(2, 2, 11, 13), np.nan)
    bias[:, 1] = np.where(mask[0], bias[:, 1], np.inf)
    subject.check(plain(mask=mask, bias=bias))


@_claim("nothing to see")
def nan_in_a_masked_entry_of_the_bias_does_not_pass_the_softcap(subject: Subject) -> None:
    # The slope of tanh at NaN is NaN, and 0 * NaN is too: the entry has to go before it.
    mask = coins(1, 1, 11, 13)
    bias = np.where(mask, normal(2, 2, 11, 13), np.nan)
    subject.check(plain(mask=mask, bias=bias, softcap=2.0))


@_claim("nothing to see")
def nan_in_a_query_that_sees_no_key_stays_there(subject: Subject) -> None:
    problem = plain(q_lengths=ints(11, 6))
    q = problem.q.copy()
    q[1, :, 6:8], q[1, :, 8:] = np.nan, np.inf
    subject.check(problem.but(q=q))


@_claim("nothing to see")
def cotangent_that_is_not_finite_stays_at_a_row_that_sees_no_key(subject: Subject) -> None:
    # The derivative of the norm of a row of zeros is NaN, that of its log infinite.
    mask = coins(2, 1, 11, 13)
    mask[:, :, 3:5] = False
    hiding: tuple[dict[str, Any], ...]
    hiding = {"mask": mask, "sinks": normal(2)}, {"bias": np.where(mask, 0.0, -np.inf)}
    for options in hiding:
        run, (floats, others) = subject.program(plain(return_lse=True, **options))
        row = np.zeros((2, 2, 11, 1), bool)
        row[:, :, 3:5] = True

        def pulled(floats: Any, others: Any, fill: Any, run: Any = run, row: Any = row) -> Any:
            (out, lse), pull = jax.vjp(lambda floats: run(floats, others), floats)
            dout = jnp.where(row, fill.astype(out.dtype), jnp.ones_like(out))
            dlse = jnp.where(lse == -jnp.inf, fill.astype(lse.dtype), jnp.ones_like(lse))
            return pull((dout, dlse))

        program = subject.jit(pulled)
        want, have = (program(floats, others, jnp.float32(fill)) for fill in (0.0, np.nan))
        for name, x in have[0].items():
            off = difference(np.asarray(x, np.float64), np.asarray(want[0][name], np.float64))
            fail_unless(off == 0, f"d{name} is off by {off:.2g}")


@_claim("nothing to see")
def additive_mask_of_minus_infinity_hides(subject: Subject) -> None:
    keys, pairs = np.zeros((1, 1, 1, 13)), np.where(coins(1, 1, 11, 13), 0.0, -np.inf)
    keys[..., :7], pairs[:, :, 2], pairs[:, :, 4, :9] = -np.inf, -np.inf, -np.inf
    for bias in (keys, pairs):
        subject.check(plain(bias=bias))


# --- terms of the logits ---


@_claim("terms")
def bias_of_any_broadcast_shape_has_a_gradient_of_its_shape(subject: Subject) -> None:
    for shape in ((2, 2, 11, 13), (1, 2, 11, 1)):
        subject.check(plain(bias=normal(*shape)))


@_claim("terms")
def bias_and_mask_hold_together(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    mask[..., 0] = True
    subject.check(plain(bias=normal(1, 2, 11, 13), mask=mask, causal=True))


@_claim("terms")
def softcap_bounds_the_logits(subject: Subject) -> None:
    problem = plain(softcap=1.5)
    subject.check(problem.but(q=problem.q * 3))


@_claim("terms")
def softcap_comes_after_the_bias_and_before_the_mask(subject: Subject) -> None:
    subject.check(plain(softcap=1.5, bias=3 * normal(1, 2, 11, 13), mask=coins(2, 1, 11, 13)))


@_claim("terms")
def sinks_join_the_denominator_alone(subject: Subject) -> None:
    subject.check(plain(sinks=normal(2) + 1))


@_claim("terms")
def row_that_sees_no_key_has_lse_of_its_sink(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    mask[:, :, 3:5] = False
    subject.check(plain(sinks=normal(2), mask=mask, return_lse=True))


@_claim("terms")
def huge_sinks_do_not_overflow(subject: Subject) -> None:
    got = subject.check(plain(sinks=np.array([-1e4, 1e4]), return_lse=True))
    fail_unless(np.isfinite(got.out).all(), "out is not finite")


@_claim("terms")
def sink_of_minus_infinity_is_none(subject: Subject) -> None:
    mask = coins(2, 1, 11, 13)
    mask[:, :, 3:5] = False
    subject.check(plain(sinks=np.array([-np.inf, 0.5]), mask=mask, return_lse=True))


@_claim("terms")
def softcapped_logits_keep_small_and_large_values(subject: Subject) -> None:
    _values_may_be_small_or_large(subject, plain(softcap=50.0), 40.0)


def _values_may_be_small_or_large(subject: Subject, problem: Problem, size: float) -> None:
    """Values times a power of two give the same output times it, whatever side the logits are."""
    q, k = np.abs(problem.q) * size, np.abs(problem.k)
    q[:, :, ::2] *= -1
    problem = problem.but(q=q, k=k)
    dtype = _narrow(subject)
    want = subject.run(problem, dtype)
    for power in (2.0**-66, 2.0**66):
        got = subject.run(problem.but(v=problem.v * power), dtype)
        pairs = {"out": (got.out / power, want.out)}
        pairs["dq"] = got.gradients["q"] / power, want.gradients["q"]
        pairs["dv"] = got.gradients["v"], want.gradients["v"]
        for name, (have, expected) in pairs.items():
            off = difference(have, expected)
            fail_unless(off == 0, f"{name} is off by {off:.2g} for values of {power:.1g}")


@_claim("terms")
def alibi_falls_with_the_distance_from_the_diagonal(subject: Subject) -> None:
    subject.check(plain(alibi_slopes=np.array([0.5, 0.03125])))
    subject.check(plain(alibi_slopes=np.array([0.5, 0.03125]), causal=True), gradients=False)


@_claim("terms")
def relative_bias_is_added_along_the_diagonals(subject: Subject) -> None:
    subject.check(plain(relative_bias=normal(2, 23)))
    subject.check(plain(relative_bias=normal(1, 23), causal=True), gradients=False)


@_claim("terms")
def scale_may_be_a_number(subject: Subject) -> None:
    for scale in (0.25, 0.0, -1.0):
        subject.check(plain(scale=scale), gradients=scale < 0)


@_claim("terms")
def scale_per_head_is_learned(subject: Subject) -> None:
    subject.check(plain(scale=np.array([0.2, 0.9])))


@_claim("terms")
def one_scale_for_all_heads_is_learned(subject: Subject) -> None:
    subject.check(plain(scale=np.array([0.4])))


# --- cosine similarity ---


@_claim("cosine")
def cosine_ignores_the_length_of_vectors(subject: Subject) -> None:
    subject.check(plain(scale=10.0).but(cosine=True))


@_claim("cosine")
def cosine_normalises_groups_apart(subject: Subject) -> None:
    subject.check(plain(scale=5.0).but(cosine=True, groups=2))


@_claim("cosine")
def cosine_does_not_underflow_at_scale_100(subject: Subject) -> None:
    # All cosines near -1: without a running maximum exp(-100) would be lost in float32.
    problem = plain(scale=100.0, return_lse=True).but(cosine=True)
    q = np.abs(problem.q) + 1
    subject.check(problem.but(q=q, k=-np.abs(problem.k) - 1))


@_claim("cosine")
def cosine_at_a_high_scale_keeps_small_and_large_values(subject: Subject) -> None:
    _values_may_be_small_or_large(subject, plain(scale=60.0).but(cosine=True), 1.0)


@_claim("cosine")
def cosine_ignores_even_extreme_lengths_of_vectors(subject: Subject) -> None:
    problem = plain(scale=8.0).but(cosine=True)
    short, long = 2.0**-76, 2.0**66  # about 1e-23 and 1e20
    dtype = _narrow(subject)
    want = subject.run(problem, dtype)
    got = subject.run(problem.but(q=problem.q * short, k=problem.k * long), dtype)
    pairs = {"out": (got.out, want.out), "dv": (got.gradients["v"], want.gradients["v"])}
    for name, factor in (("q", short), ("k", long)):
        pairs[f"d{name}"] = got.gradients[name] * factor, want.gradients[name]
    for name, (have, expected) in pairs.items():
        off = difference(have, expected)
        fail_unless(off == 0, f"{name} is off by {off:.2g}")


@_claim("cosine")
def cosine_of_a_zero_vector_is_zero(subject: Subject) -> None:
    problem = plain(scale=8.0).but(cosine=True)
    q, k = problem.q.copy(), problem.k.copy()
    q[0, 0, 3], k[1, 1, 4] = 0, 0
    subject.check(problem.but(q=q, k=k))


@_claim("cosine")
def cosine_takes_a_bias_that_is_unbounded(subject: Subject) -> None:
    ramp = np.linspace(-60, 150, 13) * np.ones((1, 2, 11, 1))
    subject.check(plain(scale=10.0, bias=ramp).but(cosine=True))


@_claim("cosine")
def cosine_scale_per_head_is_learned(subject: Subject) -> None:
    subject.check(plain(scale=np.array([4.0, 60.0]), causal=True).but(cosine=True))


@_claim("cosine")
def nan_in_what_cosine_hides_stays_there(subject: Subject) -> None:
    problem = plain(scale=10.0, q_lengths=ints(11, 6), kv_lengths=ints(4, 13)).but(cosine=True)
    q, k = problem.q.copy(), problem.k.copy()
    q[1, :, 6:], k[0, :, 4:] = np.nan, np.inf
    subject.check(problem.but(q=q, k=k))


# --- shapes ---


@_claim("shapes")
def groups_of_query_heads_share_a_key_head(subject: Subject) -> None:
    subject.check(plain(heads=6, kv_heads=2))


@_claim("shapes")
def all_query_heads_may_share_one_key_head(subject: Subject) -> None:
    subject.check(plain(heads=3, kv_heads=1))


@_claim("shapes")
def nan_that_no_head_of_a_group_sees_stays_there(subject: Subject) -> None:
    problem = plain(heads=4, kv_heads=2, mask=coins(2, 4, 11, 13, share=0.8))
    mask, k, v = problem.options["mask"].copy(), problem.k.copy(), problem.v.copy()
    mask[:, 2:, :, 5], k[:, 1, 5], v[:, 1, 5] = False, np.nan, np.inf
    subject.check(problem.but(mask=mask, k=k, v=v))


@_claim("shapes")
def values_may_have_a_dimension_of_their_own(subject: Subject) -> None:
    subject.check(plain(dim=4, v_dim=9))


@_claim("shapes")
def any_length_will_do(subject: Subject) -> None:
    for q_len, k_len in ((1, 17), (17, 1)):
        subject.check(plain(q_len=q_len, k_len=k_len))
    for q_len, k_len in ((1, 1), (31, 37)):
        subject.check(plain(q_len=q_len, k_len=k_len), gradients=False)


# --- dtypes ---


@_claim("dtypes")
def float64_is_computed_in_float64(subject: Subject) -> None:
    subject.check(plain(), dtype="float64")


@_claim("dtypes")
def float32_is_as_exact_as_the_plain_formula(subject: Subject) -> None:
    subject.check(plain(q_len=31, k_len=37, causal=True), dtype="float32")


@_claim("dtypes")
def bfloat16_is_as_exact_as_the_plain_formula(subject: Subject) -> None:
    subject.check(plain(q_len=31, k_len=37, causal=True), dtype="bfloat16")


@_claim("dtypes")
def float16_is_as_exact_as_the_plain_formula(subject: Subject) -> None:
    subject.check(plain(q_len=31, k_len=37, causal=True), dtype="float16")


@_claim("dtypes")
def results_have_the_dtypes_of_their_arguments(subject: Subject) -> None:
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        run, (floats, others) = subject.program(plain(), dtype)
        out, pull = jax.eval_shape(
            lambda f, run=run, others=others: jax.vjp(lambda f: run(f, others), f), floats
        )
        gradients = jax.eval_shape(pull, out)[0]
        for name, x in {"out": out, **{f"d{name}": g for name, g in gradients.items()}}.items():
            fail_unless(x.dtype == jnp.dtype(dtype), f"{name} is {x.dtype} for {dtype} inputs")


@_claim("dtypes")
def sums_are_accumulated_in_float32_at_least(subject: Subject) -> None:
    run, (floats, others) = subject.program(plain(), "bfloat16")

    def both(floats: Any) -> Any:
        out, pull = jax.vjp(lambda floats: run(floats, others), floats)
        return pull(out)

    for equation in equations(jax.make_jaxpr(both)(floats).jaxpr):
        kind = equation.primitive.name
        if kind in ("dot_general", "reduce_sum", "exp", "cumsum", "add_any", "scatter-add"):
            dtypes = {str(x.aval.dtype) for x in equation.outvars}
            narrow = dtypes & {"bfloat16", "float16"}
            fail_unless(not narrow, f"a {kind} accumulates in {', '.join(narrow)}")


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# --- lse ---


@_claim("lse")
def lse_is_the_log_of_the_denominator(subject: Subject) -> None:
    problem = plain(return_lse=True, causal=True)
    got = subject.check(problem, gradients=False)
    fail_unless(got.lse is not None and got.lse.shape == (2, 2, 11), "lse is not one per query")


@_claim("lse")
def lse_is_float32_for_16_bit_inputs(subject: Subject) -> None:
    for dtype, wide in (("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")):
        run, (floats, others) = subject.program(plain(return_lse=True), dtype)
        _, lse = jax.eval_shape(run, floats, others)
        fail_unless(lse.dtype == jnp.dtype(wide), f"lse is {lse.dtype} for {dtype} inputs")


@_claim("lse")
def lse_is_not_rounded_for_16_bit_inputs(subject: Subject) -> None:
    subject.check(plain(return_lse=True), dtype="bfloat16", gradients=False)


@_claim("lse")
def lse_is_differentiable(subject: Subject) -> None:
    subject.check(plain(return_lse=True))


@_claim("lse")
def lse_is_differentiable_with_every_term(subject: Subject) -> None:
    problem = plain(
        return_lse=True,
        bias=normal(1, 2, 11, 13),
        sinks=normal(2),
        softcap=2.0,
        alibi_slopes=np.array([0.5, 0.1]),
        mask=coins(2, 1, 11, 13),
    )
    subject.check(problem)


@_claim("lse")
def parts_of_the_keys_merge_exactly(subject: Subject) -> None:
    problem = rounded(plain(k_len=19, return_lse=True), subject.dtype)
    parts = [
        subject.run(problem.but(k=problem.k[:, :, s], v=problem.v[:, :, s]), gradients=False)
        for s in (slice(0, 7), slice(7, 19))
    ]
    lses = np.stack([np.asarray(part.lse) for part in parts])
    lse = np.logaddexp(*lses)
    out = sum(
        np.exp(part.lse - lse)[..., None] * part.out for part in parts if part.lse is not None
    )
    whole = subject.expected(problem, gradients=False)
    eps = float(jnp.finfo(subject.dtype).eps)
    for name, have, want in (("out", out, whole.out), ("lse", lse, whole.lse)):
        off = difference(np.asarray(have), np.asarray(want))
        fail_unless(off <= 8 * eps, f"merged {name} is off by {off:.2g} (allowed {8 * eps:.2g})")


# --- dropout ---


def _kept(subject: Subject, problem: Problem, **run: Any) -> np.ndarray:
    """Which probabilities dropout keeps (b, h, i, j): values that are unit vectors show them."""
    b, hk, j, _ = problem.k.shape
    units = np.broadcast_to(np.eye(j), (b, hk, j, j)).copy()
    out = subject.run(problem.but(v=units), gradients=False, **run).out
    return out != 0


def _dropping(**options: Any) -> Problem:
    defaults = {"dropout_rate": 0.3, "dropout_key": jax.random.key(3), "dim": 4}
    return plain(**{**defaults, **options})


@_claim("dropout")
def dropout_drops_normalised_probabilities_and_rescales(subject: Subject) -> None:
    problem = _dropping()
    subject.check(problem, keep=_kept(subject, problem))


@_claim("dropout")
def dropout_does_not_change_lse(subject: Subject) -> None:
    problem = _dropping(return_lse=True)
    subject.check(problem, keep=_kept(subject, problem))


@_claim("dropout")
def dropout_holds_together_with_masks_and_terms(subject: Subject) -> None:
    problem = _dropping(causal=True, bias=normal(1, 2, 11, 13), kv_lengths=ints(13, 9))
    subject.check(problem, keep=_kept(subject, problem))


@_claim("dropout")
def dropout_rate_is_kept_within_one_percent(subject: Subject) -> None:
    for rate in (0.1, 0.5):
        problem = _dropping(heads=4, q_len=96, k_len=96, dropout_rate=rate)
        dropped = 1 - _kept(subject, problem).mean()
        fail_unless(abs(dropped - rate) < 0.01, f"{dropped:.4f} were dropped, not {rate}")


@_claim("dropout")
def dropout_depends_on_the_key_alone(subject: Subject) -> None:
    problem = _dropping()
    kept = _kept(subject, problem)
    fail_unless((kept == _kept(subject, problem.but(q=problem.q * 2))).all(), "q changes the mask")
    other = _kept(subject, problem.but(dropout_key=jax.random.key(4)))
    share = (kept != other).mean()  # 2 * 0.3 * 0.7 = 0.42 for independent masks
    fail_unless(0.3 < share < 0.54, f"{share:.2f} of the mask differ for another key, not 0.42")


@_claim("dropout")
def dropout_mask_does_not_depend_on_lengths(subject: Subject) -> None:
    long = _kept(subject, _dropping())
    short = _kept(subject, _dropping(q_len=7, k_len=10))
    fail_unless((long[:, :, :7, :10] == short).all(), "the mask changes with the lengths")


# --- together ---


@_claim("together")
def every_feature_holds_together(subject: Subject) -> None:
    q_ids, kv_ids = (np.sort(RNG(n).integers(0, 2, (2, n))).astype(np.int32) for n in (19, 23))
    problem = _dropping(
        heads=4,
        kv_heads=2,
        q_len=19,
        k_len=23,
        v_dim=6,
        mask=coins(2, 1, 19, 23, share=0.8),
        causal=True,
        window=(9, 0),
        q_offset=ints(2, 5).reshape(2, 1),
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        q_lengths=ints(19, 15),
        kv_lengths=ints(20, 23),
        bias=normal(1, 4, 19, 23),
        scale=np.array([0.5, 1.0, 1.5, 2.0]),
        softcap=3.0,
        sinks=normal(4),
        alibi_slopes=np.abs(normal(4)),
        relative_bias=normal(4, 41),
        return_lse=True,
    )
    subject.check(problem, keep=_kept(subject, problem))


CLAIMS: tuple[Claim, ...] = tuple(_CLAIMS)
"""Every claim, in the order in which they are reported."""
