"""The command `bench`: what it says moved between two records, and where the suites are."""

import copy
import json

import pytest

from flash_attention_jax import __main__
from flash_attention_jax._commands import bench


def sample(peer="blocked", seconds=(1.0, 1.0, 1.1), **more):
    ordered = sorted(seconds)
    row = {"section": "forward", "workload": "full-4k", "pass": "forward", "length": 4096}
    row |= {"peer": peer, "dtype": "float32", "seconds": list(seconds), "error": 1e-7}
    row |= {"low_s": ordered[0], "median_s": ordered[1], "high_s": ordered[-1]}
    return row | {"temp_bytes": 2**20} | more


@pytest.fixture
def record():
    return {
        "format": 1,
        "date": "2030-01-02T03:04:05+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "machine": {"cpu": "a processor", "cores": 2},
        "rates": {"matmul": 2.0, "copy": 1.0},
        "samples": [sample(), sample("jax.nn")],
        "builds": [],
    }


def changed(record, **more):
    other = copy.deepcopy(record)
    other["samples"][0] |= more
    return other


def verdicts(a, b):
    return [change.verdict for change in bench.changes(a, b)[0]]


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ((1.2, 1.2, 1.3), ["slower"]),
        ((0.8, 0.8, 0.9), ["faster"]),
        ((1.05, 1.2, 1.3), []),  # the quartiles overlap
        ((1.2, 1.2), []),  # too few rounds to know
    ],
    ids=str,
)
def test_time_moved_only_beyond_the_noise(seconds, verdict, record):
    moved = sample(seconds=seconds) if len(seconds) > 2 else sample() | {"seconds": [1.2, 1.2]}
    moved |= {"low_s": 1.2, "median_s": 1.2, "high_s": 1.2} if len(seconds) == 2 else {}
    assert verdicts(record, changed(record, **moved)) == verdict


def test_small_step_is_noise_however_still_the_machine(record):
    quiet = {"low_s": 1.0, "median_s": 1.0, "high_s": 1.0}
    step = {"low_s": 1.04, "median_s": 1.04, "high_s": 1.04}
    assert verdicts(changed(record, **quiet), changed(record, **step)) == []
    larger = dict.fromkeys(step, 1.06)
    assert verdicts(changed(record, **quiet), changed(record, **larger)) == ["slower"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"temp_bytes": 2**21}, "larger"),
        ({"temp_bytes": 2**19}, "smaller"),
        ({"error": 0.5}, "wrong"),
        ({"error": None}, "wrong"),
        ({"why_not": "oom"}, "stopped"),
    ],
    ids=str,
)
def test_other_changes_are_told(change, verdict, record):
    assert verdicts(record, changed(record, **change)) == [verdict]
    back = {"larger": "smaller", "smaller": "larger", "wrong": "right", "stopped": "runs"}
    assert verdicts(changed(record, **change), record) == [back[verdict]]


def test_rows_of_one_record_alone_are_not_compared(record):
    other = copy.deepcopy(record)
    other["samples"][1]["length"] = 8192
    assert bench.changes(record, other) == ([], 1)


def test_command_prints_what_moved_and_fails_on_what_got_worse(record, tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    slower = changed(record, **sample(seconds=(2.0, 2.0, 2.2)))
    slower["machine"] = {"cpu": "another", "cores": 2}
    slower["rates"] = {"matmul": 1.0, "copy": 1.0}
    a.write_text(json.dumps(record))
    b.write_text(json.dumps(slower))
    assert __main__.main(["bench", "--compare", str(a), str(b)]) == 1
    printed = capsys.readouterr().out
    assert "Take times with care: cpu was a processor and is another." in printed
    assert "The machine's matrix product ran at 0.50x the rate." in printed
    assert "slower   blocked, full-4k, 4096, forward: 1e+03 ms -> 2e+03 ms  2.00x" in printed
    assert "2 rows compared: 1 worse, 0 better" in printed
    assert __main__.main(["bench", "--compare", str(b), str(a)]) == 0
    assert "2 rows compared: 0 worse, 1 better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--compare", "a.json"], "--compare takes two files, got 1."),
        (["nope"], f"no suite 'nope'; there are {', '.join(bench.SUITES)}, and --compare A B."),
        (["--compare", "absent.json", "absent.json"], "No such file or directory: 'absent.json'."),
    ],
    ids=str,
)
def test_wrong_command_is_one_line_and_code_2(argv, message, capsys):
    assert __main__.main(["bench", *argv]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("flash_attention_jax bench: error: ")
    assert printed.endswith(f"{message}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 0}', "must be a benchmark of format 1, got format 0."),
        ("[]", "must be a benchmark of format 1, got format None."),
        ("not json", "must be a benchmark's JSON, got other text: "),
    ],
)
def test_record_of_another_format_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert __main__.main(["bench", "--compare", str(path), str(path)]) == 2
    assert message in capsys.readouterr().err


def test_suite_runs_from_a_clone(capsys):
    for argv in ([], ["--help"]):
        assert __main__.main(["bench", *argv]) == 0
        assert all(f"  {name} " in capsys.readouterr().out for name in ("cpu",))
    assert __main__.main(["bench", "named", "--list"]) == 0
    assert "| llama-8k " in capsys.readouterr().out


def test_suite_without_a_clone_says_so(monkeypatch, tmp_path, capsys):
    installed = tmp_path / "flash_attention_jax" / "_commands" / "bench.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    assert __main__.main(["bench", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "flash_attention_jax bench: error: cpu is a program of the repository, which is not "
        "installed with the package, and this package is not in a clone. Clone it, `pip install "
        "--editable .`, and try again.\n"
    )
