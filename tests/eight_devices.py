"""Claims about 8 devices, for `test_sharding` to run in a process that has so many (virtual ones).

Each way to share a sequence is held against one device, forward and backward, with random
cotangents of out and lse, in float64 so that nothing hides in rounding.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flash_attention_jax import flash_attention, flash_cosine_sim_attention
from flash_attention_jax._engines import partition
from flash_attention_jax.sharding import (
    Placement,
    context_parallel_attention,
    explain_context_parallel,
    ring_attention,
    shard_positions,
    ulysses_attention,
    unzigzag,
    zigzag,
)

B, H, K, T, D = 2, 4, 2, 37, 4
PER_QUERY = ("q", "mask", "bias", "q_segment_ids")


def mesh(explicit=False, **axes):
    devices = np.array(jax.devices()[: np.prod([*axes.values()])]).reshape([*axes.values()])
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def problem(length=T, heads=H, kv_heads=K):
    return {
        "q": normal(B, heads, length, D),
        "k": normal(B, kv_heads, length, D) + np.linspace(-2, 2, length)[:, None],
        "v": normal(B, kv_heads, length, D + 1),
    }


def everything(length=T, heads=H):
    """Every term of the contract, and the static options that go with it."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, (B, length))).astype(np.int32)
    named = problem(length, heads) | {
        "bias": normal(B, heads, length, length),
        "mask": rng.random((B, 1, length, length)) < 0.8,
        "q_segment_ids": ids,
        "kv_segment_ids": ids,
        "kv_lengths": np.array([length - 5, length], np.int32),
        "q_lengths": np.array([length, length - 3], np.int32),
        "q_offset": np.array([0, 2], np.int32),
        "scale": np.abs(normal(heads)),
        "sinks": normal(heads),
        "alibi_slopes": np.abs(normal(heads)),
        "relative_bias": normal(heads, 2 * length - 1),
        "dropout_key": np.array([3, 5], np.uint32),
    }
    return named, {"window": (20, 3), "dropout_rate": 0.3, "softcap": 5.0}


