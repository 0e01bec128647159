"""Attention over the devices of a mesh: sequences that outgrow one device.

Batch and heads need nothing of this module: every function of the library keeps them sharded under
`jax.jit` and inside `jax.shard_map`. Where a length is cut, devices have to exchange keys:

* `ring_attention` passes keys and values round (any number of heads, any window),
* `ulysses_attention` shares the heads out for the time of the attention (as many heads as devices),
* `context_parallel_attention` takes whole arrays and a mesh, and chooses.

What they compute is what `flash_attention` computes on one device, with the same options, up to
rounding; dropout has the same bits. Memory on each device is linear in its own part of the length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flash_attention_jax._api import read
from flash_attention_jax._api.options import JAX_NAMES, Options
from flash_attention_jax._api.run import check_implementation, check_names
from flash_attention_jax._core import check
from flash_attention_jax._core.call import DIFFERENTIABLE, ROLES, Arrays, Call, roles
from flash_attention_jax._core.types import ArrayLike
from flash_attention_jax._parallel import context
from flash_attention_jax._parallel.context import Plan
from flash_attention_jax._parallel.local import axis_size, read_local
from flash_attention_jax._parallel.order import shard_positions, unzigzag, zigzag

__all__ = [
    "Placement",
    "Plan",
    "context_parallel_attention",
    "explain_context_parallel",
    "ring_attention",
    "shard_positions",
    "ulysses_attention",
    "unzigzag",
    "zigzag",
]


class SimilarityOptions(Options, total=False):
    """The options of `flash_attention`, and which similarity and order of axes."""

    similarity: str
    groups: int
    l2norm_qk: bool
    layout: str


OWN = ("similarity", "groups", "l2norm_qk", "layout")


def _fixed(function: str, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks the names; what `read` takes as options, and what as arguments of its own."""
    own = {name: options[name] for name in OWN if name in options}
    rest = {name: x for name, x in options.items() if name not in OWN}
    check_names(function, rest, {})
    check_implementation(rest.get("implementation"))
    check.flag("return_lse", rest.get("return_lse", False))
    layout, similarity = own.get("layout", "heads_first"), own.get("similarity", "dot")
    check.choice("layout", layout, ("heads_first", "heads_last"))
    check.choice("similarity", similarity, ("dot", "cosine"))
    return rest, {
        "layout": layout,
        "similarity": similarity,
        "groups": own.get("groups", 1),
        "l2norm": own.get("l2norm_qk", True),
    }


def _inside(
    function: str,
    arrays: tuple[Any, Any, Any, Any],
    options: Any,
    way: str,
    axes: tuple[str, ...],
    order: str,
    batch_axis: str | None,
    head_axis: str | None,
) -> Any:
    """Runs a function inside `shard_map`."""
    rest, fixed = _fixed(function, options)
    sizes = [axis_size("axis_name", axis) for axis in axes]
    for name, axis in (("batch_axis", batch_axis), ("head_axis", head_axis)):
        if axis is not None:
            axis_size(name, axis)
    local = read_local(*arrays, rest, sizes[0], **fixed)
    context.check_order(order, local.call, sizes[0])
    chosen = context.plan(local.call, (sizes[0], 0), way, order)
    found = context.with_origin(local.call, local.arrays, batch_axis, head_axis)
    out, lse = context.attend(local.call, found, chosen, axes, rest.get("implementation"))
    out, lse = out.reshape(local.out_shape), lse.reshape(local.lse_shape)
    return (out, lse) if rest.get("return_lse", False) else out


