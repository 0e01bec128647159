"""Comparing functions, and the command line: check, explain, versions, bad arguments."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax as f
from flash_attention_jax import __main__
from flash_attention_jax._commands import check
from flash_attention_jax._commands.check import check_main
from flash_attention_jax.compare import Difference, Gradients

ROOT = Path(__file__).parents[1]
SIZES = {"batch": 2, "heads": 2, "q_seq_len": 20, "k_seq_len": 30, "dim": 8}
difference = functools.partial(f.value_and_grad_difference, **SIZES)


# --- value_and_grad_difference ---


def largest_of(found):
    return max(found.o, *found.gradients)


def test_unpacks_as_its_users_write_it():
    planted = functools.partial(f.attention, scale=0.3)
    diff, (dq, dk, dv) = found = difference(f.attention, planted, seed=42)
    gradients = found.gradients
    assert (diff, dq, dk, dv) == (found.o, gradients.dq, gradients.dk, gradients.dv)
    assert len({diff, dq, dk, dv}) == 4
    assert {type(x) for x in (diff, dq, dk, dv)} == {float}


def test_equal_functions_do_not_differ():
    assert difference(f.attention, f.attention) == (0.0, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f.attention, f.flash_attention),
        (f.plain_cosine_sim_attention, f.flash_cosine_sim_attention),
        (jax.nn.dot_product_attention, functools.partial(f.attention, return_lse=True)),
        (functools.partial(f.dot_product_attention, implementation="dense"), jax.jit(f.attention)),
    ],
)
def test_two_ways_to_the_same_attention_differ_by_rounding(one, other):
    assert largest_of(difference(one, other)) < 5e-6


def test_without_the_mask_functions_of_three_arguments_do():
    def plain(q, k, v):
        return f.attention(q, k, v)

    found = difference(plain, jax.nn.dot_product_attention, add_key_mask=False)
    assert largest_of(found) < 5e-6


def test_mask_is_passed():
    def without(q, k, v, mask):
        assert mask.shape == (2, 30)
        assert mask.dtype == bool
        return f.attention(q, k, v)

    assert difference(f.attention, without).o > 1e-2


def test_difference_that_sums_hide_is_found():
    # Two entries of one row, changed so that the sum of the output stays what it was.
    def planted(q, k, v, mask):
        out = f.attention(q, k, v, mask)
        return out.at[1, 1, 3, :2].add(jnp.array([0.125, -0.125], jnp.float32))

    found = difference(f.attention, planted)
    assert found.o == pytest.approx(0.125, abs=1e-6)
    assert max(found.gradients) < 1e-6


@pytest.mark.parametrize("index", [0, 1, 2])
def test_difference_of_one_gradient_is_found(index):
    # The value is right and one gradient is not: what a forgotten term of a custom rule looks like.
    def planted(*arguments):
        x = arguments[index]
        half = (x + jax.lax.stop_gradient(x)) * np.float32(0.5)
        return f.attention(*arguments[:index], half, *arguments[index + 1 :])

    found = difference(f.attention, planted)
    assert found.o < 1e-6
    wrong = [name for name, x in found.gradients._asdict().items() if x > 1e-3]
    assert wrong == [("dq", "dk", "dv")[index]]


def test_nan_is_not_lost():
    def planted(q, k, v, mask):
        return f.attention(q, k, v, mask).at[0, 0, 0, 0].set(jnp.nan)

    assert np.isnan(difference(f.attention, planted).o)


def test_seed_decides():
    planted = functools.partial(f.attention, scale=0.3)
    assert difference(f.attention, planted, 1) == difference(f.attention, planted, seed=1)
    assert difference(f.attention, planted, 1) != difference(f.attention, planted, 2)


def test_outputs_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"^`fn2` must return an output of the queries' shape"):
        difference(f.attention, lambda q, k, v, mask: f.attention(q, k, v, mask)[:, :, :5])


def test_difference_prints_readably():
    assert str(Difference(0.0, Gradients(1.25e-7, 0.5, float("nan")))) == (
        "o 0.0e+00  dq 1.2e-07  dk 5.0e-01  dv nan"
    )


def test_no_matrix_of_logits_is_held_beside_those_of_the_functions(monkeypatch):
    # What is alive while the second function is traced: the inputs, and four results of the first.
    alive = []

    def watched(q, k, v):
        alive.append(sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4))
        return f.attention(q, k, v)

    before = sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4)
    sizes = {**SIZES, "q_seq_len": 64, "k_seq_len": 64, "add_key_mask": False}
    f.value_and_grad_difference(f.attention, watched, **sizes)
    array = 2 * 2 * 64 * 8 * 4
    assert alive[0] - before <= 8 * array


# --- PRNGKeyGenerator ---


def test_keys_are_reproducible_and_never_the_same():
    keys = f.PRNGKeyGenerator(seed=3)
    assert iter(keys) is keys
    drawn = [jax.random.key_data(next(keys)).tolist() for _ in range(5)]
    again = [jax.random.key_data(key).tolist() for key, _ in zip(f.PRNGKeyGenerator(3), drawn)]  # noqa: B905
    assert drawn == again
    assert len({tuple(key) for key in drawn}) == 5
    assert next(f.PRNGKeyGenerator(4)) != next(f.PRNGKeyGenerator(3))
    assert next(f.PRNGKeyGenerator()) == next(f.PRNGKeyGenerator(42))


# --- the command check ---

SMALL = ["--lengths", "20", "--heads", "2", "--dim", "8", "--rounds", "1"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m flash_attention_jax ...` in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "flash_attention_jax", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def rows(text: str) -> dict[tuple[int, str], list[str]]:
    """(length, engine) -> the other cells of the table, or "-" and the reason."""
    found = [re.match(r" +(\d+)  (\w+) +(.*)", line) for line in text.splitlines()]
    return {
        (int(m[1]), m[2]): m[3].split("  ") if m[3].startswith("-") else m[3].split()
        for m in found
        if m
    }


def largest(cells: list[str]) -> float:
    """The largest of a row's errors, NaN among them."""
    return float(np.max([float(cell) for cell in cells[:4]]))


