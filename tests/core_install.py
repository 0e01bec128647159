"""What an install of the core requirements alone must have; `make test-core` runs it in one."""

import importlib.util
import sys

import jax
import jax.numpy as jnp

import flash_attention_jax as f

EXTRAS = ("flax", "matplotlib", "optax", "orbax", "torch", "tqdm", "triton")


def main() -> int:
    """Prints what is wrong; the exit code says whether anything is."""
    brought = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    if brought:
        print(f"This install is not that of the core requirements: it has {', '.join(brought)}.")
        return 1
    wrong = []
    q = jax.ShapeDtypeStruct((1, 8, 1024, 64), jnp.bfloat16)
    for options in ({}, {"causal": True}):
        said = f.explain(q, q, q, platform="gpu", capability=(9, 0), **options)
        for passed, chosen in (("forward", said.forward), ("backward", said.backward)):
            if chosen != "hopper":
                reason = said.reasons.get("hopper")
                wrong.append(f"{chosen} runs {passed} on sm_90 {options}, not hopper: {reason}")
    x = jnp.ones((1, 2, 8, 4), jnp.float32)
    if not bool(jnp.allclose(f.flash_attention(x, x, x), x)):
        wrong.append("flash_attention of ones is not ones")
    for name in sorted(set(f._MODULES) - {"linen", "nnx", "torch", "train", "transformer"}):
        try:
            importlib.import_module(f"flash_attention_jax.{name}")
        except ImportError as error:
            wrong.append(f"{name} does not import: {type(error).__name__}: {error}")
    wings = ("_api", "_commands", "_conformance", "_core", "_engines", "_flax", "_parallel")
    wrong += [
        f"the folder {wing} was not installed: list it in setup.cfg's packages"
        for wing in (*wings, "_torch", "_training", "kernels")
        if importlib.util.find_spec(f"flash_attention_jax.{wing}") is None
    ]
    print(
        *wrong or [f"jax {jax.__version__} and the core requirements have every kernel"], sep="\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
