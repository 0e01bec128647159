"""The benchmark of a GPU: its loop on a CPU, with the blocked engine in place of the kernels."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import command
import gpu
import measure
import peers
import suite
import tables
from suite import Section
from workloads import WORKLOADS

needs_no_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")


def test_every_row_of_the_known_anchors_is_measured_first():
    names = [section.name for section in gpu.plan_sections()]
    assert len(set(names)) == len(names)
    kinds = ("check", "sweep", "named")
    order = [next((k for k in kinds if name.startswith(k)), "named") for name in names]
    assert order[:6] == ["check"] * 6  # correctness first
    first = names[6:18]
    assert first == [
        f"sweep-d{dim}-{kind}-16k, {words}"
        for dim in (128, 64, 256)
        for kind in ("full", "causal")
        for words in ("forward", "forward+backward")
    ]
    every = {section.name: section for section in gpu.plan_sections()}
    cases = every["sweep-d128-full-16k, forward"].cases
    assert {case.peer for case in cases} >= {"hopper", "triton", "blocked", "tokamax"}
    assert {"jax.nn", "jax.nn cuDNN", "torch FlexAttention"} <= {case.peer for case in cases}
    assert len([name for name in gpu.PEERS if name.startswith("torch SDPA")]) == 3
    assert {case.workload.similarity for case in cases} == {"dot", "cosine"}
    assert all(case.workload.dtype == "bfloat16" for s in every.values() for case in s.cases)
    measured = {case.workload.name for s in every.values() for case in s.cases}
    for start in ("llama", "packed", "gemma", "gpt-oss", "alphafold", "vit", "decode-128k", "bert"):
        assert any(name.startswith(start) for name in measured), start


def test_every_peer_and_workload_is_known():
    for section in gpu.plan_sections():
        for case in section.cases:
            assert case.peer in peers.PEERS
            assert dataclasses.replace(case.workload, dtype="float32").name in WORKLOADS


@needs_no_gpu
def test_it_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv(gpu.INNER, "1")
    assert gpu.main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_process_that_lost_the_device_ends_with_a_code_of_its_own(monkeypatch, capsys):
    def lose():
        raise suite.LostError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(gpu.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(command, "begin", lambda *_: suite.Run("gpu", command="a test"))
    monkeypatch.setattr(command, "make_steps", lambda *_: [("a section", lose)])
    monkeypatch.setattr(measure, "describe_machine", lambda: {"cpu": "a processor", "cores": 2})
    monkeypatch.setenv(gpu.INNER, "1")
    assert gpu.main([]) == gpu.LOST
    assert "The device is lost to this process: CUDA_ERROR" in capsys.readouterr().err


@needs_no_gpu
def test_loop_checks_times_and_goes_on(monkeypatch, tmp_path):
    """All of it but the device: blocked under the kernels' names, on small calls."""
    stand_in = dataclasses.replace(peers.PEERS["blocked"], name="hopper")
    monkeypatch.setitem(peers.PEERS, "hopper", stand_in)

    def small(section):
        cases = tuple(
            dataclasses.replace(
                case, workload=dataclasses.replace(case.workload.quick(), length=32)
            )
            for case in section.cases
            if case.peer
            in ("hopper", "triton", "tokamax")  # without torch, whose import takes longer
        )
        return Section(section.name, cases, seconds=0.0, rounds=1)

    wanted = [s for s in gpu.plan_sections() if s.name.startswith("sweep-d64-causal-16k")]
    path = tmp_path / "gpu.json"
    for deadline, left in ((0.0, 2), (float("inf"), 0), (float("inf"), 0)):
        run = suite.Run("gpu", command="a test", path=path, deadline=deadline)
        run.take([(s.name, functools.partial(run.time_section, small(s))) for s in wanted])
        assert len(run.record.left) == left
        run.finish()
    record = tables.load(path)
    rows = [row for row in record["samples"] if row["peer"] == "hopper"]
    assert len(rows) == 4  # dot and cosine, forward and with gradients; nothing twice
    for row in rows:
        assert row["error"] < 2e-2
        assert row["dtype"] == "bfloat16"
        assert row["median_s"] > 0
    assert {row["why_not"] for row in record["samples"] if row["peer"] == "tokamax"} == {
        "it needs an NVIDIA GPU"
    }
    table = gpu.anchors_table(record).splitlines()
    assert len(table) == 2 + 12
    page = gpu.page({**record, "rates": {"matmul": 1e12, "copy": 1e12}})
    assert "TFLOP/s, bfloat16, 16384 tokens" in page


def test_cells_show_what_was_wrong_and_what_had_no_memory():
    row = {"flops": 2e12, "median_s": 1.0, "error": 1e-3, "dtype": "bfloat16", "peer": "x"}
    assert gpu._cell(None) == ""
    assert gpu._cell(row) == "2"
    assert gpu._cell(row | {"error": 0.5}) == "2 **wrong**"
    assert gpu._cell(row | {"why_not": "oom"}) == "oom"
    assert gpu._cell(row | {"why_not": "it is not installed"}) == "–"
    assert "No speed has been measured" in gpu.empty_page()
    assert "|" not in gpu.empty_page()


SCRIPT = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
assert os.environ[{inner!r}] == "1"
tries = folder / "tries"
count = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (count + 1))
(folder / "gpu.json.tmp").write_text("working")
if count == 0:
    os._exit(134)
if count == 1:
    time.sleep(60)
sys.exit(0)
"""


def test_process_that_dies_or_hangs_is_replaced(monkeypatch, tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(inner=gpu.INNER))
    monkeypatch.setattr(gpu, "STALLED", 1.0)
    real = gpu._watch

    def watch(words, path):
        assert words[:2] == [sys.executable, gpu.__file__]
        return real([sys.executable, str(script), str(tmp_path)], path)

    monkeypatch.setattr(gpu, "_watch", watch)
    assert gpu._supervise([], tmp_path / "gpu.json", 1.0, fresh=False) == 0
    assert (tmp_path / "tries").read_text() == "xxx"
    printed = capfd.readouterr().err
    assert "The process ended with code 134; going on in a new one." in printed
    assert "No word for 1 s: ending the process." in printed


def test_fresh_is_only_for_the_first_process(monkeypatch, tmp_path):
    commands = []

    def watch(words, path):
        commands.append(words[2:])
        return 134 if len(commands) == 1 else 0

    monkeypatch.setattr(gpu, "_watch", watch)
    assert gpu._supervise(["--fresh"], tmp_path / "gpu.json", 1.0, fresh=True) == 0
    assert ["--fresh" in command for command in commands] == [True, False]
    assert all(str(tmp_path / "gpu.json") in command for command in commands)