def results(attend, named):
    """Out, lse and the gradient of every float, for random cotangents."""
    floats = {name: x for name, x in named.items() if x.dtype == np.float64}
    others = {name: x for name, x in named.items() if name not in floats}

    def loss(floats):
        out, lse = attend(**floats, **others)
        seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
        total = (out * normal(*out.shape)).sum() + (seen * normal(*lse.shape)).sum()
        return total, (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(floats)
    return {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}


def agree(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-11, atol=1e-12, err_msg=name)


@functools.cache
def on_one_device(length=T, heads=H):
    named, static = everything(length, heads)
    return results(functools.partial(flash_attention, **static, return_lse=True), named)


WAYS = {
    "ring": ({"context": 8}, {}, H),
    "ulysses": ({"context": 4}, {}, H),
    "ring+ulysses": ({"ring": 2, "heads": 4}, {"length_axis": ("ring", "heads")}, H),
    "ring and shared batch and heads": (
        {"data": 2, "model": 2, "context": 2},
        {"batch_axis": "data", "head_axis": "model"},
        H,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_whole_contract_equals_one_device(way):
    axes, options, heads = WAYS[way]
    named, static = everything(heads=heads)
    attend = functools.partial(
        context_parallel_attention,
        mesh=mesh(**axes),
        context_parallel=way.split()[0],
        return_lse=True,
        **options,
        **static,
    )
    agree(results(attend, named), on_one_device(heads=heads))


def test_zigzag_order_equals_one_device():
    length, devices = 32, 4
    named, static = everything(length)

    def attend(**named):
        named = {
            name: zigzag(x, 1 if x.ndim == 2 else 2, devices=devices)
            if name in (*PER_QUERY, "k", "v", "kv_segment_ids")
            else x
            for name, x in named.items()
        }
        pair = context_parallel_attention(
            **named,
            **static,
            mesh=mesh(context=devices),
            context_parallel="ring",
            order="zigzag",
            return_lse=True,
        )
        return tuple(unzigzag(x, 2, devices=devices) for x in pair)

    agree(results(attend, named), on_one_device(length))


def test_cosine_parts_add_to_what_one_device_computes():
    named = problem(length=16) | {"sinks": normal(H)}
    want = results(
        functools.partial(flash_cosine_sim_attention, causal=True, return_lse=True), named
    )
    cut = PartitionSpec(None, None, "context")

    def attend(q, k, v, sinks):
        ring = functools.partial(
            ring_attention,
            axis_name="context",
            similarity="cosine",
            scale=8.0,
            causal=True,
            return_lse=True,
        )
        return jax.shard_map(
            lambda q, k, v, sinks: ring(q, k, v, sinks=sinks),
            mesh=mesh(context=4),
            in_specs=(cut, cut, cut, PartitionSpec()),
            out_specs=(cut, cut),
        )(q, k, v, sinks)

    agree(results(attend, named), want)


def test_queries_and_keys_of_other_lengths_in_the_other_layout():
    named = {"q": normal(B, 13, H, D), "k": normal(B, 22, K, D), "v": normal(B, 22, K, D)}
    options = {"causal": True, "return_lse": True, "q_offset": 9}
    want = results(
        lambda q, k, v: tuple(
            x.swapaxes(1, 2)
            for x in flash_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), **options)
        ),
        named,
    )
    attend = functools.partial(
        context_parallel_attention, mesh=mesh(context=4), layout="heads_last", **options
    )
    agree(results(attend, named), want)


EMPTY = {"no keys": (13, 0), "no queries": (0, 13), "neither": (0, 0)}
INSIDE = {"ring": ring_attention, "ulysses": ulysses_attention}


@functools.cache
def empty(case):
    """A call in which no query sees a key, its options, and what one device makes of it."""
    queries, keys = EMPTY[case]
    named = {
        "q": normal(B, H, queries, D),
        "k": normal(B, K, keys, D),
        "v": normal(B, K, keys, D + 1),
        "bias": normal(B, H, queries, keys),
        "scale": np.abs(normal(H)),
        "alibi_slopes": np.abs(normal(H)),
        "sinks": np.array([-np.inf, 0.5, 1, -2]),
        "kv_lengths": np.array([keys, max(keys - 2, 0)], np.int32),
        "q_segment_ids": np.zeros((B, queries), np.int32),
        "kv_segment_ids": np.zeros((B, keys), np.int32),
        "dropout_key": np.array([3, 5], np.uint32),
    }
    if case != "neither":
        named["relative_bias"] = normal(H, queries + keys - 1)
    options = {"causal": True, "dropout_rate": 0.3, "return_lse": True}
    return named, options, results(functools.partial(flash_attention, **options), named)


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("way", WAYS)
def test_call_without_queries_or_keys_equals_one_device(way, case):
    named, options, want = empty(case)
    axes, where, _ = WAYS[way]
    attend = functools.partial(
        context_parallel_attention,
        mesh=mesh(**axes),
        context_parallel=way.split()[0],
        **where,
        **options,
    )
    agree(results(attend, named), want)


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("way", INSIDE)
def test_call_without_queries_or_keys_inside_shard_map(way, case):
    options = {
        "scale": 5.0,
        "window": (3, 2),
        "return_lse": True,
        "differentiation": "any",
    }
    whole, _, _ = empty(case)
    named = {name: whole[name][:, :, :12] for name in "qkv"} | {"sinks": whole["sinks"]}
    want = results(functools.partial(flash_cosine_sim_attention, **options), named)
    cut = PartitionSpec(None, None, "context")
    of_device = functools.partial(INSIDE[way], axis_name="context", similarity="cosine", **options)

    def attend(q, k, v, sinks):
        return jax.shard_map(
            lambda q, k, v, sinks: of_device(q, k, v, sinks=sinks),
            mesh=mesh(context=4),
            in_specs=(cut, cut, cut, PartitionSpec()),
            out_specs=(cut, cut),
        )(q, k, v, sinks)

    agree(results(attend, named), want)


def test_query_on_an_axis_of_one_device():
    named = {"q": normal(B, H, 1, D), "k": normal(B, K, 9, D), "v": normal(B, K, 9, D)}
    want = results(functools.partial(flash_attention, causal=True, return_lse=True), named)
    attend = functools.partial(
        context_parallel_attention, mesh=mesh(context=1), causal=True, return_lse=True
    )
    agree(results(attend, named), want)


def test_same_input_gives_the_same_bits_on_explicit_axes_too():
    named = problem(length=24)
    attend = functools.partial(
        context_parallel_attention, context_parallel="ring", window=7, return_lse=True
    )
    first, second = (
        results(functools.partial(attend, mesh=mesh(explicit, context=4)), named)
        for explicit in (False, True)
    )
    for name, x in first.items():
        assert (np.asarray(x) == np.asarray(second[name])).all(), name


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize("length", [16, 13])
def test_arrays_that_know_no_mesh_meet_explicit_axes(length, way):
    named = {name: jnp.asarray(x) for name, x in problem(length=length).items()}
    options = {"causal": True, "return_lse": True}

    def found(attend):
        (out, lse), pull = jax.vjp(lambda named: attend(**named, **options), named)
        cotangents = normal(*out.shape), normal(*lse.shape)
        return {"out": out, "lse": lse} | pull(tuple(map(jnp.asarray, cotangents)))[0]

    attend = functools.partial(
        context_parallel_attention, mesh=mesh(True, context=4), context_parallel=way
    )
    agree(found(attend), found(flash_attention))


@pytest.mark.parametrize("explicit", ["context", "data"])
def test_mesh_may_have_axes_of_both_kinds(explicit):
    where = Mesh(
        np.array(jax.devices()).reshape(2, 4),
        ("data", "context"),
        axis_types=tuple(
            AxisType.Explicit if axis == explicit else AxisType.Auto for axis in ("data", "context")
        ),
    )
    named = problem(length=13)
    options = {"causal": True, "return_lse": True}
    attend = functools.partial(
        context_parallel_attention, mesh=where, batch_axis="data", context_parallel="ring"
    )
    want = results(functools.partial(flash_attention, **options), named)
    agree(results(functools.partial(attend, **options), named), want)


def test_forward_mode_goes_through_the_ring():
    named = problem(length=8)
    options = {"differentiation": "any", "causal": True}
    along = {name: normal(*x.shape, 1)[..., 0] for name, x in named.items()}

    def slope(attend):
        return jax.jit(lambda x, dx: jax.jvp(lambda x: attend(**x), (x,), (dx,))[1])(named, along)

    ring = functools.partial(
        context_parallel_attention, mesh=mesh(context=2), context_parallel="ring", **options
    )
    want = slope(functools.partial(flash_attention, **options))
    np.testing.assert_allclose(slope(ring), want, rtol=1e-11, atol=1e-12)


def test_nan_in_keys_that_nobody_sees_stays_where_it_is():
    named = problem(length=24)
    named["k"][:, :, -2:] = np.nan
    named["v"][:, :, -2:] = np.nan
    named["kv_lengths"] = np.array([22, 22], np.int32)
    attend = functools.partial(
        context_parallel_attention,
        mesh=mesh(context=4),
        context_parallel="ring",
        return_lse=True,
    )
    for name, x in results(attend, named).items():
        assert np.isfinite(x).all(), name


def test_positions_follow_the_order():
    cut = PartitionSpec("context")
    for order in ("contiguous", "zigzag"):
        positions = jax.shard_map(
            lambda order=order: shard_positions(4, axis_name="context", order=order),
            mesh=mesh(context=8),
            in_specs=(),
            out_specs=cut,
        )()
        want = np.arange(32) if order == "contiguous" else zigzag(np.arange(32), 0, devices=8)
        assert (np.asarray(positions) == np.asarray(want)).all()


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_flax_layer_on_a_mesh_is_the_layer(order):
    linen = pytest.importorskip("flash_attention_jax.linen")
    x = normal(2, 16, 12)
    layer = linen.Attention(
        dim=12, heads=4, dim_head=4, kv_heads=2, causal=True, rotary=True, param_dtype=jnp.float64
    )
    want, params = layer.init_with_output(jax.random.key(0), x)
    placement = Placement(
        mesh(data=2, context=4), batch_axis="data", context_parallel="ring", order=order
    )
    layer = layer.clone(placement=placement)
    zigzags = order == "zigzag"
    got = layer.apply(params, zigzag(x, 1, devices=4) if zigzags else x)
    got = unzigzag(got, 1, devices=4) if zigzags else got
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_nnx_layer_on_a_mesh_is_the_layer():
    nnx_layer = pytest.importorskip("flash_attention_jax.nnx").Attention
    nnx = pytest.importorskip("flax.nnx")
    x, sizes = normal(2, 16, 12), {"dim": 12, "heads": 4, "dim_head": 4, "param_dtype": jnp.float64}
    placement = Placement(mesh(context=4))
    got, want = (
        nnx_layer(**sizes, placement=where, rngs=nnx.Rngs(0))(x) for where in (placement, None)
    )
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


# --- what is sent ---

KINDS = ("collective-permute", "all-to-all", "all-gather", "all-reduce", "reduce-scatter")


def collectives(function, *args):
    """How often a compiled function runs each collective, loops counted by their trips."""
    text = jax.jit(function).lower(*args).compile().as_text()
    bodies, name = {}, ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
            bodies[name] = []
        bodies.setdefault(name, []).append(line)

    def count(name, times, totals):
        for line in bodies[name]:
            for kind in KINDS:
                if re.search(rf" {kind}(-start)?\(", line):
                    totals[kind] = totals.get(kind, 0) + times
            trips = re.search(r'known_trip_count[^}]*"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|to_apply|calls|computation)=%?([\w.\-]+)", line):
                count(callee, times * int(trips.group(1)) if trips else times, totals)
        return totals

    entry = next(
        line.split()[1].lstrip("%") for line in text.splitlines() if line.startswith("ENTRY")
    )
    return count(entry, 1, {})


SENT = [
    ("ring", {"causal": True}, 8),
    ("ring", {"window": (5, 9)}, 8),
    ("ulysses", {"causal": True}, 8),
    ("ring+ulysses", {"causal": True}, 8),
]


@pytest.mark.parametrize(("way", "options", "heads"), SENT)
def test_collectives_are_those_that_the_formula_says(way, options, heads):
    two = way == "ring+ulysses"
    where = mesh(ring=4, heads=2) if two else mesh(context=8)
    axes = ("ring", "heads") if two else "context"
    options = options | {"mesh": where, "context_parallel": way, "length_axis": axes}
    sharding = NamedSharding(where, PartitionSpec(None, None, axes))
    named = problem(length=32, heads=heads)
    q, k, v = (jax.device_put(named[name], sharding) for name in "qkv")
    said = explain_context_parallel(q, k, v, **options)
    attend = functools.partial(context_parallel_attention, **options)
    assert collectives(attend, q, k, v) == said.forward
    out, pull = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
    assert collectives(lambda pull, dout: pull(dout), pull, out) == said.backward


# --- batch and heads, without any of this ---


def lying(where, length):
    """Shapes of every array of a call, batch over `data` and heads over `model`."""
    named, static = everything(length)
    places = {
        "k": ("data", "model"),
        "v": ("data", "model"),
        "mask": ("data",),
        "relative_bias": ("model",),
        "dropout_key": (),
    }
    places |= dict.fromkeys(("q", "bias"), ("data", "model"))
    places |= dict.fromkeys(("scale", "sinks", "alibi_slopes"), ("model",))
    return {
        name: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(where, PartitionSpec(*places.get(name, ("data",)))),
        )
        for name, x in named.items()
    }, static


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_batch_and_heads_need_no_collective(explicit):
    named, static = lying(mesh(explicit, data=2, model=2), 2048)  # where blocks are cut
    # A gradient of what all batches share is a sum over them, so not of these.
    moving = {name: named.pop(name) for name in ("q", "k", "v", "bias")}

    def attend(moving, named):
        return flash_attention(**moving, **named, **static)

    def gradients(moving, named, dout):
        return jax.vjp(lambda moving: attend(moving, named), moving)[1](dout)[0]

    q, v = moving["q"], moving["v"]
    dout = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype, sharding=q.sharding)
    assert collectives(attend, moving, named) == {}
    assert collectives(gradients, moving, named, dout) == {}


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_batch_and_heads_give_what_one_device_gives(explicit):
    shapes, static = lying(mesh(explicit, data=2, model=2), T)
    named, _ = everything()
    placed = {name: jax.device_put(x, shapes[name].sharding) for name, x in named.items()}
    dout = normal(B, H, T, D + 1)

    @jax.jit
    def found(named, dout):
        floats = {name: x for name, x in named.items() if x.dtype == np.float64}
        others = {name: x for name, x in named.items() if name not in floats}
        out, pull = jax.vjp(lambda floats: flash_attention(**floats, **others, **static), floats)
        return {"out": out} | pull(dout)[0]

    placed_dout = jax.device_put(dout, shapes["q"].sharding)
    agree(found(placed, placed_dout), found(named, dout))


