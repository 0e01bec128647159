"""The text that the demo and the training read: any file or folder, as one memory-mapped array."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import os
import shutil
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, UInt8, UInt64

__all__ = ["InputError", "Text", "byte_entropy", "load_text", "replacing"]

DEFAULT_FILE = Path("data/enwik8.gz")
VALID_FRACTION = 20  # one part in 20 is held out, as is usual for enwik8
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the largest file
HEAD = 8192  # bytes that tell what a file is
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


# What cannot be trained on as it lies, by the bytes that it begins with.
PACKED = (
    (b"\x1f\x8b", "gz"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"]\0\0", "lzma"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"\x1f\xa0", "compress (.Z)"),
    (b"LZIP\x01", "lzip"),
    (b"\x89LZO\0", "lzop"),
    (b"\xff\x06\0\0sNaPpY", "snappy"),
    (b"MSCF\0\0", "cab"),
    (b"PAR1\x15", "Parquet"),
    (b"%PDF-", "PDF"),
)
# The modules of Python's standard library that read some of them; a Python may be built without.
OPENERS = {"gz": "gzip", "bz2": "bz2", "xz": "lzma", "lzma": "lzma", "zip": "zipfile"}


class InputError(ValueError):
    """What a command line function was given cannot be used; its message is one line."""


def no_room(error: BaseException, folder: Path, advice: str) -> InputError | None:
    """The line for a disk that is full, where that is what `error` comes from.

    Args:
        error: what writing raised; those that it was raised from count too.
        folder: where a run writes.
        advice: what to do.

    Returns:
        The error to raise instead, or `None` where the disk is not full.

    Example:
        >>> error = OSError(errno.ENOSPC, "No space left on device")
        >>> print(no_room(error, Path("runs/demo"), "Free some."))
        `--out` must have room for what the run writes, got runs/demo: No space left on device. \
