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

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
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


def sections() -> Iterator[Section]:
    """What is timed, in the order of what matters most."""
    for dim in DIMS:  # correctness first: small, and the kernels alone
        for similarity in ("", "cosine-"):
            workload = WORKLOADS[f"sweep-{similarity}d{dim}-causal-1k"]
            cases = tuple(Case(peer, workload, backward=True) for peer in KERNELS)
            yield Section(f"check-{similarity}d{dim}", cases, seconds=1.0, rounds=3)
    for length in LENGTHS[:1]:
        yield from _sweep(length)
    for name in NAMED:
        yield from suite.sections_of(name, _half(name), PEERS, seconds=2.0)
    for length in LENGTHS[1:]:
        yield from _sweep(length)


def _half(name: str) -> Workload:
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
                said = suite.said(backward)
                yield Section(f"sweep-{name}, {said}", (*dot, *cosine), seconds=4.0)


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
                    cells.append(_cell(rows.get((name, suite.said(backward), peer))))
                lines.append((str(dim), kind, suite.said(backward), *cells))
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
    every = {section.name: section for section in sections()}
    shown = dict.fromkeys(name.partition(", ")[0] for name in every)
    parser = suite.parser(
        "Measure the kernels on an NVIDIA GPU.",
        minutes=MINUTES,
        epilog=f"Sections: {', '.join(shown)}; or how some begin, such as sweep-d128.",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    reason = suite.chosen_or_reason("gpu.py", chosen, list(every))
    if reason is not None:
        return suite.refuse(reason)
    if os.environ.get(INNER):
        return _measure(chosen, every)
    return _watched(given, chosen.out, chosen.minutes, chosen.fresh)


def _measure(chosen: Any, every: dict[str, Section]) -> int:
    """The process that measures."""
    if jax.default_backend() != "gpu":
        print(f"`benchmarks/gpu.py` needs an NVIDIA GPU that JAX can use, got {jax.devices()}.")
        return 1
    run = suite.begun("gpu.py", chosen)

    def step(name: str) -> tuple[str, Callable[[], None]]:
        return name, lambda: run.timed(suite.without(every[name], chosen))

    try:
        run.each(map(step, suite.selected(chosen, list(every))), then=lambda: None)
    except suite.LostError as error:
        suite.progress(f"The device is lost to this process: {error}")
        return LOST
    print(page(run.record))
    run.finish()
    return 130 if run.record["interrupted"] else 0


def _watched(given: Sequence[str], out: Path | None, minutes: float, fresh: bool) -> int:
    """Measure in another process; where it hangs or dies, go on in a new one while time is left."""
    deadline = suite.until(minutes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu.json" if out is None else out
        again = [word for word in given if word != "--fresh"]
        while True:
            left = max((deadline - time.monotonic()) / 60, 0.01)
            arguments = [*(given if fresh else again), "--out", str(path)]
            arguments += ["--minutes", f"{left:.3f}"]
            fresh = False
            code = _one_process([sys.executable, __file__, *arguments], path)
            if code in (0, 1, 2, 130):
                return code
            if time.monotonic() > deadline:
                print(f"Out of time; the last process ended with code {code}.", file=sys.stderr)
                return 1
            suite.progress(f"The process ended with code {code}; going on in a new one.")


def _one_process(command: Sequence[str], path: Path) -> int:
    """Run it; end it where its file has not changed for too long."""
    environment = {**os.environ, INNER: "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(command, env=environment)
    begin = time.time()
    try:
        while True:
            try:
                return process.wait(timeout=min(STALLED / 10, 1.0))
            except subprocess.TimeoutExpired:
                pass
            try:
                changed = suite.working(path).stat().st_mtime
            except OSError:
                changed = begin
            if time.time() - max(changed, begin) > STALLED:
                suite.progress(f"No word for {STALLED:.0f} s: ending the process.")
                process.kill()
    except KeyboardInterrupt:
        return process.wait()  # it has had the same signal, and keeps what it has
    finally:
        if process.poll() is None:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