# --- a length or dimension that is cut, without any of this ---

ADVICE = (
    " and is gathered on every device of these axes, which then repeat each other's work. For the "
    "length, use flash_attention_jax.sharding.context_parallel_attention, or a Flax layer's "
    "`placement`: it is a ring. Otherwise cut batch or heads. This is said once."
)
CUT_ALONG = {
    "length": (PartitionSpec(None, None, "context"),) * 3,
    "dimension": (PartitionSpec(None, None, None, "context"),) * 3,
    "length of k alone": (
        PartitionSpec(),
        PartitionSpec(None, None, "context"),
        PartitionSpec(None, None, "context"),
    ),
    "dimension of v alone": (
        PartitionSpec(),
        PartitionSpec(),
        PartitionSpec(None, None, None, "context"),
    ),
    "batch together with length": (PartitionSpec("data", None, "context"),) * 3,
    "each otherwise": (
        PartitionSpec("data", None, "context"),
        PartitionSpec(None, "data", None, "context"),
        PartitionSpec(None, None, ("data", "context")),
    ),
}


@pytest.fixture
def warned(monkeypatch):
    """What is shown while warnings are errors, from a process that has said nothing yet."""
    monkeypatch.setattr(partition, "_warned", [])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        yield shown


def cross(batch=B):
    """Queries and keys of other lengths, that 8 devices divide, and a bias for the whole batch."""
    return {
        "q": normal(batch, H, 16, D),
        "k": normal(batch, K, 24, D),
        "v": normal(batch, K, 24, 8),
        "bias": normal(1, H, 16, 24),
    }


