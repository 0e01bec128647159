"""Rotary position embedding: positions as rotations of the queries and the keys."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from flash_attention_jax import _check
from flash_attention_jax._types import ArrayLike

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

    Angles, sines and cosines are computed in float32 (float64 for float64 `x`), never in the dtype
    of a lower-precision `x`. Float32 holds every position below 2**24; the angle of position `p`
    is then exact to about `p * 6e-8` radians. The tables cost `n * dim` numbers for each row of
    positions, whatever the number of heads.

    Args:
        x: queries or keys of any floating dtype. `layout="heads_first"`: (..., n, d), such as
            (n, d), (h, n, d) or (b, h, n, d). `layout="heads_last"`: (..., n, h, d), such as
            (n, h, d) or (b, n, h, d).
        offset: position of the first token, a Python integer or an integer array, traced or not, of
            shape () or, one per row of the batch, (b,), where b is the first axis of `x`.
        positions: position of each token, integer or floating, (n,) or (b, n). Any order, gaps and
            repetitions included (packed sequences start again at 0). `None` means 0 .. n - 1.
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

    where = _check_offset(offset, x, length_axis)[..., None]
    steps = _check_positions(positions, x, length_axis)
    # Integers add as integers, whatever their widths: a float32 sum would round twice.
    integer = jnp.int64 if where.dtype.itemsize == 8 or steps.dtype.itemsize == 8 else jnp.int32
    common = dtype if jnp.issubdtype(steps.dtype, jnp.floating) else integer
    where = (where.astype(common) + steps.astype(common)).astype(dtype)  # (n,) or (b, n)

    # The frequencies are constants: float64 at trace time costs nothing and rounds once.
    frequencies = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / scaling
    theta = where[..., None] * jnp.asarray(frequencies, dtype)
    # Room for the axes that `where` lacks: those between batch and length, and the heads after it.
    batch = theta.shape[:-2] + (1,) * (length_axis - theta.ndim + 2)
    theta = theta.reshape(*batch, length, *(1,) * (x.ndim - 2 - length_axis), dim // 2)
    cos, sin = jnp.cos(theta), jnp.sin(theta)

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


def _check_x(x: ArrayLike, layout: str) -> Array:
    """Reads `x` as an array and checks dtype and rank against the layout."""
    _check.choice("layout", layout, ("heads_first", "heads_last"))
    _check.floating("x", x)
    rank, axes = (2, "(..., n, d)") if layout == "heads_first" else (3, "(..., n, h, d)")
    if x.ndim < rank:
        requirement = f"have at least {rank} axes {axes} with layout={layout!r}"
        _check.fail("x", requirement, f"shape {x.shape}", "Add the missing axes.")
    return jnp.asarray(x)


def _check_dim(dim: int | None, x: Array) -> int:
    """How many features rotate."""
    if dim is None:
        if x.shape[-1] % 2 or not x.shape[-1]:
            advice = "Give `dim`, an even number of features to rotate."
            _check.fail("x", "have an even last axis", f"shape {x.shape}", advice)
        return x.shape[-1]
    dim = _check.whole("dim", dim, least=2)
    if dim % 2 or dim > x.shape[-1]:
        got = f"{dim} with `x` {x.shape}"
        advice = "Choose how many of the first features to rotate."
        _check.fail("dim", "be even and at most the last axis of `x`", got, advice)
    return dim


def _check_positive(name: str, value: float) -> float:
    """A static positive number."""
    number = _check.number(name, value)
    if number <= 0:
        default = 10000.0 if name == "base" else 1.0
        _check.fail(name, "be positive", repr(value), f"The default is {default}.")
    return number


def _check_offset(offset: int | np.integer | ArrayLike, x: Array, length_axis: int) -> Array:
    """`offset` as an integer array of shape () or (b,)."""
    if isinstance(offset, int) and not isinstance(offset, bool):
        return jnp.asarray(offset, jnp.int32)
    if not _is_number(offset, jnp.integer):
        advice = "Fractional positions go in `positions`."
        got = _check.shown(offset)
        _check.fail("offset", "be an integer or an integer array", got, advice, TypeError)
    offset = jnp.asarray(offset)
    batched = length_axis > 0
    if offset.ndim and not (batched and offset.shape == x.shape[:1]):
        allowed = f"() or ({x.shape[0]},)" if batched else "()"
        advice = "Pass one offset, or one for each row of the batch (the first axis of `x`)."
        _check.fail("offset", f"have shape {allowed} with `x` {x.shape}", str(offset.shape), advice)
    return offset


def _check_positions(positions: ArrayLike | None, x: Array, length_axis: int) -> Array:
    """`positions` as an array of shape (n,) or (b, n)."""
    length = x.shape[length_axis]
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)
    advice = "Pass one position for each token."
    if not (_is_number(positions, jnp.integer) or _is_number(positions, jnp.floating)):
        got = _check.shown(positions)
        _check.fail("positions", "be an integer or floating array", got, advice, TypeError)
    shapes = [(length,)] + ([(x.shape[0], length)] if length_axis > 0 else [])
    if positions.shape not in shapes:
        requirement = f"have shape {' or '.join(map(str, shapes))} with `x` {x.shape}"
        _check.fail("positions", requirement, str(positions.shape), advice)
    return jnp.asarray(positions)


def _is_number(value: object, kind: type) -> bool:
    """Whether `value` is an array, or a NumPy scalar, of this kind of dtype."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(value.dtype, kind)
