"""The Hopper kernels on the chip: real sizes, the same bits each time, memory linear in length."""

import os
import shutil
import subprocess
import sys

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


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("shape", ["own", "shared by the batch", "of keys"])
def test_gradient_of_a_bias_agrees_with_the_formula_in_float32(shape, dim):
    n = 1000
    q, k, v, dout = arrays(n, dim)
    sizes = {"own": (2, 4, n, n), "shared by the batch": (1, 4, n, n), "of keys": (2, 4, 1, n)}
    bias = jax.random.normal(jax.random.key(0), sizes[shape])

    def run(implementation, dtype):
        def attend(q, k, v, bias):
            return flash_attention(q, k, v, bias=bias, causal=True, implementation=implementation)

        _, pull = jax.vjp(attend, *(x.astype(dtype) for x in (q, k, v)), bias)
        return pull(dout.astype(dtype))

    with jax.default_matmul_precision("highest"):
        exact = run("blocked", jnp.float32)
    for name, found, want in zip(
        ("dq", "dk", "dv", "dbias"), run("hopper", jnp.bfloat16), exact, strict=True
    ):
        assert relative_error(found, want) < 1.5e-2, name


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("heads_last", [False, True])
def test_few_queries_against_many_keys_agree_with_the_formula_in_float32(n, heads_last):
    keys = jax.random.split(jax.random.key(n), 3)
    q = jax.random.normal(keys[0], (2, 16, n, 128), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, 4, 70001, 128), jnp.bfloat16) for key in keys[1:])
    lengths = jnp.array([70001, 12345], jnp.int32)
    want = flash_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)),
        kv_lengths=lengths,
        implementation="blocked",
        precision="highest",
    )
    if heads_last:
        found = flash_attention_jax.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            key_value_seq_lengths=lengths,
            implementation="hopper",
        ).swapaxes(1, 2)
    else:
        found = flash_attention(q, k, v, kv_lengths=lengths, implementation="hopper")
    assert relative_error(found, want) < 1e-2


def test_dense_mask_agrees_with_the_formula_in_float32():
    given = arrays(1000)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 4, 1000, 1000))
    found = gradients("dot", *given, "hopper", mask=mask)
    wide = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        exact = gradients("dot", *wide, "blocked", mask=mask)
    for name, want in exact.items():
        assert relative_error(found[name], want) < 1e-2, name


SANITIZED = """
import jax, jax.numpy as jnp
from flash_attention_jax import flash_attention
q = jnp.ones((1, 2, 333, 72), jnp.bfloat16)
bias = jnp.ones((2, 333, 333), jnp.float32)
def loss(q, bias):
    out = flash_attention(q, q, q, bias=bias, causal=True, implementation="hopper")
    return out.astype(jnp.float32).sum()
print(jax.jit(jax.grad(loss, (0, 1)))(q, bias)[0].sum())
"""


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
)
def test_no_kernel_reads_or_writes_out_of_bounds():
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    # Without a pool, so that what lies beyond an array is not another one.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    done = subprocess.run(
        [*command, "-c", SANITIZED],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


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
