"""Functions exported with symbolic sizes (`jax.export.symbolic_shape`): one program for all sizes.

Each is exported for symbols, goes through bytes, is called with numbers, and must give what the
function itself gives for them, forward and backward.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from flash_attention_jax import (
    dot_product_attention,
    explain,
    flash_attention,
    flash_attention_varlen,
    flash_cosine_sim_attention,
    memory_efficient_attention,
)
from flash_attention_jax._flax.attention_fn import attention_fn

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialise")

TYPES = {"f": jnp.float32, "i": jnp.int32, "m": jnp.bool_}


def split(specification):
    """The specification "f b 2*h n 4; m b n" as ("f", "b, 2*h, n, 4") and ("m", "b, n")."""
    words = [argument.split() for argument in specification.split(";")]
    return [(kind, ", ".join(axes)) for kind, *axes in words]


def symbols(specification):
    """Arguments without values, their sizes in symbols of one new scope."""
    scope = export.SymbolicScope()
    return [
        jax.ShapeDtypeStruct(export.symbolic_shape(axes, scope=scope), TYPES[kind])
        for kind, axes in split(specification)
    ]


def values(specification, sizes):
    """Arguments for numbers in place of the symbols."""
    rng = np.random.default_rng(0)
    found = []
    for kind, axes in split(specification):
        shape = eval(f"({axes},)", {}, sizes)
        x = rng.standard_normal(shape)
        x = {"f": x, "i": np.floor(2 * np.abs(x)), "m": x > -1}[kind]
        found.append(jnp.asarray(x.astype(TYPES[kind])))
    return found


def round_trip(function, specification, vjp_order=0):
    exported = export.export(jax.jit(function))(*symbols(specification))
    return export.deserialize(exported.serialize(vjp_order=vjp_order)).call


def check(function, specification, *all_sizes, gradient=False):
    back = round_trip(function, specification, int(gradient))
    for sizes in all_sizes:
        arguments = values(specification, sizes)
        floats = [x for x in arguments if x.dtype == jnp.float32]
        others = arguments[len(floats) :]

        def results(call, floats=floats, others=others):
            if not gradient:
                return call(*floats, *others)
            out, pull = jax.vjp(lambda *floats: call(*floats, *others), *floats)
            weight = np.random.default_rng(1).standard_normal(out.shape)
            return out, pull(jnp.asarray(weight, out.dtype))

        for got, want in zip(
            *map(jax.tree.leaves, (results(back), results(function))), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


# --- packed sequences ---


def test_symbolic_tokens_and_sequences_of_packed_calls():
    def function(q, k, v, bounds):
        return flash_attention_varlen(q, k, v, bounds, bounds, 7, 7, causal=True)

    back = round_trip(function, "f t 4 4; f t 2 4; f t 2 4; i s")
    for bounds in ([0, 3, 3, 8], [0, 5]):
        q, k, v, _ = values("f t 4 4; f t 2 4; f t 2 4; i s", {"t": 9, "s": len(bounds)})
        starts = jnp.asarray(bounds, jnp.int32)
        want = function(q, k, v, starts)
        np.testing.assert_allclose(back(q, k, v, starts), want, atol=1e-5, rtol=1e-5)


# --- batch and heads ---


def test_symbolic_batch_and_heads_with_gradients():
    def function(q, k, v, bias, kept):
        return flash_attention(q, k, v, kept, bias=bias, causal=True, implementation="blocked")

    specification = "f b 2*h 5 4; f b h 7 4; f b h 7 4; f b 1 5 7; m b 7"
    check(function, specification, {"b": 3, "h": 2}, {"b": 1, "h": 1}, gradient=True)


def test_symbolic_batch_of_the_drop_in_for_jax_nn():
    def function(q, k, v, bias, mask, lengths):
        options = {"key_value_seq_lengths": lengths, "local_window_size": 3, "is_causal": True}
        return dot_product_attention(q, k, v, bias, mask, **options)

    specification = "f b 5 4 4; f b 7 2 4; f b 7 2 3; f b 4 5 7; m b 1 5 7; i b"
    check(function, specification, {"b": 2})


def test_symbolic_heads_of_single_headed_keys():
    def function(q, k, v, slopes, sinks):
        key = jax.random.key(0)
        options = {"dropout_rate": 0.3, "dropout_key": key, "scale": 0.3}
        return flash_attention(q, k, v, alibi_slopes=slopes, sinks=sinks, **options)

    check(function, "f b h 5 4; f b 7 4; f b 7 4; f h; f h", {"b": 2, "h": 3})


def test_symbolic_batch_in_any_mode_of_differentiation():
    def function(q, k, v):
        attend = lambda q: flash_attention(q, k, v, causal=True, differentiation="any")  # noqa: E731
        return jax.jvp(attend, (q,), (v,))[1]

    check(function, "f b 2 5 4; f b 2 5 4; f b 2 5 4", {"b": 2})


# --- lengths ---


def end_aligned(q, k, v):
    return flash_attention(q, k, v, causal=True, window=(3, 0), return_lse=True)


def masked(q, k, v, bias, kept, ids):
    options = {"q_segment_ids": ids, "kv_segment_ids": ids, "bias": bias, "softcap": 3.0}
    return flash_attention(q, k, v, kept, causal=True, **options)


def along_diagonals(q, k, v, relative_bias):
    return flash_attention(q, k, v, relative_bias=relative_bias)


def later_keys(q, k, v):
    return flash_attention(q, k, v, causal=True, q_offset=k.shape[2] - 2)


def cosine(q, k, v, bias, kept):
    return flash_cosine_sim_attention(q, k, v, kept, bias, causal=True)


def as_in_jax_nn(q, k, v, bias, mask, q_lengths):
    return dot_product_attention(
        q, k, v, bias, mask, is_causal=True, query_seq_lengths=q_lengths, similarity="cosine"
    )


def as_in_flax(q, k, v, mask):
    return attention_fn(q, k, v, mask=mask, is_causal=True)


def unbatched(q, k, v):
    return flash_attention(q, k, v, causal=True)


LENGTHS = {
    end_aligned: "f b 2 n 4; f b 2 j 4; f b 2 j 4",
    along_diagonals: "f 2 2 n 4; f 2 2 j 4; f 2 2 j 4; f 2 n+j-1",
    later_keys: "f b 2 n 4; f b 2 j 4; f b 2 j 4",
    cosine: "f b h n 4; f b h n 4; f b h n 3; f h n n; m b n",
    as_in_jax_nn: "f b n 2*h 4; f b n h 4; f b n h 4; f 1 n n; m b 1 n n; i b",
    as_in_flax: "f a b n 2 4; f a b n 2 4; f a b n 2 4; m a b 1 n n",
    unbatched: "f n 4; f n 4; f n 4",
}


@pytest.mark.parametrize("function", LENGTHS)
def test_symbolic_lengths(function):
    check(function, LENGTHS[function], {"a": 2, "b": 2, "h": 2, "n": 5, "j": 7})


def test_symbolic_lengths_with_gradients():
    specification = "f b 2*h n 4; f b h n 4; f b h n 4; f b 1 n n; m b n; i b n"
    check(masked, specification, {"b": 2, "h": 1, "n": 5}, {"b": 1, "h": 2, "n": 1}, gradient=True)


def test_one_query_against_a_symbolic_number_of_keys():
    def function(q, k, v, lengths):
        return flash_attention(q, k, v, causal=True, kv_lengths=lengths, q_offset=lengths - 1)

    check(function, "f b 4 1 4; f b 2 j 4; f b 2 j 4; i b", {"b": 2, "j": 9}, {"b": 1, "j": 1})


def test_symbolic_length_that_may_be_zero():
    check(unbatched, "f n-1 4; f n-1 4; f n-1 4", {"n": 4}, {"n": 1})


def test_concrete_lengths_beside_a_symbolic_one():
    def function(q, k, v):
        return flash_attention(q, k, v, kv_lengths=jnp.array([1, 3], jnp.int32))

    check(function, "f 2 1 n 4; f 2 1 n 4; f 2 1 n 4", {"n": 5})


# --- the choice ---


def test_explain_says_that_a_length_is_symbolic():
    said = explain(*symbols("f b 2 n 4; f b 2 j 4; f b 2 j 4"), platform="cpu")
    assert (said.forward, said.backward) == ("dense", "dense")
    assert said.reasons["blocked"].startswith("its length is symbolic (q_len = n)")
    assert said.reasons["checkpointed"] == said.reasons["blocked"]


def test_explain_keeps_blocks_where_batch_and_heads_alone_are_symbolic():
    q, k, v = symbols("f b h 8 4; f b h 8 4; f b h 8 4")
    assert explain(q, k, v, platform="cpu").forward == "blocked"
    assert explain(q, k, v, platform="cpu", differentiation="any").forward == "checkpointed"
    said = explain(q, k, v, platform="gpu", capability=(9, 0))
    assert said.forward == "blocked"
    assert "batch is symbolic (b)" in said.reasons["triton"]


@pytest.mark.parametrize("name", ["blocked", "checkpointed"])
def test_named_engine_declines_a_symbolic_length(name):
    q, k, v = symbols("f 1 2 n 4; f 1 2 n 4; f 1 2 n 4")
    with pytest.raises(NotImplementedError, match=f"{name}' declines this call: its length is sym"):
        explain(q, k, v, implementation=name)
    with pytest.raises(NotImplementedError, match="its length is symbolic"):
        jax.eval_shape(memory_efficient_attention, q, k, v)


def test_calls_of_two_scopes_are_two_records():
    q, k, v = symbols("f b h 8 4; f b h 8 4; f b h 8 4")
    again = symbols("f b h 8 4; f b h 8 4; f b h 8 4")
    call = explain(q, k, v).call
    assert hash(call) == hash(explain(q, k, v).call)
    assert call == explain(q, k, v).call
    assert call != explain(*again).call
    for _ in range(2):  # the second meets the first in every cache
        check(unbatched, "f b 5 4; f b 5 4; f b 5 4", {"b": 2})


# --- errors ---


def test_heads_that_may_not_divide_are_refused_in_words():
    with pytest.raises(ValueError, match="multiple of the heads of `k`, got h heads and g key"):
        explain(*symbols("f b h 8 4; f b g 8 4; f b g 8 4"))


def test_symbolic_dimension_needs_a_scale():
    q, k, v = symbols("f b 2 8 d; f b 2 8 d; f b 2 8 d")
    with pytest.raises(ValueError, match=r"`scale` must be given where the dimension is symbolic"):
        explain(q, k, v)

    def function(q, k, v):
        return flash_attention(q, k, v, scale=jnp.asarray(q.shape[-1], jnp.float32) ** -0.5)

    check(function, "f b 2 8 d; f b 2 8 d; f b 2 8 d", {"b": 2, "d": 3})
