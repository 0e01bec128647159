"""A run of the benchmark with peers made up: what it keeps, skips, and says of failures."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu
import measure
import peers
import prepared
import record as records
import suite
import tables
import workloads
from suite import Case, Section
from workloads import WORKLOADS

SMALL = WORKLOADS["full-4k"].quick()


class World:
    """Made-up peers, a clock that they move, and what was prepared."""

    def __init__(self):
        self.now = 0.0
        self.prepared = []
        self.seconds = {
            "ours": [1.0] * 99,
            "theirs": [2.0, 3.0],  # then interrupted
            "steady": [4.0] * 99,
            "oom later": [1.0, MemoryError()],
        }
        self.errors = {
            "oom": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."),
            "fatal": RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"),
            "broken": ZeroDivisionError("division by zero"),
        }
        self.reasons = {"absent": "it is not installed"}
        self.wrong = {"theirs": 0.5}
        self.closed = []

    def clock(self):
        return self.now

    def peers(self):
        names = [*self.seconds, *self.errors, *self.reasons]
        return {
            name: prepared.Peer(name, self._reason(name), self._prepare(name)) for name in names
        }

    def _reason(self, name):
        return lambda w, backward: self.reasons.get(name)

    def _prepare(self, name):
        def prepare(workload, backward):
            self.prepared.append(name)
            if name in self.errors:
                raise self.errors[name]
            seconds = iter(self.seconds[name])

            def time_once():
                step = next(seconds, None)
                if step is None:
                    raise KeyboardInterrupt
                if isinstance(step, Exception):
                    raise step
                self.now += step
                return step

            right = workloads.reference(workload, backward=False)["out"]
            out = right + self.wrong.get(name, 0.0) * np.abs(right).max()
            results = {"out": np.broadcast_to(out, (1, workload.heads, *out.shape[-2:]))}
            return prepared.Prepared(
                time_once, lambda: results, close=lambda: self.closed.append(name)
            )

        return prepare


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(peers, "PEERS", world.peers())
    interleaved = functools.partial(measure.interleave, clock=world.clock)
    monkeypatch.setattr(measure, "interleave", interleaved)
    return world


def section(name, *names, **more):
    return Section(name, tuple(Case(peer, SMALL) for peer in names), **more)


def make_run(path=None, **more):
    return suite.Run("cpu", command="a test", repeat=5, path=path, **more)


def make_steps(run, *sections):
    return [(s.name, functools.partial(run.time_section, s)) for s in sections]


def test_interrupted_section_keeps_its_whole_rounds_and_every_row(world, monkeypatch, tmp_path):
    case = {n: Case(n, SMALL) for n in ("ours", "theirs", "absent", "oom")}
    claims = [
        cpu.Claim("theirs / ours", case["theirs"], case["ours"], 2.6),
        cpu.Claim("theirs / ours, low", case["theirs"], case["ours"], 2.5),
        cpu.Claim("ours / theirs", case["ours"], case["theirs"], 0.4, at_most=True),
        cpu.Claim("absent / ours", case["absent"], case["ours"], 0.7),
        cpu.Claim("oom / ours", case["oom"], case["ours"], 0.7),
    ]
    monkeypatch.setattr(cpu, "CLAIMS", {"a section": claims})
    run = make_run(tmp_path / "cpu.json")
    every = section("a section", "ours", "theirs", "absent", "oom", "broken")
    # `theirs` is interrupted in the third of five rounds.
    run.take(make_steps(run, every), judge=cpu.judge)
    assert run.record.interrupted
    samples = {sample["peer"]: sample for sample in run.record.samples}
    assert list(samples) == ["ours", "theirs", "absent", "oom", "broken"]
    assert samples["ours"]["seconds"] == [1.0, 1.0]
    assert samples["theirs"]["seconds"] == [2.0, 3.0]
    assert samples["theirs"]["median_s"] == 2.5
    assert samples["ours"]["error"] == 0.0
    assert samples["theirs"]["error"] == pytest.approx(0.5)
    assert samples["absent"]["why_not"] == "it is not installed"
    assert samples["oom"]["why_not"] == "oom"
    assert samples["broken"]["why_not"] == "failed: ZeroDivisionError: division by zero"
    assert sorted(world.closed) == ["ours", "theirs"]
    rows = run.record.claims
    assert [row.get("value") for row in rows] == [2.5, 2.5, pytest.approx(5 / 12), None, None]
    assert [tables.verdict(row) for row in rows] == [
        "**missed**",
        "met",
        "**missed**",
        "it is not installed",
        "oom",
    ]
    page = tables.page(run.record.to_json())
    assert "| 2.50x | 2.25x – 2.75x | ≥ 2.6x | **missed** " in page
    assert "5.0e-01, wrong" in page
    assert "– it is not installed" in page
    assert "interrupted before its end" in page
    assert json.loads(records.working_path(tmp_path / "cpu.json").read_text())["samples"]


def test_case_that_fails_while_it_is_timed_does_not_stop_the_others(world):
    run = make_run()
    run.time_section(section("a", "ours", "oom later", "steady"))
    rows = {row["peer"]: row for row in run.record.samples}
    assert rows["oom later"]["why_not"] == "oom"
    assert rows["ours"]["seconds"] == [1.0] * 5
    assert rows["steady"]["seconds"] == [4.0] * 5


def test_second_run_skips_what_is_done_and_measures_the_rest(world, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    first, second, third = (section(name, "ours", "steady") for name in "abc")
    run = make_run(path)
    run.take(make_steps(run, first, section("b", "ours", "theirs")))
    assert run.record.sections == ["a"]  # b was interrupted
    again = make_run(path)
    assert {row["section"] for row in again.record.samples} == {"a"}
    world.prepared.clear()
    again.take(make_steps(again, first, second, third))
    assert world.prepared == ["ours", "steady"] * 2
    assert again.record.sections == ["a", "b", "c"]
    assert not again.record.interrupted
    again.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]
    assert len(tables.load(path)["samples"]) == 6
    assert "Going on from" in capsys.readouterr().err
    assert make_run(path, fresh=True).record.sections == []


@pytest.mark.parametrize("name", ["git", "versions", "quick", "name"])
def test_results_of_other_code_or_packages_are_not_gone_on_from(name, world, tmp_path):
    path = tmp_path / "cpu.json"
    run = make_run(path)
    run.take(make_steps(run, section("a", "ours")))
    setattr(run.record, name, "another")
    run.finish()
    assert make_run(path).record.sections == []


def test_results_of_another_processor_are_not_gone_on_from(world, tmp_path):
    path = tmp_path / "cpu.json"
    run = make_run(path)
    run.take(make_steps(run, section("a", "ours")))
    run.record.machine = {**run.record.machine, "cpu": "another"}
    run.finish()
    assert make_run(path).record.sections == []


def test_sections_that_time_does_not_reach_are_named(world, tmp_path):
    run = make_run(tmp_path / "cpu.json", deadline=0.0)
    run.take(make_steps(run, section("a", "ours")))
    assert run.record.left == ["a"]
    assert world.prepared == []
    assert "1 sections not reached in its time" in tables.caption(run.record.to_json())


def test_case_that_took_the_process_down_is_not_tried_again(world, tmp_path):
    path = tmp_path / "cpu.json"
    every = section("a", "ours", "fatal", "steady")
    run = make_run(path)
    with pytest.raises(suite.LostError, match="ILLEGAL_ADDRESS"):
        run.take(make_steps(run, every))
    again = make_run(path)
    world.prepared.clear()
    again.take(make_steps(again, every))
    assert world.prepared == ["ours", "steady"]
    rows = {row["peer"]: row for row in again.record.samples}
    assert rows["fatal"]["why_not"] == "failed: it ended the process"
    assert rows["ours"]["seconds"] == [1.0] * 5


def test_committed_record_is_read_and_written_as_it_is():
    text = (Path(suite.__file__).parent / "results" / "cpu.json").read_text()
    values = records.Record.from_json(json.loads(text)).to_json()
    assert json.dumps(values, indent=1) + "\n" == text


def test_record_of_another_benchmark_is_refused_and_not_resumed(world, tmp_path):
    path = tmp_path / "cpu.json"
    records.write({"format": tables.FORMAT, "name": "cpu", "rows": []}, path)
    with pytest.raises(ValueError, match=r"must hold every field: .* 'git'"):
        records.read(path)
    assert make_run(path).record.sections == []


def test_result_that_is_not_finite_is_wrong(world):
    world.wrong["steady"] = float("nan")
    run = make_run()
    run.time_section(section("a", "steady"))
    (row,) = run.record.samples
    assert row["error"] is None
    assert tables.wrong(row)


def test_dropout_is_timed_and_not_compared(world):
    workload = WORKLOADS["bert-dropout-512"].quick()
    world.wrong["ours"] = 0.0
    run = make_run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "reference", lambda w, backward: {"out": np.zeros((1, 1, 4, 4))})
        run.time_section(Section("a", (Case("ours", workload),)))
    (row,) = run.record.samples
    assert (row["error"], row["unchecked"]) == (None, "dropout is random")
    assert not tables.wrong(row)
    assert "– dropout is random" in tables.samples_table(run.record.to_json())
