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
from typing import Any, NamedTuple, Unpack

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


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes cuts which axis of the arrays.

    Every function of this module makes one from its arguments; the Flax layers take one as their
    attribute `placement`. It is checked where it is used, not where it is made, because the mesh
    may become current later.

    Attributes:
        mesh: A `jax.sharding.Mesh`; None = the one of `jax.set_mesh`.
        length_axis: The mesh axis along which the length is cut; or two, (ring, heads), as in
            `context_parallel_attention`.
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
            query: (batch, length, heads, dim), of a floating dtype.
            key: (batch, key length, key heads, dim), of the same dtype.
            value: (batch, key length, key heads, value dim), of the same dtype.
            **options: Those of `dot_product_attention`.

        Returns:
            (batch, length, heads, value dim), in the dtype of the query.

        Raises:
            ValueError: As `context_parallel_attention` does.
            TypeError: The same.
            NotImplementedError: The same.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from flash_attention_jax import dot_product_attention
            >>> mesh = jax.sharding.Mesh(jax.devices(), ("context",))
            >>> query, key, value = jax.random.normal(
            ...     jax.random.key(0), (3, 2, 16, 4, 8), "float32"
            ... )
            >>> out = Placement(mesh).attend(query, key, value, is_causal=True)
            >>> expected = dot_product_attention(query, key, value, is_causal=True)
            >>> bool(jnp.allclose(out, expected, atol=1e-5))
            True
        """
        ours = {theirs: name for name, theirs in JAX_NAMES.items()}
        named: dict[str, Any] = {ours.get(name, name): x for name, x in options.items()}
        # The fields are that function's arguments, so it refuses options that name one again.
        return context_parallel_attention(
            query, key, value, layout="heads_last", **vars(self), **named
        )

    def positions(self, length: int) -> jax.Array | None:
        """Where the tokens of a whole sequence stand; None = one after another.

        Args:
            length: Tokens of the sequence; in zigzag order a multiple of 2 * devices of the ring.

        Returns:
            (length,) int32, or None in contiguous order.

        Raises:
            ValueError: If there is no mesh, or the length does not fit the order.
            TypeError: If `mesh` is no mesh.

        Example:
            >>> import jax
            >>> mesh = jax.sharding.AbstractMesh((2,), ("context",))
            >>> Placement(mesh, order="zigzag").positions(8).tolist()
            [0, 1, 6, 7, 2, 3, 4, 5]
            >>> Placement(mesh).positions(8) is None
            True
        """
        if self.order == "contiguous":
            return None
        ring = self.length_axis if isinstance(self.length_axis, str) else self.length_axis[0]
        return zigzag(jnp.arange(length, dtype=jnp.int32), 0, devices=_axis_sizes(self.mesh)[ring])


class ReadArguments(NamedTuple):
    """The options of a call as `_api.read.read` takes them.

    Attributes:
        options: What `flash_attention` has as options too.
        keywords: What its siblings are about: similarity, groups, normalisation and layout.
    """

    options: dict[str, Any]
    keywords: dict[str, Any]


OF_SIBLINGS = ("similarity", "groups", "l2norm_qk", "layout")


def _read_arguments(function: str, options: Any) -> ReadArguments:
    """Checks the options' names, and the values that `read` takes as they are."""
    rest = {name: x for name, x in options.items() if name not in OF_SIBLINGS}
    check_names(function, rest, {})
    check_implementation(rest.get("implementation"))
    check.flag("return_lse", rest.get("return_lse", False))
    layout, similarity = options.get("layout", "heads_first"), options.get("similarity", "dot")
    check.choice("layout", layout, ("heads_first", "heads_last"))
    check.choice("similarity", similarity, ("dot", "cosine"))
    keywords = {
        "layout": layout,
        "similarity": similarity,
        "groups": options.get("groups", 1),
        "l2norm": options.get("l2norm_qk", True),
    }
    return ReadArguments(rest, keywords)


