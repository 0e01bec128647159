"""One wording for an optional dependency that is not there, or is there and does not import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["needs"]


@contextlib.contextmanager
def needs(module: str, *packages: str, extra: str) -> Iterator[None]:
    """Turns a failed import of `packages` into an error that says what to install.

    Args:
        module: the module of this library that needs them, as its user imports it.
        packages: names of the packages imported in the block, as on PyPI.
        extra: the extra of this distribution that installs them.

    Raises:
        ImportError: a package is missing, or is installed and fails while it is imported.

    Example:
        >>> with needs("flash_attention_jax.shell", "absent", extra="flax"):
        ...     import absent
        Traceback (most recent call last):
        ImportError: flash_attention_jax.shell needs absent: pip install 'flash-attention-jax[flax]'
    """
    try:
        yield
    # A package built for another jax fails with whatever its first broken line raises, so any
    # exception counts.
    except Exception as error:
        name = error.name or "" if isinstance(error, ImportError) else ""
        if name.split(".")[0] == __name__.split(".")[0]:
            raise  # from another module of this library, which has said what it needs
        *most, last = packages
        wanted = f"{module} needs {', '.join(most)}{' and ' if most else ''}{last}"
        advice = f"pip install 'flash-attention-jax[{extra}]'"
        modules = {package.replace("-", "_") for package in packages}
        if isinstance(error, ModuleNotFoundError) and name.split(".")[0] in modules:
            raise ImportError(f"{wanted}: {advice}", name=module) from error
        raise ImportError(
            f"{wanted}, and it does not import here: {type(error).__name__}: {error}. "
            f"Try {advice} --upgrade",
            name=module,
        ) from error