def ring_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    axis_name: str,
    order: str = "contiguous",
    batch_axis: str | None = None,
    head_axis: str | None = None,
    **options: Unpack[SimilarityOptions],
) -> Any:
    """`flash_attention` of a sequence that is cut over a mesh axis; inside `jax.shard_map`.

    Queries stay, keys and values go round the devices while each computes with those it has; what
    a window cannot see is not sent. Out and its gradients are those of one device up to rounding,
    and the same for every run. Memory on each device grows with its part of the length.

    n devices; b batch, h heads, t queries and s keys of one device.

    Args:
        q: The device's queries, (b, h, t, d) or the other ranks of `flash_attention`.
        k: Its keys, (b, hk, s, d).
        v: Its values, (b, hk, s, e).
        mask: Its rows of the mask, whole along the keys: (b, h, t, n * s), an axis may be 1, or
            (b, n * s).
        axis_name: The mesh axis along which the sequence is cut.
        order: "contiguous", or "zigzag" for arrays in the order of `zigzag`, which shares causal
            work equally. Keys of a mask, bias or relative bias are in their natural order always.
        batch_axis: The mesh axis along which the batch is cut, for dropout's bits; None = not cut,
            or no matter.
        head_axis: That along which the heads are cut.
        **options: Those of `flash_attention`. What belongs to a token is the device's own:
            q_segment_ids (b, t), kv_segment_ids (b, s), q_offset (b, t); a bias is (b, h, t, n * s)
            with ones. The rest speaks of the whole: q_lengths and kv_lengths count its tokens,
            relative_bias has n * (t + s) - 1 entries, causal and windows are about its diagonal.
            Besides, similarity ("dot", or "cosine" with default scale 10), groups, l2norm_qk, and
            layout ("heads_first", or "heads_last" for the axes of `dot_product_attention`).

    Returns:
        The device's out, (b, h, t, e); with return_lse, (out, lse).

    Raises:
        ValueError: If `axis_name` is no manual mesh axis here, the length does not fit the order,
            or as `flash_attention` does.
        TypeError: As `flash_attention` does.
        NotImplementedError: The implementation asked for by name cannot run this call.

    Example:
        >>> import functools, jax
        >>> from flash_attention_jax import flash_attention
        >>> from flash_attention_jax.sharding import ring_attention
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("context",))
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 16, 8), "float32")
        >>> cut = jax.sharding.PartitionSpec(None, None, "context")
        >>> ring = functools.partial(ring_attention, axis_name="context", causal=True)
        >>> out = jax.shard_map(ring, mesh=mesh, in_specs=cut, out_specs=cut)(q, k, v)
        >>> bool(jax.numpy.allclose(out, flash_attention(q, k, v, causal=True), atol=1e-5))
        True

    References:
        Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite
        Context", arXiv:2310.01889.
    """
    arrays = (q, k, v, mask)
    return _inside(
        "ring_attention", arrays, options, "ring", (axis_name,), order, batch_axis, head_axis
    )


def ulysses_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    axis_name: str,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    **options: Unpack[SimilarityOptions],
) -> Any:
    """As `ring_attention`, by all-to-all: every device attends with some heads to all tokens.

    The heads of q are a multiple of the devices. Key heads may be fewer: each device then receives
    the one that its queries read. What a device sends does not grow with the number of devices, and
    any engine and kernel runs; nothing is computed meanwhile.

    Args:
        q: The device's queries, as in `ring_attention`.
        k: Its keys.
        v: Its values.
        mask: Its rows of the mask.
        axis_name: The mesh axis along which the sequence is cut.
        batch_axis: As in `ring_attention`.
        head_axis: As in `ring_attention`.
        **options: As in `ring_attention`.

    Returns:
        The device's out, (b, h, t, e); with return_lse, (out, lse).

    Raises:
        ValueError: If the heads are no multiple of the devices, or as `ring_attention` does.
        TypeError: As `flash_attention` does.
        NotImplementedError: The implementation asked for by name cannot run this call.

    Example:
        >>> import functools, jax
        >>> from flash_attention_jax import flash_attention
        >>> from flash_attention_jax.sharding import ulysses_attention
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("context",))
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 16, 8), "float32")
        >>> cut = jax.sharding.PartitionSpec(None, None, "context")
        >>> ulysses = functools.partial(ulysses_attention, axis_name="context", causal=True)
        >>> out = jax.shard_map(ulysses, mesh=mesh, in_specs=cut, out_specs=cut)(q, k, v)
        >>> bool(jax.numpy.allclose(out, flash_attention(q, k, v, causal=True), atol=1e-5))
        True

    References:
        Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509.
    """
    arrays = (q, k, v, mask)
    axes = (axis_name,)
    return _inside(
        "ulysses_attention", arrays, options, "ulysses", axes, "contiguous", batch_axis, head_axis
    )


# --- whole arrays and a mesh ---


