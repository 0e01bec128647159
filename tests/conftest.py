"""What every test runs under: strict promotion, float64 for the oracle, fixed seeds.

Float64 is on throughout, so a test names the dtype of each array it makes.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# The interpreter of the Hopper kernels waits for barriers inside callbacks, each of which holds one
# of XLA's threads: with as many as two cores have, the threads that would be waited for never run.
os.environ.setdefault("NPROC", "16")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update(
        "jax_num_cpu_devices", 4
    )  # so that pmap and shard_map have what to shard over

# Annotations are executed below the front: what arrives there has been checked, so a wrong shape is
# a bug of the library. At the front it is the user's, and meets the library's own error.
BELOW_THE_FRONT = ("_core", "_engines", "_parallel", "kernels")
ROOT = Path(__file__).parents[1]
install_import_hook(
    [
        f"flash_attention_jax.{wing}.{path.stem}"
        for wing in BELOW_THE_FRONT
        for path in sorted((ROOT / "flash_attention_jax" / wing).glob("*.py"))
        # Triton reads the source of its kernels and would trip over a check wrapped around them.
        if "@triton.jit" not in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype",
)

# Compiling makes single examples slow and the first one slowest, so there is no deadline.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone: not on its order, nor on its worker."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is told of numbers that other tests compiled before it."""
    from flash_attention_jax._api import compilations

    monkeypatch.setattr(compilations, "_values", {})
    monkeypatch.setattr(compilations, "_warned", set())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU that JAX can use; JAX's devices here are {jax.devices()}")


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compile without LLVM's optimizations, for tests whose time is that of compiling."""
    previous = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", previous)
    jax.clear_caches()  # no other test may get what was compiled here
