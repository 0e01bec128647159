"""JAX's transformations, nested: each against the same transformation of the oracle in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flash_attention_jax import dot_product_attention, flash_attention
from flash_attention_jax._api import run
from flash_attention_jax._conformance.subject import QUICK

jit = functools.partial(jax.jit, compiler_options=QUICK)

B, H, T, S, D = 2, 2, 7, 9, 4
BLOCKS = {"block_q": 3, "block_kv": 5}  # neither divides its length


def close(got, want, tolerance=1e-12):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want
    )


@pytest.fixture
def arrays(rng):
    """One call's arrays by name, float64."""
    normal = rng.standard_normal
    return {
        "q": normal((B, H, T, D)),
        "k": normal((B, H, S, D)),
        "v": normal((B, H, S, D)),
        "mask": rng.random((B, H, T, S)) < 0.7,
        "bias": normal((B, H, T, S)),
        "sinks": normal(H),
        "scale": normal(H),
        "q_offset": np.array(3, np.int32),
        "kv_lengths": np.array([S, S - 3], np.int32),
        "q_segment_ids": np.sort(rng.integers(0, 2, (B, T))).astype(np.int32),
        "kv_segment_ids": np.sort(rng.integers(0, 2, (B, S))).astype(np.int32),
    }


WEIGHT = np.random.default_rng(1).standard_normal((B, H, T, D))
ROW_WEIGHT = np.random.default_rng(2).standard_normal((B, H, T))
BASIC = ("q", "k", "v")
RICH = (*BASIC, "bias", "sinks")
OPTIONS = {"causal": True, "softcap": 3.0, **BLOCKS}


def make_loss(implementation, **options):
    """A scalar that depends on all of out and lse, of named arrays."""

    def loss(named):
        out, lse = flash_attention(
            named["q"],
            named["k"],
            named["v"],
            named.get("mask"),
            return_lse=True,
            implementation=implementation,
            **{name: x for name, x in named.items() if name not in (*BASIC, "mask")},
            **options,
        )
        weight, row_weight = (x[: out.shape[0], : out.shape[1]] for x in (WEIGHT, ROW_WEIGHT))
        seen = jnp.isfinite(lse)
        return (out * weight).sum() + jnp.where(
            seen, jnp.where(seen, lse, 0.0) * row_weight, 0.0
        ).sum()

    return loss


def floats(named):
    return {name: x for name, x in named.items() if x.dtype.kind == "f"}


def split_grad(loss):
    """Value and gradient in the float arrays, of a dict of arrays that may hold others."""

    def value_and_grad(named):
        others = {name: x for name, x in named.items() if name not in floats(named)}
        return jax.value_and_grad(lambda moving: loss({**moving, **others}))(floats(named))

    return value_and_grad


# --- vmap ---

MAPPED = [
    ("q",),
    ("k",),
    ("v",),
    ("mask",),
    ("bias",),
    ("kv_lengths",),
    ("q_offset",),
    ("q_segment_ids",),
    ("sinks", "scale"),
    ("q", "k", "v", "mask", "bias", "kv_lengths", "q_offset"),
]


def varied(arrays, mapped, rng, size=3):
    """The arrays, those in `mapped` made `size` times along a new first axis."""
    changed = dict(arrays)
    for name in mapped:
        x = arrays[name]
        if name == "kv_lengths":
            changed[name] = rng.integers(0, S + 1, (size, *x.shape)).astype(np.int32)
        elif name == "q_offset":
            changed[name] = np.arange(-2, 2 * size - 2, 2, np.int32)
        elif name.endswith("ids"):
            changed[name] = rng.integers(0, 2, (size, *x.shape)).astype(np.int32)
        elif x.dtype == bool:
            changed[name] = rng.random((size, *x.shape)) < 0.6
        else:
            changed[name] = rng.standard_normal((size, *x.shape))
    return changed


@pytest.mark.parametrize("mapped", MAPPED, ids="-".join)
def test_vmap_over_any_subset_of_the_arguments(mapped, arrays, rng):
    names = {*BASIC, "mask", "q_offset", *mapped}
    if "q_segment_ids" in mapped:
        names.add("kv_segment_ids")
    named = varied({name: arrays[name] for name in sorted(names)}, mapped, rng)
    axes = {name: 0 if name in mapped else None for name in named}
    options = {"causal": "q_offset" in mapped, **BLOCKS}
    got = jit(jax.vmap(split_grad(make_loss("blocked", **options)), (axes,)))(named)
    dense = jit(split_grad(make_loss("dense", **options)))
    singles = [
        dense({name: x[n] if name in mapped else x for name, x in named.items()}) for n in range(3)
    ]
    close(got, jax.tree.map(lambda *x: np.stack(x), *singles))


