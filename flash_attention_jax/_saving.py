"""Checkpoints that survive a kill at any moment, and interruptions that wait for one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flash_attention_jax._optional import needs
from flash_attention_jax.data import InputError

with needs("flash_attention_jax.train", "orbax-checkpoint", extra="train"):
    import orbax.checkpoint as ocp

__all__ = ["interruptions", "restore", "save"]

FORMAT = 3  # of the manifest and of what lies beside it
KEPT = 2  # if the newest is damaged, the run goes on from the one before
MANIFEST = "manifest.json"


def save(folder: Path, step: int, state: Any, config: Mapping[str, Any]) -> Path:
    """Writes `state` as a checkpoint in `folder`, whole or not at all.

    A checkpoint is a folder named after its step. It holds the arrays, written by orbax, and a
    manifest with the configuration, what the arrays are, and a checksum of every file. It gets its
    name when all of it is on the disk, so what has a name is whole; only then older ones go.

    Args:
        folder: where the checkpoints of one run lie; made where it is missing.
        step: names the checkpoint.
        state: a pytree of arrays and numbers.
        config: what the state was made with, as JSON has it.

    Returns:
        The checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.partial"):  # by a kill
        shutil.rmtree(left)
    whole = folder / f"{step:08d}"
    partial = folder / f".{whole.name}.partial"
    with _checkpointer() as checkpointer:
        checkpointer.save((partial / "state").absolute(), args=ocp.args.StandardSave(state))
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sums = {path.relative_to(partial).as_posix(): _checksum(path) for path in files}
    manifest = {"format": FORMAT, "config": dict(config), "arrays": _kinds(state), "crc32": sums}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    # The rename must not reach the disk before what is renamed does.
    for path in (partial, *partial.rglob("*")):
        _sync(path)
    if whole.exists():
        _discard(whole)
    partial.rename(whole)
    _sync(folder)
    for old in _whole(folder)[:-KEPT]:
        _discard(old)
    return whole


def restore(folder: Path, template: Any, config: Mapping[str, Any]) -> Any:
    """The state of the newest checkpoint in `folder`.

    Args:
        folder: that of `save`.
        template: a pytree like the state that was saved: its structure, shapes and dtypes.
        config: what the checkpoint must have been made with.

    Returns:
        The state, in the structure of `template`.

    Raises:
        InputError: there is no checkpoint, or the newest one is damaged, was made with another
            `config`, or does not fit `template`.
    """
    found = _whole(folder)
    if not found:
        raise InputError(
            f"`--resume` must find a checkpoint, got none in {folder}. "
            "Leave out --resume to start, or give the --out of the interrupted run."
        )
    path = found[-1]
    try:
        made_with, arrays = _verified(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "Leave out --resume to start again."
        if len(found) > 1:
            advice = f"Remove that folder to go on from step {int(found[-2].name)}."
        raise InputError(
            f"`--resume` must find a whole checkpoint, got {path} ({_said(error)}). {advice}"
        ) from error
    for name in {**made_with, **config}:
        if made_with.get(name) != config.get(name):
            raise InputError(
                f"`--{name.replace('_', '-')}` must be what the checkpoint {path} was made with, "
                f"{made_with.get(name)}, got {config.get(name)}. "
                "Resume with the same options, or start anew with another --out."
            )
    # Not left to orbax, which goes on reading some arrays when another one does not fit.
    wanted = _kinds(template)
    for name in {**arrays, **wanted}:
        if arrays.get(name) != wanted.get(name):
            there, here = (kinds.get(name, "nothing") for kinds in (arrays, wanted))
            raise _other_arrays(path, f"{name} is {there} in it, and {here} here")
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.StandardRestore(template)
            return checkpointer.restore((path / "state").absolute(), args=args)
    except Exception as error:  # orbax has no class of its own for what does not fit
        raise _other_arrays(path, _said(error)) from error


def _other_arrays(path: Path, how: str) -> InputError:
    return InputError(
        f"`--resume` must find a checkpoint of this model, got {path}, whose arrays differ: {how}. "
        "Resume with the version of this library that made it, or start anew with another --out."
    )


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


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone: of several, each restores, and one saves."""
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        me = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        )
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=options)


def _whole(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(
        (p for p in folder.glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name)
    )


def _kinds(state: Any) -> dict[str, str]:
    """Dtype and shape of every leaf of a state, by its path."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        if hasattr(x, "shape")
        else type(x).__name__
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def _verified(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Configuration and arrays of a checkpoint, whose files are those that were written."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
    for name, crc in manifest["crc32"].items():
        if _checksum(path / name) != crc:
            raise ValueError(f"the checksum of {name} differs")
    return dict(manifest["config"]), dict(manifest["arrays"])


def _checksum(path: Path) -> int:
    """CRC-32 of a file, which is read in parts."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Removes a checkpoint, which loses its name before its first file."""
    partial = path.with_name(f".{path.name}.old.partial")
    path.rename(partial)
    shutil.rmtree(partial)


def _said(error: Exception) -> str:
    """An error in one line, short enough to read."""
    name = getattr(error, "filename", None)
    text = f"{name}: {error.strerror}" if isinstance(error, OSError) and name else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
