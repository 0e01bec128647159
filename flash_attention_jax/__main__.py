"""The command line: `python -m flash_attention_jax`, installed as `flash-attention-jax`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence

import jax

import flash_attention_jax
from flash_attention_jax._commands.check import check_main
from flash_attention_jax._commands.explain import explain_main
from flash_attention_jax._commands.line import PROG


def _demo(argv: list[str]) -> int:
    from flash_attention_jax.train import demo_main

    return demo_main(argv)


def _train(argv: list[str]) -> int:
    from flash_attention_jax.train import train_main

    return train_main(argv)


def _bench(argv: list[str]) -> int:
    from flash_attention_jax._commands.bench import bench_main

    return bench_main(argv)


def _compile(argv: list[str]) -> int:
    from flash_attention_jax._commands import compile_hopper, compile_triton

    backends = {"hopper": compile_hopper.main, "triton": compile_triton.main}
    if not argv or argv[0] not in backends:
        asked = not argv or argv[0] in ("-h", "--help")
        text = f"usage: {PROG} compile hopper|triton [OPTIONS]; hopper --help lists its options"
        print(text, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return backends[argv[0]](argv[1:])


def _tune(argv: list[str]) -> int:
    from flash_attention_jax._commands.tune import tune_main

    return tune_main(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "check": (check_main, "compare every engine on this machine with float64: error, time, memory"),
    "demo": (_demo, "check, then train a small transformer on real text, in minutes"),
    "train": (_train, "train a byte-level transformer"),
    "bench": (_bench, "measure speed and memory in a clone, or compare two measurements"),
    "tune": (_tune, "measure the fastest tiles of the kernels on this GPU, and store them"),
    "compile": (_compile, "compile every kernel for GPUs that are not there: registers, spills"),
    "explain": (explain_main, "say which implementation would run a call, and why"),
}
HELP = "\n".join(
    [
        f"usage: python -m {PROG} COMMAND [OPTIONS]",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        f"  {'--version':<10} print the versions",
        "",
        "COMMAND --help lists the options of a command.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; None = those of the process.

    Returns:
        The exit code: 0, what the command returns, 2 for arguments that cannot be used, 130 after
        Ctrl-C.
    """
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if command == "--version":
        print(
            f"{PROG} {flash_attention_jax.__version__}, jax {jax.__version__}, "
            f"Python {platform.python_version()}"
        )
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"{PROG}: error: no command {command!r}; there are {known}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[command][0](rest)
    except ImportError as error:  # demo and train need packages that a plain install lacks
        print(f"{PROG} {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
