"""Exact attention for JAX, by dot product or by cosine similarity, in memory linear in the length.

Heads first, (batch, heads, length, dim): `flash_attention`, `flash_cosine_sim_attention` and their
relatives. JAX's own convention, (batch, length, heads, dim): `dot_product_attention`, a drop-in for
that of `jax.nn`. Packed sequences, (tokens, heads, dim): `flash_attention_varlen`.

The other public modules, such as `linen`, `sharding` and `torch`, are attributes too, each imported
when it is first asked for.
"""

import importlib.util
import types
import typing

if importlib.util.find_spec("flash_attention_jax.kernels") is None:
    raise ImportError(
        "flash_attention_jax/kernels must be a link to the folder kernels beside the package; "
        "git writes a text or nothing where it makes no symbolic links. In the checkout, run "
        "`git config core.symlinks true` and `git checkout -- flash_attention_jax/kernels` (on "
        "Windows in developer mode), or run `pip install .` there and import it from elsewhere.",
        name="flash_attention_jax.kernels",
    )

from flash_attention_jax._api.attention import (
    causal_flash_attention,
    dot_product_attention,
    flash_attention,
)
from flash_attention_jax._api.cosine import (
    causal_cosine_sim_flash_attention,
    cosine_sim_flash_attention,
    flash_cosine_sim_attention,
    l2norm_tensors,
)
from flash_attention_jax._api.explain import explain
from flash_attention_jax._api.merge import merge_attention
from flash_attention_jax._api.plain import (
    attention,
    causal_attention,
    cosine_sim_attention,
    memory_efficient_attention,
    plain_cosine_sim_attention,
)
from flash_attention_jax.compare import PRNGKeyGenerator, value_and_grad_difference
from flash_attention_jax.rotary import apply_rotary
from flash_attention_jax.varlen import (
    flash_attention_varlen,
    flash_attention_varlen_qkvpacked,
    pad_input,
    unpad_input,
)

__version__ = "1.0.0.dev0"

plain_attention = attention
rabe_attention = memory_efficient_attention

__all__ = [
    "PRNGKeyGenerator",
    "__version__",
    "apply_rotary",
    "attention",
    "causal_attention",
    "causal_cosine_sim_flash_attention",
    "causal_flash_attention",
    "cosine_sim_attention",
    "cosine_sim_flash_attention",
    "dot_product_attention",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attention_varlen_qkvpacked",
    "flash_cosine_sim_attention",
    "l2norm_tensors",
    "memory_efficient_attention",
    "merge_attention",
    "pad_input",
    "plain_attention",
    "plain_cosine_sim_attention",
    "rabe_attention",
    "unpad_input",
    "value_and_grad_difference",
]

_MODULES = (
    "cache",
    "compare",
    "data",
    "linen",
    "nnx",
    "rotary",
    "sharding",
    "testing",
    "torch",
    "train",
    "transformer",
    "varlen",
)

# Type checkers would take any name for an attribute.
if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> types.ModuleType:
        """A public module, of which some need packages that a plain install lacks (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:  # as an attribute that is missing: `hasattr` and `help` ask
            raise AttributeError(str(error)) from error

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
