"""The command `explain`: which engine would run a call of these shapes, and why."""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp

from flash_attention_jax._api.explain import explain
from flash_attention_jax._commands.line import DTYPES, PROG, Parser, UsageError, lengths


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
            print(explain(*structs, **args))
    except (UsageError, NotImplementedError, TypeError, ValueError) as error:
        text = error if isinstance(error, UsageError) else f"{PROG} explain: error: {error}"
        print(text, file=sys.stderr)
        return 2
    return 0