@pytest.fixture
def few(monkeypatch):
    """Three engines, one of which declines: every compilation costs a second."""
    monkeypatch.setattr(check.dispatch, "NAMES", ("triton", "blocked", "dense"))


def test_check_prints_a_row_for_every_engine_and_length():
    done = run("check", "--lengths", "24,7", "--heads", "2", "--dim", "8", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    engines = ["hopper", "triton", "blocked", "checkpointed", "dense"]
    assert list(table) == [(length, name) for length in (24, 7) for name in engines]
    for (_, name), cells in table.items():
        if cells[0] == "-":
            assert len(cells) > 1, "a reason"
            assert name in ("hopper", "triton")
            continue
        assert largest(cells) < 1e-5
        assert cells[5:8:2] == ["ms", "ms"]
        assert min(float(cells[4]), float(cells[6]), float(cells[8])) > 0
        assert [cell[-1] for cell in cells[10:]] == ["x", "x", "x"]
    assert table[24, "dense"][10:] == ["1.00x", "1.00x", "1.00x"]
    assert done.stderr == ""  # no progress bar, whose carriage returns would stay in a log


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", ["--dtype", "float64", "--causal"]),
        ("bfloat16", ["--dtype", "bfloat16", "--similarity", "cosine"]),
        ("float32", ["--lengths", "1"]),
    ],
)
def test_check_of_other_calls(dtype, options, few, capsys):
    with jax.enable_x64(False):
        assert check_main([*SMALL, *options]) == 0
        assert jnp.ones(1).dtype == jnp.float32
    found = [largest(cells) for cells in rows(capsys.readouterr().out).values() if cells[0] != "-"]
    assert len(found) == 2
    assert max(found) < 60 * float(jnp.finfo(dtype).eps)
    # In float64 the reference is dense itself; one key leaves nothing to round.
    assert found[0] > 0 or "1" in options


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_reference_by_blocks_is_the_definition(causal, similarity, monkeypatch, rng):
    problem = check._Problem(11, 2, 3, 4, "float32", causal, similarity, 0)
    arrays = problem.arrays()
    monkeypatch.setattr(check, "ENTRIES", 2 * 3 * 11 * 4)  # blocks of 4 queries, the last of 3
    with jax.enable_x64(False):  # as most users have it; the reference is float64 all the same
        found = check._reference(problem, arrays)
    q, k, v, dout = (x.astype(np.float64) for x in arrays)
    if similarity == "cosine":
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    x = (10.0 if similarity == "cosine" else 0.5) * np.einsum("bhid,bhjd->bhij", q, k)
    x = np.where(np.tri(11, dtype=bool) | (not causal), x, -np.inf)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = np.einsum("bhij,bhje->bhie", p, v)
    dv = np.einsum("bhij,bhie->bhje", p, dout)
    np.testing.assert_allclose(found[0], out, atol=1e-12)
    np.testing.assert_allclose(found[3], dv, atol=1e-12)
    if similarity == "dot":
        dp = np.einsum("bhie,bhje->bhij", dout, v)
        ds = 0.5 * p * (dp - (dout * out).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(found[1], np.einsum("bhij,bhjd->bhid", ds, k), atol=1e-12)
        np.testing.assert_allclose(found[2], np.einsum("bhij,bhid->bhjd", ds, q), atol=1e-12)


def test_check_finds_a_wrong_engine(few, monkeypatch, capsys):
    attend = check._Problem.attend

    def planted(self, name, **options):
        if name != "blocked":
            return attend(self, name, **options)
        return lambda q, k, v: attend(self, name, **options)(q, k, v) * 1.001

    monkeypatch.setattr(check._Problem, "attend", planted)
    assert check_main(SMALL) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "wrong: blocked at length 20 is off by more than 10 times the error of dense"
    )


