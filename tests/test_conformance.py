"""Every claim of the conformance suite, in every engine and both conventions."""

import functools

import jax
import numpy as np
import pytest

import flash_attention_jax
from flash_attention_jax._conformance.reference import Problem, reference
from flash_attention_jax._conformance.subject import QUICK
from flash_attention_jax.testing import CLAIMS, Failure, Subject, check, conformance

# Blocks so small that several occur, none of which divides a length of the claims.
BLOCKS = {"block_q": 4, "block_kv": 5}


def _cosine(q, k, v, mask=None, *, bias=None, **options):
    return flash_attention_jax.flash_cosine_sim_attention(q, k, v, mask, bias, **options)


def subject(implementation: str, convention: str) -> Subject:
    fixed = {"implementation": implementation, **BLOCKS}
    if convention == "dot_product_attention":
        return Subject(
            flash_attention_jax.dot_product_attention,
            dtype="float64",
            fixed=fixed,
            compiler_options=QUICK,
        )
    if convention == "cosine":
        return Subject(
            _cosine,
            layout="heads_first",
            dtype="float64",
            cosine=True,
            default_scale=8.0,
            fixed=fixed,
            compiler_options=QUICK,
        )
    return Subject(
        flash_attention_jax.flash_attention,
        layout="heads_first",
        dtype="float64",
        fixed=fixed,
        compiler_options=QUICK,
    )


ENGINES = ("dense", "blocked", "checkpointed")

# What `flash_attention` does not take because it is another function's, and is tried there.
OF_COSINE = {claim.name for claim in CLAIMS if claim.subject == "cosine"}

# Where the convention could matter: everything whose axes, names or diagonal differ between the
# two.
BY_CONVENTION = (
    "output_is_the_softmax_average_of_the_values",
    "causal_diagonal_lies_where_it_is_said_to_for_fewer_queries",
    "causal_diagonal_lies_where_it_is_said_to_for_more_queries",
    "window_follows_the_diagonal_when_lengths_differ",
    "lengths_do_not_move_the_diagonal",
    "groups_of_query_heads_share_a_key_head",
    "lse_is_differentiable",
    "every_feature_holds_together",
)


def passes(name: str, tried: Subject) -> None:
    claim = next(claim for claim in CLAIMS if claim.name == name)
    assert check(claim, tried) == ("passed", "")


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("claim", [claim.name for claim in CLAIMS])
def test_dot_product_attention(claim, implementation):
    passes(claim, subject(implementation, "dot_product_attention"))


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("claim", BY_CONVENTION)
def test_flash_attention(claim, implementation):
    passes(claim, subject(implementation, "flash_attention"))


@pytest.mark.parametrize("claim", ["cosine_normalises_groups_apart", *BY_CONVENTION[-1:]])
def test_flash_cosine_sim_attention(claim):
    tried = subject("blocked", "cosine")
    if claim in OF_COSINE:
        passes(claim, tried)
        return
    # The default scale, 8, is the one thing that no other claim passes through.
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, n, 8)) for n in (11, 13, 13))
    tried.check(Problem(q, k, v, {"causal": True, "return_lse": True}, cosine=True))


# --- jax.nn ---

WRONG_IN_JAX_NN = {
    "row_that_sees_no_key_is_zero",
    "row_that_sees_no_key_has_lse_of_minus_infinity",
    "nan_in_a_hidden_key_stays_there",
    "nan_in_a_hidden_value_stays_there",
    "nan_beyond_the_lengths_stays_there",
    "nan_beyond_the_diagonal_stays_there",
    "lse_is_float32_for_16_bit_inputs",
    "lse_is_not_rounded_for_16_bit_inputs",
    "lse_is_differentiable",
}
RIGHT_IN_JAX_NN = {
    "output_is_the_softmax_average_of_the_values",
    "logits_that_grow_along_the_keys_are_exact",
    "mask_of_any_broadcast_shape_hides_keys",
    "causal_hides_what_lies_beyond_the_diagonal",
    "causal_diagonal_lies_where_it_is_said_to_for_fewer_queries",
    "lengths_hide_the_padding",
    "bias_of_any_broadcast_shape_has_a_gradient_of_its_shape",
    "groups_of_query_heads_share_a_key_head",
    "float32_is_as_exact_as_the_plain_formula",
}
ABSENT_FROM_JAX_NN = {
    "segments_see_only_themselves",
    "sinks_join_the_denominator_alone",
    "offset_moves_the_diagonal",
    "cosine_ignores_the_length_of_vectors",
    "dropout_rate_is_kept_within_one_percent",
}