attend_with_lse = functools.partial(flash_attention, causal=True, return_lse=True)


@functools.cache
def cross_on_one_device():
    return results(attend_with_lse, cross())


def cut_along(case):
    where, named = mesh(data=2, context=4), cross()
    for name, spec in zip("qkv", CUT_ALONG[case], strict=True):
        named[name] = jax.device_put(named[name], NamedSharding(where, spec))
    return named


@pytest.mark.parametrize("case", CUT_ALONG)
def test_length_or_dimension_that_is_cut_is_gathered(case, warned):
    agree(results(attend_with_lse, cut_along(case)), cross_on_one_device())
    (said,) = warned
    assert said.category is UserWarning
    first = {"length of k alone": "k", "dimension of v alone": "v"}.get(case, "q")
    what = "dimension" if case.startswith("dimension") else "length"
    assert str(said.message).startswith(f"`{first}` is sharded along its {what}, ")
    assert str(said.message).endswith(ADVICE)


def test_partitioner_before_shardy_gathers_it_too(warned):
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this JAX has no partitioner but Shardy")
    was = jax.config.jax_use_shardy_partitioner
    try:
        jax.config.update("jax_use_shardy_partitioner", False)
        got = results(attend_with_lse, cut_along("batch together with length"))
    finally:
        jax.config.update("jax_use_shardy_partitioner", was)
    agree(got, cross_on_one_device())
    assert len(warned) == 1