def test_vmap_over_the_dropout_key(arrays):
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(implementation, key):
        named = {name: arrays[name] for name in BASIC}
        options = {"dropout_rate": 0.4, "dropout_key": key, **BLOCKS}
        return split_grad(make_loss(implementation, **options))(named)

    got = jit(jax.vmap(functools.partial(loss, "blocked")))(keys)
    dense = jit(functools.partial(loss, "dense"))
    close(got, jax.tree.map(lambda *x: np.stack(x), *map(dense, keys)))


def test_nested_vmap(arrays, rng):
    qs, ks = rng.standard_normal((2, B, H, T, D)), rng.standard_normal((3, B, H, S, D))

    def both(implementation):
        grad = split_grad(make_loss(implementation, causal=True, **BLOCKS))

        def one(q, k):
            return grad({"q": q, "k": k, "v": arrays["v"]})

        return jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(qs, ks)

    close(both("blocked"), both("dense"))


def test_grad_of_vmap(arrays):
    def both(implementation):
        def one(q, k, v):
            return flash_attention(q, k, v, causal=True, implementation=implementation, **BLOCKS)

        def loss(q, k, v):
            return (jax.vmap(jax.vmap(one))(q, k, v) * WEIGHT).sum()

        return jit(jax.grad(loss, (0, 1, 2)))(*(arrays[name] for name in BASIC))

    close(both("blocked"), both("dense"))


def test_vmap_of_checkpointed_in_forward_mode(arrays, rng):
    mask = rng.random((3, B, H, T, S)) < 0.6

    def both(implementation):
        def tangent(mask):
            loss = make_loss(implementation, differentiation="any", **BLOCKS)

            def of_q(q):
                return loss({"q": q, "k": arrays["k"], "v": arrays["v"], "mask": mask})

            return jax.jvp(of_q, (arrays["q"],), (arrays["q"] * 0.5,))

        return jit(jax.vmap(tangent))(mask)

    close(both("checkpointed"), both("dense"))


# --- control flow and compilation ---


def test_remat(arrays):
    named = {name: arrays[name] for name in RICH}
    got = jit(split_grad(jax.checkpoint(make_loss("blocked", **OPTIONS))))(named)
    close(got, jit(split_grad(make_loss("dense", **OPTIONS)))(named))


def test_scan_over_layers(arrays):
    def both(implementation):
        def layer(x, k):
            return x + flash_attention(x, k, k, implementation=implementation, **BLOCKS), None

        def loss(x, keys):
            return (lax.scan(layer, x, keys)[0] * WEIGHT).sum()

        return jit(jax.grad(loss, (0, 1)))(arrays["q"], np.stack([arrays["k"], arrays["v"]]))

    close(both("blocked"), both("dense"))


def test_without_jit(arrays):
    named = {name: arrays[name] for name in RICH}
    got = make_loss("blocked", **OPTIONS)(named)
    close(got, make_loss("dense", **OPTIONS)(named))


@pytest.mark.parametrize("implementation", ["blocked", "checkpointed"])
def test_block_sizes_change_rounding_and_nothing_else(implementation, arrays):
    loss = make_loss("dense", causal=True)
    want = loss(arrays)
    for block_q, block_kv in ((1, 1), (2, 9), (7, 2), (64, 64)):
        loss = make_loss(implementation, causal=True, block_q=block_q, block_kv=block_kv)
        close(jit(loss)(arrays), want)


def test_calls_of_the_same_shapes_are_traced_once(arrays):
    call = functools.partial(flash_attention, causal=True, block_q=2, block_kv=3)

    def grad(*basic):
        return jax.grad(lambda *x: (call(*x) * WEIGHT).sum(), (0, 1, 2))(*basic)

    basic = [arrays[name] for name in BASIC]
    call(*basic)
    grad(*basic)
    before = run._run._cache_size()
    for factor in (2.0, 3.0):
        call(*(factor * x for x in basic))
        grad(*(factor * x for x in basic))
    assert run._run._cache_size() == before


def test_export(arrays):
    def out(q, k, v):
        return flash_attention(q, k, v, causal=True, **BLOCKS)

    basic = [arrays[name] for name in BASIC]
    exported = export.export(jax.jit(out))(*basic)
    close(exported.call(*basic), out(*basic), 0)


