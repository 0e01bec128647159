"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import flash_attention_jax

NAMES = ["flash_attention_jax"]
NAMES += [m.name for m in pkgutil.walk_packages(flash_attention_jax.__path__, NAMES[0] + ".")]
OPTIONAL = {"flax", "optax", "tqdm", "orbax", "matplotlib", "torch", "triton", "jax_triton"}
CODE = [name for name in NAMES if not name.endswith("__main__")]


def load(name):
    """The module; skips where a package that it is about is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        # A shell's error has the missing package as its cause; the kernels import theirs plainly.
        missing = getattr(error.__cause__ or error, "name", None) or ""
        if missing.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {missing}")


@pytest.mark.parametrize("name", CODE)
def test_examples_print_what_they_say(name):
    module = load(name)
    # As users run them, with JAX's own settings.
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        failed, _ = doctest.testmod(module, raise_on_error=False)
    assert failed == 0, "see the captured output"


def test_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = (
        "_api.attention",
        "_api.cosine",
        "_api.plain",
        "_api.explain",
        "_api.merge",
        "compare",
        "rotary",
        "varlen",
        "testing",
    )
    for name in modules:
        module = importlib.import_module(f"flash_attention_jax.{name}")
        assert any(test.examples for test in finder.find(module)), name
    assert len(CODE) > 15


def test_example_that_is_wrong_is_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
