"""The command line: `python -m flash_attention_jax`, installed as `flash-attention-jax`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import flash_attention_jax
from flash_attention_jax.compare import DTYPES, Parser, UsageError, check_main, lengths

PROG = "flash_attention_jax"


def _demo(argv: list[str]) -> int:
    from flash_attention_jax.train import demo_main

    return demo_main(argv)


def _train(argv: list[str]) -> int:
    from flash_attention_jax.train import train_main

    return train_main(argv)


def _bench(argv: list[str]) -> int:
    from flash_attention_jax._bench import bench_main

    return bench_main(argv)


def _tune(argv: list[str]) -> int:
    from flash_attention_jax.kernels.tune import tune_main

    return tune_main(argv)


def _capability(text: str) -> tuple[int, int]:
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be two integers as in 9.0, got {text!r}")
    return int(major), int(minor)


def _window(text: str) -> int | tuple[int, ...]:
    try:
        sides = tuple(int(side) for side in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be w or left,right, got {text!r}") from error
    return sides[0] if len(sides) == 1 else sides


def _explain_parser() -> Parser:
    parser = Parser(
        prog=f"{PROG} explain",
        description="Say which implementation would run a call, and why no other. Example: "
        "explain 1,8,4096,64 --causal --platform gpu --capability 9.0",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("q", type=lengths, help="shape of the queries, such as 1,8,4096,64")
    add("k", type=lengths, nargs="?", help="shape of the keys; that of the queries without it")
    add("v", type=lengths, nargs="?", help="shape of the values; that of the keys without it")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of all three")
    add("--causal", action="store_true", help="with causal masking")
    add("--window", type=_window, help="w or left,right; -1 is unbounded")
    add("--similarity", default="dot", help="dot or cosine")
    add("--layout", default="heads_first", help="heads_first, or heads_last as in jax.nn")
    add("--implementation", help="ask for this one by name")
    add("--differentiation", default="reverse", help="reverse, or any for forward mode too")
    add("--platform", help="cpu, gpu or tpu; this machine's without it")
    add("--capability", type=_capability, help="CUDA compute capability, such as 9.0")
    return parser


def explain_main(argv: list[str]) -> int:
    """The command `explain`: what `flash_attention_jax.explain` says of shapes.

    Args:
        argv: Arguments after `explain`; ["--help"] lists them.

    Returns:
        The exit code: 0, or 2 for a call that is not possible.
    """
    try:
        args = vars(_explain_parser().parse_args(argv))
        shapes = [args.pop(name) for name in ("q", "k", "v")]
        shapes[1] = shapes[1] or shapes[0]
        shapes[2] = shapes[2] or shapes[1]
        dtype = args.pop("dtype")
        with jax.enable_x64(True):
            structs = [jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for shape in shapes]
            print(flash_attention_jax.explain(*structs, **args))
    except (UsageError, NotImplementedError, TypeError, ValueError) as error:
        text = error if isinstance(error, UsageError) else f"{PROG} explain: error: {error}"
        print(text, file=sys.stderr)
        return 2
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "check": (check_main, "compare every engine on this machine with float64: error, time, memory"),
    "demo": (_demo, "check, then train a small transformer on real text, in minutes"),
    "train": (_train, "train a byte-level transformer"),
    "bench": (_bench, "measure speed and memory in a clone, or compare two measurements"),
    "tune": (_tune, "measure the fastest tiles of the kernels on this GPU, and store them"),
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
