"""The Triton kernels themselves, interpreted on the CPU: the whole conformance suite, and `vmap`.

Triton decides when it is imported whether it interprets, so these run in a process of their own:
`make test-triton` builds what they need and runs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax
from flash_attention_jax import flash_attention, flash_cosine_sim_attention
from flash_attention_jax._api import read
from flash_attention_jax._conformance.subject import QUICK, difference
from flash_attention_jax._core import platform
from flash_attention_jax._engines import dense
from flash_attention_jax.kernels import triton_support
from flash_attention_jax.testing import CLAIMS, Subject, check

missing = triton_support._interpreter_why_not()
pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"{missing}"),
    # NumPy, which computes for the interpreter, warns of NaN and infinities that are then hidden.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DECLINED = {
    "an axis of size 0": "nothing to compute",
    "a wide dtype": "computes in bfloat16, float16 and float32, and this call is float64",
}
"""What the kernels decline, by the words of the reason: everything else has to pass."""


@pytest.fixture(autouse=True)
def interpreted():
    with platform.interpreted():
        yield


def passes(claim, dtype):
    tried = Subject(
        flash_attention_jax.dot_product_attention,
        dtype=dtype,
        fixed={"implementation": "triton"},
        compiler_options=QUICK,
    )
    outcome, why = check(claim, tried)
    if outcome == "not offered":
        assert any(words in why for words in DECLINED.values()), why
    else:
        assert (outcome, why) == ("passed", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("claim", [pytest.param(claim, id=claim.name) for claim in CLAIMS])
def test_claim_holds_in_the_kernels_or_they_decline(claim, dtype):
    passes(claim, dtype)


# --- what the claims do not ask ---


def gradients(function, *arrays):
    """Out, lse and every gradient under cotangents that depend on the position."""
    (out, lse), pull = jax.vjp(function, *arrays)
    weights = [jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (out, lse)]
    return [out, lse, *pull(tuple(weights))]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def close(have, want, tolerance=2e-5):
    for pair in zip(have, want, strict=True):
        x, y = (np.asarray(x, np.float64) for x in pair)
        assert difference(x, y) <= tolerance * max(1.0, np.abs(y[np.isfinite(y)]).max())


SEVERAL = {
    "dot": (flash_attention, {"causal": True}),
    "window": (flash_attention, {"causal": True, "window": (20, None)}),
    "cosine": (flash_cosine_sim_attention, {"causal": True}),
    "ragged": (flash_attention, {}),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_kernels_agree_with_the_formula_over_several_blocks(case):
    function, options = SEVERAL[case]
    n, m = (71, 83) if case == "ragged" else (64, 64)  # whole blocks go without a mask
    q, k, v = normal(0, 1, 2, n, 24), normal(1, 1, 1, m, 24), normal(2, 1, 1, m, 40)

    def run(implementation):
        def attend(q, k, v):
            return function(q, k, v, return_lse=True, implementation=implementation, **options)

        both = jax.jit(lambda q, k, v: gradients(attend, q, k, v), compiler_options=QUICK)
        return both(q, k, v)

    close(run("triton"), run("dense"))


VMAPPED = {
    "all": ({"q", "k", "v"}, {}),
    "bias of each, keys of all": ({"q", "bias"}, {"bias": (1, 2, 17, 1)}),
    "bias of all": ({"q", "k", "v"}, {"bias": (1, 1, 17, 19)}),
    "slopes of each": ({"q", "k", "v", "alibi_slopes"}, {"alibi_slopes": (2,)}),
    "dropout": ({"q", "k", "v"}, {"dropout_rate": 0.3}),
}
"""What differs between examples, and the options: folded into the batch, or one after another."""


@pytest.mark.parametrize("case", VMAPPED)
def test_vmap_is_that_of_the_formula(case):
    mapped, options = VMAPPED[case]
    shapes, static = {"q": (1, 2, 17, 8), "k": (1, 1, 19, 8), "v": (1, 1, 19, 8)}, {}
    if case == "dropout":
        static = options | {"dropout_key": jax.random.key(5)}
    else:
        shapes |= options
    arrays = {
        name: normal(seed, *((2,) if name in mapped else ()), *shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }

    def run(implementation):
        def one(given):
            def function(given):
                return flash_attention(
                    **given, **static, return_lse=True, implementation=implementation
                )

            return gradients(function, given)

        axes = ({name: 0 if name in mapped else None for name in arrays},)
        together = jax.jit(jax.vmap(one, in_axes=axes), compiler_options=QUICK)
        return jax.tree.leaves(together(arrays))

    close(run("triton"), run("dense"))


def test_second_derivative_is_that_of_the_reference():
    q = normal(0, 1, 1, 20, 8)

    def twice(implementation):
        def loss(q):
            return jnp.sin(
                flash_attention(q, q, q, causal=True, implementation=implementation)
            ).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(q)

    close([twice("triton")], [twice("blocked")])


@pytest.mark.parametrize("origin", [None, (6, 1, 3, 5, 2)], ids=["whole", "part"])
def test_dropout_keeps_what_the_reference_keeps(origin):
    # Equal logits, and values that are unit vectors: the output shows which keys were kept.
    q, k = jnp.zeros((2, 2, 19, 8), jnp.float32), jnp.zeros((2, 2, 24, 8), jnp.float32)
    v = jnp.broadcast_to(jnp.eye(24, dtype=jnp.float32), (2, 2, 24, 24))
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(7)}
    reading = read.read(q, k, v, None, options)
    arrays = read.arrays(reading.call, reading.given)
    if origin is not None:
        arrays = arrays._replace(dropout_origin=jnp.array(origin, jnp.int32))
    from flash_attention_jax.kernels import triton_attention

    out = triton_attention.attend(dense.attend, reading.call, arrays).out
    want = dense.attend(reading.call, arrays).out
    assert np.array_equal(np.asarray(out) != 0, np.asarray(want) != 0)
    assert 0.5 < (np.asarray(out) != 0).mean() < 0.7