def test_cotangent_whose_length_is_cut_is_gathered(warned):
    where = mesh(data=2, context=4)

    def attend(**named):
        out, lse = attend_with_lse(**named)
        spec = PartitionSpec("data", None, "context")
        return jax.lax.with_sharding_constraint(out, NamedSharding(where, spec)), lse

    named = cross()
    named["q"] = jax.device_put(named["q"], NamedSharding(where, PartitionSpec("data")))
    agree(results(attend, named), cross_on_one_device())
    (said,) = warned
    assert str(said.message).startswith("The cotangent of attention's output is sharded along its ")


def test_gathering_is_said_once_however_often_it_is_compiled(warned):
    x = jax.device_put(
        np.zeros((1, 2, 8, 4)),
        NamedSharding(mesh(context=4), PartitionSpec(None, None, "context")),
    )
    for causal in (False, True):
        jax.jit(functools.partial(flash_attention, causal=causal))(x, x, x)
        assert len(warned) == 1


def test_filter_that_ignores_warnings_hides_it(warned):
    x = jax.device_put(
        np.zeros((1, 2, 8, 4)),
        NamedSharding(mesh(context=4), PartitionSpec(None, None, "context")),
    )
    warnings.simplefilter("ignore")
    jax.jit(flash_attention)(x, x, x)
    assert warned == []


