"""Checkpoints: a run that is stopped, however, resumes with the same losses; damage is named."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import train
from flash_attention_jax._training import curves as drawing
from flash_attention_jax._training import saving
from flash_attention_jax.data import InputError, Text

ROOT = Path(__file__).parents[1]
PATTERN = b"the quick brown fox jumps over the lazy dog; "
SMALL = ["--dim", "32", "--depth", "1", "--heads", "1", "--seq-len", "16", "--batch", "4"]
CONFIG = {"steps": 2, "lr": 0.5}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(PATTERN * 100)
    return path


def options(text_file, out, *more, steps=6):
    return ["--data", str(text_file), "--out", str(out), *SMALL, "--steps", str(steps), *more]


def curve(out):
    """What the log of a run says of the steps, apart from their speed."""
    curves = drawing.read(out)
    del curves["tokens_per_second"]
    return np.stack(list(curves.values()))


def state_of(step, size=4):
    """A small state that tells its step."""
    array = jnp.full((size,), step, jnp.float32)
    return {"step": step, "params": {"w": array, "half": array.astype(jnp.bfloat16)}}


def same(state, other):
    return jax.tree.structure(state) == jax.tree.structure(other) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    )


# --- the folder -------------------------------------------------------------------------------


def test_newest_checkpoint_comes_back_as_it_was(tmp_path):
    for step in (1, 2, 10):
        assert saving.save(tmp_path, step, state_of(step), CONFIG) == tmp_path / f"{step:08d}"
    assert same(saving.restore(tmp_path, state_of(0), CONFIG), state_of(10))


def test_two_checkpoints_are_kept(tmp_path):
    for step in range(4):
        saving.save(tmp_path, step, state_of(step), CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]


def test_step_that_is_saved_again_replaces_the_first(tmp_path):
    saving.save(tmp_path, 1, state_of(7), CONFIG)
    saving.save(tmp_path, 1, state_of(8), CONFIG)
    assert same(saving.restore(tmp_path, state_of(0), CONFIG), state_of(8))


def test_killed_at_any_moment_of_saving_a_whole_checkpoint_is_left(tmp_path, monkeypatch):
    """The folder is copied before and after whatever touches the disk; each copy must load."""
    folder, copies = tmp_path / "checkpoints", []

    def noting(function):
        def noted(*args, **kwargs):
            copy()
            result = function(*args, **kwargs)
            copy()
            return result

        return noted

    def copy():
        copies.append(shutil.copytree(folder, tmp_path / f"copy{len(copies)}"))

    for step in (1, 2):
        saving.save(folder, step, state_of(step), CONFIG)
    with monkeypatch.context() as patch:
        for module, name in (
            (saving.ocp.Checkpointer, "save"),
            (saving.shutil, "rmtree"),
            (saving.os, "fsync"),
            (saving.os, "unlink"),
            (Path, "rename"),
            (Path, "write_text"),
        ):
            patch.setattr(module, name, noting(getattr(module, name)))
        saving.save(folder, 3, state_of(3), CONFIG)
    steps = [saving.restore(path, state_of(0), CONFIG)["step"] for path in copies]
    assert set(steps) == {2, 3}
    assert steps == sorted(steps)
    for path in copies:
        assert [saving._verified(whole) for whole in saving._whole(path)]
    # What a kill left behind goes with the next checkpoint.
    assert any(list(path.glob(".*")) for path in copies)
    saving.save(copies[1], 4, state_of(4), CONFIG)
    assert sorted(path.name for path in copies[1].iterdir()) == ["00000002", "00000004"]


def test_checkpoint_has_its_name_only_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noting(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    rename, unsynced = Path.rename, []

    def renaming(self, target):
        if Path(target).name.isdecimal():
            files = (self, *self.rglob("*"))
            unsynced.extend(p for p in files if p.stat().st_ino not in synced)
        return rename(self, target)

    monkeypatch.setattr(saving.os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", renaming)
    whole = saving.save(tmp_path, 1, state_of(1), CONFIG)
    assert (whole / "state").is_dir()
    assert unsynced == []


def test_checkpoint_is_saved_as_windows_has_it(tmp_path, monkeypatch):
    """There `fsync` refuses what was opened for reading alone, and no folder can be opened."""
    fsync, open_, synced = os.fsync, os.open, []

    def fsync_there(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def open_there(path, flags, *more, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, flags, *more, **options)

    monkeypatch.setattr(saving.os, "fsync", fsync_there)
    monkeypatch.setattr(saving.os, "open", open_there)
    path = saving.save(tmp_path, 1, state_of(1), CONFIG)
    files = [p.stat().st_ino for p in path.rglob("*") if p.is_file()]
    assert sorted(synced) == sorted(files)
    assert same(saving.restore(tmp_path, state_of(0), CONFIG), state_of(1))


def test_folder_that_cannot_be_synced_is_no_obstacle_and_a_file_is(tmp_path, monkeypatch):
    fsync, refused = os.fsync, [os.path.isdir]

    def refusing(descriptor):
        if refused[0](f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(saving.os, "fsync", refusing)
    saving.save(tmp_path, 1, state_of(1), CONFIG)
    assert same(saving.restore(tmp_path, state_of(0), CONFIG), state_of(1))
    refused[0] = os.path.isfile
    with pytest.raises(OSError, match="Invalid argument"):
        saving.save(tmp_path, 2, state_of(2), CONFIG)


# --- a full disk ------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_by_tensorstore(*args, **kwargs):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code]")


def quota(*args, **kwargs):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


NO_ROOM = {
    "before orbax": ("os.posix_fallocate", full, "No space left on device"),
    "quota": ("os.posix_fallocate", quota, "Disk quota exceeded"),
    "in orbax": ("ocp.Checkpointer.save", full_by_tensorstore, "No space left on device"),
    "manifest": ("Path.write_text", full, "No space left on device"),
    "sync": ("os.fsync", full, "No space left on device"),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_full_disk_is_one_line_and_keeps_what_was_saved(case, tmp_path, monkeypatch):
    where, raising, text = NO_ROOM[case]
    folder = tmp_path / "checkpoints"
    said = f"`--out` must have room for what the run writes, got {tmp_path}: {text}. Free some, or "
    for step, advice in ((1, "choose another."), (2, "go on from step 1 with --resume.")):
        with monkeypatch.context() as patch:
            patch.setattr(f"flash_attention_jax._training.saving.{where}", raising, raising=False)
            with pytest.raises(InputError) as caught, saving.writing(tmp_path):
                saving.save(folder, step, state_of(step), CONFIG)
        assert str(caught.value) == said + advice
        assert list(folder.glob(".*")) == []  # the part that was written takes no room
        with saving.writing(tmp_path):
            saving.save(folder, step, state_of(step), CONFIG)
    assert same(saving.restore(folder, state_of(0), CONFIG), state_of(2))


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), saving.writing(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_room_is_asked_for_before_orbax_starts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        saving.os, "posix_fallocate", lambda fd, start, size: asked.append(size), raising=False
    )
    saving.save(tmp_path, 1, state_of(1, size=10**6), CONFIG)
    assert 6e6 < asked[0] < 6.5e6
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < asked[0]
    assert "room" not in {p.name for p in files}
    monkeypatch.delattr(saving.os, "posix_fallocate")  # as on macOS and Windows
    usage = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="No space left on device"):
        saving.save(tmp_path, 2, state_of(2, size=10**6), CONFIG)


# --- damage -----------------------------------------------------------------------------------


def largest(path):
    """The file with the arrays."""
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    file = largest(path / "state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(path):
    file = largest(path / "state")
    file.write_bytes(file.read_bytes()[:-1])


def change(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


DAMAGE = {
    "one bit": (flip, r"the checksum of state/\S+ differs"),
    "cut": (cut, r"the checksum of state/\S+ differs"),
    "file missing": (
        lambda path: largest(path / "state").unlink(),
        r"\S+/state/\S+: No such file or directory",
    ),
    "manifest missing": (
        lambda path: (path / "manifest.json").unlink(),
        r"\S+/manifest.json: No such file or directory",
    ),
    "manifest cut": (
        lambda path: (path / "manifest.json").write_text('{"format": 3,'),
        r"Expecting property name .*",
    ),
    "manifest of another program": (
        lambda path: (path / "manifest.json").write_text("[]"),
        r"list indices must be integers or slices, not str",
    ),
    "manifest without sums": (lambda path: change(path, crc32=None), r".* no attribute 'items'"),
    "a later format": (
        lambda path: change(path, format=4),
        r"it has format 4, this version reads 3",
    ),
    "nothing in it": (
        lambda path: (shutil.rmtree(path), path.mkdir()),
        r"\S+/manifest.json: No such file or directory",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused(case, tmp_path):
    damage, reason = DAMAGE[case]
    path = saving.save(tmp_path, 1, state_of(1, size=1000), CONFIG)
    damage(path)
    wanted = (
        rf"`--resume` must find a whole checkpoint, got {re.escape(str(path))} \({reason}\)\. "
        r"Leave out --resume to start again\."
    )
    with pytest.raises(InputError, match=f"^{wanted}$"):
        saving.restore(tmp_path, state_of(0, size=1000), CONFIG)


def test_damaged_checkpoint_says_that_there_is_an_older_one(tmp_path):
    saving.save(tmp_path, 1, state_of(1), CONFIG)
    path = saving.save(tmp_path, 2, state_of(2), CONFIG)
    flip(path)
    with pytest.raises(InputError, match=r"Remove that folder to go on from step 1\.$"):
        saving.restore(tmp_path, state_of(0), CONFIG)
    shutil.rmtree(path)
    assert same(saving.restore(tmp_path, state_of(0), CONFIG), state_of(1))


def test_no_checkpoint_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError) as caught:
            saving.restore(folder, state_of(0), CONFIG)
        assert str(caught.value) == (
            f"`--resume` must find a checkpoint, got none in {folder}. "
            "Leave out --resume to start, or give the --out of the interrupted run."
        )


@pytest.mark.parametrize(
    ("template", "how"),
    [
        (state_of(0, size=5), "['params']['half'] is bfloat16[4] in it, and bfloat16[5] here"),
        (
            {"step": 0, "params": {"w": jnp.zeros(4, jnp.float32)}},
            "['params']['half'] is bfloat16[4] in it, and nothing here",
        ),
        (
            {**state_of(0), "more": jnp.zeros(1, jnp.float32)},
            "['more'] is nothing in it, and float32[1] here",
        ),
    ],
    ids=["shape", "fewer", "more"],
)
def test_checkpoint_with_other_arrays_is_refused(template, how, tmp_path):
    path = saving.save(tmp_path, 1, state_of(1), CONFIG)
    with pytest.raises(InputError) as caught:
        saving.restore(tmp_path, template, CONFIG)
    assert str(caught.value) == (
        f"`--resume` must find a checkpoint of this model, got {path}, whose arrays differ: {how}. "
        "Resume with the version of this library that made it, or start anew with another --out."
    )


def test_what_orbax_refuses_is_said_in_one_line(tmp_path, monkeypatch):
    saving.save(tmp_path, 1, state_of(1), CONFIG)
    monkeypatch.setattr(saving.ocp.args, "StandardRestore", lambda template: 1 / 0)
    with pytest.raises(InputError) as caught:
        saving.restore(tmp_path, state_of(0), CONFIG)
    assert "whose arrays differ: division by zero. Resume with" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "made_with", "got"), [("lr", 0.5, 0.25), ("steps", 2, 3), ("seed", None, 0)]
)
def test_checkpoint_of_another_configuration_is_refused(name, made_with, got, tmp_path):
    path = saving.save(tmp_path, 1, state_of(1), CONFIG)
    with pytest.raises(InputError) as caught:
        saving.restore(tmp_path, state_of(0), {**CONFIG, name: got})
    assert str(caught.value) == (
        f"`--{name}` must be what the checkpoint {path} was made with, {made_with}, got {got}. "
        "Resume with the same options, or start anew with another --out."
    )


# --- the commands -----------------------------------------------------------------------------


def test_command_refuses_another_configuration_and_another_text(text_file, tmp_path, capsys):
    argv = options(text_file, tmp_path)
    assert train.train_main(argv) == 0
    capsys.readouterr()
    path = tmp_path / "checkpoints" / "00000006"
    assert train.train_main([*argv, "--resume", "--heads", "2"]) == 2
    assert capsys.readouterr().err == (
        f"error: `--heads` must be what the checkpoint {path} was made with, 1, got 2. "
        "Resume with the same options, or start anew with another --out.\n"
    )
    text_file.write_bytes(PATTERN * 101)
    assert train.train_main([*argv, "--resume"]) == 2
    assert re.fullmatch(
        r"error: `--data` must be what .* was made with, text \w+, got text \w+\. .*\n",
        capsys.readouterr().err,
    )


def test_command_refuses_a_damaged_checkpoint(text_file, tmp_path, capsys):
    argv = options(text_file, tmp_path)
    assert train.train_main(argv) == 0
    capsys.readouterr()
    flip(tmp_path / "checkpoints" / "00000006")
    log = (tmp_path / "log.csv").read_bytes()
    assert train.train_main([*argv, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `--resume` must find a whole checkpoint, got ")
    assert error.count("\n") == 1
    assert (tmp_path / "log.csv").read_bytes() == log


def test_command_on_a_full_disk_is_one_line_and_resumes(text_file, tmp_path, monkeypatch, capsys):
    argv = options(text_file, tmp_path / "run", "--save-every", "2")
    calls = []

    def full_later(*args):
        calls.append(args)
        if len(calls) > 2:
            full()

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "posix_fallocate", full_later, raising=False)
        assert train.train_main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("train: step ")] == [
        f"error: `--out` must have room for what the run writes, got {tmp_path}/run: "
        "No space left on device. Free some, or go on from step 4 with --resume."
    ]
    assert train.train_main([*argv, "--resume"]) == 0
    assert train.train_main(options(text_file, tmp_path / "whole")) == 0
    np.testing.assert_array_equal(curve(tmp_path / "run"), curve(tmp_path / "whole"))


@pytest.mark.parametrize(
    "where", ["_training.curves.os.fsync", "_training.curves.draw", "train.replacing"]
)
def test_log_picture_and_summary_on_a_full_disk_are_one_line(
    where, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(f"flash_attention_jax.{where}", full)
    assert train.train_main(options(text_file, tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: `--out` must have room for what the run writes, got {tmp_path}")


# --- one run in a folder ------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from flash_attention_jax._training import saving
with saving.writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_second_run_in_a_folder_is_refused_until_the_first_ends_however(
    text_file, tmp_path, capsys
):
    out = tmp_path / "run"
    argv = options(text_file, out)
    assert train.train_main(argv) == 0
    before = sorted(out.rglob("*"))
    command = [sys.executable, "-c", HOLD, str(out)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "held\n"
        capsys.readouterr()
        for more in ([], ["--resume"]):
            assert train.train_main([*argv, *more]) == 2
            printed = capsys.readouterr()
            assert printed.err == (
                f"error: `--out` must be a folder into which no other run writes, got {out}, into "
                f"which process {first.pid} on {platform.node()} does. "
                "Wait for it to end, or choose another.\n"
            )
            assert printed.out == ""
        assert sorted(out.rglob("*")) == before  # nothing was moved away
        first.kill()
        first.wait()
    assert (out / ".lock").read_text() == f"process {first.pid} on {platform.node()}"
    assert train.train_main([*argv, "--resume"]) == 0


def test_loop_alone_is_refused_too(text_file, tmp_path):
    text = train.load_text(text_file, cache=tmp_path, seq_len=16)
    parser = train._parser("train", steps=6, out="")
    config = train._config(parser.parse_args(options(text_file, tmp_path)), text)
    with saving.writing(tmp_path):
        with pytest.raises(InputError, match="into which no other run writes"):
            train.fit(config, text, tmp_path)
        train.fit(config, text, tmp_path / "elsewhere")
    train.fit(config, text, tmp_path)


def test_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def without(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with saving.writing(tmp_path):
        assert (tmp_path / ".lock").exists()


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Sends this process a signal while the batch of `step` is made."""
    batch = Text.batch

    def interrupting(self, **kwargs):
        if kwargs["step"] == step:
            signal.raise_signal(number)
        return batch(self, **kwargs)

    monkeypatch.setattr(Text, "batch", interrupting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_resumes_with_the_same_losses(
    text_file, tmp_path, monkeypatch, capsys, number
):
    assert train.train_main(options(text_file, tmp_path / "whole")) == 0
    argv = options(text_file, tmp_path / "parts")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, number)
        capsys.readouterr()
        assert train.train_main(argv) == 130
    assert signal.getsignal(number) is handler
    printed = capsys.readouterr().out
    assert f"Interrupted at step 3 of 6, saved in {tmp_path}/parts/checkpoints." in printed
    assert curve(tmp_path / "parts").shape[1] == 3
    assert (tmp_path / "parts" / "curves.png").exists()

    command = shlex.split(printed.split("To go on: ")[1].strip())
    assert command[1:4] == ["-m", "flash_attention_jax", "train"]
    assert command[4:] == [*argv, "--resume"]
    assert train.train_main(command[4:]) == 0
    assert "bits per byte" in capsys.readouterr().out
    np.testing.assert_array_equal(curve(tmp_path / "parts"), curve(tmp_path / "whole"))


