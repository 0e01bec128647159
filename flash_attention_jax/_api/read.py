"""From what the user wrote to the call record: both families of functions are read here, once.

Only shapes, dtypes and Python values are read, so arrays, tracers and `jax.ShapeDtypeStruct`s all
do. The result names for every array the shape and dtype that the engines want; `arrays` brings them
into it (reshapes and casts, no transposes).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api.shapes import Sizes, sizes_and_shapes
from flash_attention_jax._core import check, dropout
from flash_attention_jax._core.call import (
    COSINE_SCALE,
    ROLES,
    Arrays,
    Call,
    Layout,
    Similarity,
    Size,
    symbolic,
)
from flash_attention_jax._core.platform import machine_for


@dataclasses.dataclass(frozen=True)
class Reading:
    """A call that was read: the record, the arrays as given, the shapes of the results.

    Attributes:
        call: The static record.
        given: The arrays by the names of `Arrays`, as the user gave them.
        out_shape: Shape of the output.
        lse_shape: Shape of lse.
        offset_given: Whether the record's offset is a number that the user gave.
    """

    call: Call
    given: dict[str, Any]
    out_shape: tuple[Size, ...]
    lse_shape: tuple[Size, ...]
    offset_given: bool = False


def arrays(call: Call, given: dict[str, Any]) -> Arrays:
    """The arrays in the shapes and dtypes that the engines want."""
    shapes = {name: (call.shape(ROLES[name][call.layout]), call.dtype) for name in ("q", "k", "v")}
    shapes |= {name: (shape, dtype) for name, shape, dtype in call.terms}
    return Arrays(
        **{
            name: (
                dropout.key_words(jnp.asarray(x))
                if name == "dropout_key"
                else jnp.asarray(x).reshape(shapes[name][0])
            ).astype(shapes[name][1])
            for name, x in given.items()
        }
    )


def read(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    options: dict[str, Any],
    *,
    layout: Layout = "heads_first",
    similarity: Similarity = "dot",
    default_scale: float | None = None,
    l2norm: bool = True,
    groups: int = 1,
    names: dict[str, str] | None = None,
    bias_batch_dim: bool = False,
    platform: str | None = None,
    capability: tuple[int, int] | None = None,
) -> Reading:
    """Check the arguments of one call and make its record.

    Args:
        q: Queries, in any of the family's ranks.
        k: Keys.
        v: Values.
        mask: Mask or None.
        options: The options by the names of `Options`, those not given left out.
        layout: Family of the function.
        similarity: "dot" or "cosine".
        default_scale: Scale where the options have none; None = 1 / sqrt(d), or `COSINE_SCALE`.
        l2norm: Whether cosine normalises q and k.
        groups: Chunks that it normalises apart.
        names: What the function calls the arguments where it differs.
        bias_batch_dim: Whether a bias of three axes is (b, i, j) rather than (h, i, j).
        platform: What to trace for; None = where q lies, or JAX's default device or backend.
        capability: CUDA compute capability to assume; None = that of the first device.
    """
    names = names or {}
    check.array(names.get("q", "q"), q)
    reader = _Reader(names, options, layout, len(q.shape))
    own = reader.name("q"), reader.name("k"), reader.name("v")
    sizes, out_shape, lse_shape = sizes_and_shapes(layout, own, q, k, v)
    causal = check.flag(reader.name("causal"), options.get("causal", False))
    window = check.window(reader.name("window"), options.get("window"))
    if causal:
        # Causal is a window that ends at the diagonal: engines know one band alone.
        window = (window[0], None if window[1] is None else 0)
    given = {"q": q, "k": k, "v": v}
    terms = {
        **reader.masks(mask, sizes, bias_batch_dim),
        **reader.per_token(sizes),
        **reader.per_head(sizes),
    }
    if default_scale is None and similarity == "cosine":
        # 1 / sqrt(d) would leave cosines, which are at most 1, nearly alike.
        default_scale = COSINE_SCALE
    scale, scale_term = reader.scale(default_scale, sizes)
    terms |= scale_term
    dropout_rate = check.rate(reader.name("dropout_rate"), options.get("dropout_rate", 0.0))
    dropout_key = reader.dropout_key(needed=dropout_rate > 0)
    if dropout_key is not None and dropout_rate > 0:
        terms["dropout_key"] = dropout_key
    offset = options.get("q_offset")
    if offset is None:
        # The heads-first family is end-aligned: the last query sees the last key, as caches need.
        # The other is start-aligned, as in jax.nn. Without a band nothing depends on it.
        offset = sizes.k_len - sizes.q_len if layout == "heads_first" else 0
    softcap = options.get("softcap")
    check.choice("similarity", similarity, ("dot", "cosine"))
    groups = check.whole("groups", groups, least=1)
    if sizes.dim % groups:
        check.fail(
            "groups", "divide the dimension", f"{groups} for {sizes.dim}", "Use a divisor of it."
        )
    if groups > 1 and similarity == "dot":
        check.fail("groups", "be 1 with similarity='dot'", str(groups), "Use similarity='cosine'.")
    check.choice(
        reader.name("differentiation"),
        options.get("differentiation", "reverse"),
        ("reverse", "any"),
    )
    check.precision(reader.name("precision"), options.get("precision"))
    for name, (x, _, _) in terms.items():
        given[name] = x
    machine = machine_for(q, platform, capability)
    call = Call(
        layout=layout,
        similarity=similarity,
        l2norm=check.flag(reader.name("l2norm_qk"), l2norm),
        groups=groups,
        **sizes._asdict(),
        dtype=check.dtype_name(q),
        scale=scale,
        causal=causal,
        window=window,
        offset=0 if "q_offset" in terms else offset,
        softcap=None if softcap is None else check.softcap(reader.name("softcap"), softcap),
        dropout_rate=dropout_rate,
        terms=tuple((name, shape, dtype) for name, (_, shape, dtype) in terms.items()),
        block_q=reader.block("block_q"),
        block_kv=reader.block("block_kv"),
        precision=options.get("precision"),
        differentiation=options.get("differentiation", "reverse"),
        deterministic_backward=check.flag(
            reader.name("deterministic_backward"), options.get("deterministic_backward", True)
        ),
        platform=machine.platform,
        capability=machine.capability,
        interpret=machine.interpret,
    )
    number = isinstance(options.get("q_offset"), int)
    return Reading(call, given, out_shape, lse_shape, offset_given=number)


Term = tuple[Any, tuple[Size, ...], str]
"""An array as given, and the shape and dtype that the engines want it in."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the arguments of one function, and speaks of them by that function's names."""

    names: dict[str, str]
    options: dict[str, Any]
    layout: Layout
    rank: int

    def name(self, canonical: str) -> str:
        """What the user calls it."""
        return self.names.get(canonical, canonical)

    # --- masks and bias ---

    def masks(self, mask: Any, sizes: Sizes, bias_batch_dim: bool) -> dict[str, Term]:
        """The dense mask, the bias and the relative bias."""
        terms: dict[str, Term] = {}
        if mask is not None:
            name = self.name("mask")
            check.boolean_or_integer(name, mask, self.name("bias"))
            terms["mask"] = (mask, self._four_axes(name, mask, sizes, is_mask=True), "bool")
        bias = self.options.get("bias")
        if bias is not None:
            name = self.name("bias")
            check.array(name, bias)
            if bias.dtype == bool:
                requirement, mask_name = "be of a float dtype", self.name("mask")
                advice = f"Pass a boolean mask as `{mask_name}`."
                check.fail(name, requirement, str(bias.dtype), advice, TypeError)
            check.floating(name, bias)
            shape = self._four_axes(name, bias, sizes, is_mask=False, batch_dim=bias_batch_dim)
            terms["bias"] = (bias, shape, check.dtype_name(bias))
        relative = self.options.get("relative_bias")
        if relative is not None:
            check.floating("relative_bias", relative)
            diagonals = sizes.q_len + sizes.k_len - 1
            diagonals = 0 if diagonals == -1 else diagonals
            shapes = {(diagonals,), (sizes.heads, diagonals), (1, diagonals)}
            meaning = (
                f"(heads, q_len + k_len - 1) = {(sizes.heads, diagonals)} or without the heads"
            )
            advice = "Entry j - i + q_len - 1 is that of query i and key j."
            check.shape_is("relative_bias", relative, shapes, meaning, advice)
            rows = 1 if len(relative.shape) == 1 else relative.shape[0]
            terms["relative_bias"] = (relative, (rows, diagonals), check.dtype_name(relative))
        return terms

    def _four_axes(
        self, name: str, x: Any, sizes: Sizes, *, is_mask: bool, batch_dim: bool = False
    ) -> tuple[Size, ...]:
        """The shape (b, h, i, j), with ones, that a mask or bias of fewer axes stands for."""
        b, h, i, j = sizes.batch, sizes.heads, sizes.q_len, sizes.k_len
        shape = tuple(x.shape)
        advice = "An axis may be 1; see the docstring for fewer axes."
        alone = self._unbatched or self.layout == "heads_last"  # where (j,) has one meaning
        if is_mask and len(shape) < 2 and not (shape and alone):
            # (j,) could as well be (b,), of which two axes have the first.
            few = "(bh, j) or (bh, i, j)" if self._merged else "(b, h, i, j)"
            few = "(j,) or (i, j)" if self._unbatched else few
            if self.layout == "heads_first" and not (self._merged or self._unbatched):
                few = "(b, j), or three or four that broadcast to (b, h, i, j)"
            meant = f"For all of the batch pass {name}[None]." if shape and not self._merged else ""
            check.fail(name, f"have the axes {few}", f"shape {shape}", meant)
        if shape == (b, i, j) and not batch_dim and not self._unbatched:
            advice = f"One per batch entry is {name}[:, None]."
        elif shape == (i, j) and is_mask and not self._unbatched:
            advice = f"One for every batch entry is {name}[None{', None' * (not self._merged)}]."
        if self._merged:
            if len(shape) == 2 and is_mask:
                check.broadcasts(name, x, (b, j), "(bh, j)", advice)
                return shape[0], 1, 1, shape[1]
            axes = "(bh, i, j)" if is_mask else "(bh, i, j) or (i, j)"
            check.broadcasts(name, x, (b, i, j), axes, advice)
            padded = (1,) * (3 - len(shape)) + shape
            return padded[0], 1, *padded[1:]
        if self.layout == "heads_first" and is_mask and len(shape) == 2 and self.rank == 4:
            check.broadcasts(name, x, (b, j), "(b, j)", advice)
            return shape[0], 1, 1, shape[1]
        if self._unbatched:
            check.broadcasts(name, x, (i, j), "(j,) or (i, j)" if is_mask else "(i, j)", advice)
        if batch_dim and len(shape) == 3:
            check.broadcasts(name, x, (b, i, j), "(b, i, j)", advice)
            return shape[0], 1, *shape[1:]
        check.broadcasts(name, x, (b, h, i, j), "(b, h, i, j)", advice)
        return (1,) * (4 - len(shape)) + shape  # pyright: ignore[reportReturnType]

    @property
    def _merged(self) -> bool:
        return self.layout == "heads_first" and self.rank == 3

    @property
    def _unbatched(self) -> bool:
        return self.layout == "heads_first" and self.rank == 2

    # --- per token ---

    def per_token(self, sizes: Sizes) -> dict[str, Term]:
        """Lengths, segment ids and the offset of the diagonal."""
        terms: dict[str, Term] = {}
        batch = sizes.batch
        for canonical, length in (("q_lengths", sizes.q_len), ("kv_lengths", sizes.k_len)):
            x = self.options.get(canonical)
            if x is not None:
                name = self.name(canonical)
                check.integer(name, x)
                shapes = {(batch,)} | ({()} if batch == 1 else set())
                advice = "Pass one length per batch entry."
                check.shape_is(name, x, shapes, f"(batch,) = {(batch,)}", advice)
                check.lengths_within(name, x, length)
                terms[canonical] = (x, (batch,), "int32")
        terms |= self._segments(sizes)
        offset = self.options.get("q_offset")
        if symbolic(offset):
            pass  # k_len - q_len of symbolic lengths, say
        elif isinstance(offset, int) and not isinstance(offset, bool):
            check.offset_within("q_offset", offset)
        elif offset is not None:
            if isinstance(offset, (bool, float)):
                got, advice = check.shown(offset), "Pass a Python int."
                requirement = "be an integer or an integer array"
                check.fail("q_offset", requirement, got, advice, TypeError)
            check.integer("q_offset", offset)
            shapes = {(): (1, 1), (batch,): (batch, 1), (1,): (1, 1)}
            shapes |= {(b, sizes.q_len): (b, sizes.q_len) for b in (1, batch)}
            meaning = f"(), (batch,) = {(batch,)} or (batch, q_len) = {(batch, sizes.q_len)}"
            advice = "Pass one for all, one per batch entry or one per query."
            check.shape_is("q_offset", offset, shapes, meaning, advice)
            check.offset_within("q_offset", offset)
            terms["q_offset"] = (offset, shapes[tuple(offset.shape)], "int32")
        return terms

    def _segments(self, sizes: Sizes) -> dict[str, Term]:
        pair = [self.options.get(name) for name in ("q_segment_ids", "kv_segment_ids")]
        if all(x is None for x in pair):
            return {}
        terms: dict[str, Term] = {}
        both = ("q_segment_ids", "kv_segment_ids")
        for name, x, length in zip(both, pair, (sizes.q_len, sizes.k_len), strict=True):
            other = both[1 - both.index(name)]
            if x is None:
                check.fail(
                    name,
                    f"come with `{other}`",
                    "None",
                    "Pass the same ids twice for self-attention.",
                )
            check.integer(name, x)
            shapes = {(length,), (1, length), (sizes.batch, length)}
            if sizes.batch not in (0, 1):
                shapes -= {(length,)}
            meaning = f"(batch, length) = {(sizes.batch, length)}"
            advice = "Pass one id per token; those that all batch entries share are ids[None]."
            check.shape_is(name, x, shapes, meaning, advice)
            check.fits_int32(name, x)
            terms[name] = (x, ((1,) * (2 - len(x.shape))) + tuple(x.shape), "int32")
        return terms

    # --- per head ---

    def per_head(self, sizes: Sizes) -> dict[str, Term]:
        """Sinks and ALiBi slopes."""
        terms: dict[str, Term] = {}
        heads = sizes.heads
        for name in ("sinks", "alibi_slopes"):
            x = self.options.get(name)
            if x is not None:
                check.floating(name, x)
                shapes = {(heads,), (1,), ()}
                check.shape_is(
                    name, x, shapes, f"(heads,) = {(heads,)}", "Pass one entry per head."
                )
                check.finite(name, x, or_less=name == "sinks")
                terms[name] = (x, (heads,) if x.shape == (heads,) else (1,), check.dtype_name(x))
        return terms

    def scale(self, default: float | None, sizes: Sizes) -> tuple[float | None, dict[str, Term]]:
        """The scale as a number, or as an array per head."""
        x: Any = self.options.get("scale")
        name = self.name("scale")
        if x is None and default is None and symbolic(sizes.dim):
            advice = "Pass jnp.asarray(dim, jnp.float32) ** -0.5, of q's last axis."
            check.fail(name, "be given where the dimension is symbolic", "None", advice)
        if x is None:
            return (sizes.dim**-0.5 if default is None else default), {}
        if isinstance(x, (bool, int, float, np.generic)):
            return check.number(name, x), {}
        if isinstance(x, (str, complex)):
            got = check.shown(x)
            check.fail(name, "be a number or an array", got, "Pass a Python float.", TypeError)
        check.floating(name, x)
        heads = sizes.heads
        shapes = {
            (): (1,),
            (1,): (1,),
            (heads,): (heads,),
            (heads, 1, 1): (heads,),
            (1, heads, 1, 1): (heads,),
        }
        meaning = f"() or (heads,) = {(heads,)}"
        check.shape_is(name, x, shapes, meaning, "Pass one for all or one per head.")
        check.finite(name, x)
        return None, {"scale": (x, shapes[tuple(x.shape)], check.dtype_name(x))}

    # --- the rest ---

    def dropout_key(self, *, needed: bool) -> Term | None:
        """The key, which dropout needs; a rate of 0 leaves it unused."""
        key = self.options.get("dropout_key")
        if key is None and needed:
            check.fail(
                "dropout_key",
                "be given when `dropout_rate` is over 0",
                "None",
                "Pass jax.random.key(seed).",
            )
        if key is None:
            return None
        check.random_key("dropout_key", key)
        return key, (2,), "uint32"

    def block(self, name: str) -> int | None:
        """A block size."""
        x, advice = self.options.get(name), "Use None for the library's choice."
        return None if x is None else check.whole(self.name(name), x, least=1, advice=advice)
