"""Rotary position embedding: positions as rotations of the queries and the keys.

The angle of a token is its position times a frequency, of which only the part beyond whole turns
counts. In float32 the product of a position of a million keeps no more than two of its digits
there, so for `x` of at most 32 bits it is formed in integers (`_turns`).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from flash_attention_jax._core import check
from flash_attention_jax._core.types import ArrayLike

__all__ = ["apply_rotary"]


def apply_rotary(
    x: Float[ArrayLike, "*shape"],
    *,
    offset: int | np.integer | Int[ArrayLike, ""] | Int[ArrayLike, " b"] = 0,
    positions: Shaped[ArrayLike, "*positions"] | None = None,
    base: float = 10000.0,
    scaling: float = 1.0,
    dim: int | None = None,
    interleaved: bool = False,
    layout: Literal["heads_first", "heads_last"] = "heads_first",
) -> Float[Array, "*shape"]:
    """Rotates pairs of features by an angle proportional to the token's position.

    Token `i` sits at position `p = offset + i` (or `offset + positions[i]`). Pair `c` of its first
    `dim` features turns by

        theta[p, c] = (p / scaling) * base ** (-2 * c / dim),        0 <= c < dim / 2
        (x1, x2)    = (x1 * cos(theta) - x2 * sin(theta), x1 * sin(theta) + x2 * cos(theta))

    where `(x1, x2)` is `(x[c], x[c + dim // 2])`, or `(x[2 * c], x[2 * c + 1])` if `interleaved`.
    Features from `dim` on pass unchanged. A rotation keeps norms, and the dot product of a query
    at `i` with a key at `j`, both rotated, depends on the positions through `i - j` only.

    Apply it to the queries and the keys, not to the values. With a cache, give the number of tokens
    already there as `offset`, so that a token gets the rotation it had in the whole sequence. Lay
    the pairs out as the weights expect: half-split is what GPT-NeoX and LLaMA's checkpoints on
    Hugging Face use, interleaved is RoFormer's own and GPT-J's.

    Sines and cosines have float32 (float64 for float64 `x`), never the dtype of a lower-precision
    `x`. They are exact to 2e-7 at positions below 2**24, to 1e-6 below 2**31, for angles lose their
    whole turns in integers of 64 bits before they are rounded; in float64 to about `p * 2e-16`. The
    tables cost `n * dim` numbers for each row of positions, whatever the number of heads.

    Args:
        x: queries or keys of any floating dtype. `layout="heads_first"`: (..., n, d), such as
            (n, d), (h, n, d) or (b, h, n, d). `layout="heads_last"`: (..., n, h, d), such as
            (n, h, d) or (b, n, h, d).
        offset: position of the first token, a Python integer or an integer array, traced or not, of
            shape () or, one per row of the batch, (b,), where b is the first axis of `x`.
        positions: position of each token, integer or floating, (n,) or (b, n), below 2**31 with the
            offset. Any order, gaps and repetitions included (packed sequences start again at 0).
            `None` means 0 .. n - 1. The result has a gradient with respect to floating ones.
        base: a positive number; pair c turns through a full circle in
            `2 * pi * base ** (2 * c / dim)` tokens.
        scaling: a positive number that divides the positions (position interpolation): 4 lets a
            model trained on n tokens read 4 * n within the angles it knows.
        dim: how many of the first features to rotate, even, 2 <= dim <= d. `None` means d.
        interleaved: pair neighbouring features instead of the two halves.
        layout: which axis of `x` is the length: -2 for "heads_first", -3 for "heads_last".

    Returns:
        An array with the shape and the dtype of `x`.

    Raises:
        TypeError: `x` is not floating, or an argument has the wrong type.
        ValueError: a rank, a shape, or `dim`, `base`, `scaling` or `layout` is not as said above.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 2, 5, 4), jnp.float32)  # batch, heads, length, dimension
        >>> whole = apply_rotary(x)
        >>> cached = apply_rotary(x[:, :, 3:], offset=3)  # the same tokens, after a cache of 3
        >>> bool(jnp.array_equal(cached, whole[:, :, 3:]))
        True

    References:
        Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position
        Embedding", 2021, arXiv:2104.09864, equations 14, 15 and 34.
        Chen, Wong, Chen, Tian, "Extending Context Window of Large Language Models via Positional
        Interpolation", 2023, arXiv:2306.15595, equation 4 (`scaling`).
    """
    x = _check_x(x, layout)
    length_axis = x.ndim + (-2 if layout == "heads_first" else -3)
    length, dim = x.shape[length_axis], _check_dim(dim, x)
    base, scaling = _check_positive("base", base), _check_positive("scaling", scaling)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32

    first = _check_offset(offset, x, length_axis)[..., None]
    steps, parts = _check_positions(positions, x, length_axis, dtype)
    # Integers add as integers, whatever their widths: a float32 sum would round twice.
    wide = jnp.int64 if first.dtype.itemsize == 8 or steps.dtype.itemsize == 8 else jnp.int32
    where = first.astype(wide) + steps.astype(wide)  # (n,) or (b, n)
    tables = _cos_sin(where, parts, dtype=dtype, base=base, scaling=scaling, dim=dim)
    # Room for the axes that they lack: those between batch and length, and the heads after it.
    batch = tables[0].shape[:-2] + (1,) * (length_axis - tables[0].ndim + 2)
    shape = (*batch, length, *(1,) * (x.ndim - 2 - length_axis), dim // 2)
    cos, sin = (table.reshape(shape) for table in tables)

    if interleaved:
        x1, x2 = x[..., 0:dim:2].astype(dtype), x[..., 1:dim:2].astype(dtype)
    else:
        x1, x2 = x[..., : dim // 2].astype(dtype), x[..., dim // 2 : dim].astype(dtype)
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    if interleaved:
        rotated = jnp.stack((y1, y2), axis=-1).reshape(*x.shape[:-1], dim)
    else:
        rotated = jnp.concatenate((y1, y2), axis=-1)
    return jnp.concatenate((rotated.astype(x.dtype), x[..., dim:]), axis=-1)


@functools.partial(jax.jit, static_argnames=("dtype", "base", "scaling", "dim"))
def _cos_sin(
    where: Int[Array, "*n"],
    parts: Float[Array, "*n"] | None,
    *,
    dtype: Any,
    base: float,
    scaling: float,
    dim: int,
) -> tuple[Float[Array, "*n half"], Float[Array, "*n half"]]:
    """Cosine and sine of the positions `where + parts` times each pair's frequency."""
    # The frequencies are constants: float64 at trace time costs nothing and rounds once.
    frequencies = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / scaling
    # In floating point, where a gradient with respect to fractional positions goes through.
    between = 0 if parts is None else parts[..., None] * jnp.asarray(frequencies, dtype)
    if dtype == jnp.float64:
        theta = where.astype(dtype)[..., None] * jnp.asarray(frequencies) + between
        return jnp.cos(theta), jnp.sin(theta)
    turns = _turns(where.astype(jnp.int32), frequencies)
    # Quarters of a turn exchange and negate the two, so an angle of at most pi / 4 is rounded.
    quarters = (turns + 2**29) >> 30
    rest = (turns - (quarters << 30)).astype(dtype)
    theta = rest * np.float32(2 * np.pi / 2**32) + between
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    odd = quarters & 1 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    return (
        jnp.where((quarters + 1) & 2 == 2, -cos, cos),
        jnp.where(quarters & 2 == 2, -sin, sin),
    )


