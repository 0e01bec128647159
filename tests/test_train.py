"""Training, its log and its texts, by way of the commands where it can be."""

import bz2
import dataclasses
import errno
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import re
import sys
import tarfile
import types
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flash_attention_jax import data, train
from flash_attention_jax._training import curves as drawing
from flash_attention_jax._training import loop
from flash_attention_jax.data import InputError, byte_entropy, load_text
from flash_attention_jax.transformer import CausalTransformer, generate

PATTERN = b"the quick brown fox jumps over the lazy dog; "
SMALL = ["--dim", "32", "--depth", "1", "--heads", "1", "--seq-len", "16", "--batch", "4"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(PATTERN * 100)
    return path


def options(text_file, out, *more, steps=6):
    # The number of steps is a part of the configuration: another one compiles again.
    return ["--data", str(text_file), "--out", str(out), *SMALL, "--steps", str(steps), *more]


def config_of(text, **changes):
    # By default what `options` asks for: a configuration compiles once.
    values = {
        "data": f"text {text.fingerprint}",
        "similarity": "dot",
        "attention": "auto",
        "dtype": "float32",
        "dim": 32,
        "depth": 1,
        "heads": 1,
        "seq_len": 16,
        "batch": 4,
        "accumulate": 1,
        "steps": 6,
        "lr": 4e-3,
        "warmup": 1,
        "clip": 1.0,
        "seed": 0,
    }
    return train.Config(**{**values, **changes})


def losses_in(out):
    """The losses in the log of a run."""
    return drawing.read(out)["bits_per_byte"].astype(np.float32)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_loss_falls_below_that_of_byte_frequencies(text_file, tmp_path, capsys, similarity):
    argv = options(text_file, tmp_path, "--similarity", similarity, "--lr", "1e-2", steps=60)
    assert train.train_main(argv) == 0
    losses = losses_in(tmp_path)
    assert len(losses) == 60
    assert losses[0] > 7
    printed = capsys.readouterr().out
    order0, bits = (float(x) for x in re.findall(r"^  (\d+\.\d+)  ", printed, re.MULTILINE))
    assert order0 == pytest.approx(byte_entropy(np.frombuffer(PATTERN, np.uint8)), abs=0.1)
    assert bits < order0 - 1
    assert losses[-1] == pytest.approx(bits, abs=0.5)


def test_commands_say_which_text_and_show_a_sample(text_file, tmp_path, capsys):
    assert train.train_main(options(text_file, tmp_path)) == 0
    printed = capsys.readouterr()
    assert f"text: {text_file}, 4,500 bytes: 4,275 to train, 225 to validate" in printed.out
    sample = printed.out.split("a sample; the text before the bar was given:\n\n")[1]
    given, drawn = sample.split("|", 1)
    assert given.encode() in PATTERN * 2
    assert drawn
    assert "bits/byte" in printed.err


def test_dense_and_blocked_attention_give_the_same_losses(text_file, tmp_path):
    for attention in ("dense", "blocked"):
        argv = options(text_file, tmp_path / attention, "--attention", attention)
        assert train.train_main(argv) == 0
    np.testing.assert_allclose(
        losses_in(tmp_path / "dense"), losses_in(tmp_path / "blocked"), rtol=1e-5
    )


def test_bfloat16_trains_with_parameters_in_float32(text_file, tmp_path):
    text = load_text(text_file, cache=tmp_path, seq_len=16)
    config = config_of(text, dtype="bfloat16")
    state = train.fit(config, text, tmp_path / "half")
    assert {x.dtype.name for x in jax.tree.leaves(state["params"])} == {"float32"}
    train.fit(config_of(text), text, tmp_path / "single")
    half, single = losses_in(tmp_path / "half"), losses_in(tmp_path / "single")
    assert (half != single).any()
    np.testing.assert_allclose(half, single, rtol=0.02)


def test_accumulated_batches_are_one_large_batch(text_file, tmp_path):
    text = load_text(text_file, cache=tmp_path, seq_len=16)
    for accumulate in (1, 4):
        config = config_of(text, batch=4 // accumulate, accumulate=accumulate)
        train.fit(config, text, tmp_path / str(accumulate))
    whole = drawing.read(tmp_path / "1")
    parts = drawing.read(tmp_path / "4")
    for name in ("bits_per_byte", "gradient_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4)
    assert len(whole["step"]) == 6


def test_gradients_are_clipped_and_the_rate_warms_up_and_falls(text_file, tmp_path):
    text = load_text(text_file, cache=tmp_path, seq_len=16)
    config = config_of(text, warmup=2, lr=1e-2, clip=1e-3)
    gradient = {"w": jnp.asarray([3.0, 4.0], jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = config.optimizer.update(gradient, config.optimizer.init(gradient), gradient)
    # Adam's first mean is a tenth of the gradient, whose norm of 5 became 1e-3.
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], [6e-5, 8e-5], rtol=1e-5)
    # Up to 1e-2 in two steps, then along half a cosine that would reach 1e-3 after four more.
    half = 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4))
    expected = [0.0, 5e-3, *(1e-3 + 9e-3 * half)]
    with jax.numpy_dtype_promotion("standard"):
        rates = [float(config.schedule(np.int32(step))) for step in range(7)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_length_8192_trains(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(PATTERN * 400)
    argv = ["--data", str(path), "--out", str(tmp_path), "--dim", "32", "--depth", "1"]
    argv += ["--heads", "1", "--seq-len", "8192", "--batch", "1", "--steps", "2"]
    text = load_text(path, cache=tmp_path, seq_len=8192)
    config = train._config(train._parser("train", steps=2, out="").parse_args(argv), text)
    state = train.fit(config, text, tmp_path)
    assert state["step"] == 2
    assert np.isfinite(losses_in(tmp_path)).all()


def test_log_has_a_row_for_each_step_and_validations_where_asked(text_file, tmp_path):
    out = tmp_path / "run"
    argv = options(text_file, out, "--validate-every", "4", "--sample-every", "3")
    assert train.train_main(argv) == 0
    curves = drawing.read(out)
    assert tuple(curves) == drawing.COLUMNS
    np.testing.assert_array_equal(curves["step"], np.arange(1, 7))
    assert np.flatnonzero(np.isfinite(curves["validation"])).tolist() == [3, 5]  # and the last
    assert (curves["tokens_per_second"] > 0).all()
    assert (curves["gradient_norm"] > 0).all()
    half = 0.5 * (1 + np.cos(np.pi * np.arange(5) / 5))
    np.testing.assert_allclose(curves["learning_rate"], [0, *(4e-4 + 3.6e-3 * half)], rtol=1e-5)
    samples = (out / "samples.txt").read_text()
    assert re.findall(r"^--- after (\d) steps", samples, re.MULTILINE) == ["3", "6"]
    # Validation and samples do not touch the run.
    assert train.train_main(options(text_file, tmp_path / "plain", "--validate-every", "0")) == 0
    plain = drawing.read(tmp_path / "plain")
    assert np.isnan(plain["validation"]).all()
    np.testing.assert_array_equal(plain["bits_per_byte"], curves["bits_per_byte"])


def test_run_leaves_a_picture_and_a_summary(text_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.train_main(options(text_file, out)) == 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["steps"] == 6
    assert summary["versions"]["jax"] == jax.__version__
    bits = summary["held_out_bits_per_byte"]
    printed = capsys.readouterr().out
    assert f"  {bits['model']:.3f}  this model" in printed
    assert f"{summary['sample']['given']}|{summary['sample']['drawn']}" in printed


def test_rows_after_the_checkpoint_and_a_row_cut_short_are_forgotten(tmp_path):
    with drawing.Curves(tmp_path, done=0) as curves:
        for step in (1, 2, 3):
            curves.add(step=step, bits_per_byte=np.float32(1 / step))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4,0.2")
    assert drawing.read(tmp_path)["step"].tolist() == [1, 2, 3]
    with drawing.Curves(tmp_path, done=2) as curves:
        curves.add(step=3, bits_per_byte=0.5, validation=0.25)
    found = drawing.read(tmp_path)
    assert found["step"].tolist() == [1, 2, 3]
    assert found["bits_per_byte"].tolist() == [1, 0.5, 0.5]
    np.testing.assert_array_equal(found["validation"], [np.nan, np.nan, 0.25])


def test_mean_in_the_picture_is_that_of_the_last_steps():
    np.testing.assert_allclose(drawing._smooth(np.arange(40.0))[[0, 1, 2, 39]], [0, 0.5, 1.5, 38.5])
    np.testing.assert_array_equal(drawing._smooth(np.asarray([3.0])), [3.0])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_picture_of_a_run_that_has_hardly_begun_is_drawn(tmp_path, steps):
    with drawing.Curves(tmp_path, done=0) as curves:
        for step in range(steps):
            curves.add(step=step + 1, bits_per_byte=8.0, gradient_norm=1.0, learning_rate=0.0)
    assert drawing.draw(tmp_path, "nothing yet").read_bytes().startswith(b"\x89PNG")


class Writer:
    """What TensorBoard offers, as far as it is used."""

    written: list = []  # noqa: RUF012

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, name, value, step):
        self.written.append((self.folder, name, value, step))

    def close(self):
        self.written.append("closed")


def test_tensorboard_gets_the_numbers_if_it_is_installed(tmp_path, monkeypatch):
    module = type(sys)("tensorboard.summary")
    module.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    monkeypatch.setitem(sys.modules, "tensorboard", type(sys)("tensorboard"))
    monkeypatch.setattr(drawing, "find_spec", lambda name: name == "tensorboard")
    with drawing.Curves(tmp_path, done=0) as curves:
        curves.add(step=1, bits_per_byte=8.0)
    assert Writer.written == [(str(tmp_path / "tensorboard"), "bits_per_byte", 8.0, 1), "closed"]
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with drawing.Curves(tmp_path, done=0) as curves:
        curves.add(step=1, bits_per_byte=8.0)
    assert len(Writer.written) == 2


def test_real_tensorboard_writes_its_file(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard")
    with drawing.Curves(tmp_path, done=0) as curves:
        curves.add(step=1, bits_per_byte=8.0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"bits_per_byte" in events.read_bytes()


def test_broken_tensorboard_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", type(sys)("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", type(sys)("tensorboard.summary"))
    monkeypatch.setattr(drawing, "find_spec", lambda name: name == "tensorboard")
    with drawing.Curves(tmp_path, done=0) as curves:
        curves.add(step=1, bits_per_byte=8.0)
    assert "TensorBoard is installed and does not import" in capsys.readouterr().out
    assert drawing.read(tmp_path)["bits_per_byte"].tolist() == [8.0]


def test_progress_shows_the_speed_without_the_first_step(capsys):
    config = config_of(type("T", (), {"fingerprint": ""}), accumulate=2)
    with loop._progress(config, 0, "train", shown=True) as progress:
        for loss, seconds in ((9.0, 60.0), (7.0, 0.25), (5.0, 0.75)):
            progress({"bits_per_byte": np.float32(loss)}, seconds)
    # 2 batches of 4 sequences of 16 tokens in half a second on average.
    assert "256 tokens/s, 7.000 bits/byte" in capsys.readouterr().err


def test_progress_in_a_pipe_is_whole_lines(capsys):
    config = config_of(type("T", (), {"fingerprint": ""}), steps=25)
    for done, shown in ((0, True), (22, True), (0, False)):
        with loop._progress(config, done, "train", shown=shown) as progress:
            for _ in range(done, 25):
                progress({"bits_per_byte": np.float32(8.0)}, 0.5)
        said = capsys.readouterr().err
        steps = [n for n in (3, 6, 9, 12, 15, 18, 21, 24, 25) if n > done and shown]
        assert said == "".join(
            f"train: step {n} of 25, 128 tokens/s, 8.000 bits/byte\n" for n in steps
        )


def test_progress_of_slow_steps_is_a_line_a_minute(monkeypatch, capsys):
    config = config_of(type("T", (), {"fingerprint": ""}), steps=10_000)
    now = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with loop._progress(config, 0, "train", shown=True) as progress:
        for _ in range(8):
            now[0] += 25.0
            progress({"bits_per_byte": np.float32(8.0)}, 25.0)
    steps = re.findall(r"^train: step (\d+) of 10000, ", capsys.readouterr().err, re.MULTILINE)
    assert steps == ["3", "6"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    config = config_of(type("T", (), {"fingerprint": ""}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with loop._progress(config, 0, "train", shown=True) as progress:
        progress({"bits_per_byte": np.float32(8.0)}, 0.5)
    said = capsys.readouterr().err
    assert re.search(r"\rtrain: +17%.*1/6 .*128 tokens/s, 8.000 bits/byte\]", said)
    assert "step 1 of 6" not in said


BAD_INPUT = {
    "missing": (
        ["--data", "nowhere.txt"],
        "`--data` must be a file or a folder that exists, got nowhere.txt. "
        "Leave it out to read Python's standard library.",
    ),
    "empty": (
        ["--data", "empty.txt"],
        "`--data` must hold text, got empty.txt with 0 bytes. Give another file.",
    ),
    "short": (
        ["--data", "short.txt"],
        "`--data` must hold at least 34 bytes with --seq-len 16, got 33 in short.txt. "
        "Give a longer text or a smaller --seq-len.",
    ),
    "empty gz": (
        ["--data", "empty.gz"],
        "`--data` must hold at least 34 bytes with --seq-len 16, got 0 in empty.gz. "
        "Give a longer text or a smaller --seq-len.",
    ),
    "cut gz": (
        ["--data", "cut.gz"],
        "`--data` must be a whole .gz file, got cut.gz: Compressed file ended before the "
        "end-of-stream marker was reached. Fetch it again.",
    ),
    "zip": (
        ["--data", "text.zip"],
        "`--data` must be a whole .zip file, got text.zip: File is not a zip file. Fetch it again.",
    ),
    "folder without text": (
        ["--data", "folder"],
        "`--data` must be a text or a folder with texts, got folder without any. "
        "Give another folder.",
    ),
    "out is a file": (
        ["--data", "long.txt", "--out", "empty.txt"],
        "`--out` must be a folder that can be written, got empty.txt: File exists. Choose another.",
    ),
    "no checkpoint": (
        ["--data", "long.txt", "--resume"],
        "`--resume` must find a checkpoint, got none in out/checkpoints. "
        "Leave out --resume to start, or give the --out of the interrupted run.",
    ),
    "no steps": (["--steps", "0"], "`--steps` must be at least 1, got 0. Raise it."),
    "no batch": (["--batch", "-1"], "`--batch` must be at least 1, got -1. Raise it."),
    "no accumulation": (
        ["--accumulate", "0"],
        "`--accumulate` must be at least 1, got 0. Raise it.",
    ),
    "warmup": (["--warmup", "-1"], "`--warmup` must be at least 0, got -1. Raise it."),
    "save every": (["--save-every", "-2"], "`--save-every` must be at least 0, got -2. Raise it."),
    "clip": (["--clip", "0"], "`--clip` must be positive and finite, got 0.0. Change it."),
    "rate": (["--lr", "nan"], "`--lr` must be positive and finite, got nan. Change it."),
    "choice": (
        ["--similarity", "euclid"],
        re.compile(
            r"flash_attention_jax (demo|train): error: argument --similarity: invalid choice: "
            r"'euclid' \(choose from '?dot'?, '?cosine'?\)"
        ),
    ),
    "unknown option": (
        ["--step", "5"],
        re.compile(r"flash_attention_jax (demo|train): error: unrecognized arguments: --step 5"),
    ),
    "seed": (["--seed", "-1"], "`--seed` must be at least 0, got -1. Raise it."),
    "diverging": (
        ["--data", "long.txt", "--lr", "1e30"],
        re.compile(
            r"`--lr` must keep the loss finite, got 1e\+30 and a loss of (nan|inf) at step \d+\. "
            r"Take a smaller one\."
        ),
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("command", ["demo", "train"])
def test_bad_input_is_one_line_and_exit_code_2(case, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_check", lambda: 0)
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(PATTERN[:33])
    Path("long.txt").write_bytes(PATTERN * 20)
    Path("empty.gz").write_bytes(gzip.compress(b""))
    Path("cut.gz").write_bytes(gzip.compress(PATTERN * 20)[:-8])
    Path("text.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    Path("folder").mkdir()
    Path("folder/binary").write_bytes(b"\0" * 100)
    argv, expected = BAD_INPUT[case]
    main = {"demo": train.demo_main, "train": train.train_main}[command]
    assert main(["--out", "out", *SMALL, "--steps", "6", *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    if isinstance(expected, str):
        assert error == f"error: {expected}"
    else:
        assert expected.fullmatch(error.removeprefix("error: "))


def test_demo_checks_first_and_stops_where_the_check_fails(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_check", lambda: 1)
    assert train.demo_main(options(text_file, tmp_path)) == 1
    assert not (tmp_path / "checkpoints").exists()


def test_byte_entropy_is_that_computed_by_hand():
    # p = 1/2, 1/4, 1/8, 1/8:  1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 = 1.75
    assert byte_entropy(np.frombuffer(b"aaaabbcd", np.uint8)) == 1.75
    assert byte_entropy(np.arange(256, dtype=np.uint8)) == 8.0
    assert byte_entropy(np.zeros((3, 4), np.int32)) == 0.0


def test_plain_file_is_mapped_where_it_lies(text_file, tmp_path):
    cache = tmp_path / "cache"
    text = load_text(text_file, cache=cache, seq_len=16)
    assert isinstance(text.train, np.memmap)
    assert not cache.exists()
    assert (text.train.tobytes() + text.valid.tobytes()) == PATTERN * 100


def test_gz_is_unpacked_once(tmp_path, monkeypatch):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(PATTERN * 100))
    cache = tmp_path / "cache"
    first = load_text(path, cache=cache, seq_len=16)
    assert (first.train.tobytes() + first.valid.tobytes()) == PATTERN * 100
    monkeypatch.setattr(gzip, "open", None)
    again = load_text(path, cache=cache, seq_len=16)
    assert again.fingerprint == first.fingerprint
    assert len(list(cache.iterdir())) == 1


def zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("folder")
        for name in names:
            archive.writestr(f"folder/{name}", PATTERN * 100)
    return buffer.getvalue()


def tarred(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo("text.txt")
        info.size = len(PATTERN) * 100
        archive.addfile(info, io.BytesIO(PATTERN * 100))
    return buffer.getvalue()


READ = {
    "gz": gzip.compress(PATTERN * 100),
    "bz2": bz2.compress(PATTERN * 100),
    "xz": lzma.compress(PATTERN * 100),
    "lzma": lzma.compress(PATTERN * 100, lzma.FORMAT_ALONE),
    "zip": zipped("text.txt"),
}


@pytest.mark.parametrize("name", ["as it should be", "text.txt"])
@pytest.mark.parametrize("kind", READ)
def test_compressed_text_is_read_whatever_its_name(kind, name, tmp_path):
    path = tmp_path / name.replace("as it should be", f"text.{kind}")
    path.write_bytes(READ[kind])
    text = load_text(path, cache=tmp_path / "cache", seq_len=16)
    assert text.train.tobytes() + text.valid.tobytes() == PATTERN * 100
    assert text.source == str(path)


@pytest.mark.parametrize("kind", READ)
def test_damaged_compressed_text_is_refused(kind, tmp_path):
    path = tmp_path / f"text.{kind}"
    for content in (
        READ[kind][:-30],
        READ[kind][:40] + bytes(20) + READ[kind][60:],
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"^`--data` must be a whole \.{kind} file, got .*: "):
            load_text(path, cache=tmp_path / "cache", seq_len=16)
    assert list((tmp_path / "cache").iterdir()) == []


NOT_READ = {
    "zstd": b"\x28\xb5\x2f\xfd\x24",
    "lz4": b"\x04\x22\x4d\x18\x64",
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "rar": b"Rar!\x1a\x07\x01\0",
    "compress (.Z)": b"\x1f\x9d\x90",
    "lzip": b"LZIP\x01",
    "lzop": b"\x89LZO\0\r\n",
    "snappy": b"\xff\x06\0\0sNaPpY",
    "cab": b"MSCF\0\0\0\0",
    "Parquet": b"PAR1\x15\x04",
    "PDF": b"%PDF-1.7",
    "zlib": zlib.compress(PATTERN * 100),
    "tar": tarred("w"),
    "tar inside gz": tarred("w:gz"),
    "tar inside xz": tarred("w:xz"),
    "gz inside gz": gzip.compress(gzip.compress(PATTERN * 100)),
    "a zip of 2 files": zipped("a.txt", "b.txt"),
    "a zip of 0 files": zipped(),
}


@pytest.mark.parametrize("kind", [*NOT_READ, "brotli"])
def test_other_compressed_files_are_never_trained_on(kind, tmp_path):
    path = tmp_path / ("text.br" if kind == "brotli" else "text.txt")
    content = NOT_READ.get(kind, b"\x1b\x2c")
    path.write_bytes(content if len(content) > 20 else content + b"\x80 no zeros here" * 10)
    message = (
        "`--data` must be a text, one compressed as .gz, .bz2 or .xz, a .zip of one file, or a "
        f"folder, got {path}, which is {kind}. Unpack it first."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_text(path, cache=tmp_path / "cache", seq_len=16)
    assert not list(tmp_path.glob("cache/*"))


def test_compressed_files_in_a_folder_are_no_texts(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(PATTERN * 10)
    for kind, content in {**READ, **NOT_READ}.items():
        (folder / kind).write_bytes(content)
    # Without a zero in them, by which others are told from texts.
    whole = (
        b"BZh91AY&SY no zeros",
        b"x\x9c+\xc9WHJU\xc8/R\xc8\xcb/)\x19e\x8f\xb2G\xd9D\xb3\x01\x03.$<",
    )
    heads = [NOT_READ[kind] for kind in ("zstd", "lz4", "compress (.Z)", "lzip", "Parquet", "PDF")]
    for number, content in enumerate((*whole, *(head + b" no zeros" for head in heads))):
        assert b"\0" not in content
        (folder / f"{number}.txt").write_bytes(content)
    text = load_text(folder, cache=tmp_path / "cache", seq_len=16)
    assert text.source == f"1 files in {folder}"


@pytest.mark.parametrize(
    "beginning",
    ["BZh is no bzip2", "x^2 + y^2 = 1, ", "LZIP and PAR1: ", "PK, MSCF, 7z, Rar!", "]"],
)
def test_text_that_begins_like_a_compressed_file_is_one(beginning, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(beginning.encode() + PATTERN * 10)
    text = load_text(path, cache=tmp_path, seq_len=16)
    assert text.train[: len(beginning)].tobytes() == beginning.encode()


def test_python_without_a_decoder_says_so(tmp_path, monkeypatch):
    path = tmp_path / "text.bz2"
    path.write_bytes(READ["bz2"])
    monkeypatch.setitem(sys.modules, "bz2", None)
    with pytest.raises(InputError, match=r"which is bz2, and this Python cannot read it \("):
        load_text(path, cache=tmp_path, seq_len=16)


def test_no_room_for_the_flat_copy_is_no_fault_of_the_data(tmp_path, monkeypatch):
    path = tmp_path / "text.gz"
    path.write_bytes(READ["gz"])

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.shutil, "copyfileobj", full)
    message = (
        f"`--out` must have room for what the run writes, got {tmp_path}/cache: "
        "No space left on device. Free some, or choose another."
    )
    for source in (path, tmp_path):
        (tmp_path / "plain.txt").write_bytes(PATTERN * 10)
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            load_text(source, cache=tmp_path / "cache", seq_len=16)


def test_folder_is_its_texts_in_the_order_of_their_paths(tmp_path):
    folder = tmp_path / "folder"
    for name, content in {
        "b.txt": b"second ",
        "a.txt": b"first ",
        "sub/c.txt": b"third ",
        "sub/image.png": b"\x89PNG\0\0",
        ".git/config": b"hidden",
        "tests/t.txt": b"skipped",
        "out/text-0.bin": b"an earlier flat copy",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    text = load_text(folder, cache=folder / "out", seq_len=4)
    assert text.train.tobytes() + text.valid.tobytes() == b"first second third "
    assert text.source == f"3 files in {folder}"


def test_changed_folder_is_read_again(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(PATTERN)
    before = load_text(folder, cache=tmp_path / "cache", seq_len=4)
    (folder / "b.txt").write_bytes(PATTERN)
    after = load_text(folder, cache=tmp_path / "cache", seq_len=4)
    assert len(after.train) + len(after.valid) == 2 * len(PATTERN)
    assert after.fingerprint != before.fingerprint


def test_without_a_path_enwik8_is_read_where_present(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/enwik8.gz").write_bytes(gzip.compress(PATTERN * 100))
    text = load_text(None, cache=tmp_path / "cache", seq_len=16)
    assert text.source == "data/enwik8.gz"
    assert text.train[: len(PATTERN)].tobytes() == PATTERN


def test_without_enwik8_the_standard_library_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = tmp_path / "library"
    for name in ("ast.py", "test/support.py", "site-packages/x.py", "json/__init__.py", "a.so"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}, and more text\n")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(library))
    text = load_text(None, cache=tmp_path / "cache", seq_len=4)
    assert text.source == f"Python's standard library ({library})"
    assert text.train.tobytes() + text.valid.tobytes() == (
        b"# ast.py, and more text\n# json/__init__.py, and more text\n"
    )


def test_unfinished_copy_is_not_taken_for_a_text(tmp_path, monkeypatch):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(PATTERN * 100))

    def killed(source, target):
        target.write(source.read(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            load_text(path, cache=tmp_path / "cache", seq_len=16)
    assert list((tmp_path / "cache").iterdir()) == []


def test_batches_depend_on_seed_and_step_alone(text_file, tmp_path):
    text = load_text(text_file, cache=tmp_path, seq_len=16)
    sizes = {"batch": 4, "seq_len": 16}
    first = text.batch(seed=0, step=3, **sizes)
    assert first.shape == (4, 17)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, text.batch(seed=0, step=3, **sizes))
    assert (first != text.batch(seed=0, step=4, **sizes)).any()
    assert (first != text.batch(seed=1, step=3, **sizes)).any()
    assert all(bytes(row.tolist()) in PATTERN * 2 for row in first)


@pytest.mark.parametrize("length", [34, 35, 48, 49, 50, 100, 1000])
def test_every_stretch_is_read_once_before_any_is_read_again(tmp_path, length):
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(i % 251 for i in range(length)))
    text = load_text(path, cache=tmp_path, seq_len=16)
    count = max(1, (len(text.train) - 16) // 16)
    orders = []
    for epoch in range(3):
        steps = range(epoch * count, (epoch + 1) * count)
        rows = [text.batch(seed=7, step=s, batch=1, seq_len=16)[0] for s in steps]
        # The text can be read off modulo 251: where a row begins says which stretch it is.
        begins = [next(i for i in range(len(text.train)) if text.train[i : i + 17].tobytes()
                       == bytes(row.tolist())) for row in rows]  # fmt: skip
        shift = min(begins)
        assert sorted(begins) == [shift + 16 * i for i in range(count)] or length > 251
        assert shift < 16
        orders.append(begins)
    assert count < 5 or orders[0] != orders[1] != orders[2] != orders[0]
    # Steps that cross from one epoch to the next read the same stretches in the same order.
    two = np.concatenate([text.batch(seed=7, step=s, batch=3, seq_len=16) for s in range(count)])
    one = np.concatenate(
        [text.batch(seed=7, step=s, batch=1, seq_len=16) for s in range(3 * count)]
    )
    np.testing.assert_array_equal(two, one)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 256, 1000])
def test_shuffling_is_a_permutation_that_depends_on_all_keys(count):
    keys = np.arange(4, dtype=np.uint64)
    places = np.arange(count)
    first = data._shuffled(places, count, keys)
    np.testing.assert_array_equal(np.sort(first), places)
    for i in range(4 if count > 16 else 0):
        other = keys.copy()
        other[i] += np.uint64(1)
        assert (data._shuffled(places, count, other) != first).mean() > 0.5


def test_shuffling_takes_every_place_everywhere_alike():
    times = np.zeros((16, 16))
    for seed in range(2000):
        keys = np.random.default_rng(seed).integers(0, 2**32, 4, np.uint64)
        times[np.arange(16), data._shuffled(np.arange(16), 16, keys)] += 1
    # Chi-squared of 225 degrees of freedom: 99.9 percent lie below 295.
    assert ((times - 125) ** 2 / 125).sum() < 295


def test_text_larger_than_memory_is_opened_and_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(PATTERN)
        file.truncate(2**40)  # a hole, which takes no space on the disk
    text = load_text(path, cache=tmp_path, seq_len=64)
    assert len(text.train) + len(text.valid) == 2**40
    assert text.batch(seed=0, step=10**6, batch=4, seq_len=64).shape == (4, 65)
    assert text.validation(windows=4, seq_len=64).shape == (4, 65)


def test_shortest_text_has_one_window_of_each_kind(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(PATTERN[:34])
    text = load_text(path, cache=tmp_path, seq_len=16)
    assert bytes(text.batch(seed=0, step=0, batch=2, seq_len=16)[1].tolist()) == PATTERN[:17]
    windows = text.validation(windows=9, seq_len=16)
    assert [bytes(w.tolist()) for w in windows] == [PATTERN[17:34]]


def test_evaluation_is_the_mean_over_all_bytes_whatever_the_batch(text_file, tmp_path):
    text = load_text(text_file, cache=tmp_path, seq_len=16)
    config = config_of(text)
    tokens = text.validation(windows=7, seq_len=16)
    params = config.initial_state()["params"]
    logits = np.asarray(config.model.apply(params, tokens[:, :-1]), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log2(np.take_along_axis(p, tokens[:, 1:, None], -1)).mean()
    for batch in (4, 9):
        bits = train.evaluate(dataclasses.replace(config, batch=batch), params, tokens)
        assert bits == pytest.approx(expected, rel=1e-5)


def test_model_is_causal_and_reads_the_past():
    model = CausalTransformer(dim=32, depth=2, heads=2, dim_head=16)
    tokens = jnp.asarray([list(b"abcdefgh")], jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    before = model.apply(params, tokens)
    after = model.apply(params, tokens.at[0, 4].set(0))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-4).all()


class Counter:
    """A model that expects each token to be followed by its successor."""

    def apply(self, params, tokens):
        return 50.0 * jax.nn.one_hot((tokens + params) % 256, 256, dtype=jnp.float32)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 20])
def test_generation_goes_on_from_the_prompt_for_any_window(window):
    prompt = jnp.asarray([[5, 6, 7, 8], [100, 101, 102, 103]], jnp.int32)
    one = jnp.asarray(1, jnp.int32)
    drawn = generate(Counter(), one, prompt, 6, key=jax.random.key(0), window=window)
    np.testing.assert_array_equal(drawn, [np.arange(9, 15), np.arange(104, 110)])


def test_generation_reads_the_last_tokens_of_the_window_and_no_others():
    class Adder:
        """Expects each token to be the sum of all that are read."""

        def apply(self, params, tokens):
            total = jnp.cumsum(tokens, axis=1, dtype=jnp.int32) % 256
            return jax.nn.one_hot(total, 256, dtype=jnp.float32)

    prompt = [3, 1, 4, 1, 5]
    array = jnp.asarray([prompt], jnp.int32)
    for window in (1, 3, 6, 8, 99):
        tokens = list(prompt)
        for _ in range(7):
            tokens.append(sum(tokens[-window:]) % 256)
        key = jax.random.key(0)
        drawn = generate(Adder(), {}, array, 7, key=key, window=window, temperature=0.0)
        assert np.asarray(drawn)[0].tolist() == tokens[5:]


def test_top_k_and_temperature_shape_the_distribution():
    class Fixed:
        def apply(self, params, tokens):
            logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2], jnp.float32))
            return jnp.broadcast_to(logits, (*tokens.shape, 3))

    prompt = jnp.zeros((500, 1), jnp.int32)

    def frequencies(**options):
        drawn = generate(Fixed(), {}, prompt, 4, key=jax.random.key(0), window=1, **options)
        return np.bincount(np.ravel(drawn), minlength=3) / drawn.size

    np.testing.assert_allclose(frequencies(), [0.5, 0.3, 0.2], atol=0.04)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0], atol=0.04)
    squares = np.asarray([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(frequencies(temperature=0.5), squares, atol=0.04)
    np.testing.assert_array_equal(frequencies(temperature=0.0), [1, 0, 0])
    np.testing.assert_array_equal(frequencies(top_k=1), [1, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": jnp.zeros((1, 0), jnp.int32)},
            "`prompt` must have shape (batch, n) with n at least 1, got (1, 0). "
            "Start from one token at least.",
        ),
        ({"length": 0}, "`length` must be at least 1, got 0. Pass more."),
        ({"window": 0}, "`window` must be at least 1, got 0. Pass more."),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0. Pass more."),
        ({"temperature": -1.0}, "`temperature` must not be negative, got -1.0. Pass 0 or more."),
    ],
)
def test_generation_refuses_what_it_cannot_do(change, message):
    call = {"prompt": jnp.zeros((1, 1), jnp.int32), "length": 1, "key": jax.random.key(0), **change}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(Counter(), jnp.asarray(1, jnp.int32), **call)


def test_text_of_a_sample_is_safe_to_print():
    tokens = np.frombuffer("é\x1b[2J\ta\nb".encode() + b"\xff", np.uint8)
    assert loop._printable(tokens) == "é?[2J a\nb\ufffd"


def test_resume_command_names_this_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    for argv in (["--data", "my text"], ["--data", "my text", "--resume"]):
        assert train._resume_command("demo", argv) == (
            ".venv/bin/python -m flash_attention_jax demo --data 'my text' --resume"
        )


# --- the benchmark ----------------------------------------------------------------------------


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("training")


def test_measured_curves_are_the_same_and_dense_attention_takes_more_memory(benchmark_module):
    record = json.loads(benchmark_module.RESULTS.read_text())
    assert not record["quick"]
    curves = record["same_curve"]["bits_per_byte"]
    assert {len(curve) for curve in curves.values()} == {50}
    np.testing.assert_allclose(curves["dense"], curves["blocked"], rtol=1e-5)
    temporary = {(m["attention"], m["length"]): m["temp_bytes"] for m in record["memory"]}
    assert temporary["dense", 8192] > 8 * temporary["dense", 2048]
    assert temporary["blocked", 8192] < 5 * temporary["blocked", 2048]
    assert temporary["blocked", 8192] < temporary["dense", 8192] / 5


def test_results_show_what_the_training_benchmark_measured(benchmark_module):
    results = (Path(__file__).parents[1] / "benchmarks" / "RESULTS.md").read_text()
    table = benchmark_module.page(json.loads(benchmark_module.RESULTS.read_text()))
    assert benchmark_module.tables.redraw(results, "training", table) == results


def test_benchmark_trains_one_model_and_reads_its_memory(benchmark_module, text_file):
    found = benchmark_module.one("blocked", 32, str(text_file))
    assert found["attention"] == "blocked"
    assert found["peak_bytes"] > found["temp_bytes"] > 0