def test_export_round_trip_through_bytes_with_its_gradient(arrays):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialise")

    def out(q, k, v):
        return flash_attention(q, k, v, causal=True, **BLOCKS)

    basic = [arrays[name] for name in BASIC]
    back = export.deserialize(export.export(jax.jit(out))(*basic).serialize(vjp_order=1))
    close(back.call(*basic), out(*basic), 0)
    got = jax.grad(lambda *x: (back.call(*x) * WEIGHT).sum(), (0, 1, 2))(*basic)
    want = jax.grad(lambda *x: (out(*x) * WEIGHT).sum(), (0, 1, 2))(*basic)
    close(got, want)


# --- several devices ---


def mesh(**axes):
    return Mesh(
        np.array(jax.devices()[: np.prod([*axes.values()])]).reshape([*axes.values()]), [*axes]
    )


SPECS = {"batch": PartitionSpec("x"), "heads": PartitionSpec(None, "x")}


@pytest.mark.parametrize("over", ["batch", "heads"])
@pytest.mark.parametrize("implementation", ["blocked", "checkpointed"])
def test_shard_map(over, implementation, arrays):
    named = {name: arrays[name] for name in (*BASIC, "bias")}
    spec = SPECS[over]

    def out(implementation, named):
        return flash_attention(**named, causal=True, implementation=implementation, **BLOCKS)

    sharded = jax.shard_map(
        functools.partial(out, implementation), mesh=mesh(x=2), in_specs=(spec,), out_specs=spec
    )
    got = jit(jax.grad(lambda named: (sharded(named) * WEIGHT).sum()))(named)
    want = jit(jax.grad(lambda named: (out("dense", named) * WEIGHT).sum()))(named)
    close(got, want)