Free some.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = None
        if isinstance(cause, OSError) and cause.errno in FULL:
            text = cause.strerror
        elif not isinstance(cause, OSError):  # tensorstore's errors are text alone
            text = next((os.strerror(n) for n in FULL if os.strerror(n) in str(cause)), None)
        if text is not None:
            return InputError(
                f"`--out` must have room for what the run writes, got {folder}: {text}. {advice}"
            )
        cause = cause.__cause__ or cause.__context__
    return None


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as bytes on disk, its last part held out for validation.

    Attributes:
        source: where it came from, in words.
        train: (n,) uint8, memory-mapped.
        valid: (m,) uint8, memory-mapped.
        fingerprint: tells texts apart, wherever they lie.
    """

    source: str
    train: UInt8[np.ndarray, " n"]
    valid: UInt8[np.ndarray, " m"]
    fingerprint: str

    def batch(
        self, *, seed: int, step: int, batch: int, seq_len: int
    ) -> Int[np.ndarray, "batch length"]:
        """The stretches of the training text for one step, a function of `seed` and `step` alone.

        The text is cut into stretches that do not overlap, which are read in a shuffled order: each
        once, then all of them in another order, cut at other places. The order is computed and
        never stored, so memory does not depend on the length of the text.

        Args:
            seed: the run's seed.
            step: the step that this batch is for, from 0.
            batch: number of stretches.
            seq_len: tokens that the model reads in each.

        Returns:
            (batch, seq_len + 1) int32: what is read, and one byte more to predict.
        """
        # As many as fit wherever the cutting begins, so that every epoch has the same number.
        count = max(1, (len(self.train) - seq_len) // seq_len)
        shifts = min(seq_len, len(self.train) - count * seq_len)
        epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
        starts = np.empty(batch, np.int64)
        for epoch in np.unique(epochs):
            keys = np.random.default_rng((seed, int(epoch))).integers(0, 2**32, 5, np.uint64)
            now = epochs == epoch
            starts[now] = _shuffled(places[now], count, keys[:4]) * seq_len + int(keys[4]) % shifts
        return np.stack([self.train[s : s + seq_len + 1] for s in starts]).astype(np.int32)

    def validation(self, *, windows: int, seq_len: int) -> Int[np.ndarray, "w length"]:
        """At most `windows` stretches at even distances over the held-out text.

        Args:
            windows: how many are wanted; a short text gives fewer, so that they do not overlap.
            seq_len: tokens that the model reads in each.

        Returns:
            (w, seq_len + 1) int32 with 1 <= w <= windows.
        """
        count = max(1, min(windows, (len(self.valid) - 1) // seq_len))
        starts = np.linspace(0, len(self.valid) - seq_len - 1, count).astype(np.int64)
        return np.stack([self.valid[s : s + seq_len + 1] for s in starts]).astype(np.int32)


def load_text(data: str | os.PathLike[str] | None, *, cache: Path, seq_len: int) -> Text:
    """Opens a text without reading it whole.

    A plain file is mapped where it lies. A compressed file and a folder are written once as a flat
    file into `cache`, and found there as long as their sizes and dates stay.

    Args:
        data: a text, one that gzip, bzip2 or xz compressed, a zip archive with one file, or a
            folder, whose text files are read in the order of their paths; compressed ones in it
            are left out. `None` means data/enwik8.gz where that exists, and otherwise the source
            of Python's standard library.
        cache: folder for flat copies.
        seq_len: the least length that the training part and the held-out part must have.

    Returns:
        The text; its last twentieth is held out.

    Raises:
        InputError: no such file, one that cannot be read, one that something else compressed, a
            text that is too short, or no room for the flat file.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "text.txt").write_bytes(b"to be or not to be, " * 100)
        >>> text = load_text(folder / "text.txt", cache=folder, seq_len=16)
        >>> len(text.train), len(text.valid)
        (1900, 100)
    """
    try:
        source, path = _find(data, cache)
        size = path.stat().st_size
        if size < 2 * (seq_len + 1):
            raise InputError(
                f"`--data` must hold at least {2 * (seq_len + 1)} bytes with --seq-len {seq_len}, "
                f"got {size} in {source}. Give a longer text or a smaller --seq-len."
            )
        flat = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise InputError(
            f"`--data` must be readable, got {error.filename or data}: {error.strerror or error}. "
            "Check the path and its permissions."
        ) from error
    held_out = max(size // VALID_FRACTION, seq_len + 1)
    return Text(source, flat[:-held_out], flat[-held_out:], _fingerprint(flat))


def byte_entropy(data: UInt8[np.ndarray, "..."] | Int[np.ndarray, "..."]) -> float:
    """Bits per byte of the best model that knows how often each byte occurs, and nothing more.

        H = -sum_b p(b) * log2(p(b)),        p(b) = count(b) / n

    No code that ignores the order of the bytes needs fewer bits for `data`.

    Args:
        data: integers in [0, 256), any shape, at least one.

    Returns:
        The entropy of order 0, in bits.

    Example:
        >>> byte_entropy(np.frombuffer(b"aabc", np.uint8))
        1.5
    """
    counts = np.bincount(np.ravel(data), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and else goes.

    Whenever the process is killed, `path` is what it was before, or whole.

    Args:
        path: the file to write or to replace; its folder is made where it is missing.

    Yields:
        The file, open for writing.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"all of it")
        >>> path.read_bytes()
        b'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _shuffled(
    places: Int[np.ndarray, " n"], count: int, keys: UInt64[np.ndarray, " rounds"]
) -> Int[np.ndarray, " n"]:
    """Where a permutation of range(count), drawn by `keys`, takes `places`.

    A Feistel network permutes the numbers of an even count of bits (Luby and Rackoff, 1988); what
    it takes out of the range is taken on until it falls inside.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    places = places.astype(np.uint64)
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & low
        for key in keys:
            # The odd number is 2**64 over the golden ratio; a product's upper bits mix best.
            mixed = ((right + key) ^ (key << np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        places[outside] = (left << half) | right
        outside = places >= count
    return places.astype(np.int64)


def _find(data: str | os.PathLike[str] | None, cache: Path) -> tuple[str, Path]:
    """The text in words, and the flat file that holds it."""
    if data is None and not DEFAULT_FILE.is_file():
        folder = Path(sysconfig.get_path("stdlib"))
        files = list(_files(folder, cache, suffix=".py"))
        return f"Python's standard library ({folder})", _join(files, folder, cache)
    path = DEFAULT_FILE if data is None else Path(data)
    if path.is_dir():
        files = list(_files(path, cache))
        if not files:
            raise InputError(
                f"`--data` must be a text or a folder with texts, got {path} without any. "
                "Give another folder."
            )
        return f"{len(files)} files in {path}", _join(files, path, cache)
    if not path.is_file():
        raise InputError(
            f"`--data` must be a file or a folder that exists, got {path}. "
            "Leave it out to read Python's standard library."
        )
    if not path.stat().st_size:
        raise InputError(f"`--data` must hold text, got {path} with 0 bytes. Give another file.")
    with path.open("rb") as file:
        kind = _packed(file.read(HEAD), path.suffix)
    return str(path), path if kind is None else _unpack(path, kind, cache)


def _packed(head: bytes, suffix: str = "") -> str | None:
    """How a file is compressed or archived, by its beginning; `None` where it is read as it is."""
    if head[257:262] == b"ustar":
        return "tar"
    if suffix == ".br":  # nothing in it tells
        return "brotli"
    for magic, kind in PACKED:
        if head.startswith(magic):
            # Three letters may begin a text; a stream goes on with its level and a block's number.
            blocks = (b"1AY&SY", b"\x17rE8P\x90")
            if kind != "bz2" or (head[3:4] in b"123456789" and head[4:10] in blocks):
                return kind
    if head[:1] == b"x":  # a zlib stream has no more to know it by, so it is tried
        with contextlib.suppress(zlib.error):
            zlib.decompressobj().decompress(head)
            return "zlib"
    return None


def _unreadable(path: Path, kind: str) -> InputError:
    return InputError(
        "`--data` must be a text, one compressed as .gz, .bz2 or .xz, a .zip of one file, or a "
        f"folder, got {path}, which is {kind}. Unpack it first."
    )


def _files(folder: Path, cache: Path, suffix: str = "") -> Iterator[Path]:
    """The text files under `folder`, sorted by path, without tests, caches and hidden ones."""
    for root, folders, names in os.walk(folder):
        # Sorted while walking: a folder's files first, then its folders, on every machine.
        folders[:] = sorted(
            name
            for name in folders
            if name not in SKIPPED_FOLDERS
            and not name.startswith(".")
            # The flat copies must not become part of the next text.
            and (Path(root) / name).resolve() != cache.resolve()
        )
        for name in sorted(names):
            path = Path(root) / name
            if name.startswith(".") or not name.endswith(suffix) or not path.is_file():
                continue
            with path.open("rb") as file:
                head = file.read(HEAD)
            # How git tells texts from other files; a short compressed file may hold no zero.
            if head and b"\0" not in head and _packed(head, path.suffix) is None:
                yield path


def _join(files: list[Path], folder: Path, cache: Path) -> Path:
    """One flat file with the contents of `files` one after another."""

    def copy(target: BinaryIO) -> None:
        for path in files:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

    return _cached(files, folder, cache, copy)


def _unpack(path: Path, kind: str, cache: Path) -> Path:
    """One flat file with the contents of a compressed file."""
    if kind not in OPENERS:
        raise _unreadable(path, kind)
    try:
        module = importlib.import_module(OPENERS[kind])
    except ImportError as error:
        raise _unreadable(path, f"{kind}, and this Python cannot read it ({error})") from error

    def copy(target: BinaryIO) -> None:
        with contextlib.ExitStack() as stack:
            if kind == "zip":
                archive = stack.enter_context(module.ZipFile(path))
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                if len(entries) != 1:
                    raise _unreadable(path, f"a zip of {len(entries)} files")
                source = stack.enter_context(archive.open(entries[0]))
            else:
                source = stack.enter_context(module.open(path, "rb"))
            head = source.read(HEAD)
            inner = _packed(head)
            if inner is not None:  # names and padding of an archive, say, are no text
                raise _unreadable(path, f"{inner} inside {kind}")
            target.write(head)
            shutil.copyfileobj(source, target)

    bad = [getattr(module, name, EOFError) for name in ("BadGzipFile", "LZMAError", "BadZipFile")]
    try:
        return _cached([path], path.parent, cache, copy)
    except (EOFError, zlib.error, *bad) as error:
        reason: Exception = error
    except RuntimeError as error:  # a password, or a method that Python does not have
        raise _unreadable(path, f"a zip that Python cannot read ({error})") from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the data
            raise
        reason = error
    raise InputError(
        f"`--data` must be a whole .{kind} file, got {path}: {reason}. Fetch it again."
    ) from reason


def _cached(
    files: list[Path], folder: Path, cache: Path, write: Callable[[BinaryIO], None]
) -> Path:
    """The flat file for `files` in `cache`, written if it is not there yet."""
    stats = [(path, path.stat()) for path in files]
    key = repr([(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns) for p, s in stats])
    target = cache / f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    if target.is_file():
        return target
    try:
        with replacing(target) as file:
            write(file)
    except OSError as error:
        full = no_room(error, cache, "Free some, or choose another.")
        if full is None:
            raise
        raise full from error
    return target


def _fingerprint(flat: UInt8[np.ndarray, " n"]) -> str:
    """A digest of the length and of 64 samples: quick for any length."""
    digest = hashlib.sha256(str(len(flat)).encode())
    for start in np.linspace(0, max(0, len(flat) - 4096), 64).astype(np.int64):
        digest.update(flat[start : start + 4096].tobytes())
    return digest.hexdigest()[:16]