def test_what_does_not_fit_is_said_and_the_rest_runs(few, monkeypatch, capsys):
    # Eight heads of 1024 * 1024 logits are 32 MiB a matrix, and the dense engine holds several.
    monkeypatch.setattr(check, "_free_memory", lambda: 48 * 2**20)
    assert check_main(["--lengths", "1024", "--dim", "8", "--rounds", "1"]) == 0
    table = rows(capsys.readouterr().out)
    dash, reason = table[1024, "dense"]
    assert dash == "-"
    assert re.fullmatch(r"needs [\d.]+ MiB of temporary memory, 48 MiB are free", reason)
    assert largest(table[1024, "blocked"]) < 1e-5
    # No ratio to what did not run; what it would have needed is known.
    assert table[1024, "blocked"][10:12] == ["-", "-"]
    assert table[1024, "blocked"][12].endswith("x")


def test_length_whose_inputs_do_not_fit_is_said(monkeypatch, capsys):
    monkeypatch.setattr(check, "_free_memory", lambda: 1000)
    assert check_main(SMALL) == 0
    table = rows(capsys.readouterr().out)
    reason = "inputs and reference need 30 KiB, 0.977 KiB are free"
    assert table[20, "blocked"] == ["-", reason]
    assert table[20, "hopper"][0] == "-"
    assert table[20, "hopper"][1] != reason


def test_device_that_runs_out_of_memory_is_said(few, monkeypatch, capsys):
    compile_ = check._compile

    def full(problem, row, arrays):
        if row.name == "dense":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        compile_(problem, row, arrays)

    monkeypatch.setattr(check, "_compile", full)
    assert check_main(SMALL) == 0
    table = rows(capsys.readouterr().out)
    assert table[20, "dense"] == ["-", "out of memory"]
    assert table[20, "blocked"][0] != "-"


def test_free_memory_is_a_number_here():
    free = check._free_memory()
    assert free is None or free > 2**20


@pytest.mark.parametrize("tqdm", ["installed", "absent"])
def test_terminal_gets_a_bar(tqdm, few, monkeypatch, capsys):
    if tqdm == "absent":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert check_main(SMALL) == 0
    printed = capsys.readouterr()
    bar = r"\[#+\.+\] \d/5 blocked" if tqdm == "absent" else r"blocked: .*\d/5 \["
    assert re.search(bar, printed.err)
    assert "float64 reference" in printed.err
    assert len(rows(printed.out)) == 3
    assert "\r" not in printed.out


