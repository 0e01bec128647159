"""The benchmark of calls from torch: one tiny run, and what it writes."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import crossing


def test_tiny_run_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "results" / "crossing.json"
    assert crossing.main(["--lengths", "16", "--rounds", "3", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == crossing.table(record)
    measured = [row for row in record["rows"] if row["device"] == "cpu"]
    assert [row["pass"] for row in measured] == list(crossing.PASSES)
    for row in measured:
        assert row["rounds"] == 3
        for name in ("ours, from torch", "ours, JAX alone", "torch SDPA"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    # Each pass of a device that is not here has its reason.
    assert all("reason" in row or row["rounds"] for row in record["rows"])


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--lengths", "16", "0"]])
def test_bad_command_says_what_is_wrong(arguments, capsys):
    assert crossing.main(arguments) == 2
    assert f"crossing.py: {arguments[0]} must be at least 1, got 0." in capsys.readouterr().err