def _resharding(mesh: Any) -> Any:
    """What brings an array into place where JAX leaves that to us: along a mesh's explicit axes."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    explicit = {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    }
    if not explicit:
        return lambda x, spec: x  # shard_map does

    def place(x: Any, spec: PartitionSpec) -> Any:
        """The array with its explicit axes as a spec says; shard_map sees to the others."""
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
        named = (tuple(axis for axis in entry if axis in explicit) or None for entry in entries)
        return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, PartitionSpec(*named)))

    return place


def _entered(name: str, x: Any, place: Any) -> Any:
    """An array with a gradient, on the mesh before it is padded or cut.

    The gradient of an array whose type knows no mesh would come back cut along the padded length,
    from which JAX cannot take the padding away.
    """
    if name not in DIFFERENTIABLE:
        return x
    x = jnp.asarray(x)
    return place(x, PartitionSpec(*[None] * x.ndim)) if jax.typeof(x).sharding.mesh.empty else x


def _sizes(mesh: Any) -> Mapping[str, int]:
    """Axes of a mesh, of the one that `jax.set_mesh` made current, or sizes as they are."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.shape:
            advice = "Pass one, or call inside jax.set_mesh(mesh)."
            check.fail("mesh", "be a jax.sharding.Mesh", "None, and none is set", advice)
    shape = getattr(mesh, "shape", None)
    if not isinstance(shape, Mapping):
        advice = "jax.make_mesh makes one."
        check.fail("mesh", "be a jax.sharding.Mesh", check.shown(mesh), advice, TypeError)
    return shape


def _axes(
    sizes: Mapping[str, int], length_axis: Any, batch_axis: Any, head_axis: Any
) -> tuple[str, ...]:
    """The mesh axes of the length; checks all of them."""
    length = (length_axis,) if isinstance(length_axis, str) else length_axis
    if not isinstance(length, tuple) or len(length) not in (1, 2):
        advice = "Pass 'context', say, or ('ring', 'heads')."
        got = check.shown(length_axis)
        check.fail("length_axis", "be one mesh axis or two", got, advice, TypeError)
    named = [("length_axis", axis) for axis in length]
    named += [(n, a) for n, a in (("batch_axis", batch_axis), ("head_axis", head_axis)) if a]
    for name, axis in named:
        if axis not in sizes:
            advice = "Name one of its axes."
            check.fail(name, f"be an axis of the mesh {dict(sizes)}", repr(axis), advice)
    taken = [axis for _, axis in named]
    if len(set(taken)) < len(taken):
        got, advice = ", ".join(map(repr, taken)), "An axis cuts one thing."
        check.fail("length_axis`, `batch_axis` and `head_axis", "differ", got, advice)
    return length


