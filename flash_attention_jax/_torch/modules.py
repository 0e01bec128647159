"""Attention layers for torch, with the arguments of memory-efficient-attention-pytorch.

Their parameters have that package's names, shapes and meaning, so its state_dict loads.
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeForm=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Bool, Float, Num

from flash_attention_jax._api import run
from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch.bridge import jax2torch
from flash_attention_jax._torch.options import kept, seeded
from flash_attention_jax._torch.read import check_dense

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch
    from torch import nn

__all__ = ["Attention", "CosineSimAttention"]


NAMES = {
    "q": "x",
    "k": "context",
    "v": "context",
    "bias": "attn_bias",
    "dropout_rate": "dropout",
    "block_q": "q_bucket_size",
    "block_kv": "k_bucket_size",
}
"""What the layers call the arguments."""


def _of_projected(x: Any, context: Any, mask: Any, attn_bias: Any, **options: Any) -> Any:
    """On JAX's side: queries (b, n, h, d), and keys and values (b, j, 2, h, d), as projected."""
    k, v = context[:, :, 0], context[:, :, 1]
    mask = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
    similarity = options.pop("similarity", "dot")
    options |= {"bias": attn_bias, "q_offset": k.shape[1] - x.shape[1]}
    fixed = {"layout": "heads_last", "similarity": similarity, "names": NAMES}
    return run.run("Attention", x, k, v, mask, options, **fixed)


_attend = jax2torch(_of_projected)


class Attention(nn.Module):
    """Multi-head attention over a sequence or to another one, without biases in its projections.

        q = x @ to_q;   k, v = split(context @ to_kv)
        y = concatenate_heads(softmax(q k^T / sqrt(dim_head) + attn_bias) v) @ to_out

    The arguments and parameters are those of memory-efficient-attention-pytorch: `to_q.weight`
    (heads * dim_head, dim), `to_kv.weight` (2 * heads * dim_head, dim) and `to_out.weight` (dim,
    heads * dim_head). Two things differ: dropout is applied to the normalised probabilities, and by
    both algorithms; the sizes of the buckets are the library's choice unless they are given.

    Args:
        dim: Features of the input and of the output.
        heads: Number of heads.
        dim_head: Features of each head.
        dropout: Share of the probabilities dropped in training, in [0, 1), from torch's generator.
        causal: A token attends to itself and to those before it; end-aligned, so that the last
            token of x sees the whole context.
        memory_efficient: Use memory linear in the length; False computes by the definition, with
            all logits in memory, to compare with.
        q_bucket_size: Queries per block where `memory_efficient`; None = the library's choice.
        k_bucket_size: Keys per block where `memory_efficient`; None = the library's choice.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import Attention
        >>> layer = Attention(dim=32, dim_head=8, heads=4, causal=True, memory_efficient=True)
        >>> layer(torch.randn(1, 100, 32)).shape
        torch.Size([1, 100, 32])

    References:
        Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        causal: bool = False,
        memory_efficient: bool = False,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            check.whole(name, size, least=1)
        self.heads = heads
        self.causal = check.flag("causal", causal)
        self.dropout = check.rate("dropout", dropout)
        self.memory_efficient = memory_efficient
        self.q_bucket_size = q_bucket_size
        self.k_bucket_size = k_bucket_size
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        x: Float[torch.Tensor, "b n dim"],
        context: Float[torch.Tensor, "b j dim"] | None = None,
        mask: Bool[torch.Tensor, "..."] | Num[torch.Tensor, "..."] | None = None,
        attn_bias: Float[torch.Tensor, "..."] | None = None,
        memory_efficient: bool | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
    ) -> Float[torch.Tensor, "b n dim"]:
        """Attends from x to the context.

        Args:
            x: (b, n, dim).
            context: (b, j, dim); None = x.
            mask: Boolean, or integer of 0 and 1 (1 = may attend): (b, j), or broadcasting to
                (b, h, n, j).
            attn_bias: Added to the logits, broadcasts to (b, h, n, j).
            memory_efficient: None = that of the layer, and so for the next two.
            q_bucket_size: As of the layer.
            k_bucket_size: As of the layer.

        Returns:
            (b, n, dim).

        Raises:
            ValueError: x or the context is not (b, length, dim), or as in `flash_attention`.
            TypeError: As in `flash_attention`.
        """
        context = x if context is None else context
        for name, tensor in (("x", x), ("context", context)):
            dim = self.to_q.in_features
            check_dense(lambda name=name: name, tensor)
            if tensor.dim() != 3 or tensor.shape[-1] != dim:
                got, advice = f"shape {tuple(tensor.shape)}", "`dim` is that of the layer."
                check.fail(name, f"have the axes (batch, length, dim = {dim})", got, advice)
        efficient = self.memory_efficient if memory_efficient is None else memory_efficient
        options: dict[str, Any] = {"implementation": "dense"}
        if check.flag("memory_efficient", efficient):
            options = {
                "block_q": self.q_bucket_size if q_bucket_size is None else q_bucket_size,
                "block_kv": self.k_bucket_size if k_bucket_size is None else k_bucket_size,
            }
        if self.causal:
            options |= {"causal": True}
        if self.training:
            options |= {"dropout_rate": self.dropout}
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        kv = self.to_kv(context).unflatten(-1, (2, self.heads, -1))
        options = seeded({**options, **self._similarity()}, q)
        return self.to_out(_attend(q, kv, kept(mask), attn_bias, **options).flatten(-2))

    def _similarity(self) -> dict[str, Any]:
        """What distinguishes the two layers."""
        return {}


class CosineSimAttention(Attention):
    """`Attention` by cosine similarity with a scale per head, which is learned.

        y = concatenate_heads(softmax(exp(scale) * l2norm(q) l2norm(k)^T + attn_bias) v) @ to_out

    The arguments and parameters are those of memory-efficient-attention-pytorch: beside the ones of
    `Attention`, `scale` (1, heads, 1, 1), the log of the factor. The factor begins at
    log2(seq_len^2 - seq_len) as the paper has it; that package begins at the inverse of this, which
    leaves the attention nearly uniform. What `Attention` says of dropout and buckets holds here.

    Args:
        dim: As in `Attention`.
        seq_len: Length of the sequences, at least 2; the scale begins at what suits it.
        heads: As in `Attention`.
        dim_head: As in `Attention`.
        dropout: As in `Attention`.
        causal: As in `Attention`.
        memory_efficient: As in `Attention`.
        q_bucket_size: As in `Attention`.
        k_bucket_size: As in `Attention`.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import CosineSimAttention
        >>> layer = CosineSimAttention(dim=32, seq_len=100, dim_head=8, heads=4, causal=True)
        >>> layer(torch.randn(1, 100, 32)).shape
        torch.Size([1, 100, 32])

    References:
        Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245, section 3.
    """

    def __init__(self, *, dim: int, seq_len: int, heads: int = 8, **options: Any) -> None:
        super().__init__(dim=dim, heads=heads, **options)
        check.whole("seq_len", seq_len, least=2, advice="A scale is of use among several keys.")
        log_scale = math.log(math.log2(seq_len**2 - seq_len))
        self.scale = nn.Parameter(torch.full((1, heads, 1, 1), log_scale))

    def _similarity(self) -> dict[str, Any]:
        return {"similarity": "cosine", "scale": self.scale.exp()}
