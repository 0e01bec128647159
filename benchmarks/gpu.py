"""Measure the kernels on an NVIDIA GPU, against cuDNN, tokamax and torch, in one run.

python benchmarks/gpu.py                                      what fits into nine minutes
python benchmarks/gpu.py --out benchmarks/results/gpu.json    and keep it; again: goes on
python benchmarks/gpu.py --only sweep-d128                    some sections

First the kernels are checked on small calls, forward and backward. Then, workload by workload in
the order of what matters most, every implementation is checked against float64 and all are timed in
turn. The file is written before each thing that is tried: a kernel that hangs or takes the process
down loses only its own row, and the measuring goes on in a new process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import command
import jax
import record
import suite
import tables
from suite import Case, Section
from workloads import WORKLOADS, Workload

MINUTES = 9.0  # no section is begun after these
STALLED = 150.0  # seconds without a word, after which a process is taken to hang
LOST = 3  # the exit code of a process that lost the device
INNER = "FLASH_ATTENTION_JAX_BENCH_INNER"

KERNELS = ("hopper", "triton")
OTHERS = (
    "jax.nn cuDNN",
    "tokamax",
    "torch SDPA flash",
    "torch SDPA cuDNN",
    "torch SDPA efficient",
    "torch FlexAttention",
    "jax.nn",
)
PEERS = (*KERNELS, "blocked", *OTHERS)
DIMS = (128, 64, 256)
LENGTHS = ("16k", "2k", "512", "8k", "4k", "1k")  # in the order in which they are measured
NAMED = (
    "llama-8k",
    "packed-8k",
    "gemma-8k",
    "gpt-oss-8k",
    "alphafold-256x256",
    "alphafold-384x384",
    "vit-64x197",
    "vit-64x577",
    *(f"decode-{n}k" for n in (1, 4, 16, 64, 128)),
    *(f"bert-{kind}{n}" for n in ("512", "2k") for kind in ("", "masked-", "dropout-")),
    *(f"seed-{n}" for n in ("512", "2k", "8k")),
)


def plan_sections() -> Iterator[Section]:
    """What is timed, in the order of what matters most."""
    for dim in DIMS:  # correctness first: small, and the kernels alone
        for similarity in ("", "cosine-"):
            workload = WORKLOADS[f"sweep-{similarity}d{dim}-causal-1k"]
            cases = tuple(Case(peer, workload, backward=True) for peer in KERNELS)
            yield Section(f"check-{similarity}d{dim}", cases, seconds=1.0, rounds=3)
    for length in LENGTHS[:1]:
        yield from _sweep(length)
    for name in NAMED:
        yield from suite.make_sections(name, _to_bfloat16(name), PEERS, seconds=2.0)
    for length in LENGTHS[1:]:
        yield from _sweep(length)


def _to_bfloat16(name: str) -> Workload:
    """A workload in bfloat16."""
    return dataclasses.replace(WORKLOADS[name], dtype="bfloat16")


def _sweep(length: str) -> Iterator[Section]:
    """Every head dimension at a length, full and causal, cosine beside dot."""
    for dim in DIMS:
        for kind in ("full", "causal"):
            name = f"d{dim}-{kind}-{length}"
            for backward in (False, True):
                dot = [Case(p, WORKLOADS[f"sweep-{name}"], backward) for p in PEERS]
                cosine = [Case(p, WORKLOADS[f"sweep-cosine-{name}"], backward) for p in KERNELS]
                section = f"sweep-{name}, {suite.name_pass(backward)}"
                yield Section(section, (*dot, *cosine), seconds=4.0)


# --- what RESULTS.md shows -------------------------------------------------------------------

COLUMNS = (
    ("hopper", "dot"),
    ("hopper", "cosine"),
    ("triton", "dot"),
    ("jax.nn cuDNN", "dot"),
    ("tokamax", "dot"),
    ("torch SDPA flash", "dot"),
    ("torch FlexAttention", "dot"),
)


def anchors_table(record: dict[str, Any] | None) -> str:
    """TFLOP/s at 16384 tokens and a width of 2048; a cell is empty where nothing was measured."""
    rows = {}
    for row in [] if record is None else record["samples"]:
        rows[row["workload"], row["pass"], row["peer"]] = row
    lines = []
    for dim in (64, 128, 256):
        for kind in ("full", "causal"):
            for backward in (False, True):
                cells = []
                for peer, similarity in COLUMNS:
                    cosine = "cosine-" if similarity == "cosine" else ""
                    name = f"sweep-{cosine}d{dim}-{kind}-16k"
                    cells.append(_cell(rows.get((name, suite.name_pass(backward), peer))))
                lines.append((str(dim), kind, suite.name_pass(backward), *cells))
    header = [peer if similarity == "dot" else f"{peer}, cosine" for peer, similarity in COLUMNS]
    return tables.markdown(("dim", "mask", "pass", *header), lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row.get("why_not") is not None:
        return "oom" if row["why_not"] == "oom" else "–"
    wrong = " **wrong**" if tables.wrong(row) else ""
    return f"{row['flops'] / row['median_s'] / 1e12:.0f}{wrong}"


def page(record: dict[str, Any]) -> str:
    """The table of the known anchors, then everything."""
    words = "TFLOP/s, bfloat16, 16384 tokens, heads x dim = 2048:"
    return "\n\n".join([words, anchors_table(record), tables.page(record)])


def empty_page() -> str:
    """What is said in place of the table as long as there are no results."""
    return (
        "No speed has been measured on a GPU yet. `make bench-gpu` measures it, against cuDNN, "
        "tokamax and torch."
    )


# --- the command -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep; the exit status is 1 where there is no GPU."""
    sections = {section.name: section for section in plan_sections()}
    parser = command.make_parser(
        "Measure the kernels on an NVIDIA GPU.",
        minutes=MINUTES,
        epilog=command.list_sections(sections, "sweep-d128"),
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    reason = command.check_options("gpu.py", options, list(sections))
    if reason is not None:
        return command.refuse(reason)
    if os.environ.get(INNER):
        return _measure(options, sections)
    return _supervise(words, options.out, options.minutes, options.fresh)


def _measure(options: argparse.Namespace, sections: dict[str, Section]) -> int:
    """Measure in this process, which `_supervise` started."""
    if jax.default_backend() != "gpu":
        print(f"`benchmarks/gpu.py` needs an NVIDIA GPU that JAX can use, got {jax.devices()}.")
        return 1
    run = command.begin("gpu.py", options)
    try:
        return command.carry_out(run, command.make_steps(run, sections, options), draw=page)
    except suite.LostError as error:
        suite.report(f"The device is lost to this process: {error}")
        return LOST


def _supervise(words: Sequence[str], out: Path | None, minutes: float, fresh: bool) -> int:
    """Measure in another process; if it hangs or dies, go on in a new one while time is left."""
    deadline = command.compute_deadline(minutes)
    with tempfile.TemporaryDirectory() as folder:
        # Without --out too, the next process must see what the last one had done.
        path = Path(folder) / "gpu.json" if out is None else out
        # A second --fresh would throw away what the first process measured.
        resuming = [word for word in words if word != "--fresh"]
        while True:
            left = max((deadline - time.monotonic()) / 60, 0.01)
            arguments = [*(words if fresh else resuming), "--out", str(path)]
            arguments += ["--minutes", f"{left:.3f}"]
            fresh = False
            code = _watch([sys.executable, __file__, *arguments], path)
            if code in (0, 1, command.WRONG, command.INTERRUPTED):
                return code
            if time.monotonic() > deadline:
                print(f"Out of time; the last process ended with code {code}.", file=sys.stderr)
                return 1
            suite.report(f"The process ended with code {code}; going on in a new one.")


def _watch(words: Sequence[str], path: Path) -> int:
    """Run a command in a process, and end it if its file has not changed for too long."""
    environment = {**os.environ, INNER: "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(words, env=environment)
    begin = time.time()
    try:
        while True:
            try:
                return process.wait(timeout=min(STALLED / 10, 1.0))
            except subprocess.TimeoutExpired:
                pass
            try:
                changed = record.working_path(path).stat().st_mtime
            except OSError:
                changed = begin
            if time.time() - max(changed, begin) > STALLED:
                suite.report(f"No word for {STALLED:.0f} s: ending the process.")
                process.kill()
    except KeyboardInterrupt:
        return process.wait()  # it has had the same signal, and keeps what it has
    finally:
        if process.poll() is None:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
