"""The fast paths, one backend per file; imports as `flash_attention_jax.kernels`.

The folder lies at the top of the repository, beside the package, and setup.cfg maps it into the
package; the link `flash_attention_jax/kernels` does the same for a checkout. A file is named after
its backend (`hopper_forward.py`, `triton_forward.py`); `hopper_support.py` and `triton_support.py`
say of any call why they decline it.
"""

if __name__ != "flash_attention_jax.kernels":
    raise ImportError(
        f"This folder must be imported as `flash_attention_jax.kernels`, got `{__name__}`. "
        "Write `import flash_attention_jax.kernels`.",
        name=__name__,
    )
