"""The benchmarks: their tables, their arithmetic on made-up numbers, and one tiny run."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import flash_attention, flash_cosine_sim_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu
import gpu
import measure
import peers
import tables
import workloads
from workloads import WORKLOADS, Workload

ROOT = Path(__file__).parents[1]
CLAIMS = [(section, claim) for section, claims in cpu.TIMED.items() for claim in claims]
CASES = {case for _, claim in CLAIMS for case in (claim.above, claim.below)}


# --- workloads and claims --------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_well_formed(name):
    workload = WORKLOADS[name]
    assert workload.name == name
    assert workload.source
    assert min(workload.shape) >= 1
    assert workload.similarity in ("dot", "cosine")
    assert workload.term in (None, *workloads.TERMS)
    # "4k" in the name is 4096.
    assert workload.length == 1024 * int(name.rpartition("-")[2].removesuffix("k"))
    assert workload.quick().length <= 512
    # The tables tell calls of one length apart by their words.
    alike = [
        w for w in WORKLOADS.values() if (w.words, w.length) == (workload.words, workload.length)
    ]
    assert alike == [workload]


def test_every_workload_is_measured():
    assert {case.workload for case in CASES} | set(cpu.BUILT) == set(WORKLOADS)
    assert {WORKLOADS[name].term for name in cpu.BUILT} == {None, *workloads.TERMS}
    assert set(cpu.SECTIONS) == {*cpu.TIMED, "memory", "compile"}


def test_every_case_names_a_peer_that_takes_it_when_installed():
    for case in CASES:
        reason = peers.PEERS[case.peer].why_not(WORKLOADS[case.workload])
        assert reason is None or reason.startswith("torch "), case


def test_targets_are_those_that_are_promised():
    found = {
        (section, claim.what.partition(" /")[0]): (claim.target, claim.at_most)
        for section, claim in CLAIMS
        if claim.target is not None
    }
    assert found == {
        ("forward", "jax.nn"): (2.5, False),
        ("causal-forward", "jax.nn"): (3.5, False),
        ("forward-backward", "jax.nn"): (1.5, False),
        ("causal-forward-backward", "jax.nn"): (2.5, False),
        **{(s, "torch SDPA"): (0.7, False) for s in cpu.TIMED if "share" not in s},
        **{(s, "softmax"): (1.05, False) for s in cpu.TIMED if "share" not in s},
        ("causal-share", "causal"): (0.6, True),
        ("window-share", "window"): (0.1, True),
    }


def test_claims_divide_the_slower_by_the_faster_and_parts_by_wholes():
    for section, claim in CLAIMS:
        assert claim.above.backward == claim.below.backward
        above, below = WORKLOADS[claim.above.workload], WORKLOADS[claim.below.workload]
        assert above.length == below.length
        if "share" in section:
            assert above.causal or above.window
            assert not below.causal
            assert below.window is None
            assert claim.above.peer == claim.below.peer == "blocked"
        else:
            assert claim.below.peer.startswith("blocked")
            assert above.causal == below.causal == section.startswith("causal")
            assert claim.above.backward == section.endswith("backward")


def test_inputs_are_the_same_each_time_and_all_different():
    workload = Workload("small", "a test", 16, heads=2, dim=8)
    first, second = workloads.inputs(workload), workloads.inputs(workload)
    assert list(first) == ["q", "k", "v", "weights"]
    for name, array in first.items():
        assert array.shape == workload.shape
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, second[name])
    assert not np.array_equal(first["q"], first["k"])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 5}], ids=str)
def test_reference_is_what_dense_computes(similarity, options, monkeypatch):
    monkeypatch.setattr(workloads, "ORACLE_ROWS", 16)  # three blocks, the last one short
    workload = Workload("small", "a test", 37, heads=2, dim=8, similarity=similarity, **options)
    arrays = workloads.inputs(workload)
    found = workloads.reference(workload, arrays, batch=0, head=1, backward=True)
    q, k, v, weights = (arrays[n][0, 1].astype(np.float64) for n in ("q", "k", "v", "weights"))
    attend = flash_attention if similarity == "dot" else flash_cosine_sim_attention
    attend = functools.partial(attend, implementation="dense", **options)
    out, pull = jax.vjp(attend, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    for name, right in zip(
        ("out", "dq", "dk", "dv"), (out, *pull(jnp.asarray(weights))), strict=True
    ):
        np.testing.assert_allclose(found[name], right, rtol=1e-9, atol=1e-12, err_msg=name)


# --- arithmetic ------------------------------------------------------------------------------


def test_summary_is_the_median_and_the_quartiles():
    assert measure.summarize([5.0, 1.0, 4.0, 2.0, 3.0]) == measure.Summary(3.0, 2.0, 4.0, 5)
    assert measure.summarize([2.0, 1.0]) == measure.Summary(1.5, 1.25, 1.75, 2)
    assert measure.summarize([7.0]) == measure.Summary(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="got none"):
        measure.summarize([])


def test_ratio_is_taken_within_rounds_so_that_drift_cancels():
    below = [1.0, 2.0, 4.0, 8.0]  # the machine gets slower all the time
    assert measure.ratio([3 * x for x in below], below) == measure.Summary(3.0, 3.0, 3.0, 4)
    # Medians 2 and 2 would say 1.
    assert measure.ratio([2.0, 1.0, 9.0], [1.0, 2.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="shorter"):
        measure.ratio([1.0, 2.0], [1.0])


def test_relative_error_sees_what_is_not_finite():
    right = np.array([1.0, -4.0])
    assert measure.relative_error(np.array([1.5, -4.0]), right) == 0.125
    assert measure.relative_error(np.array([1.0, np.nan]), right) == float("inf")


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 0.0
        self.ran = []

    def __call__(self):
        return self.now

    def case(self, name, seconds):
        def run():
            self.ran.append(name)
            self.now += seconds

        return run


def test_rounds_run_every_case_once_in_changing_order():
    clock = Clock()
    cases = {name: clock.case(name, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 4))}
    rounds = list(measure.interleaved(cases, 6, clock=clock))
    assert rounds == [{"a": 1.0, "b": 2.0, "c": 4.0}] * 6
    orders = [tuple(clock.ran[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({}, 9),
        ({"at_least": 3, "seconds": 45.0}, 5),  # 5 rounds of 10 s are the first past 45 s
        ({"at_least": 7, "seconds": 45.0}, 7),
        ({"at_least": 3, "seconds": 1e9}, 9),
    ],
    ids=str,
)
def test_rounds_end_when_the_time_is_spent(limits, count):
    clock = Clock()
    cases = {"a": clock.case("a", 10)}
    assert len(list(measure.interleaved(cases, 9, clock=clock, **limits))) == count


def test_compiled_says_what_memory_and_time_it_took():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    build = measure.compiled(lambda x: (x @ x) @ x, shape)
    assert build.seconds > 0
    assert build.temp_bytes is not None
    assert build.temp_bytes >= 64 * 64 * 4
    np.testing.assert_array_equal(build.run(jnp.eye(64, dtype=jnp.float32)), np.eye(64))


# --- one run, with peers made up -------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """A quick run of `ours` (1 s), `theirs` (2 s, then 3 s) and two that cannot run."""
    clock = Clock()

    def prepare(peer_name):
        def prepared(workload, arrays, backward):
            if peer_name == "broken":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
            seconds = iter([2.0, 3.0] if peer_name == "theirs" else [1.0] * 9)

            def once():
                step = next(seconds, None)
                if step is None:
                    raise KeyboardInterrupt
                clock.now += step

            right = workloads.reference(workload, arrays, batch=0, head=1, backward=False)["out"]
            wrong = right + (0.5 * np.abs(right).max() if peer_name == "theirs" else 0.0)
            return peers.Prepared(once, lambda: {"out": np.stack([wrong, wrong])[None]})

        return prepared

    made_up = {
        name: peers.Peer(name, lambda w, reason=reason: reason, prepare(name))
        for name, reason in (
            ("ours", None),
            ("theirs", None),
            ("absent", "it is not installed"),
            ("broken", None),
        )
    }
    monkeypatch.setattr(peers, "PEERS", made_up)
    monkeypatch.setattr(measure, "interleaved", functools.partial(measure.interleaved, clock=clock))
    found = cpu.Run(quick=True, repeat=5, command="a test")
    found.quick = False  # so that targets are judged,
    monkeypatch.setitem(WORKLOADS, "full-4k", WORKLOADS["full-4k"].quick())  # at a tiny size
    return found


def test_interrupted_section_keeps_its_whole_rounds_and_every_row(run):
    case = {name: cpu.Case(name, "full-4k") for name in ("ours", "theirs", "absent", "broken")}
    claims = [
        cpu.Claim("theirs / ours", case["theirs"], case["ours"], 2.6),
        cpu.Claim("theirs / ours, low", case["theirs"], case["ours"], 2.5),
        cpu.Claim("ours / theirs", case["ours"], case["theirs"], 0.4, at_most=True),
        cpu.Claim("absent / ours", case["absent"], case["ours"], 0.7),
        cpu.Claim("broken / ours", case["broken"], case["ours"], 0.7),
    ]
    with pytest.raises(KeyboardInterrupt):  # `theirs` in the third of five rounds
        run.timed("a section", claims)
    samples = {sample["peer"]: sample for sample in run.record["samples"]}
    assert list(samples) == ["theirs", "ours", "absent", "broken"]
    assert samples["ours"]["seconds"] == [1.0, 1.0]
    assert samples["theirs"]["seconds"] == [2.0, 3.0]
    assert samples["theirs"]["median_s"] == 2.5
    assert samples["ours"]["error"] == 0.0
    assert samples["theirs"]["error"] == pytest.approx(0.5)
    assert samples["absent"]["why_not"] == "it is not installed"
    assert samples["broken"]["why_not"] == "out of memory"
    rows = run.record["claims"]
    assert [row.get("value") for row in rows] == [2.5, 2.5, pytest.approx(5 / 12), None, None]
    assert [tables.verdict(row) for row in rows] == [
        "**missed**",
        "met",
        "**missed**",
        "it is not installed",
        "out of memory",
    ]
    page = tables.page(run.record)
    assert "| 2.50x | 2.25x – 2.75x | ≥ 2.6x | **missed** " in page
    assert "5.0e-01, wrong" in page
    assert "– it is not installed" in page
    json.dumps(run.record, allow_nan=False)


def test_torch_that_is_not_installed_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    reason = peers.PEERS["torch SDPA"].why_not(WORKLOADS["full-4k"])
    assert reason == "torch is not installed"


def test_growth_is_the_largest_of_the_doublings(run):
    workload = WORKLOADS["full-4k"]
    for sizes, value, verdict in (
        ([100, 200, 400], 2.0, "met"),
        ([100, 200, 500], 2.5, "**missed**"),
        ([0, 0, 0], 1.0, "met"),
        ([100, None, 400], None, "the compiler does not say"),
    ):
        builds = [measure.Build(len, 1.0, size) for size in sizes]
        run._add_growth("memory", "blocked", workload, True, [1, 2, 4], builds)
        assert run.record["claims"][-1].get("value") == value
        assert tables.verdict(run.record["claims"][-1]) == verdict
    run._add_growth("memory", "blocked", workload, True, [1, 2], [builds[0], "out of memory"])
    assert tables.verdict(run.record["claims"][-1]) == "out of memory"


@pytest.mark.parametrize("peer", peers.TRACED)
def test_memory_is_that_of_heads_and_lengths_where_the_peer_has_them(peer):
    # Longer than a block, which may hold 1024 * 1024 logits and as many probabilities.
    workload = Workload("small", "a test", 2048, heads=2, dim=8)
    size = peers.compiled(peer, workload, backward=False).temp_bytes
    logits = 4 * 2 * 2048 * 2048
    assert size is not None
    assert logits <= size < 3 * logits if peer == "jax.nn" else size < logits


@pytest.mark.parametrize("name", cpu.BUILT[1:])
def test_term_is_in_what_is_compiled(name):
    """A mask or dropout that never arrived would be compiled at no cost."""
    workload = WORKLOADS[name].quick()
    plain = WORKLOADS["full-4k"].quick()
    assert _operations(workload) > _operations(plain)


def _operations(workload):
    build = peers.compiled("blocked", workload, backward=True)
    return build.run.as_text().count(" = ")


# --- tables ----------------------------------------------------------------------------------

PAGE = "# Title\n\nBefore.\n\n<!-- benchmark:cpu -->\nold\n<!-- /benchmark:cpu -->\n\nAfter.\n"


def test_redraw_replaces_what_is_between_the_markers_and_nothing_else():
    table = tables.markdown(("a", "b"), [("1", "2|3")])
    assert table == "| a | b    |\n|---|------|\n| 1 | 2\\|3 |"
    once = tables.redraw(PAGE, "cpu", table)
    begin, end = "<!-- benchmark:cpu -->", "<!-- /benchmark:cpu -->"
    assert once == f"# Title\n\nBefore.\n\n{begin}\n\n{table}\n\n{end}\n\nAfter.\n"
    assert tables.redraw(once, "cpu", table) == once


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- benchmark:cpu -->",
        "<!-- /benchmark:cpu --><!-- benchmark:cpu -->",
        PAGE * 2,
    ],
    ids=["none", "no end", "wrong order", "twice"],
)
def test_redraw_refuses_a_page_without_its_markers(text):
    with pytest.raises(ValueError, match="must hold the markers <!-- benchmark:cpu --> and"):
        tables.redraw(text, "cpu", "table")


# --- the commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "forward,nope", "memory", "neither"],
            f"cpu.py: --only must name {', '.join(cpu.SECTIONS)}; got nope, neither.\n",
        ),
        (["--repeat", "0"], "cpu.py: --repeat must be at least 1, got 0.\n"),
    ],
    ids=["unknown name", "no rounds"],
)
def test_wrong_command_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert cpu.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


def test_out_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cpu.main(["--out", str(tmp_path / "file" / "cpu.json")]) == 2
    assert capsys.readouterr().err.startswith("cpu.py: --out must be a file that can be written")


def test_record_of_another_format_is_refused(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    path.write_text('{"format": 0}')
    assert tables.main([str(path)]) == 2
    assert "must be a benchmark of format 1, got format 0." in capsys.readouterr().err


def test_command_that_is_recorded_repeats_the_run_anywhere():
    options = {"quick": True, "only": ["memory"], "repeat": 3, "out": Path("results/cpu.json")}
    said = "python benchmarks/cpu.py --quick --only memory --repeat 3"
    namespace = argparse.Namespace
    assert cpu.command(namespace(**options)) == f"{said} --out results/cpu.json"
    assert cpu.command(namespace(**options | {"out": Path("/somewhere/cpu.json")})) == said


def _python(*arguments):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


def test_quick_run_writes_a_record_that_the_readme_is_drawn_from(tmp_path):
    out, readme = tmp_path / "results" / "cpu.json", tmp_path / "README.md"
    ran = _python("benchmarks/cpu.py", "--quick", "--only", "window-share", "--out", out)
    assert "window / full, both ours" in ran.stdout
    assert list(out.parent.iterdir()) == [out]
    record = tables.load(out)
    assert [row["section"] for row in record["claims"]] == ["window-share"]
    assert len(record["samples"]) == 2
    for sample in record["samples"]:
        assert len(sample["seconds"]) == cpu.QUICK_ROUNDS
        assert sample["low_s"] <= sample["median_s"] <= sample["high_s"]
        assert sample["error"] < 1e-5
    assert not record["interrupted"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["machine"]["cores"] == os.cpu_count()
    assert str(tmp_path) not in out.read_text()
    assert str(ROOT) not in out.read_text()

    readme.write_text(PAGE)
    drawn = []
    for _ in range(2):
        assert tables.main([str(out), "--readme", str(readme)]) == 0
        drawn.append(readme.read_text())
    assert drawn[0] == drawn[1]
    assert "a quick run, whose figures mean nothing" in drawn[0]
    assert drawn[0].startswith("# Title\n\nBefore.\n\n<!-- benchmark:cpu -->")
    assert drawn[0].endswith("<!-- /benchmark:cpu -->\n\nAfter.\n")


def test_long_run_says_what_time_and_memory_it_took():
    ran = _python("benchmarks/long.py", "--length", "300", "--dim", "16", "--causal")
    said = dict(line.split("  ", 1) for line in ran.stdout.splitlines()[1:])
    assert list(said)[:3] == ["compile time", "time", "temporary memory"]
    assert float(said["error"]) < 1e-5


# --- on a GPU --------------------------------------------------------------------------------


def test_gpu_work_counts_operations_as_the_field_does():
    full, causal = gpu.Work(128, 16384, causal=False), gpu.Work(128, 16384, causal=True)
    assert (full.batch, full.heads) == (1, 16)
    assert full.flops(backward=False) == 4 * 16 * 16384**2 * 128
    assert causal.flops(backward=True) == 2.5 * full.flops(backward=False) / 2


def test_gpu_benchmark_says_that_it_needs_a_gpu(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


@pytest.fixture
def tiny(monkeypatch):
    """The GPU benchmark's loop on a CPU: one small workload, three implementations."""

    def absent(q, k, v, *, causal):
        raise NotImplementedError("not here")

    def wrong(q, k, v, *, causal):
        return 1.5 * gpu._ours("dot", "blocked")(q, k, v, causal=causal)

    named = {"ours": gpu._ours("dot", "blocked"), "wrong": wrong, "absent": absent}
    monkeypatch.setattr(gpu, "JAX_PEERS", named)
    monkeypatch.setattr(gpu, "PEERS", tuple(named))
    monkeypatch.setattr(gpu, "WORK", [gpu.Work(64, 64, causal=True)])
    monkeypatch.setattr(gpu, "TOKENS", 64)
    monkeypatch.setattr(gpu, "WIDTH", 128)
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "CALLS", 1)


def test_gpu_benchmark_goes_on_where_it_stopped_and_marks_what_is_wrong(tiny, capsys):
    record, saved = {"rows": []}, []
    gpu.measure_all(record, lambda: saved.append(len(record["rows"])), deadline=0.0)
    assert record["rows"] == []
    assert "Out of time" in capsys.readouterr().out
    gpu.measure_all(record, lambda: saved.append(len(record["rows"])), deadline=float("inf"))
    found = {(row["pass"], row["peer"]): row for row in record["rows"]}
    assert len(found) == 6
    assert saved[-1] == 6
    assert found["forward", "absent"]["reason"] == "NotImplementedError: not here"
    assert found["forward+backward", "ours"]["error"] < 2e-2
    lines = capsys.readouterr().out.splitlines()
    assert all(("WRONG" in line) == ("wrong" in line) for line in lines)
    gpu.measure_all(record, lambda: None, deadline=float("inf"))
    assert len(record["rows"]) == 6