def test_interrupted_report_says_how_to_get_it(text_file, tmp_path, monkeypatch, capsys):
    argv = options(text_file, tmp_path, "--validate-every", "0")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert train.train_main(argv) == 130
    assert "Interrupted at step 6 of 6, saved in" in capsys.readouterr().out
    assert train.train_main([*argv, "--resume"]) == 0


def test_second_interrupt_acts_at_once(text_file, tmp_path, monkeypatch):
    batch = Text.batch

    def interrupting(self, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return batch(self, **kwargs)

    monkeypatch.setattr(Text, "batch", interrupting)
    # A shell's background job is started with SIGINT ignored, and "as ever" would be to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train.train_main(options(text_file, tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "checkpoints").exists()


def test_finished_run_resumes_to_its_report(text_file, tmp_path, capsys):
    argv = options(text_file, tmp_path)
    assert train.train_main(argv) == 0
    first, log = capsys.readouterr().out, (tmp_path / "log.csv").read_bytes()
    assert train.train_main([*argv, "--resume"]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "log.csv").read_bytes() == log


def test_new_run_keeps_the_results_that_it_replaces(text_file, tmp_path, capsys):
    argv = options(text_file, tmp_path)
    kept = tmp_path / "previous"
    for run in range(3):
        (tmp_path / "samples.txt").write_text(f"before run {run}")
        assert train.train_main(argv) == 0
        assert (kept / "samples.txt").read_text() == f"before run {run}"
        assert not (tmp_path / "samples.txt").exists()
    assert f"an earlier run's results are kept in {kept}" in capsys.readouterr().out
    assert (kept / "checkpoints" / "00000006" / "manifest.json").exists()
    assert (kept / "summary.json").exists()
    np.testing.assert_array_equal(curve(kept), curve(tmp_path))


def rows(out):
    """How many steps the log has so far."""
    with contextlib.suppress(FileNotFoundError):
        return (out / "log.csv").read_bytes().count(b"\n") - 1
    return 0


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_losses(text_file, tmp_path, rng):
    """SIGKILL, twice, at moments that are drawn; a checkpoint is nearly always under way."""
    steps = 60
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(out, *more):
        command = [sys.executable, "-m", "flash_attention_jax", "train"]
        return subprocess.Popen(
            [*command, *options(text_file, out, "--save-every", "1", *more, steps=steps)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = start(tmp_path / "whole")
    out, resume, kills = tmp_path / "parts", [], []
    for enough in (5, 25):
        process = start(out, *resume)
        deadline = time.monotonic() + 120
        while rows(out) < enough and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, printed
        kills.append(rows(out))
        resume = ["--resume"]
    assert kills == sorted(set(kills))
    assert kills[-1] < steps
    process = start(out, *resume)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    printed, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, printed
    np.testing.assert_array_equal(curve(out), curve(tmp_path / "whole"))
    assert curve(out).shape[1] == steps
