"""The Hopper kernels on the chip: real sizes, the same bits each time, memory linear in length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax
from flash_attention_jax import flash_attention, flash_cosine_sim_attention
from flash_attention_jax.testing import CLAIMS, Subject, check

pytestmark = pytest.mark.gpu

FUNCTIONS = {"dot": flash_attention, "cosine": flash_cosine_sim_attention}


@pytest.fixture(autouse=True)
def _default_types():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


def arrays(n, dim=64, heads=4, kv_heads=4, batch=2, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(n + dim), 4)
    shapes = [(batch, heads, n, dim)] + [(batch, kv_heads, n, dim)] * 2 + [(batch, heads, n, dim)]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def gradients(similarity, q, k, v, dout, implementation, **options):
    def attend(q, k, v):
        return FUNCTIONS[similarity](q, k, v, implementation=implementation, **options)

    out, pull = jax.vjp(attend, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(dout.astype(out.dtype))), strict=True))


def relative_error(have, want):
    have, want = (np.asarray(x, np.float64) for x in (have, want))
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


@pytest.mark.parametrize("claim", [pytest.param(claim, id=claim.name) for claim in CLAIMS])
def test_claim_holds_on_the_chip(claim):
    tried = Subject(
        flash_attention_jax.dot_product_attention,
        dtype="bfloat16",
        fixed={"implementation": "hopper"},
        x64=False,
    )
    outcome, why = check(claim, tried)
    assert outcome == "not offered" or (outcome, why) == ("passed", "")


@pytest.mark.parametrize("similarity", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("n", [512, 2048, 4095])
def test_gradients_agree_with_the_formula_in_float32(n, dim, causal, similarity):
    given = arrays(n, dim)
    found = gradients(similarity, *given, "hopper", causal=causal)
    wide = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        exact = gradients(similarity, *wide, "blocked", causal=causal)
    for name, want in exact.items():
        assert relative_error(found[name], want) < 1e-2, name


@pytest.mark.parametrize("similarity", FUNCTIONS)
def test_two_hundred_runs_give_the_same_bits(similarity):
    given = arrays(1500, heads=8, kv_heads=2)
    run = jax.jit(lambda *x: gradients(similarity, *x, "hopper", causal=True))
    first = jax.tree.map(np.asarray, run(*given))
    for _ in range(200):
        for name, x in run(*given).items():
            assert np.array_equal(np.asarray(x), first[name]), name


def test_what_lies_beyond_the_lengths_reaches_nothing():
    q, k, v, dout = arrays(700)
    lengths = jnp.array([333, 700], jnp.int32)
    clean = gradients("dot", q, k, v, dout, "hopper", kv_lengths=lengths)
    k, v = (x.at[0, :, 333:].set(jnp.nan) for x in (k, v))
    poisoned = gradients("dot", q, k, v, dout, "hopper", kv_lengths=lengths)
    for name, x in clean.items():
        assert np.array_equal(np.asarray(x), np.asarray(poisoned[name])), name


def test_dropout_keeps_what_the_reference_keeps_on_the_cpu():
    # Equal logits, and values that are unit vectors: the output shows which keys were kept.
    n = 64
    q = jnp.zeros((1, 2, n, n), jnp.bfloat16)
    v = jnp.broadcast_to(jnp.eye(n, dtype=jnp.bfloat16), (1, 2, n, n))
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(7)}
    chip = np.asarray(flash_attention(q, q, v, implementation="hopper", **options)) != 0
    with jax.default_device(jax.devices("cpu")[0]):
        host = [jax.device_put(x, jax.devices("cpu")[0]) for x in (q, q, v)]
        reference = np.asarray(flash_attention(*host, implementation="blocked", **options)) != 0
    assert np.array_equal(chip, reference)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_memory_grows_with_the_length(causal):
    def temporary(n):
        shapes = [jax.ShapeDtypeStruct((1, 8, n, 64), jnp.bfloat16)] * 4

        def run(q, k, v, dout):
            return gradients("dot", q, k, v, dout, "hopper", causal=causal)

        return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(32768), temporary(131072)
    assert long <= 4.2 * short
    given = arrays(131072, heads=1, kv_heads=1, batch=1)
    assert all(
        np.isfinite(np.asarray(x, np.float32)).all()
        for x in gradients("dot", *given, "hopper", causal=causal).values()
    )