def _attend_inside(
    function: str, arrays: tuple[Any, Any, Any, Any], options: Any, placement: Placement
) -> Any:
    """Attention inside `shard_map`: the arrays are one device's, and the mesh is the current one.

    Args:
        function: What the user called.
        arrays: The device's q, k, v and mask.
        options: The user's.
        placement: Without a mesh, and with one axis of the length: here the user names the way.
    """
    arguments = _read_arguments(function, options)
    axis = placement.length_axis
    devices = axis_size("axis_name", axis)
    for name in ("batch_axis", "head_axis"):
        if getattr(placement, name) is not None:
            axis_size(name, getattr(placement, name))
    local = read_local(*arrays, arguments.options, devices, **arguments.keywords)
    context.check_order(placement.order, local.call, devices)
    plan = context.plan(local.call, (devices, 0), placement.context_parallel, placement.order)
    operands = context.with_origin(
        local.call, local.arrays, placement.batch_axis, placement.head_axis
    )
    implementation = arguments.options.get("implementation")
    out, lse = context.attend(local.call, operands, plan, (str(axis),), implementation)
    out, lse = out.reshape(local.out_shape), lse.reshape(local.lse_shape)
    return (out, lse) if arguments.options.get("return_lse", False) else out


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
        q: The device's queries, (b, h, t, d) or the other ranks of `flash_attention`, of a
            floating dtype.
        k: Its keys, (b, hk, s, d), of the same dtype.
        v: Its values, (b, hk, s, e), of the same dtype.
        mask: Its rows of the mask, whole along the keys, boolean, or integers of 1 and 0:
            (b, h, t, n * s), an axis may be 1, or (b, n * s).
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
        The device's out, (b, h, t, e) in the dtype of q; with return_lse, (out, lse), lse (b, h, t)
        as `flash_attention` gives it.

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
    placement = Placement(
        length_axis=axis_name,
        batch_axis=batch_axis,
        head_axis=head_axis,
        context_parallel="ring",
        order=order,
    )
    return _attend_inside("ring_attention", (q, k, v, mask), options, placement)


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
        q: The device's queries, (b, h, t, d), as in `ring_attention`.
        k: Its keys, (b, hk, s, d).
        v: Its values, (b, hk, s, e).
        mask: Its rows of the mask, whole along the keys: (b, h, t, n * s) or (b, n * s).
        axis_name: The mesh axis along which the sequence is cut.
        batch_axis: As in `ring_attention`.
        head_axis: As in `ring_attention`.
        **options: As in `ring_attention`.

    Returns:
        The device's out, (b, h, t, e) in the dtype of q; with return_lse, (out, lse), lse (b, h, t)
        as `flash_attention` gives it.

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
    placement = Placement(
        length_axis=axis_name,
        batch_axis=batch_axis,
        head_axis=head_axis,
        context_parallel="ulysses",
    )
    return _attend_inside("ulysses_attention", (q, k, v, mask), options, placement)


# --- whole arrays and a mesh ---


class Prepared(NamedTuple):
    """A call on whole arrays that was read, and how the devices share it.

    Attributes:
        reading: The call as the user made it.
        share: The record that one device computes with: the length whole and padded, batch and
            heads those of the device.
        plan: The way, and what it sends.
        axes: The mesh axes of the length: of the ring, for the heads, or both.
        devices: On how many devices the length lies.
    """

    reading: read.Reading
    share: Call
    plan: Plan
    axes: tuple[str, ...]
    devices: int


