"""Training on a mesh: the same curve on any number of devices and processes, and after a death."""

import csv
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("optax")

from flash_attention_jax._training.fleet import Fleet, make_mesh, parse_mesh
from flash_attention_jax.data import InputError
from flash_attention_jax.train import train_main

STEPS = 24
SIZES = {"dim": 16, "depth": 1, "heads": 2, "seq-len": 16, "batch": 4, "steps": STEPS}
OPTIONS = [word for name, x in SIZES.items() for word in (f"--{name}", str(x))]
OPTIONS += ["--save-every", "4", "--validate-every", "12", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["key ", "query ", "value\n", "mask, "], 20000)
    path.write_text("".join(words))
    return path


def start(text, out, *options, devices=1):
    """A training command in a process with so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "flash_attention_jax", "train", "--data", str(text)]
    return subprocess.Popen(
        [*command, "--out", str(out), *OPTIONS, *options],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    for process in processes:
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said[-4000:]


def curve(out):
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    names = ("bits_per_byte", "gradient_norm", "validation")
    return np.array([[float(row[name] or 0) for name in names] for row in rows])


def together(count, mesh):
    """Options of processes that find each other on the loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["--mesh", mesh, "--coordinator", f"localhost:{port}", "--processes", str(count)]
    return [[*common, "--process", str(number)] for number in range(count)]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(start(text, out))
    return curve(out)


@pytest.mark.slow
def test_eight_devices_and_four_processes_learn_as_one_device_does(text, alone, tmp_path):
    finish(start(text, tmp_path / "eight", "--mesh", "data=2,context=2,model=2", devices=8))
    np.testing.assert_allclose(curve(tmp_path / "eight"), alone, rtol=2e-4)
    finish(*(start(text, tmp_path / "four", *o) for o in together(4, "data=2,context=2")))
    np.testing.assert_allclose(curve(tmp_path / "four"), alone, rtol=2e-4)


@pytest.mark.slow
def test_death_of_a_process_ends_the_other_and_the_run_goes_on_elsewhere(text, alone, tmp_path):
    out = tmp_path / "run"
    pair = [start(text, out, *o, "--sample-every", "1") for o in together(2, "context=2")]
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/000000*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].kill()
    said, _ = pair[0].communicate(timeout=120)  # three times what a heartbeat takes
    pair[1].communicate()
    assert pair[0].returncode != 0, said[-4000:]
    rows = curve(out)
    assert 4 <= len(rows) < STEPS
    finish(start(text, out, "--resume", "--mesh", "data=4", devices=4))
    np.testing.assert_allclose(curve(out), alone, rtol=2e-4)


# --- where things lie ---


def test_large_parameters_are_cut_and_small_ones_are_not():
    fleet = Fleet(make_mesh({"data": 2}))
    large = fleet.place({"x": np.zeros((3, 512), np.float32)})["x"]
    small = fleet.place({"x": np.zeros((2, 8), np.float32)})["x"]
    odd = fleet.place({"x": np.zeros((33, 33), np.float32)})["x"]
    shapes = [x.addressable_shards[0].data.shape for x in (large, small, odd)]
    assert shapes == [(3, 256), (2, 8), (33, 33)]


# --- bad input ---

BAD = {
    "unknown axis": (
        ["--mesh", "rows=2"],
        "`--mesh` must be axes of data, context, model with sizes, got 'rows=2'. Write "
        "data=2,context=4, say.",
    ),
    "axis twice": (
        ["--mesh", "data=2,data=2"],
        "`--mesh` must be axes of data, context, model with sizes, got 'data=2,data=2'. Write "
        "data=2,context=4, say.",
    ),
    "batch": (
        ["--mesh", "data=2", "--batch", "3"],
        "`--batch` must be a multiple of the mesh's data=2, got 3. Change one of them.",
    ),
    "heads": (
        ["--mesh", "model=2", "--heads", "3"],
        "`--heads` must be a multiple of the mesh's model=2, got 3. Change one of them.",
    ),
    "length": (
        ["--mesh", "context=2", "--seq-len", "17"],
        "`--seq-len` must be a multiple of the mesh's context=2, got 17. Change one of them.",
    ),
    "no address": (
        ["--processes", "2", "--mesh", "data=2"],
        "`--coordinator` must be given where there are processes, got none for --processes 2. Add "
        "--coordinator localhost:12345 --mesh data=2, say.",
    ),
    "no mesh": (
        ["--processes", "2", "--coordinator", "localhost:12345"],
        "`--mesh` must be given where there are processes, got none for --processes 2. Add "
        "--coordinator localhost:12345 --mesh data=2, say.",
    ),
    "process that is not there": (
        ["--processes", "2", "--process", "2", "--coordinator", "localhost:1", "--mesh", "data=2"],
        "`--process` must be below --processes 2, got 2. Count from 0.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, tmp_path, capsys):
    options, text = BAD[case]
    assert train_main(["--out", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def test_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match=re.escape("`--mesh` must have as many devices as there")):
        make_mesh(parse_mesh("data=512"))
