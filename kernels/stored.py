"""Tiles that were measured: a JSON file per kind of device, read when a call is first traced.

`flash-attention-jax tune` writes it; `_config` and `triton_config` ask it before their own tables.
The file lies in the folder that FLASH_ATTENTION_JAX_TILES names, else in the user's cache. A file
that cannot be used, or was made for another device, is a warning and nothing else.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

FOLDER_VARIABLE = "FLASH_ATTENTION_JAX_TILES"
FORMAT = 1

Entry = dict[str, int]
Entries = dict[str, Entry]

_trial: contextvars.ContextVar[Entries | None] = contextvars.ContextVar("trial", default=None)


def folder() -> Path:
    """Where the files lie."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flash_attention_jax"


def path_of(device_kind: str) -> Path:
    """The file of a kind of device."""
    return folder() / f"tiles-{re.sub(r'[^A-Za-z0-9.]+', '-', device_kind).strip('-')}.json"


def key(backend: str, direction: str, dim: int, *, banded: bool, dtype: str) -> str:
    """Name of an entry, such as "hopper forward 128 banded bfloat16"."""
    return f"{backend} {direction} {dim} {'banded' if banded else 'full'} {dtype}"


def lookup(name: str, fields: tuple[str, ...]) -> Entry | None:
    """The entry of this name for the GPU at hand, None where nothing was measured.

    Args:
        name: Of `key`.
        fields: What an entry has to have, each a positive integer.
    """
    trial = _trial.get()
    if trial is not None and name in trial:
        return trial[name]
    kind = device_kind()
    if kind is None:
        return None
    path = path_of(kind)
    entry = load(path, kind).get(name)
    if entry is None:
        return None
    whole = isinstance(entry, dict) and sorted(entry) == sorted(fields)
    if not whole or not all(type(x) is int and x > 0 for x in entry.values()):
        _warn(path, f"its entry {name!r} is {entry!r}, and must be positive {', '.join(fields)}")
        return None
    return entry


@functools.cache
def device_kind() -> str | None:
    """What JAX calls the first GPU, None without one."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return None


@functools.cache
def load(path: Path, device: str) -> Mapping[str, Entry]:
    """The entries of a file; none, and a warning, where it cannot be used."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _warn(path, f"it is not JSON that can be read ({error})")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return _warn(path, f"it is not of format {FORMAT}")
    if found.get("device") != device:
        return _warn(path, f"it was measured on {found.get('device')!r}, and this is {device!r}")
    entries = found.get("tiles")
    return entries if isinstance(entries, dict) else _warn(path, "it has no `tiles`")


def warn(reason: str) -> None:
    """Warn, once, that an entry for the GPU at hand is not used."""
    kind = device_kind()
    if kind is not None:
        _warn(path_of(kind), reason)


@functools.cache
def _warn(path: Path, reason: str) -> Mapping[str, Entry]:
    warnings.warn(
        f"The measured tiles in {path} are ignored: {reason}. Measure again with "
        "`flash-attention-jax tune`, or delete the file.",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}


def write(device: str, entries: Entries, path: Path | None = None) -> Path:
    """Add entries to a device's file, in one step, and say where it is."""
    path = path or path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    load.cache_clear()
    entries = dict(load(path, device)) | entries
    text = {"format": FORMAT, "device": device, "jax": jax.__version__, "tiles": entries}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    part.replace(path)
    load.cache_clear()
    return path


@contextlib.contextmanager
def trial(entries: Entries) -> Iterator[None]:
    """Within it these entries come before any file: to measure them."""
    token = _trial.set(entries)
    try:
        yield
    finally:
        _trial.reset(token)
