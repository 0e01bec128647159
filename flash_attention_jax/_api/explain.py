"""Which implementation would run a call, and why."""

from __future__ import annotations

from typing import Any, Unpack

from flash_attention_jax._api import read
from flash_attention_jax._api.options import Options
from flash_attention_jax._api.run import check_implementation, check_names
from flash_attention_jax._core import check
from flash_attention_jax._engines import dispatch


def explain(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    similarity: str = "dot",
    layout: str = "heads_first",
    platform: str | None = None,
    capability: tuple[int, int] | None = None,
    **options: Unpack[Options],
) -> dispatch.Explanation:
    """Which implementation would run a call, and why no other would. Nothing is computed.

    Args:
        q: As in `flash_attention`, or a `jax.ShapeDtypeStruct`; so are the other arrays.
        k: As in `flash_attention`.
        v: As in `flash_attention`.
        mask: As in `flash_attention`.
        similarity: "dot" or "cosine".
        layout: "heads_first", or "heads_last" for the shapes of `dot_product_attention`.
        platform: "cpu", "gpu" or "tpu" to ask about; None = here.
        capability: CUDA compute capability to ask about, such as (9, 0).
        **options: As in `flash_attention`.

    Returns:
        A record with `forward`, `backward`, `platform` and `reasons`; print it.

    Raises:
        ValueError: As in `flash_attention`.
        TypeError: As in `flash_attention`.
        NotImplementedError: As in `flash_attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import explain
        >>> q = jax.ShapeDtypeStruct((1, 8, 1024, 64), jnp.float32)
        >>> explain(q, q, q, causal=True, platform="cpu").forward
        'blocked'
    """
    check.choice("layout", layout, ("heads_first", "heads_last"))
    if platform is not None:
        check.choice("platform", platform, ("cpu", "gpu", "cuda", "rocm", "tpu"))
    _check_capability(capability)
    check_names("explain", dict(options), {})
    implementation = options.get("implementation")
    check_implementation(implementation)
    reading = read.read(
        q,
        k,
        v,
        mask,
        dict(options),
        layout=layout,  # pyright: ignore[reportArgumentType]
        similarity=similarity,  # pyright: ignore[reportArgumentType]
        platform=platform,
        capability=capability,
    )
    return dispatch.explanation(reading.call, implementation)


def _check_capability(x: Any) -> None:
    pair = isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, int) for part in x)
    if x is not None and not pair:
        got = check.shown(x)
        check.fail("capability", "be two integers", got, "(9, 0) is an H100.", TypeError)
