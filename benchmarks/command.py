"""The command line that every suite shares: its options, its sections, its outer loop."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import peers
import record
import suite
import tables
from suite import Run, Section, Step

WRONG = 2  # the exit code of a command that cannot be run
INTERRUPTED = 130  # and of one that Ctrl-C ended, as shells count: 128 + SIGINT


# --- options ---------------------------------------------------------------------------------


def make_parser(description: str, *, minutes: float, epilog: str = "") -> argparse.ArgumentParser:
    """The options of every command that measures."""
    # Abbreviations would not be repeated by `spell`.
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    add("--only", nargs="+", metavar="NAME", help="sections, instead of all")
    add("--peers", nargs="+", metavar="NAME", help="peers, instead of all")
    rounds = f"rounds; {suite.ROUNDS} without it, and fewer on a slow machine"
    add("--repeat", type=int, help=rounds)
    add("--minutes", type=float, default=minutes, help="begin no section after these")
    add("--out", type=Path, help="JSON to write as the run goes, and to go on from")
    add("--fresh", action="store_true", help="measure again what --out holds already")
    return parser


def list_sections(sections: Iterable[str], example: str) -> str:
    """The epilog of `--help`: how the names of the sections begin."""
    shown = dict.fromkeys(name.partition(", ")[0] for name in sections)
    return f"Sections: {', '.join(shown)}; or how some begin, such as {example}."


def check_options(program: str, options: argparse.Namespace, sections: Sequence[str]) -> str | None:
    """What is wrong with the options, in one line, or None."""
    unknown = [name for name in split_names(options.only) if not match_sections(name, sections)]
    if unknown:
        return f"{program}: --only must name {', '.join(sections)}; got {', '.join(unknown)}."
    unknown = [name for name in split_names(options.peers) if name not in peers.PEERS]
    if unknown:
        known = ", ".join(peers.PEERS)
        return f"{program}: --peers must name {known}; got {', '.join(unknown)}."
    for name in ("repeat", "minutes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            least = "at least 1" if name == "repeat" else "over 0"
            return f"{program}: --{name} must be {least}, got {value:g}."
    # A path that cannot be written must not be noticed only after minutes of measuring.
    out = options.out
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            record.working_path(out).open("a").close()
        except OSError as error:
            return f"{program}: --out must be a file that can be written, got {out}: {error}"
    return None


def split_names(words: Sequence[str] | None) -> list[str]:
    """The names of an option, with commas or spaces between, unless a name has a comma itself."""
    names: list[str] = []
    for word in words or ():
        names += [word] if word in peers.PEERS else [name for name in word.split(",") if name]
    return names


def match_sections(name: str, sections: Sequence[str]) -> list[str]:
    """The section of that name, or else those whose names begin so."""
    if name in sections:
        return [name]
    return [section for section in sections if section.startswith((f"{name}, ", f"{name}-"))]


def select_sections(options: argparse.Namespace, sections: Iterable[str]) -> list[str]:
    """The sections that were asked for, in their own order."""
    names = list(sections)
    if not options.only:
        return names
    wanted = {match for name in split_names(options.only) for match in match_sections(name, names)}
    return [name for name in names if name in wanted]


def restrict_peers(section: Section, options: argparse.Namespace) -> Section:
    """The section with the peers that were asked for."""
    wanted = split_names(options.peers)
    if not wanted:
        return section
    cases = tuple(case for case in section.cases if case.peer in wanted)
    return dataclasses.replace(section, cases=cases)


def spell(program: str, options: argparse.Namespace) -> str:
    """The command that repeats this run anywhere."""
    words = [f"python benchmarks/{program}"]
    words += ["--quick"] if options.quick else []
    for name in ("only", "peers"):
        values = getattr(options, name)
        if values:
            quoted = (f"'{value}'" if " " in value else value for value in values)
            words += [f"--{name}", *quoted]
    words += [f"--repeat {options.repeat}"] if options.repeat else []
    # An absolute path is of this machine alone.
    if options.out is not None and not options.out.is_absolute():
        words.append(f"--out {options.out.as_posix()}")
    return " ".join(words)


def compute_deadline(minutes: float) -> float:
    """The time, by the monotonic clock, after so many minutes."""
    return time.monotonic() + 60 * minutes


def refuse(message: str) -> int:
    """Print in one line what is wrong with the command, and return its exit code."""
    print(message, file=sys.stderr)
    return WRONG


# --- the outer loop --------------------------------------------------------------------------


def begin(program: str, options: argparse.Namespace, *, command: str | None = None) -> Run:
    """A run with the options of its command, that has measured what the machine can do.

    Args:
        program: the file's name.
        options: of the command.
        command: what the record says was run; None = as the shared options spell it.
    """
    # A program out of the cache would take no time to compile, and that time is measured.
    jax.config.update("jax_enable_compilation_cache", False)
    run = Run(
        program.removesuffix(".py"),
        command=spell(program, options) if command is None else command,
        quick=options.quick,
        repeat=options.repeat,
        path=options.out,
        fresh=options.fresh,
        deadline=compute_deadline(options.minutes),
    )
    run.measure_rates()
    return run


def make_step(run: Run, section: Section, options: argparse.Namespace) -> Step:
    """The step that times a section by the peers that were asked for."""
    return section.name, functools.partial(run.time_section, restrict_peers(section, options))


def make_steps(
    run: Run, sections: Mapping[str, Section], options: argparse.Namespace
) -> list[Step]:
    """The steps that time the sections that were asked for."""
    names = select_sections(options, sections)
    return [make_step(run, sections[name], options) for name in names]


def carry_out(
    run: Run,
    steps: Iterable[Step],
    *,
    judge: suite.Judge | None = None,
    draw: Callable[[dict[str, Any]], str] | None = None,
) -> int:
    """Take the steps, print the page, keep the record, and return the exit code.

    Args:
        run: of the command.
        steps: the name of each section and what measures it.
        judge: makes the claims of a record; None = there are none.
        draw: makes the page of a record's JSON; None = every table, none folded away.
    """
    run.take(steps, judge=judge)
    values = run.record.to_json()
    print(tables.page(values, folded=False) if draw is None else draw(values))
    run.finish()
    return INTERRUPTED if run.record.interrupted else 0