def _prepared(
    function: str,
    arrays: tuple[Any, Any, Any, Any],
    options: Any,
    mesh: Any,
    axes: tuple[Any, Any, Any],
    context_parallel: str,
    order: str,
) -> tuple[read.Reading, Call, Plan, tuple[str, ...]]:
    """Reads a call on whole arrays: what was read, one device's record of the whole, the plan."""
    rest, fixed = _fixed(function, options)
    check.choice("context_parallel", context_parallel, context.WAYS)
    sizes = _sizes(mesh)
    length, batch_axis, head_axis = _axes(sizes, *axes), axes[1], axes[2]
    reading = read.read(*arrays, rest, **fixed)
    call = reading.call
    shares = {"batch": batch_axis, "heads": head_axis, "kv_heads": head_axis}
    for field, axis in shares.items():
        count = getattr(call, field)
        if axis is not None and count % sizes[axis]:
            what = {"batch": "batch", "heads": "heads of q", "kv_heads": "heads of k"}[field]
            got = f"{count} over {sizes[axis]} devices of {axis!r}"
            name = "head_axis" if axis == head_axis else "batch_axis"
            check.fail(name, f"divide the {what}", got, "Use a smaller axis, or None.")
    devices = [sizes[axis] for axis in length]
    context.check_order(order, call, devices[0])
    own = {
        field: getattr(call, field) // (sizes[axis] if axis else 1)
        for field, axis in shares.items()
    }
    multiple = math.prod(devices)
    lengths = {name: -(-getattr(call, name) // multiple) * multiple for name in ("q_len", "k_len")}
    one = dataclasses.replace(call, **own, **lengths)
    pair = (devices[0], devices[1]) if len(devices) == 2 else (devices[0], 0)
    return reading, one, context.plan(one, pair, context_parallel, order), length


def _spec(name: str, x: Any, call: Call, cut: dict[str, Any]) -> PartitionSpec:
    """How an array of a call lies on the mesh; a term's axis of size 1 is the same everywhere."""
    places = dict(cut)
    if name in ("mask", "bias"):
        places.pop("j")
    axes = zip(roles(call.layout, name), x.shape, strict=True)
    return PartitionSpec(
        *(places.get(letter) if size != 1 or name in ROLES else None for letter, size in axes)
    )


def context_parallel_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    mesh: Any = None,
    length_axis: str | tuple[str, str] = "context",
    batch_axis: str | None = None,
    head_axis: str | None = None,
    context_parallel: str = "auto",
    order: str = "contiguous",
    **options: Unpack[SimilarityOptions],
) -> Any:
    """`flash_attention` on a mesh: the length over one axis or two, batch and heads over others.

    Takes the whole arrays as `flash_attention` does, inside `jax.jit` or not, and does the rest:
    lengths that the devices do not divide are padded, and the padding hidden.

    Args:
        q: Queries, as in `flash_attention`.
        k: Keys.
        v: Values.
        mask: As in `flash_attention`.
        mesh: A `jax.sharding.Mesh`; None = the one of `jax.set_mesh`. Its axes may be automatic,
            explicit or both. On explicit ones `jax.grad` outside `jax.jit` needs `jax.set_mesh`, as
            it does for any function of JAX.
        length_axis: The mesh axis along which the length is cut; or two, (ring, heads): a ring over
            the first, and the heads shared over the second, which is the inner one of the length.
        batch_axis: The mesh axis along which the batch is cut, or None.
        head_axis: The mesh axis along which query and key heads are cut, or None.
        context_parallel: "ring", "ulysses", "ring+ulysses" (two axes), or "auto": Ulysses where the
            devices divide the heads and it sends less, else the ring; both on two axes.
            `explain_context_parallel` says which and why.
        order: "contiguous", or "zigzag" where the arrays are in the order of `zigzag` already
            (queries, keys and what belongs to them; a mask or bias along its queries alone).
        **options: Those of `flash_attention`, and similarity, groups, l2norm_qk and layout as in
            `ring_attention`.

    Returns:
        As `flash_attention`: out, or with return_lse (out, lse), sharded as the queries.

    Raises:
        ValueError: If an axis is not in the mesh or does not divide the batch or heads, or as
            `flash_attention` does.
        TypeError: As `flash_attention` does.
        NotImplementedError: The implementation asked for by name cannot run this call.

    Example:
        >>> import jax
        >>> from flash_attention_jax import flash_attention
        >>> from flash_attention_jax.sharding import context_parallel_attention
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("context",))
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 13, 8), "float32")
        >>> out = context_parallel_attention(q, k, v, mesh=mesh, causal=True)
        >>> bool(jax.numpy.allclose(out, flash_attention(q, k, v, causal=True), atol=1e-5))
        True
    """
    reading, one, chosen, length = _prepared(
        "context_parallel_attention",
        (q, k, v, mask),
        options,
        mesh,
        (length_axis, batch_axis, head_axis),
        context_parallel,
        order,
    )
    sizes = _sizes(mesh)
    multiple = math.prod(sizes[axis] for axis in length)
    place = _resharding(mesh)
    entered = {name: _entered(name, x, place) for name, x in reading.given.items()}
    given = read.arrays(reading.call, entered)
    call, given = context.padded(reading.call, given, multiple)
    whole = {name: x for name, x in given._asdict().items() if x is not None}
    over = length if len(length) == 2 else length[0]
    cut = {"b": batch_axis, "n": head_axis, "k": head_axis, "i": over, "j": over}
    one = dataclasses.replace(one, terms=call.terms)

    def attend(whole: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        arrays = context.with_origin(one, Arrays(**whole), batch_axis, head_axis)
        return context.attend(one, arrays, chosen, length, options.get("implementation"))

    results = {
        name: jax.ShapeDtypeStruct(call.shape(roles(call.layout, name)), call.dtype)
        for name in ("out", "lse")
    }
    in_specs = {name: _spec(name, x, call, cut) for name, x in whole.items()}
    out_specs = {name: _spec(name, x, call, cut) for name, x in results.items()}
    whole = {name: place(x, in_specs[name]) for name, x in whole.items()}
    out, lse = jax.shard_map(
        attend, mesh=mesh, in_specs=(in_specs,), out_specs=(out_specs["out"], out_specs["lse"])
    )(whole)
    padded = call.q_len > reading.call.q_len
    if padded:
        cut |= {"i": None}  # what is left can no longer be shared equally
    # Where nothing moves, a cotangent that knows no mesh is brought into place by this.
    out, lse = (place(x, _spec(name, x, call, cut)) for name, x in (("out", out), ("lse", lse)))
    if padded:
        at = roles(call.layout, "out").index("i")
        out, lse = (x[(slice(None),) * at + (slice(reading.call.q_len),)] for x in (out, lse))
    out, lse = out.reshape(reading.out_shape), lse.reshape(reading.lse_shape)
    return (out, lse) if options.get("return_lse", False) else out


def explain_context_parallel(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    mesh: Any = None,
    length_axis: str | tuple[str, str] = "context",
    batch_axis: str | None = None,
    head_axis: str | None = None,
    context_parallel: str = "auto",
    order: str = "contiguous",
    **options: Unpack[SimilarityOptions],
) -> Plan:
    """How `context_parallel_attention` would share a call, why, and what it would send.

    Nothing is computed, and no device is needed: the mesh may be a `jax.sharding.AbstractMesh`.

    Args:
        q: As in `context_parallel_attention`, or a `jax.ShapeDtypeStruct`; so are the others.
        k: Keys.
        v: Values.
        mask: Mask.
        mesh: A mesh, or one without devices.
        length_axis: As in `context_parallel_attention`.
        batch_axis: The same.
        head_axis: The same.
        context_parallel: The same.
        order: The same.
        **options: The same.

    Returns:
        A record with `way`, `reason`, `hops`, and the collectives and bytes of each device; print
        it.

    Raises:
        ValueError: As `context_parallel_attention` does.
        TypeError: The same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax.sharding import explain_context_parallel
        >>> mesh = jax.sharding.AbstractMesh((8,), ("context",))
        >>> q = jax.ShapeDtypeStruct((1, 6, 4096, 64), jnp.bfloat16)
        >>> print(explain_context_parallel(q, q, q, mesh=mesh, causal=True))
        context parallel: ring, because 6 heads cannot be shared by 8 devices
        devices:  ring of 8, heads over 1, contiguous order
        hops:     7
        forward:  14 collective-permute: 5,505,024 bytes sent by each device
        backward: 30 collective-permute: 18,087,936 bytes sent by each device
    """
    arrays, axes = (q, k, v, mask), (length_axis, batch_axis, head_axis)
    function = "explain_context_parallel"
    return _prepared(function, arrays, options, mesh, axes, context_parallel, order)[2]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where attention layers run: the attribute `placement` of the Flax modules.

    Attributes:
        mesh: A `jax.sharding.Mesh`; None = the one of `jax.set_mesh`.
        length_axis: As in `context_parallel_attention`; so are the rest.
        batch_axis: The mesh axis of the batch, or None.
        head_axis: The mesh axis of the heads, or None.
        context_parallel: "auto", "ring", "ulysses" or "ring+ulysses".
        order: "contiguous", or "zigzag" where tokens come in that order.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax.linen import Attention
        >>> from flash_attention_jax.sharding import Placement
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("context",))
        >>> x = jax.random.normal(jax.random.key(0), (2, 16, 32), jnp.float32)
        >>> layer = Attention(dim=32, heads=4, dim_head=8, causal=True, rotary=True)
        >>> y, params = layer.init_with_output(jax.random.key(1), x)
        >>> on_mesh = layer.clone(placement=Placement(mesh))
        >>> bool(jnp.allclose(on_mesh.apply(params, x), y, atol=1e-5))
        True
    """

    mesh: Any = None
    length_axis: str | tuple[str, str] = "context"
    batch_axis: str | None = None
    head_axis: str | None = None
    context_parallel: str = "auto"
    order: str = "contiguous"

    def attend(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        """`dot_product_attention` here; options by the names of that function.

        Args:
            query: (batch, length, heads, dim).
            key: (batch, length, key heads, dim).
            value: The same.
            **options: Those of `dot_product_attention`.

        Returns:
            (batch, length, heads, dim).
        """
        ours = {theirs: name for name, theirs in JAX_NAMES.items()}
        named: dict[str, Any] = {ours.get(name, name): x for name, x in options.items()}
        axes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return context_parallel_attention(query, key, value, layout="heads_last", **axes, **named)

    def positions(self, length: int) -> jax.Array | None:
        """Where the tokens of a whole sequence stand; None = one after another."""
        if self.order == "contiguous":
            return None
        ring = self.length_axis if isinstance(self.length_axis, str) else self.length_axis[0]
        return zigzag(jnp.arange(length, dtype=jnp.int32), 0, devices=_sizes(self.mesh)[ring])