def test_pipe_gets_no_plain_bar_either(few, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert check_main(SMALL) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert len(rows(printed.out)) == 3


BAD = {
    "no length": (["--lengths", ""], "--lengths: must be positive integers"),
    "length zero": (["--lengths", "512,0"], "--lengths: must be positive integers"),
    "length of a word": (["--lengths", "long"], "--lengths: must be positive integers"),
    "dim zero": (["--dim", "0"], "argument --dim: must be a positive integer, got '0'"),
    "heads": (["--heads", "-8"], "argument --heads: must be a positive integer, got '-8'"),
    "dtype": (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "similarity": (["--similarity", "l2"], "argument --similarity: invalid choice: 'l2'"),
    "seed": (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
    "unknown": (["--length", "512"], "unrecognized arguments: --length 512"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_one_line_and_code_2(name, capsys):
    argv, text = BAD[name]
    assert __main__.main(["check", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flash_attention_jax check: error: ")
    assert text in printed.err
    assert printed.err.count("\n") == 1


# --- the other commands ---


def test_command_line_without_arguments_prints_help(capsys):
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("check", "demo", "train", "explain", "--version"))


def test_command_line_of_the_module():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m flash_attention_jax COMMAND")
    done = run("--version")
    assert done.stdout.startswith(f"flash_attention_jax {f.__version__}, jax {jax.__version__}, ")


def test_compile_asks_for_a_backend(capsys):
    usage = "usage: flash_attention_jax compile hopper|triton [OPTIONS]; "
    assert __main__.main(["compile"]) == 0
    assert capsys.readouterr().out.startswith(usage)
    assert __main__.main(["compile", "cuda"]) == 2
    assert capsys.readouterr().err.startswith(usage)


def test_unknown_command_is_one_line_and_code_2(capsys):
    assert __main__.main(["chek"]) == 2
    assert capsys.readouterr().err == (
        "flash_attention_jax: error: no command 'chek'; "
        "there are check, demo, train, bench, tune, compile, explain\n"
    )


def test_explain_prints_what_the_function_says(capsys):
    argv = ["1,8,1024,64", "1,2,512,64", "--causal", "--platform", "gpu", "--capability", "9.0"]
    assert __main__.main(["explain", *argv, "--window", "128,0", "--dtype", "bfloat16"]) == 0
    q, k = (jax.ShapeDtypeStruct((1, h, n, 64), jnp.bfloat16) for h, n in ((8, 1024), (2, 512)))
    options = {"causal": True, "window": (128, 0), "platform": "gpu", "capability": (9, 0)}
    assert capsys.readouterr().out == f"{f.explain(q, k, k, **options)}\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "the following arguments are required: q"),
        (["8"], "`q` must have the axes (n, d), (bh, n, d) or (b, h, n, d), got shape (8,)."),
        (["1,8,64,64", "1,3,64,64"], "`q` must have a multiple of the heads of `k`, got 8 heads"),
        (["64,64", "--window", "x"], "argument --window: must be w or left,right, got 'x'"),
        (["64,64", "--window", "1,2,3"], "`window` must be an integer or a pair (left, right)"),
        (["64,64", "--capability", "90"], "must be two integers as in 9.0, got '90'"),
        (["64,64", "--implementation", "xla"], "What jax.nn calls 'xla' is 'dense' here"),
        (["64,64", "--implementation", "hopper"], "implementation='hopper' declines this call"),
    ],
)
def test_bad_shapes_to_explain_are_one_line_and_code_2(argv, text, capsys):
    assert __main__.main(["explain", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("flash_attention_jax explain: error: ")
    assert text in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "train"])
def test_training_commands_get_their_arguments(command, monkeypatch):
    train = pytest.importorskip("flash_attention_jax.train", reason="needs flax, optax and tqdm")
    monkeypatch.setattr(train, f"{command}_main", lambda argv: (argv, 7))
    assert __main__.main([command, "--steps", "3"]) == (["--steps", "3"], 7)


def test_training_without_flax_says_what_to_install(tmp_path):
    (tmp_path / "flax").mkdir()
    body = "raise ModuleNotFoundError('No module named flax', name='flax')"
    (tmp_path / "flax" / "__init__.py").write_text(body)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("demo", PYTHONPATH=paths)
    assert done.returncode == 1
    assert "pip install 'flash-attention-jax[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(__main__.COMMANDS, "check", (interrupted, ""))
    assert __main__.main(["check"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
