"""Checkpoints that survive a kill at any moment, and interruptions that wait for one.

A folder belongs to one run at a time (`writing`), or the second would move the first's away.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from flash_attention_jax._core.optional import needs
from flash_attention_jax.data import FULL, InputError, no_room

with needs("flash_attention_jax.train", "orbax-checkpoint", extra="train"):
    import orbax.checkpoint as ocp

__all__ = ["interruptions", "restore", "save", "writing"]

FORMAT = 3  # of the manifest and of what lies beside it
KEPT = 2  # if the newest is damaged, the run goes on from the one before
MANIFEST = "manifest.json"
LOCK = ".lock"
SPARE = 2**18  # bytes beside the arrays: the manifest, and what orbax writes of their shapes
UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # what a file system lacks


@contextlib.contextmanager
def writing(out: Path, *, lock: bool = True) -> Iterator[None]:
    """A block in which this process, and no other, writes a run into `out`.

    The system holds the lock for the open file and lets go of it when the process ends, however it
    does, so a dead run locks nobody out. The file stays: removing it would race with the next run.

    Args:
        out: the folder of the run; made where it is missing.
        lock: whether to lock it; of several processes that train together, one does.

    Raises:
        InputError: another run writes into it, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out) if lock else contextlib.nullcontext():
            yield
    except Exception as error:
        found = [int(path.name) for path in _whole(out / "checkpoints")]
        resume = f"go on from step {found[-1]} with --resume" if found else "choose another"
        full = no_room(error, out, f"Free some, or {resume}.")
        if full is None:
            raise
        raise full from error


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / LOCK).open("a+", encoding="utf-8") as file:
        if not _lock(file):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise InputError(
                f"`--out` must be a folder into which no other run writes, got {out}, into which "
                f"{holder} does. Wait for it to end, or choose another."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Takes the lock of an open file, which its closing gives back; `False` if another has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(2**30)  # past the text, which others cannot read where it is locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
    return True


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
    try:
        _write(partial, state, config)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    if whole.exists():
        _discard(whole)
    partial.rename(whole)
    _sync(folder)
    for old in _whole(folder)[:-KEPT]:
        _discard(old)
    return whole


def _write(partial: Path, state: Any, config: Mapping[str, Any]) -> None:
    """Arrays and manifest, on the disk when this returns."""
    partial.mkdir()
    # Before orbax, whose threads would print hundreds of lines about a full disk.
    _reserve(partial, SPARE + sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")))
    with _checkpointer() as checkpointer:
        checkpointer.save((partial / "state").absolute(), args=ocp.args.StandardSave(state))
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sums = {path.relative_to(partial).as_posix(): _checksum(path) for path in files}
    manifest = {"format": FORMAT, "config": dict(config), "arrays": _kinds(state), "crc32": sums}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    # The rename must not reach the disk before what is renamed does.
    for path in (partial, *partial.rglob("*")):
        _sync(path)


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


def _reserve(folder: Path, size: int) -> None:
    """Raises the system's error where `folder` has no room for `size` bytes."""
    if hasattr(os, "posix_fallocate"):  # which knows of quotas too
        room = folder / "room"
        try:
            with room.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in FULL:
                raise
        finally:
            room.unlink(missing_ok=True)
    elif shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    try:
        # Windows writes out only what is open for writing, and opens no folder.
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of other machines have nothing to write out for a folder.
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
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
