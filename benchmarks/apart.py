"""flash-attention-jax 0.3.1, measured in a process of its own: its import name is ours.

`make` installs it into a folder beside the environment's packages. Run as a script, this file is
that process: it reads a line of JSON from its input for each thing to do, and answers with one.

    {"do": "prepare", "folder": ..., "backward": ..., "causal": ..., "mask": ...}   compile, and run
    {"do": "time", "calls": 3}                                                      seconds of each
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

NAME = "flash-attention-jax"
LABEL = "flash-attention-jax 0.3.1"
CHUNK = 1024  # a length over this must be a multiple of it: others are wrong by 0.1


# --- here ------------------------------------------------------------------------------------


def installed() -> Path:
    """Where `make` puts it."""
    return Path(sys.prefix) / "peers" / NAME


def why_not(w: Any, backward: bool) -> str | None:
    """Why it cannot run a workload."""
    del backward
    missing = [name for name in w.features if name != "key mask"]
    if missing:
        return f"it has no {missing[0]}"
    if w.causal and w.mask_prob:
        return "it takes no mask beside causal"
    if any(n > CHUNK and n % CHUNK for n in (w.length, w.keys)):
        return f"it is wrong for lengths that are no multiple of {CHUNK}"
    if w.dtype != "float32":
        return "its gradients are of float32 only"
    if not (installed() / "flash_attention_jax").is_dir():
        return f"{LABEL} is not installed"
    return None


class Process:
    """The process apart, with one workload prepared in it."""

    def __init__(self, workload: Any, backward: bool) -> None:
        import jax
        import workloads

        self.folder = tempfile.TemporaryDirectory()
        for name, x in workloads.inputs(workload).items():
            np.save(Path(self.folder.name) / f"{name}.npy", x)
        environment = {
            **os.environ,
            "PYTHONPATH": str(installed()),
            "JAX_PLATFORMS": jax.default_backend(),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        asked = {"causal": workload.causal, "mask": workload.mask_prob > 0}
        asked["package"] = str(installed())
        try:
            self.facts = self.ask("prepare", folder=self.folder.name, backward=backward, **asked)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **with_what: Any) -> dict[str, Any]:
        """Have one thing done.

        Raises:
            RuntimeError: With the process's own words, or because it died.
            MemoryError: If it ran out of memory.
        """
        asks, answers = self.process.stdin, self.process.stdout
        try:
            print(json.dumps({"do": what, **with_what}), file=asks, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"{LABEL}: its process ended") from None
        line = answers.readline() if answers is not None else ""
        if not line:
            code = self.process.wait()
            if code == -9:  # what Linux does where memory ends
                raise MemoryError(LABEL)
            raise RuntimeError(f"{LABEL}: its process ended with code {code}")
        answer = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def results(self) -> dict[str, np.ndarray]:
        """What it computed."""
        with np.load(Path(self.folder.name) / "results.npz") as found:
            return dict(found)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()
        self.folder.cleanup()


def prepare(workload: Any, backward: bool) -> Any:
    """Compile and warm it, apart."""
    from measure import make_timer
    from prepared import Prepared

    process = Process(workload, backward)
    taken: list[float] = [0.0]

    def run(calls: int) -> None:
        # The time is taken there, around the calls alone, and told by a clock that adds it up.
        taken[0] += process.ask("time", calls=calls)["seconds"]

    return Prepared(
        time=make_timer(run, clock=lambda: taken[0]),
        results=process.results,
        temp_bytes=process.facts["temp_bytes"],
        compile_seconds=process.facts["compile_s"],
        close=process.close,
    )


def _peer() -> Any:
    from prepared import Peer

    return Peer(LABEL, why_not, prepare)


# --- there -----------------------------------------------------------------------------------


class Worker:
    """Does what it is asked, with the old package under its own name."""

    def prepare(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Compile, run once, and leave the results beside the inputs."""
        import time

        import jax
        import jax.numpy as jnp

        import flash_attention_jax as old

        if not Path(old.__file__ or "").is_relative_to(asked["package"]):
            raise ImportError(f"{LABEL} is not in {asked['package']}, and ours was found instead")
        folder = Path(asked["folder"])
        names = ("q", "k", "v", "weights", *(["mask"] if asked["mask"] else []))
        x = {name: jax.device_put(np.load(folder / f"{name}.npy")) for name in names}
        x.setdefault("mask", jnp.ones((x["k"].shape[0], x["k"].shape[2]), bool))

        def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
            return (
                old.causal_flash_attention(q, k, v)
                if asked["causal"]
                else old.flash_attention(q, k, v, mask)
            )

        def both(q: Any, k: Any, v: Any, mask: Any, weights: Any) -> Any:
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
            return out, *pull(weights)

        arguments = [x["q"], x["k"], x["v"], x["mask"]]
        function = attend
        if asked["backward"]:
            function = both
            arguments.append(x["weights"])
        start = time.perf_counter()
        self.run = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        self.arguments = arguments
        found = jax.block_until_ready(self.run(*arguments))
        found = found if asked["backward"] else [found]
        named = dict(zip(("out", "dq", "dk", "dv"), found, strict=False))
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in named.items()}
        np.savez(folder / "results.npz", **arrays)
        memory = self.run.memory_analysis()
        size = None if memory is None else int(memory.temp_size_in_bytes)
        return {"compile_s": seconds, "temp_bytes": size}

    def time(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Run as often as asked."""
        import time

        import jax

        start = time.perf_counter()
        for _ in range(asked["calls"]):
            jax.block_until_ready(self.run(*self.arguments))
        return {"seconds": time.perf_counter() - start}


def serve() -> None:
    """Answer until the input ends."""
    worker = Worker()
    answers = os.fdopen(os.dup(1), "w")  # what else prints must not be taken for an answer
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(worker, asked["do"])(asked)
        except Exception as error:  # noqa: BLE001 (told to whoever asked)
            said = str(error).strip().splitlines() or [""]
            answer = {"failed": f"{type(error).__name__}: {said[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
else:
    PEER = _peer()
