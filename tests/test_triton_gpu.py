"""The Triton kernels on the chip: every claim, real sizes, the same bits each time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax
from flash_attention_jax import flash_attention, flash_cosine_sim_attention
from flash_attention_jax.testing import CLAIMS, Subject, check

pytestmark = pytest.mark.gpu

FUNCTIONS = {"dot": flash_attention, "cosine": flash_cosine_sim_attention}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("claim", [pytest.param(claim, id=claim.name) for claim in CLAIMS])
def test_claim_holds_on_the_chip(claim, dtype):
    tried = Subject(
        flash_attention_jax.dot_product_attention,
        dtype=dtype,
        fixed={"implementation": "triton"},
    )
    outcome, why = check(claim, tried)
    assert outcome == "not offered" or (outcome, why) == ("passed", "")


def gradients(similarity, q, k, v, dout, implementation, **options):
    def attend(q, k, v):
        return FUNCTIONS[similarity](q, k, v, implementation=implementation, **options)

    out, pull = jax.vjp(attend, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(dout.astype(out.dtype))), strict=True))


@pytest.mark.parametrize("similarity", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("n", [512, 2047])
def test_gradients_agree_with_the_formula_in_float32(n, dim, causal, similarity):
    keys = jax.random.split(jax.random.key(n + dim), 4)
    given = [jax.random.normal(key, (2, 4, n, dim), jnp.bfloat16) for key in keys]
    run = jax.jit(lambda *x: gradients(similarity, *x, "triton", causal=causal))
    found, again = run(*given), run(*given)
    wide = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        exact = gradients(similarity, *wide, "blocked", causal=causal)
    for name, want in exact.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(again[name])), name
        error = np.asarray(found[name], np.float64) - np.asarray(want, np.float64)
        assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(np.asarray(want, np.float64)), name