def test_shard_map_with_queries_sharded_and_keys_shared(arrays):
    # What varies between devices and what does not then meet inside the loops.
    basic = [arrays[name] for name in BASIC]
    over_queries = PartitionSpec(None, None, "x")

    def out(q, k, v):
        return flash_attention(q, k, v, **BLOCKS)

    sharded = jax.shard_map(
        out,
        mesh=mesh(x=2),
        in_specs=(over_queries, PartitionSpec(), PartitionSpec()),
        out_specs=over_queries,
    )
    basic[0] = basic[0][:, :, : T // 2 * 2]
    weight = WEIGHT[:, :, : T // 2 * 2]
    got = jit(jax.grad(lambda *x: (sharded(*x) * weight).sum(), (0, 1, 2)))(*basic)
    close(got, jit(jax.grad(lambda *x: (out(*x) * weight).sum(), (0, 1, 2)))(*basic))


def test_pmap(arrays):
    basic = [arrays[name] for name in BASIC]

    def grad(implementation, q, k, v, weight):
        def loss(q, k, v):
            out = flash_attention(q, k, v, causal=True, implementation=implementation, **BLOCKS)
            return (out * weight).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    got = jax.pmap(functools.partial(grad, "blocked"))(*basic, WEIGHT)
    close(got, jax.vmap(functools.partial(grad, "dense"))(*basic, WEIGHT))


def test_jit_of_sharded_arrays(arrays):
    named = {name: arrays[name] for name in RICH}
    sharding = NamedSharding(mesh(x=2, y=2), PartitionSpec("x", "y"))
    placed = {name: jax.device_put(x, sharding) if x.ndim == 4 else x for name, x in named.items()}
    got = jit(split_grad(make_loss("blocked", **OPTIONS)))(placed)
    close(got, jit(split_grad(make_loss("dense", **OPTIONS)))(named))


# --- other modes and orders of differentiation ---


def directions(named, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(x.shape) for name, x in named.items()}


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def reverse_over_reverse(loss):
    """Gradient of the slope along a direction: every second derivative takes part."""
    return lambda named, along: jax.grad(lambda x: inner(jax.grad(loss)(x), along))(named)


@pytest.mark.parametrize("implementation", ["blocked", "checkpointed"])
def test_grad_of_grad_with_every_term(implementation, arrays):
    named = {name: arrays[name] for name in RICH}
    along = directions(named)
    got = jit(reverse_over_reverse(make_loss(implementation, **OPTIONS)))(named, along)
    close(got, jit(reverse_over_reverse(make_loss("dense", **OPTIONS)))(named, along), 1e-11)


def test_grad_of_grad_with_masks_dropout_and_shared_heads(arrays):
    named = {"q": arrays["q"], "k": arrays["k"][:, :1], "v": arrays["v"][:, :1]}
    options = {
        "mask": jnp.asarray(arrays["mask"]),
        "kv_lengths": arrays["kv_lengths"],
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(1),
        **BLOCKS,
    }

    def second(implementation):
        mask = options["mask"]
        rest = {name: x for name, x in options.items() if name != "mask"}
        loss = make_loss(implementation, **rest)
        return jit(reverse_over_reverse(lambda x: loss({**x, "mask": mask})))(
            named, directions(named)
        )

    close(second("blocked"), second("dense"), 1e-11)


def test_grad_of_grad_of_cosine_with_a_learned_scale(arrays):
    named = {name: arrays[name].swapaxes(1, 2) for name in BASIC} | {"scale": arrays["scale"]}

    def second(implementation):
        def loss(named):
            out = dot_product_attention(
                named["q"],
                named["k"],
                named["v"],
                scale=named["scale"],
                similarity="cosine",
                implementation=implementation,
                **BLOCKS,
            )
            return (out * WEIGHT.swapaxes(1, 2)).sum()

        return jit(reverse_over_reverse(loss))(named, directions(named))

    close(second("blocked"), second("dense"), 1e-11)


@pytest.mark.slow
def test_third_order_through_the_custom_rule(arrays):
    named = {name: arrays[name] for name in BASIC}
    first, second = directions(named, 1), directions(named, 2)

    def third(implementation):
        loss = make_loss(implementation, causal=True, **BLOCKS)

        def slope(x):
            return inner(jax.grad(loss)(x), first)

        return jit(jax.grad(lambda x: inner(jax.grad(slope)(x), second)))(named)

    close(third("blocked"), third("dense"), 1e-10)


def test_jvp_in_every_array(arrays):
    named = {name: arrays[name] for name in RICH}
    options = {"differentiation": "any", **OPTIONS}

    def tangent(implementation):
        loss = make_loss(implementation, **options)
        return jit(lambda x, dx: jax.jvp(loss, (x,), (dx,)))(named, directions(named))

    close(tangent("checkpointed"), tangent("dense"))


def test_any_chooses_the_engine_that_can(arrays):
    basic = tuple(arrays[name] for name in BASIC)
    f = functools.partial(flash_attention, differentiation="any", **BLOCKS)
    got = jax.jvp(f, basic, basic)
    close(got, jax.jvp(functools.partial(flash_attention, implementation="dense"), basic, basic))


def test_forward_over_reverse_and_hessian(arrays):
    named = {name: arrays[name] for name in BASIC}
    q = named["q"][:1, :1, :3]
    k, v = named["k"][:1, :1], named["v"][:1, :1]

    def hessian(implementation, mode):
        def of_q(q):
            out = flash_attention(
                q, k, v, implementation=implementation, differentiation="any", **BLOCKS
            )
            return (out**2).sum()

        return jit(mode(of_q))(q)

    want = hessian("dense", lambda f: jax.jacrev(jax.jacrev(f)))
    close(hessian("checkpointed", jax.hessian), want)  # forward over reverse
    close(
        hessian("checkpointed", lambda f: jax.jacrev(jax.jacfwd(f))), want
    )  # reverse over forward


def test_linearize_and_transpose_of_the_custom_rule(arrays):
    basic = tuple(arrays[name] for name in BASIC)
    f = functools.partial(flash_attention, causal=True, **BLOCKS)
    _, tangent = jax.linearize(f, *basic)
    got = jax.linear_transpose(tangent, *basic)(jnp.asarray(WEIGHT))
    dense = functools.partial(flash_attention, causal=True, implementation="dense")
    close(got, jax.vjp(dense, *basic)[1](WEIGHT))


def test_linearize_in_forward_mode(arrays):
    basic = tuple(arrays[name] for name in BASIC)
    out, tangent = jax.linearize(
        functools.partial(flash_attention, differentiation="any", **BLOCKS), *basic
    )
    dense = functools.partial(flash_attention, implementation="dense")
    want = jax.jvp(dense, basic, basic)
    close((out, tangent(*basic)), want)


def test_gradient_of_a_constant_bias_is_not_computed(arrays):
    basic = [arrays[name] for name in (*BASIC, "bias")]

    def products(argnums):
        def loss(q, k, v, bias):
            return (flash_attention(q, k, v, bias=bias, **BLOCKS) * WEIGHT).sum()

        return jax.jit(jax.grad(loss, argnums)).lower(*basic).compile().as_text().count(" dot(")

    assert products((0, 1, 2)) < products((0, 1, 2, 3))


def test_checkpoint_gives_each_gradient_whatever_was_asked_before(arrays):
    basic = [arrays[name] for name in BASIC]

    def gradients(argnums, **options):
        def loss(*x):
            return (flash_attention(*x, **BLOCKS, **options) * WEIGHT).sum()

        return jax.grad(loss if options else jax.checkpoint(loss), argnums)(*basic)

    for argnums in ((0,), (0, 2), (1,), (0, 1, 2), (2,)):
        close(gradients(argnums), gradients(argnums, implementation="dense"))
