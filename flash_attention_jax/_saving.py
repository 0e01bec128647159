"""Checkpoints that survive a kill at any moment, and interruptions that wait for one."""

from __future__ import annotations

import contextlib
import json
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flash_attention_jax._optional import needs
from flash_attention_jax.data import InputError, replacing

with needs("flash_attention_jax.train", "flax", extra="train"):
    from flax import serialization

__all__ = ["interruptions", "restore", "save"]

MAGIC = b"flash_attention_jax checkpoint 1\n"


def save(path: Path, state: Any, config: Mapping[str, Any]) -> None:
    """Writes `state` (a pytree) and `config` (JSON) to `path`, whole or not at all.

    The file is a line that names the format, a line of JSON with the configuration and a checksum,
    and the arrays in Flax's msgpack.
    """
    payload = serialization.to_bytes(jax.device_get(state))
    header = json.dumps({"config": dict(config), "crc32": zlib.crc32(payload)})
    with replacing(path) as file:
        file.write(MAGIC + header.encode() + b"\n" + payload)


def restore(path: Path, template: Any, config: Mapping[str, Any]) -> Any:
    """The state in `path`, in the structure of `template`.

    Raises:
        InputError: there is no checkpoint, it is damaged, or it was made with another `config`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"`--resume` must find a checkpoint, got none at {path}. "
            "Leave out --resume to start, or give the --out of the interrupted run."
        ) from None
    try:
        if not content.startswith(MAGIC):
            raise ValueError("not a checkpoint of this version")
        header, newline, payload = content[len(MAGIC) :].partition(b"\n")
        if not newline:
            raise ValueError("it ends too early")
        meta = json.loads(header)
        if zlib.crc32(payload) != meta["crc32"]:
            raise ValueError("its checksum differs")
        made_with = dict(meta["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"`--resume` must find a whole checkpoint, got {path} ({error}). "
            "Leave out --resume to start again."
        ) from error
    for name in {**made_with, **config}:
        if made_with.get(name) != config.get(name):
            raise InputError(
                f"`--{name.replace('_', '-')}` must be what the checkpoint {path} was made with, "
                f"{made_with.get(name)}, got {config.get(name)}. "
                "Resume with the same options, or start anew with another --out."
            )
    return serialization.from_bytes(template, payload)


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGINT or SIGTERM came; a second signal acts as ever.

    An exception in the middle of a step would lose the state, whose buffers were given away.
    """
    came = False
    old: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        for which, handler in old.items():
            signal.signal(which, handler)

    with contextlib.suppress(ValueError):  # not the main thread: signals do not arrive here
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