def test_the_suite_says_what_jax_nn_does_and_does_not_do():
    # jax.nn promotes dtypes on its own; versions may mend a claim or add one, so the sets are the
    # least.
    with jax.numpy_dtype_promotion("standard"):
        report = conformance(
            jax.nn.dot_product_attention,
            claims=WRONG_IN_JAX_NN | RIGHT_IN_JAX_NN | ABSENT_FROM_JAX_NN,
        )
    assert set(report.failed) == WRONG_IN_JAX_NN, report
    assert set(report.passed) == RIGHT_IN_JAX_NN, report
    assert set(report.not_offered) == ABSENT_FROM_JAX_NN, report
    assert "9 passed, 9 failed, 5 not offered" in str(report)


# --- the suite itself ---


@functools.cache
def _everything() -> Problem:
    rng = np.random.default_rng(3)
    normal = rng.standard_normal
    return Problem(
        normal((2, 4, 5, 4)),
        normal((2, 2, 6, 4)),
        normal((2, 2, 6, 3)),
        {
            "mask": rng.random((2, 1, 5, 6)) < 0.7,
            "causal": True,
            "q_offset": 2,
            "bias": normal((1, 4, 5, 1)),
            "scale": normal(4),
            "sinks": normal(4),
            "alibi_slopes": normal(1),
            "relative_bias": normal((4, 10)),
            "softcap": 2.0,
            "dropout_rate": 0.25,
            "return_lse": True,
        },
        cosine=True,
        groups=2,
    )


@pytest.mark.parametrize(
    "name", ["q", "k", "v", "bias", "scale", "sinks", "alibi_slopes", "relative_bias"]
)
def test_gradients_of_the_reference_are_its_finite_differences(name):
    problem = _everything()
    keep = np.random.default_rng(4).random((2, 4, 5, 6)) < 0.75
    dout, dlse = problem.cotangents
    x = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.options}[name]
    direction = np.random.default_rng(5).standard_normal(x.shape)

    def loss(step: float) -> float:
        moved = reference(problem.but(**{name: x + step * direction}), keep=keep, gradients=False)
        seen = moved.lse > -np.inf
        return (moved.out * dout).sum() + (moved.lse * dlse)[seen].sum()

    h = 1e-5
    slope = (loss(h) - loss(-h)) / (2 * h)
    gradient = reference(problem, keep=keep).gradients[name]
    assert abs(slope - (gradient * direction).sum()) < 1e-8 * max(1, abs(slope))


def test_reference_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 4)) for n in (3, 5, 5))
    logits = q[0, 0] @ k[0, 0].T / 2
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = reference(Problem(q, k, v, {}))
    np.testing.assert_allclose(got.out[0, 0], probs @ v[0, 0], rtol=1e-14)
    np.testing.assert_allclose(got.lse[0, 0], np.log(np.exp(logits).sum(1)), rtol=1e-14)


def _forgets_the_mask(query, key, value, bias=None, mask=None, **options):
    return flash_attention_jax.dot_product_attention(query, key, value, bias, None, **options)


def _drops_a_hundred_thousandth(query, key, value, **options):
    out = flash_attention_jax.dot_product_attention(query, key, value, **options)
    return jax.tree.map(lambda x: x * (1 - x.dtype.type(1e-5)), out)


def _has_a_gradient_off_by_a_hundred_thousandth(query, key, value, **options):
    out = flash_attention_jax.dot_product_attention(query, key, value, **options)
    zero = out - jax.lax.stop_gradient(out)
    return out + zero * zero.dtype.type(1e-5)


@pytest.mark.parametrize(
    ("function", "claim", "words"),
    [
        (_forgets_the_mask, "mask_of_any_broadcast_shape_hides_keys", "out is off by"),
        (_drops_a_hundred_thousandth, "output_is_the_softmax_average_of_the_values", "out is off"),
        (
            _has_a_gradient_off_by_a_hundred_thousandth,
            "output_is_the_softmax_average_of_the_values",
            "dk is off",
        ),
    ],
)
def test_a_planted_fault_fails_its_claim_with_the_numbers(function, claim, words):
    report = conformance(function, claims=[claim])
    assert report.failed == (claim,)
    assert words in report.outcomes[claim][1]
    assert "allowed" in str(report)


def test_an_unknown_claim_is_an_error():
    with pytest.raises(ValueError, match="must be names of claims, got it_is_fast"):
        conformance(flash_attention_jax.dot_product_attention, claims=["it_is_fast"])


def test_a_failure_is_an_assertion_error():
    assert issubclass(Failure, AssertionError)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