def _turns(where: Int[Array, "*n"], frequencies: np.ndarray) -> Int[Array, "*n half"]:
    """The part of a turn that each angle has beyond whole ones, in units of 2**-32, signed.

    A frequency in turns is a fixed-point number of 64 bits. Its product with a position, an integer
    of 32, is formed modulo 1, so whole turns fall off at the top; what is cut off at the bottom is
    below 2**-32. Two floats would do as well, were no compiler free to reorder their sums.
    """
    fractions = [int(turns % 1.0 * 2.0**64) for turns in frequencies / (2 * np.pi)]
    high = jnp.asarray([x >> 32 for x in fractions], jnp.uint32)
    low = jnp.asarray([x % 2**32 for x in fractions], jnp.uint32)
    p = jax.lax.bitcast_convert_type(where, jnp.uint32)[..., None]
    # The upper word of p * low, by halves of words; a negative p counts 2**32 too much.
    p1, p0, low1, low0 = p >> 16, p & 0xFFFF, low >> 16, low & 0xFFFF
    middle = p1 * low0 + ((p0 * low0) >> 16)
    other = p0 * low1 + (middle & 0xFFFF)
    upper = p1 * low1 + (middle >> 16) + (other >> 16)
    upper -= jnp.where(where[..., None] < 0, low, jnp.zeros_like(low))
    return jax.lax.bitcast_convert_type(p * high + upper, jnp.int32)


