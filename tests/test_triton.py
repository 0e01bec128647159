"""The Triton kernels where Triton need not be: when they are chosen, why not, and their tiles."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import explain, flash_attention
from flash_attention_jax._api import read
from flash_attention_jax.kernels import triton_config, triton_support


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def gpu(major, minor):
    return {"platform": "gpu", "capability": (major, minor)}


@pytest.fixture
def installed(monkeypatch):
    """As if a tiny kernel had been lowered."""
    monkeypatch.setattr(triton_support, "_lowering_why_not", lambda capability: None)


# --- choice ---


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_triton_is_chosen_on_other_gpus_than_hopper(capability, dtype, installed):
    q = shape(2, 8, 1024, 80, dtype=dtype)
    found = explain(q, q, q, causal=True, **gpu(*capability))
    assert (found.forward, found.backward) == ("triton", "triton")
    assert "needs compute capability 9.0" in found.reasons["hopper"]
    assert found.reasons["blocked"] == "triton comes first"


@pytest.mark.parametrize(
    "options",
    [
        {"relative_bias": shape(8, 2047, dtype=jnp.float32)},
        {"mask": shape(2, 8, 1024, 1024, dtype=jnp.bool_), "relative_bias": shape(8, 2047)},
    ],
)
def test_triton_takes_what_the_hopper_kernels_decline(options, installed):
    q = shape(2, 8, 1024, 64)
    assert explain(q, q, q, **options, **gpu(9, 0)).forward == "triton"


def test_hopper_comes_first_on_a_hopper(installed):
    q = shape(2, 8, 1024, 64)
    found = explain(q, q, q, **gpu(9, 0))
    assert found.forward == "hopper"
    assert found.reasons["triton"] == "hopper comes first"


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        (
            {},
            {"platform": "cpu"},
            "it runs on NVIDIA GPUs of compute capability 8.0 and newer, "
            "and this is traced for cpu",
        ),
        (
            {},
            {"platform": "rocm"},
            "it needs an NVIDIA GPU of compute capability 8.0 or newer, and this device's is "
            "unknown (ROCm is untested)",
        ),
        (
            {},
            gpu(7, 5),
            "it needs compute capability 8.0 (Ampere) or newer, and this device's is 7.5",
        ),
        (
            {"dim": 264},
            gpu(8, 0),
            "head dimension 264 is over 256",
        ),
        (
            {"differentiation": "any"},
            gpu(8, 0),
            "its custom rule has no forward mode (differentiation='any')",
        ),
        (
            {"block_q": 64},
            gpu(8, 0),
            "its tile sizes are its own: leave `block_q` and `block_kv` out",
        ),
        (
            {"dtype": jnp.float32, "precision": "BF16_BF16_F32_X9"},
            gpu(8, 0),
            "it has no way to multiply float32 with precision 'BF16_BF16_F32_X9'",
        ),
    ],
)
def test_triton_declines_with_a_reason(options, where, reason, installed):
    options = dict(options)
    q = shape(2, 8, 64, options.pop("dim", 64), dtype=options.pop("dtype", jnp.bfloat16))
    found = explain(q, q, q, **options, **where)
    assert found.forward != "triton"
    assert found.reasons["triton"] == reason


def test_triton_declines_float64(installed):
    q = shape(2, 8, 64, 64, dtype=jnp.float64)
    reason = explain(q, q, q, **gpu(8, 0)).reasons["triton"]
    assert reason == "it computes in bfloat16, float16 and float32, and this call is float64"


# --- what is installed ---


def _why_not(monkeypatch, present, lower=None):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        triton_support.importlib.util,
        "find_spec",
        lambda name: (name in present or None) if "triton" in name else real(name),
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_support, "_version", lambda package: "1.2.3")
    if lower is not None:
        monkeypatch.setattr(triton_support, "_lower_a_kernel", lower)
    return triton_support._lowering_why_not.__wrapped__(80)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    want = "{} is not installed: pip install 'flash-attention-jax[cuda13]'"
    assert _why_not(monkeypatch, ()) == want.format("triton")
    assert _why_not(monkeypatch, ("triton",)) == want.format("jax-triton")


def test_a_release_that_does_not_lower_is_named_with_what_it_said(monkeypatch):
    def lower(capability):
        raise TypeError(f"a rule for {capability} has the wrong arguments\nand more")

    assert _why_not(monkeypatch, ("triton", "jax_triton"), lower) == (
        f"jax-triton 1.2.3 does not lower a kernel with jax {jax.__version__} and triton 1.2.3: "
        "TypeError: a rule for 80 has the wrong arguments"
    )
    assert _why_not(monkeypatch, ("triton", "jax_triton"), lambda capability: None) is None


def test_nothing_is_compiled_under_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = triton_support._lowering_why_not.__wrapped__(80)
    assert reason == "TRITON_INTERPRET=1 is set, under which nothing is compiled"


def test_named_on_a_machine_without_a_gpu_it_says_why_not():
    q = jnp.zeros((1, 1, 8, 8), jnp.float32)
    message = (
        "implementation='triton' declines this call: it runs on NVIDIA GPUs of compute capability "
        "8.0 and newer, and this is traced for cpu. "
        "Use implementation=None to let the library choose."
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        flash_attention(q, q, q, implementation="triton")


# --- tiles and precision ---


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_dimension_has_tiles_that_products_take(capability, dtype):
    for dim in (8, 16, 40, 64, 72, 128, 136, 256):
        for direction in ("forward", "dq", "dkv", "dbias", "drelative"):
            tiles = triton_config.tiles(capability, dim, True, dtype, direction)
            for size in (tiles.block_q, tiles.block_kv, triton_config.padded(dim)):
                assert size >= 16
                assert size & (size - 1) == 0


def test_every_tile_of_the_tables_is_a_candidate():
    tables = [(table, "bfloat16") for table in triton_config.TABLE.values()]
    for directions, dtype in (*tables, (triton_config.FLOAT32, "float32")):
        for direction, by_dim in directions.items():
            missing = set(by_dim.values()) - set(triton_config.candidates(direction, dtype))
            assert not missing, (direction, dtype, missing)


@pytest.mark.parametrize(
    ("precision", "want"),
    [
        (None, "ieee"),
        ("highest", "ieee"),
        ("high", "bf16x3"),
        ("default", "tf32"),
        (jax.lax.Precision.HIGHEST, "ieee"),
        ("TF32_TF32_F32", "tf32"),
        ("BF16_BF16_F32_X6", "bf16x6"),
        (("highest", "default"), None),
    ],
)
def test_float32_is_tf32_only_when_asked(precision, want):
    q = np.zeros((1, 1, 8, 8), np.float32)
    call = read.read(q, q, q, None, {"precision": precision}, **gpu(8, 0)).call
    assert triton_config.input_precision(call) == want


def test_float32_is_what_the_context_says():
    q = np.zeros((1, 1, 8, 8), np.float32)
    call = read.read(q, q, q, None, {}, **gpu(8, 0)).call
    with jax.default_matmul_precision("tensorfloat32"):
        assert triton_config.input_precision(call) == "tf32"
    with jax.default_matmul_precision("highest"):
        assert triton_config.input_precision(call) == "ieee"


# --- lowering without a GPU ---

LOWERED = {
    "grouped, ragged": {"kv_heads": 2, "length": 300, "causal": True},
    "cosine": {"similarity": "cosine", "default_scale": 10.0},
    "terms": {"bias": (1, 4, 256, 1), "relative_bias": (4, 511), "dtype": jnp.float32},
    "shares": {"alibi_slopes": (4,)},
}


@pytest.mark.parametrize("case", LOWERED)
def test_forward_and_backward_lower_for_cuda(case):
    reason = triton_support._lowering_why_not(80)
    if reason is not None:
        pytest.skip(reason)
    from flash_attention_jax._engines import blocked
    from flash_attention_jax.kernels import triton_attention

    options = dict(LOWERED[case])
    length, kv_heads = options.pop("length", 256), options.pop("kv_heads", 4)
    how = {name: options.pop(name) for name in ("similarity", "default_scale") if name in options}
    dtype = options.pop("dtype", jnp.bfloat16)
    arrays = [shape(1, heads, length, 64, dtype=dtype) for heads in (4, kv_heads, kv_heads)]
    terms = {
        name: shape(*x, dtype=jnp.float32) for name, x in options.items() if isinstance(x, tuple)
    }
    static = {name: x for name, x in options.items() if name not in terms}

    def both(q, k, v, terms):
        def forward(q, k, v, terms):
            reading = read.read(q, k, v, None, {**static, **terms}, **how, **gpu(8, 0))
            given = read.arrays(reading.call, reading.given)
            return triton_attention.attend(blocked.attend, reading.call, given)

        out, pull = jax.vjp(forward, q, k, v, terms)
        return out, pull(out)

    lowered = jax.jit(both).trace(*arrays, terms).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") == 3 + len(terms)
