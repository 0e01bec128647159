"""From the shapes of q, k and v to the sizes of a call, in each family's axes and ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

from flash_attention_jax._core import check
from flash_attention_jax._core.call import Layout, Size

Names = tuple[str, str, str]


class Sizes(NamedTuple):
    """The sizes of a call, by the names of `Call`."""

    batch: Size
    q_len: Size
    k_len: Size
    heads: Size
    kv_heads: Size
    dim: Size
    v_dim: Size


def sizes_and_shapes(
    layout: Layout, names: Names, q: Any, k: Any, v: Any
) -> tuple[Sizes, tuple[Size, ...], tuple[Size, ...]]:
    """Sizes of the call, and the shapes of out and lse in the rank of q.

    Args:
        layout: Family of the function.
        names: What the user calls q, k and v.
        q: Queries, in any of the family's ranks.
        k: Keys.
        v: Values.

    Raises:
        TypeError: If one is no array of floats, or their dtypes differ.
        ValueError: If their shapes do not agree.
    """
    q_name, k_name, _ = names
    for name, x in zip(names, (q, k, v), strict=True):
        check.floating(name, x)
    check.same_dtype(names, (q, k, v))
    sizes = (_heads_first if layout == "heads_first" else _heads_last)(names, q, k, v)
    if sizes.dim == 0:
        check.fail(
            q_name,
            "have a dimension of at least 1",
            f"shape {tuple(q.shape)}",
            "Reshape it.",
        )
    for name, x, heads in ((q_name, q, sizes.heads), (k_name, k, sizes.kv_heads)):
        if heads == 0:
            got = f"shape {tuple(x.shape)}"
            check.fail(name, "have at least 1 head", got, "Reshape it.")
    if sizes.heads % sizes.kv_heads:
        check.fail(
            q_name,
            f"have a multiple of the heads of `{k_name}`",
            f"{sizes.heads} heads and {sizes.kv_heads} key heads",
            "Query head n reads key head n // (heads // key heads).",
        )
    out_shape = (*q.shape[:-1], v.shape[-1])
    return sizes, tuple(out_shape), tuple(q.shape[:-1])


def _heads_first(names: Names, q: Any, k: Any, v: Any) -> Sizes:
    q_name, k_name, v_name = names
    check.rank(q_name, q, (2, 3, 4), "(n, d), (bh, n, d) or (b, h, n, d)")
    ranks = {2: (2,), 3: (3,), 4: (3, 4)}[len(q.shape)]
    meaning = {
        2: f"of `{q_name}`, (n, d)",
        3: f"of `{q_name}`, (bh, n, d)",
        4: f"of `{q_name}`, (b, h, n, d), or (b, n, d) for a single head",
    }[len(q.shape)]
    for name, x in ((k_name, k), (v_name, v)):
        check.rank(name, x, ranks, meaning, f" beside {q_name} {tuple(q.shape)}")
    if tuple(k.shape[:-1]) != tuple(v.shape[:-1]):
        check.agree(
            (k_name, v_name),
            "batch, heads and length",
            (k, v),
            "Only the dimension may differ.",
        )
    if q.shape[-1] != k.shape[-1]:
        check.agree(
            (q_name, k_name), "the dimension (last axis)", (q, k), "Project them to the same."
        )
    if len(q.shape) > 2 and q.shape[0] != k.shape[0]:
        check.agree((q_name, k_name), "batch (first axis)", (q, k), "Repeat or reshape one.")
    batch, heads = ((1, 1, *q.shape)[-4:][:2]) if len(q.shape) != 3 else (q.shape[0], 1)
    kv_heads = k.shape[1] if len(k.shape) == 4 else 1
    return Sizes(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q.shape[-2],
        k_len=k.shape[-2],
        dim=q.shape[-1],
        v_dim=v.shape[-1],
    )


def _heads_last(names: Names, q: Any, k: Any, v: Any) -> Sizes:
    q_name, k_name, v_name = names
    check.rank(q_name, q, (3, 4), "(length, heads, dim) or (batch, length, heads, dim)")
    axes = f"{'(batch, ' if len(q.shape) == 4 else '('}length, key heads, dim)"
    for name, x in ((k_name, k), (v_name, v)):
        beside = f" beside {q_name} {tuple(q.shape)}"
        check.rank(name, x, (len(q.shape),), f"of `{q_name}`, {axes}", beside)
    if tuple(k.shape[:-1]) != tuple(v.shape[:-1]):
        check.agree(
            (k_name, v_name),
            "batch, length and heads",
            (k, v),
            "Only the dimension may differ.",
        )
    if q.shape[-1] != k.shape[-1]:
        check.agree(
            (q_name, k_name), "the dimension (last axis)", (q, k), "Project them to the same."
        )
    if len(q.shape) == 4 and q.shape[0] != k.shape[0]:
        check.agree((q_name, k_name), "batch (first axis)", (q, k), "Repeat or reshape one.")
    return Sizes(
        batch=q.shape[0] if len(q.shape) == 4 else 1,
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        q_len=q.shape[-3],
        k_len=k.shape[-3],
        dim=q.shape[-1],
        v_dim=v.shape[-1],
    )