def _check_x(x: ArrayLike, layout: str) -> Array:
    """Reads `x` as an array and checks dtype and rank against the layout."""
    check.choice("layout", layout, ("heads_first", "heads_last"))
    check.floating("x", x)
    rank, axes = (2, "(..., n, d)") if layout == "heads_first" else (3, "(..., n, h, d)")
    if x.ndim < rank:
        requirement = f"have at least {rank} axes {axes} with layout={layout!r}"
        check.fail("x", requirement, f"shape {x.shape}", "Add the missing axes.")
    return jnp.asarray(x)


def _check_dim(dim: int | None, x: Array) -> int:
    """How many features rotate."""
    if dim is None:
        if x.shape[-1] % 2 or not x.shape[-1]:
            advice = "Give `dim`, an even number of features to rotate."
            check.fail("x", "have an even last axis", f"shape {x.shape}", advice)
        return x.shape[-1]
    dim = check.whole("dim", dim, least=2)
    if dim % 2 or dim > x.shape[-1]:
        got = f"{dim} with `x` {x.shape}"
        advice = "Choose how many of the first features to rotate."
        check.fail("dim", "be even and at most the last axis of `x`", got, advice)
    return dim


def _check_positive(name: str, value: float) -> float:
    """A static positive number."""
    number = check.number(name, value)
    if number <= 0:
        default = 10000.0 if name == "base" else 1.0
        check.fail(name, "be positive", repr(value), f"The default is {default}.")
    return number


def _check_offset(offset: int | np.integer | ArrayLike, x: Array, length_axis: int) -> Array:
    """`offset` as an integer array of shape () or (b,)."""
    if isinstance(offset, int) and not isinstance(offset, bool):
        if not -(2**31) <= offset < 2**31:
            check.fail("offset", "fit into 32 bits", repr(offset), "Count from a later token.")
        return jnp.asarray(offset, jnp.int32)
    if not _is_number(offset, jnp.integer):
        advice = "Fractional positions go in `positions`."
        got = check.shown(offset)
        check.fail("offset", "be an integer or an integer array", got, advice, TypeError)
    offset = jnp.asarray(offset)
    batched = length_axis > 0
    if offset.ndim and not (batched and offset.shape == x.shape[:1]):
        allowed = f"() or ({x.shape[0]},)" if batched else "()"
        advice = "Pass one offset, or one for each row of the batch (the first axis of `x`)."
        check.fail("offset", f"have shape {allowed} with `x` {x.shape}", str(offset.shape), advice)
    return offset


def _check_positions(
    positions: ArrayLike | None, x: Array, length_axis: int, dtype: Any
) -> tuple[Array, Array | None]:
    """`positions`, of shape (n,) or (b, n), as integers and, where they are floating, the rest."""
    length = x.shape[length_axis]
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32), None
    advice = "Pass one position for each token."
    floating = _is_number(positions, jnp.floating)
    if not (_is_number(positions, jnp.integer) or floating):
        got = check.shown(positions)
        check.fail("positions", "be an integer or floating array", got, advice, TypeError)
    shapes = [(length,)] + ([(x.shape[0], length)] if length_axis > 0 else [])
    if positions.shape not in shapes:
        requirement = f"have shape {' or '.join(map(str, shapes))} with `x` {x.shape}"
        check.fail("positions", requirement, str(positions.shape), advice)
    if not floating:
        return jnp.asarray(positions), None
    # A NumPy array is split by NumPy: its float64 would become float32 on its way into JAX.
    numpy: Any = jnp if isinstance(positions, jax.Array) else np
    positions = positions.astype(np.promote_types(positions.dtype, np.float32))
    whole = numpy.round(positions)
    with np.errstate(invalid="ignore"):  # NaN, of which the rest is NaN too
        return jnp.asarray(whole.astype(np.int32)), jnp.asarray(positions - whole, dtype)


def _is_number(value: object, kind: type) -> bool:
    """Whether `value` is an array, or a NumPy scalar, of this kind of dtype."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(value.dtype, kind)