def test_batch_that_devices_do_not_divide_adds_nothing_to_sums():
    # Equal shares of the batch of 5 are padded, and 1 / 0 would join the gradient of the bias.
    named, lies = cross(batch=5), NamedSharding(mesh(context=4), PartitionSpec("context"))

    def attend(q, where, **named):
        q, inverse = (where(x) for x in (q, 1 / where(q)))
        return attend_with_lse(inverse, **named)

    got, want = (
        results(functools.partial(attend, where=where), named)
        for where in (lambda x: jax.lax.with_sharding_constraint(x, lies), lambda x: x)
    )
    agree(got, want)


@pytest.mark.parametrize(("axis", "what"), [(2, "length"), (3, "dimension")])
def test_queries_whose_type_says_that_they_are_cut_are_refused(axis, what):
    where = mesh(explicit=True, context=4)
    spec = PartitionSpec(*[None] * axis, "context")
    x = jax.device_put(np.zeros((1, 2, 8, 4)), NamedSharding(where, spec))
    with pytest.raises(
        ValueError, match=f"`q` must not be sharded along its {what}, got"
    ) as raised:
        jax.jit(flash_attention)(x, x, x)
    assert "context_parallel_attention" in str(raised.value)


def test_keys_whose_type_says_that_they_are_cut_are_gathered(warned):
    where, named = mesh(explicit=True, data=2, context=4), cross()
    cut = NamedSharding(where, PartitionSpec(None, None, "context"))
    named = {name: jax.device_put(x, cut if name in "kv" else None) for name, x in named.items()}
    named["q"] = jax.device_put(named["q"], NamedSharding(where, PartitionSpec("data")))
    agree(results(attend_with_lse, named), cross_on_one_device())
    (said,) = warned
    assert str(said.message).startswith("`k` is sharded along its length, ")


@pytest.mark.parametrize(
    ("way", "differentiation"), [("ring", "reverse"), ("ring", "any"), ("ulysses", "any")]
)
def test_queries_that_pad_see_no_nan_either(way, differentiation):
    # The 13 queries are padded by one, which would see one key more.
    queries, keys = 13, 22
    rng = np.random.default_rng(0)
    named = {
        "q": normal(B, H, queries, D),
        "k": normal(B, K, keys, D),
        "v": normal(B, K, keys, D),
        "bias": normal(1, 1, queries, keys),
        "scale": np.abs(normal(H)),
    }
    named["k"][:, :, queries:] = np.where(rng.random((B, K, keys - queries, D)) < 0.5, np.nan, 1)
    named["v"][:, :, queries:] = np.inf
    options = {"causal": True, "q_offset": 0, "return_lse": True}
    want = results(functools.partial(flash_attention, **options), named)
    assert all(np.isfinite(x).all() for x in want.values())
    attend = functools.partial(
        context_parallel_attention,
        mesh=mesh(context=2),
        context_parallel=way,
        differentiation=differentiation,
        **options,
    )
    agree(results(attend, named), want)


@pytest.mark.parametrize("implementation", ["blocked", "checkpointed"])
def test_parts_of_rows_whose_logits_share_an_offset_merge_to_their_mean(implementation):
    # In float32 the lse of each part is then the offset, whatever the number of its keys.
    named = {name: x.astype(np.float32) for name, x in problem(length=16).items()}
    named["q"] *= 0
    offsets = np.resize(np.array([-1e9, 0, 1e9, -3e38], np.float32), 16)
    hidden = {"kv_lengths": np.array([5, 14], np.int32)}

    def found(offsets):
        bias = jnp.broadcast_to(offsets[:, None], (1, 1, 16, 16))
        attend = functools.partial(
            context_parallel_attention,
            mesh=mesh(context=2),
            context_parallel="ring",
            implementation=implementation,
            **hidden,
        )
        floats = {**named, "bias": bias}
        out, pull = jax.vjp(lambda floats: attend(**floats), floats)
        return {"out": out} | pull(normal(*out.shape).astype(np.float32))[0]

    with jax.enable_x64(False):
        compiled = jax.jit(found)
        got, want = compiled(offsets), compiled(offsets * 0)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=2e-6, atol=2e-6, err_msg=name)