def _prepare(
    function: str, arrays: tuple[Any, Any, Any, Any], options: Any, placement: Placement
) -> Prepared:
    """Reads and checks a call on whole arrays; computes nothing, and needs no device."""
    arguments = _read_arguments(function, options)
    check.choice("context_parallel", placement.context_parallel, context.WAYS)
    sizes = _axis_sizes(placement.mesh)
    axes = _length_axes(placement, sizes)
    reading = read.read(*arrays, arguments.options, **arguments.keywords)
    call = reading.call
    counts = _counts_per_device(call, placement, sizes)
    along = [sizes[axis] for axis in axes]
    context.check_order(placement.order, call, along[0])
    devices = math.prod(along)
    # Every device holds equally many tokens, so the record of the whole is that of the padded one.
    lengths = {name: -(-getattr(call, name) // devices) * devices for name in ("q_len", "k_len")}
    share = dataclasses.replace(call, **counts, **lengths)
    # A second size of 0 says that the one axis may serve for a ring or for the heads.
    ring_and_heads = (along[0], along[1] if len(along) == 2 else 0)
    plan = context.plan(share, ring_and_heads, placement.context_parallel, placement.order)
    return Prepared(reading, share, plan, axes, devices)


def _axis_sizes(mesh: Any) -> Mapping[str, int]:
    """Name -> devices of each axis of a mesh; None = the mesh of `jax.set_mesh`."""
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


def _length_axes(placement: Placement, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes of the length; checks those of batch and heads too."""
    length: Any = placement.length_axis
    axes = (length,) if isinstance(length, str) else length
    if not isinstance(axes, tuple) or len(axes) not in (1, 2):
        advice = "Pass 'context', say, or ('ring', 'heads')."
        got = check.shown(length)
        check.fail("length_axis", "be one mesh axis or two", got, advice, TypeError)
    named = [("length_axis", axis) for axis in axes]
    others = (("batch_axis", placement.batch_axis), ("head_axis", placement.head_axis))
    named += [(name, axis) for name, axis in others if axis]
    for name, axis in named:
        if axis not in sizes:
            advice = "Name one of its axes."
            check.fail(name, f"be an axis of the mesh {dict(sizes)}", repr(axis), advice)
    taken = [axis for _, axis in named]
    if len(set(taken)) < len(taken):
        got, advice = ", ".join(map(repr, taken)), "An axis cuts one thing."
        check.fail("length_axis`, `batch_axis` and `head_axis", "differ", got, advice)
    return axes


def _counts_per_device(
    call: Call, placement: Placement, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Batch entries, query heads and key heads of one device; checks that they come out even."""
    cuts = {
        "batch": ("batch_axis", placement.batch_axis, "batch"),
        "heads": ("head_axis", placement.head_axis, "heads of q"),
        "kv_heads": ("head_axis", placement.head_axis, "heads of k"),
    }
    counts = {}
    for field, (argument, axis, meaning) in cuts.items():
        count, devices = getattr(call, field), 1 if axis is None else sizes[axis]
        if axis is not None and count % devices:
            got = f"{count} over {devices} devices of {axis!r}"
            check.fail(argument, f"divide the {meaning}", got, "Use a smaller axis, or None.")
        counts[field] = count // devices
    return counts


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


def _cuts(placement: Placement, axes: tuple[str, ...]) -> dict[str, Any]:
    """Axis letter of an array, as in `ROLES`, -> the mesh axes that cut it."""
    length = axes if len(axes) == 2 else axes[0]
    heads = placement.head_axis
    return {"b": placement.batch_axis, "n": heads, "k": heads, "i": length, "j": length}


def _spec(name: str, x: Any, call: Call, cuts: dict[str, Any]) -> PartitionSpec:
    """How an array of a call lies on the mesh; a term's axis of size 1 is the same everywhere."""
    # The rows of a mask or bias are whole: a device needs them for the keys of all the others.
    whole = ("j",) if name in ("mask", "bias") else ()
    axes = zip(roles(call.layout, name), x.shape, strict=True)
    return PartitionSpec(
        *(
            cuts.get(letter) if letter not in whole and (size != 1 or name in ROLES) else None
            for letter, size in axes
        )
    )


def _attend_on_mesh(arrays: tuple[Any, Any, Any, Any], options: Any, placement: Placement) -> Any:
    """`context_parallel_attention`: pads, places, attends inside `shard_map`, and unpads."""
    prepared = _prepare("context_parallel_attention", arrays, options, placement)
    reading, axes = prepared.reading, prepared.axes
    place = _resharding(placement.mesh)
    entered = {name: _entered(name, x, place) for name, x in reading.given.items()}
    call, padded = context.padded(
        reading.call, read.arrays(reading.call, entered), prepared.devices
    )
    # Padding may have added lengths to the terms.
    share = dataclasses.replace(prepared.share, terms=call.terms)

    def attend(operands: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        own = context.with_origin(
            share, Arrays(**operands), placement.batch_axis, placement.head_axis
        )
        return context.attend(share, own, prepared.plan, axes, options.get("implementation"))

    cuts = _cuts(placement, axes)
    results = {
        name: jax.ShapeDtypeStruct(call.shape(roles(call.layout, name)), call.dtype)
        for name in ("out", "lse")
    }
    operands = {name: x for name, x in padded._asdict().items() if x is not None}
    in_specs = {name: _spec(name, x, call, cuts) for name, x in operands.items()}
    out_specs = tuple(_spec(name, x, call, cuts) for name, x in results.items())
    operands = {name: place(x, in_specs[name]) for name, x in operands.items()}
    out, lse = jax.shard_map(
        attend, mesh=placement.mesh, in_specs=(in_specs,), out_specs=out_specs
    )(operands)
    is_padded = call.q_len > reading.call.q_len
    if is_padded:
        cuts |= {"i": None}  # what is left can no longer be shared equally
    # Where nothing moves, a cotangent that knows no mesh is brought into place by this.
    out, lse = (place(x, _spec(name, x, call, cuts)) for name, x in (("out", out), ("lse", lse)))
    if is_padded:
        at = roles(call.layout, "out").index("i")
        out, lse = (x[(slice(None),) * at + (slice(reading.call.q_len),)] for x in (out, lse))
    out, lse = out.reshape(reading.out_shape), lse.reshape(reading.lse_shape)
    return (out, lse) if options.get("return_lse", False) else out


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
        q: All queries, (b, h, i, d) or the other ranks of `flash_attention`, of a floating dtype.
        k: All keys, (b, hk, j, d), of the same dtype.
        v: All values, (b, hk, j, e), of the same dtype.
        mask: As in `flash_attention`: (b, h, i, j) with ones, or (b, j).
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
        As `flash_attention`: out (b, h, i, e) in the dtype of q, or with return_lse (out, lse),
        sharded as the queries.

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
    placement = Placement(
        mesh=mesh,
        length_axis=length_axis,
        batch_axis=batch_axis,
        head_axis=head_axis,
        context_parallel=context_parallel,
        order=order,
    )
    return _attend_on_mesh((q, k, v, mask), options, placement)


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
    placement = Placement(
        mesh=mesh,
        length_axis=length_axis,
        batch_axis=batch_axis,
        head_axis=head_axis,
        context_parallel=context_parallel,
        order=order,
    )
    return _prepare("explain_context_parallel", (q, k, v, mask), options, placement).plan
