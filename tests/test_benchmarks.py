"""The benchmarks: workloads and their answers, claims, tables, pictures, and one tiny run."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import flash_attention, flash_cosine_sim_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import command
import cpu
import measure
import micro
import named
import peers
import plots
import record as records
import redraw
import suite
import tables
import workloads
from workloads import WORKLOADS, Workload

ROOT = Path(__file__).parents[1]
CLAIMS = [(section, claim) for section, claims in cpu.CLAIMS.items() for claim in claims]
CASES = {case for _, claim in CLAIMS for case in (claim.above, claim.below)}


# --- workloads and claims --------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_well_formed(name):
    workload = WORKLOADS[name]
    assert workload.name == name
    assert workload.source
    assert min(*workload.shape, *workload.kv_shape) >= 1
    assert workload.heads % workload.key_heads == 0
    assert workload.similarity in ("dot", "cosine")
    assert workload.dtype in workloads.DTYPES
    quick = workload.quick()
    assert quick.length <= 512
    assert quick.features == workload.features
    assert quick.words.split()[0] == workload.words.split()[0]


def test_every_family_is_there_with_its_shape():
    shapes = {
        "seed-128": (4, 8, 128, 64),
        "seed-8k": (4, 8, 8192, 64),
        "bert-128": (8, 12, 128, 64),
        "bert-4k": (8, 12, 4096, 64),
        "sweep-d64-full-16k": (1, 32, 16384, 64),
        "sweep-cosine-d256-causal-512": (32, 8, 512, 256),
        "llama-8k": (1, 32, 8192, 128),
        "gemma-8k": (1, 16, 8192, 256),
        "gpt-oss-8k": (1, 64, 8192, 64),
        "alphafold-256x256": (256, 4, 256, 32),
        "vit-64x197": (64, 12, 197, 64),
        "packed-8k": (1, 32, 8192, 128),
        "decode-128k": (1, 32, 1, 128),
    }
    assert {name: WORKLOADS[name].shape for name in shapes} == shapes
    assert {WORKLOADS[f"decode-{n}k"].keys for n in (1, 128)} == {1024, 131072}
    assert WORKLOADS["llama-8k"].kv_shape == (1, 8, 8192, 128)
    features = {
        "bert-masked-1k": ("key mask",),
        "bert-dropout-1k": ("dropout",),
        "gemma-8k": ("grouped heads", "window", "softcap"),
        "gpt-oss-8k": ("grouped heads", "window", "sinks"),
        "alphafold-256x256": ("bias",),
        "packed-8k": ("grouped heads", "segments"),
    }
    assert {name: WORKLOADS[name].features for name in features} == features


def test_operations_are_counted_as_the_field_does():
    full, causal = WORKLOADS["sweep-d128-full-16k"], WORKLOADS["sweep-d128-causal-16k"]
    assert full.flops(backward=False) == 4 * 16 * 16384**2 * 128
    assert causal.flops(backward=True) == 3.5 * full.flops(backward=False) / 2
    window = Workload("w", "a test", 100, heads=1, dim=1, window=2)
    assert window.pairs() == 5 * 100 - 2 * (2 + 1)
    assert dataclasses.replace(window, causal=True).pairs() == 3 * 100 - (2 + 1)
    packed = Workload("p", "a test", 100, documents=3)
    sizes = np.diff(workloads.documents(packed))
    assert (sizes.sum(), packed.pairs()) == (100, (sizes**2).sum())
    decode = WORKLOADS["decode-1k"]
    assert decode.flops(backward=False) == 4 * 32 * 1024 * 128
    # Queries and output of 32 heads of one token, keys and values of 8 of 1024, 4 bytes each.
    assert decode.bytes(backward=False) == 4 * (2 * 32 * 128 + 2 * 8 * 1024 * 128)


def test_every_workload_of_a_plan_and_every_peer_of_it_is_known():
    for section in [*cpu.plan_sections(), *micro.plan_sections()]:
        for case in section.cases:
            assert case.peer in peers.PEERS
            assert case.workload.name in WORKLOADS
    timed = {section.name for section in cpu.plan_sections()}
    assert set(cpu.CLAIMS) < timed
    # Three other libraries at least, at each length of the sweep.
    for section in cpu.plan_sections():
        if section.name.startswith("seed-") and not section.name.startswith("seed-8k"):
            others = {case.peer for case in section.cases} - {"blocked"}
            assert len(others) >= 3, section.name


def test_every_case_of_a_claim_names_a_peer_that_takes_it_when_installed():
    for case in CASES:
        reason = peers.PEERS[case.peer].why_not(case.workload, case.backward)
        assert reason is None or "is not installed" in reason, case


def test_targets_are_those_that_are_promised():
    targets = {
        (section, claim.what.partition(" /")[0]): (claim.target, claim.at_most)
        for section, claim in CLAIMS
        if claim.target is not None
    }
    assert targets == {
        ("forward", "jax.nn"): (2.5, False),
        ("causal-forward", "jax.nn"): (3.5, False),
        ("forward-backward", "jax.nn"): (1.5, False),
        ("causal-forward-backward", "jax.nn"): (2.5, False),
        **{(s, "torch SDPA"): (0.7, False) for s in cpu.CLAIMS if "share" not in s},
        **{(s, "softmax"): (1.05, False) for s in cpu.CLAIMS if "share" not in s},
        ("causal-share", "causal"): (0.6, True),
        ("window-share", "window"): (0.1, True),
    }


def test_claims_divide_the_slower_by_the_faster_and_parts_by_wholes():
    for section, claim in CLAIMS:
        assert claim.above.backward == claim.below.backward
        above, below = claim.above.workload, claim.below.workload
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
    workload = Workload("small", "a test", 16, heads=2, dim=8, dtype="bfloat16", mask_prob=0.5)
    first = workloads.inputs(workload)
    workloads.inputs.cache_clear()
    second = workloads.inputs(workload)
    assert list(first) == ["q", "k", "v", "weights", "mask"]
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        if name != "mask":
            assert array.shape == workload.shape
            assert array.dtype == np.float32
            rounded = array.astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(array, rounded)  # so that every peer gets the same
    assert not np.array_equal(first["q"], first["k"])
    assert 0 < first["mask"].mean() < 1
    assert first["mask"][:, 0].all()


CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 5},
    "causal window softcap": {"causal": True, "window": 5, "softcap": 2.0},
    "sinks": {"sinks": True, "causal": True},
    "bias": {"bias": True, "batch": 2},
    "mask": {"mask_prob": 0.3, "batch": 2},
    "segments": {"documents": 3, "causal": True},
    "decode": {"length": 1, "kv_length": 37},
}


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("call", CALLS)
def test_reference_is_what_dense_computes(similarity, call, monkeypatch):
    monkeypatch.setattr(workloads, "ORACLE_LOGITS", 16 * 37 * 2)  # three blocks, the last one short
    options = {"heads": 4, "kv_heads": 2, "dim": 8, "length": 37, **CALLS[call]}
    workload = Workload("small", "a test", similarity=similarity, **options)
    reference = workloads.reference(workload, backward=True)
    arrays = {
        name: jnp.asarray(x.astype(np.float64) if x.dtype == np.float32 else x)
        for name, x in workloads.inputs(workload).items()
    }
    attend = flash_attention if similarity == "dot" else flash_cosine_sim_attention
    names = workloads.gradients(workload)

    @jax.jit  # op by op, each would be compiled alone
    def differentiate(arrays):
        def out_of(*leaves):
            operands = {**arrays, **dict(zip(names, leaves, strict=True))}
            options = peers.our_options(workload, operands)
            qkv = (operands[name] for name in "qkv")
            return attend(*qkv, **options, implementation="dense")

        out, pull = jax.vjp(out_of, *(arrays[name] for name in names))
        gradients = zip(names, pull(arrays["weights"]), strict=True)
        return {"out": out} | {f"d{name}": x for name, x in gradients}

    for name, x in workloads.part_of(differentiate(arrays), workload).items():
        shaped = x.reshape(reference[name].shape)
        np.testing.assert_allclose(reference[name], shaped, rtol=1e-9, atol=1e-12, err_msg=name)


def test_reference_of_jax_is_that_of_numpy():
    workload = Workload("small", "a test", 37, heads=4, kv_heads=2, dim=8, causal=True, sinks=True)
    of_numpy = workloads.reference(workload, backward=True)
    of_jax = workloads.reference(workload, backward=True, xp=jnp)
    for name, array in of_numpy.items():
        np.testing.assert_allclose(of_jax[name], array, rtol=1e-9, atol=1e-12, err_msg=name)


def test_reference_refuses_dropout():
    with pytest.raises(ValueError, match="must have no dropout, got 0"):
        workloads.reference(WORKLOADS["bert-dropout-1k"].quick(), backward=False)


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

        return functools.partial(measure.time_call, run, self)


def test_rounds_run_every_case_once_in_changing_order():
    clock = Clock()
    cases = {name: clock.case(name, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 4))}
    rounds = list(measure.interleave(cases, 6, clock=clock))
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
    assert len(list(measure.interleave(cases, 9, clock=clock, **limits))) == count


def test_short_calls_are_repeated_until_a_clock_can_see_them():
    clock, calls = Clock(), []

    def run(count):
        calls.append(count)
        clock.now += 0.001 * count

    time_once = measure.make_timer(run, clock)
    assert time_once() == pytest.approx(0.001)
    assert calls == [1, 20]
    assert time_once() == pytest.approx(0.001)
    assert calls == [1, 20, 20]


def test_inputs_rotate_through_more_than_a_cache():
    assert measure.count_sets(2**20, "gpu") == measure.MOST_SETS
    assert measure.count_sets(2**25, "gpu") * 2**25 == measure.ROTATED_BYTES["gpu"]
    assert measure.count_sets(2**40, "gpu") == 1


def test_failure_says_oom_or_what_was_said():
    assert measure.describe_failure(MemoryError()) == "oom"
    assert (
        measure.describe_failure(RuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes."))
        == "oom"
    )
    assert measure.describe_failure(RuntimeError("no kernel\nsecond line")) == "failed: no kernel"
    assert measure.describe_failure(ValueError("`q` must")) == "failed: ValueError: `q` must"
    assert measure.is_fatal(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"))
    assert not measure.is_fatal(MemoryError())


def test_compiled_says_what_memory_and_time_it_took():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    build = measure.compile_cold(lambda x: (x @ x) @ x, shape)
    assert build.seconds > 0
    assert build.temp_bytes is not None
    assert build.temp_bytes >= 64 * 64 * 4
    np.testing.assert_array_equal(build.run(jnp.eye(64, dtype=jnp.float32)), np.eye(64))


# --- memory and compile time -----------------------------------------------------------------


def _record(builds=(), samples=()):
    record = records.Record.begin("cpu", "a test")
    return dataclasses.replace(record, samples=list(samples), builds=list(builds))


def _built(length, size, **more):
    row = {"section": "memory", "peer": "blocked", "words": "full", "pass": "forward"}
    return row | {"length": length, "temp_bytes": size} | more


@pytest.mark.parametrize(
    ("sizes", "value", "verdict"),
    [
        ([100, 200, 400], 2.0, "met"),
        ([100, 200, 500], 2.5, "**missed**"),
        ([0, 0, 0], 1.0, "met"),
        ([100, None, 400], None, "the compiler does not say"),
    ],
    ids=str,
)
def test_growth_is_the_largest_of_the_doublings(sizes, value, verdict):
    builds = [_built(n, size) for n, size in zip([1, 2, 4], sizes, strict=True)]
    (claim,) = cpu.judge(_record(builds))
    assert claim.get("value") == value
    assert tables.verdict(claim) == verdict


def test_growth_of_what_did_not_compile_has_the_reason():
    (claim,) = cpu.judge(_record([_built(1, 9), _built(2, None, why_not="oom")]))
    assert tables.verdict(claim) == "oom"


def test_compile_time_is_the_longest():
    rows = [
        _built(n, 1, section="compile", compile_s=seconds) for n, seconds in ((1, 0.5), (2, 3.5))
    ]
    (claim,) = cpu.judge(_record(rows))
    assert (claim["value"], tables.verdict(claim)) == (3.5, "**missed**")


@pytest.mark.parametrize("peer", peers.TRACED)
def test_memory_is_that_of_heads_and_lengths_where_the_peer_has_them(peer):
    # Longer than a block, which may hold 1024 * 1024 logits and as many probabilities.
    workload = Workload("small", "a test", 2048, heads=2, dim=8)
    size = peers.compile_peer(peer, workload, backward=False).temp_bytes
    logits = 4 * 2 * 2048 * 2048
    assert size is not None
    assert logits <= size < 3 * logits if peer == "jax.nn" else size < logits


@pytest.mark.parametrize("name", cpu.BUILD_WORKLOADS[1:])
def test_term_is_in_what_is_compiled(name):
    """A mask or dropout that never arrived would be compiled at no cost."""
    assert _count_operations(name) > _count_operations("full-4k")


@functools.cache
def _count_operations(name):
    build = peers.compile_peer("blocked", WORKLOADS[name].quick(), backward=True)
    return build.run.as_text().count(" = ")


# --- tables and pictures ---------------------------------------------------------------------

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


def _sample(peer, seconds, *, length=1024, **more):
    summary = measure.summarize(seconds)
    workload = dataclasses.replace(WORKLOADS["seed-1k"], length=length)
    return {
        "section": f"seed-{length}, forward",
        "peer": peer,
        "workload": f"seed-{length}",
        "words": "full",
        "pass": "forward",
        "batch": 4,
        "heads": 8,
        "dim": 64,
        "length": length,
        "kv_length": length,
        "dtype": "float32",
        "flops": workload.flops(backward=False),
        "bytes": workload.bytes(backward=False),
        "seconds": seconds,
        "median_s": summary.median,
        "low_s": summary.low,
        "high_s": summary.high,
        "temp_bytes": length * 2**20,
        "error": 1e-7,
        **more,
    }


@pytest.fixture
def record():
    """A record with ours, one twice as fast, one wrong and one that cannot run, at two lengths."""
    samples = []
    for length, seconds in ((1024, 0.01), (2048, 0.04)):
        samples += [
            _sample("blocked", [seconds] * 3, length=length),
            _sample("torch SDPA", [seconds / 2] * 3, length=length),
            _sample("jax.nn", [seconds / 4] * 3, length=length, error=0.5),
            _sample("dense", [seconds * 2] * 3, length=length),
            _sample("tokamax", [1.0], length=length, why_not="tokamax is not installed"),
        ]
    return {
        **records.describe_run("cpu", "a test"),
        "rates": {"matmul": 2e11, "copy": 1e10, "dtype": "float32"},
        "claims": [],
        "samples": samples,
        "builds": [],
    }


def test_rows_show_rates_ratios_and_what_is_wrong(record):
    lines = [line.split("|")[1:-1] for line in tables.samples_table(record).splitlines()]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    rows_by_peer = {row[3]: dict(zip(header, row, strict=True)) for row in rows[1:6]}
    flops = WORKLOADS["seed-1k"].flops(backward=False)
    assert rows_by_peer["blocked"]["GFLOP/s"] == f"{flops / 0.01 / 1e9:.3g}"
    assert rows_by_peer["blocked"]["of matmul"] == f"{flops / 0.01 / 2e11:.0%}"
    assert rows_by_peer["blocked"]["theirs / ours"] == ""
    assert rows_by_peer["torch SDPA"]["theirs / ours"] == "0.50x"
    assert rows_by_peer["jax.nn"]["error"] == "**5.0e-01, wrong**"
    assert rows_by_peer["tokamax"]["median"] == "– tokamax is not installed"


def test_worst_ratios_leave_out_what_is_wrong_and_what_is_ours(record):
    rows = tables.worst_table(record).splitlines()[2:]
    assert len(rows) == 2
    assert all("torch SDPA" in row and "0.50x" in row for row in rows)


def test_half_precision_may_be_less_exact():
    assert tables.wrong({"error": 1e-2, "dtype": "float32"})
    assert not tables.wrong({"error": 1e-2, "dtype": "bfloat16"})
    assert tables.wrong({"error": None, "dtype": "bfloat16"})
    assert not tables.wrong({"error": None, "unchecked": "dropout is random"})


def test_pictures_have_axes_with_units_and_are_the_same_each_time(record):
    pictures = {picture.name: picture for picture in plots.pictures(record)}
    assert list(pictures) == ["cpu-speed", "cpu-roofline"]
    speed = pictures["cpu-speed"].svg("light")
    assert speed == pictures["cpu-speed"].svg("light")
    text = speed.decode()
    assert "length (tokens)" in text
    assert "GFLOP/s" in text
    assert "jax.nn (wrong)" in text
    assert "tokamax" not in text
    dark = pictures["cpu-speed"].svg("dark").decode()
    assert plots.THEMES["dark"]["ink"] in dark
    assert plots.THEMES["light"]["ink"] not in dark
    roofline = pictures["cpu-roofline"].svg("light").decode()
    assert "operations per byte (FLOP/B)" in roofline
    assert "jax.nn, forward" not in roofline


def test_picture_of_memory_is_drawn_from_what_was_compiled(record):
    record["builds"] = [
        _built(n, n * 2**20, **{"pass": "forward+backward", "heads": 8, "dim": 64})
        for n in (1024, 2048)
    ]
    pictures = {picture.name: picture for picture in plots.pictures(record)}
    assert "temporary memory (MiB)" in pictures["cpu-memory"].svg("light").decode()


def test_record_with_too_little_has_no_pictures(record):
    record |= {"samples": record["samples"][:1], "rates": None}
    assert plots.pictures(record) == []


@pytest.mark.parametrize("name", redraw.PAGES)
def test_page_is_what_the_results_give(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    page, pictures = redraw.drawn(name, text)
    assert page == text, "Run `make plots`."
    markers = set(re.findall(r"<!-- benchmark:(\w+) -->", text))
    assert markers == set(redraw.PAGES[name])
    for picture in pictures:
        for theme in plots.THEMES:
            path = ROOT / redraw.PICTURES / f"{picture.name}-{theme}.svg"
            assert path.exists(), "Run `make plots`."


def test_front_leaves_out_what_was_not_measured():
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    whole = redraw.front(record, "folder")
    assert whole.count("<picture>") == 2
    assert len(re.findall(r"^\| t", whole, re.MULTILINE)) == 3
    record |= {"claims": [], "builds": [], "samples": []}
    assert re.findall(r"^\| t", redraw.front(record, "folder"), re.MULTILINE) == []


def test_redraw_names_the_page_that_is_old_and_writes_it(tmp_path, capsys):
    for name in redraw.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    page = tmp_path / "README.md"
    current = page.read_text(encoding="utf-8")
    page.write_text(current.replace("| time of jax.nn", "| TIME of jax.nn"), encoding="utf-8")
    where = ["--root", str(tmp_path)]
    assert redraw.main([*where, "--check"]) == 1
    said = capsys.readouterr().out
    assert said == "redraw.py: README.md is not what the results give. Run `make plots`.\n"
    assert redraw.main(where) == 0
    assert page.read_text(encoding="utf-8") == current
    assert redraw.main([*where, "--check"]) == 0
    page.unlink()
    assert redraw.main(where) == 2


@pytest.mark.parametrize("name", redraw.PAGES)
def test_pictures_of_a_page_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert links
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


# --- the commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "forward,nope", "memory", "neither"],
            "--only must name forward, causal-forward",
        ),
        (["--only", "forward,nope", "memory", "neither"], "; got nope, neither.\n"),
        (["--peers", "nobody"], f"--peers must name {', '.join(peers.PEERS)}; got nobody.\n"),
        (["--repeat", "0"], "cpu.py: --repeat must be at least 1, got 0.\n"),
        (["--minutes", "-1"], "cpu.py: --minutes must be over 0, got -1.\n"),
    ],
    ids=str,
)
def test_wrong_command_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert cpu.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cpu.py: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "nope"], "`workload` must be the name of a workload, got 'nope'. Known: "),
        (["--only-forwards", "--only-backwards"], "leave nothing to measure"),
        (["--mask-prob", "1"], "--mask-prob must be at least 0 and under 1, got 1."),
        (["--seq-lens", "128", "0"], "--seq-lens must be at least 1, got 0."),
        (["--num-times", "0"], "--num-times must be at least 1, got 0."),
    ],
    ids=str,
)
def test_named_refuses_what_cannot_be_measured(arguments, message, capsys):
    assert named.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_flags_of_the_older_benchmark_make_its_workloads():
    parsed = {}

    def plan_sections(options, selected):
        parsed["rows"] = [
            (w.name, w.dtype, w.causal, w.mask_prob, w.batch, w.heads, w.dim) for w in selected
        ]
        raise ValueError("enough")

    words = ["--seq-lens", "128", "8192", "--causal", "--mask-prob", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "plan_sections", plan_sections)
        named.main(words)
    assert parsed["rows"] == [
        (f"seed-{n}", dtype, True, 0.2, 4, 8, 64)
        for n in ("128", "8k")
        for dtype in ("float32", "float16")
    ]


def test_sections_are_chosen_by_name_or_by_how_names_begin():
    names = ["forward", "forward-backward", "seed-128, forward", "seed-1k, forward"]
    assert command.match_sections("forward", names) == ["forward"]
    assert command.match_sections("seed", names) == names[2:]
    assert command.match_sections("seed-128", names) == names[2:3]
    assert command.match_sections("nope", names) == []


def test_out_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cpu.main(["--out", str(tmp_path / "file" / "cpu.json")]) == 2
    assert capsys.readouterr().err.startswith("cpu.py: --out must be a file that can be written")


def _python(*arguments):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        # Their times are not judged here, so they need no optimized programs.
        env={**os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


def test_quick_run_writes_a_record_that_a_page_is_drawn_from(tmp_path):
    out = tmp_path / "results" / "cpu.json"
    ran = _python("benchmarks/cpu.py", "--quick", "--only", "window-share", "--out", out)
    assert "window / full, both ours" in ran.stdout
    assert list(out.parent.iterdir()) == [out]
    record = tables.load(out)
    assert [row["section"] for row in record["claims"]] == ["window-share"]
    assert len(record["samples"]) == 2
    for sample in record["samples"]:
        assert len(sample["seconds"]) == suite.QUICK_ROUNDS
        assert sample["low_s"] <= sample["median_s"] <= sample["high_s"]
        assert sample["error"] < 1e-5
    assert not record["interrupted"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["rates"]["matmul"] > 0
    assert record["rates"]["copy"] > 0
    assert str(tmp_path) not in out.read_text()
    assert str(ROOT) not in out.read_text()
    page = tables.redraw(PAGE, "cpu", tables.page(record))
    assert "a quick run, whose figures mean nothing" in page
    assert page.startswith("# Title\n\nBefore.\n\n<!-- benchmark:cpu -->")
    assert page.endswith("<!-- /benchmark:cpu -->\n\nAfter.\n")
    json.dumps(record, allow_nan=False)


def test_long_run_says_what_time_and_memory_it_took():
    ran = _python("benchmarks/long.py", "--length", "300", "--dim", "16", "--causal")
    lines = dict(line.split("  ", 1) for line in ran.stdout.splitlines()[1:])
    assert list(lines)[:3] == ["compile time", "time", "temporary memory"]
    assert float(lines["error"]) < 1e-5
