"""The public face: names, signatures, docstrings, upstream's positional calls, the README."""

import ast
import configparser
import functools
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax as f
from flash_attention_jax._api.options import CommonOptions, Options, ScaleOptions

ROOT = Path(__file__).parents[1]

COSINE = (
    "q, k, v, mask=None, attn_bias=None, scale=8, causal=False, l2norm_qk=True, "
    "attn_bias_batch_dim=False, *, groups=1, **options"
)
PACKED = (
    "similarity='dot', causal=False, window=None, scale=None, softcap=None, sinks=None, "
    "alibi_slopes=None, dropout_rate=0.0, dropout_key=None, return_lse=False, block_q=None, "
    "block_kv=None, implementation=None, differentiation='reverse', "
    "deterministic_backward=True, precision=None"
)
SIGNATURES = {
    "PRNGKeyGenerator": "seed=42",
    "apply_rotary": (
        "x, *, offset=0, positions=None, base=10000.0, scaling=1.0, dim=None, interleaved=False, "
        "layout='heads_first'"
    ),
    "attention": "q, k, v, mask=None, **options",
    "causal_attention": "q, k, v, mask=None, **options",
    "causal_cosine_sim_flash_attention": "q, k, v, mask=None, **options",
    "causal_flash_attention": "q, k, v, mask=None, **options",
    "cosine_sim_attention": "q, k, v, mask=None, **options",
    "cosine_sim_flash_attention": "q, k, v, mask=None, **options",
    "dot_product_attention": (
        "query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, "
        "query_seq_lengths=None, key_value_seq_lengths=None, local_window_size=None, "
        "implementation=None, return_residual=False, similarity='dot', groups=1, l2norm_qk=True, "
        "q_offset=None, q_segment_ids=None, kv_segment_ids=None, logits_soft_cap=None, "
        "sinks=None, alibi_slopes=None, relative_bias=None, dropout_rate=0.0, dropout_key=None, "
        "block_q=None, block_kv=None, differentiation='reverse', deterministic_backward=True, "
        "precision=None"
    ),
    "explain": (
        "q, k, v, mask=None, *, similarity='dot', layout='heads_first', platform=None, "
        "capability=None, **options"
    ),
    "flash_attention": "q, k, v, mask=None, **options",
    "flash_attention_varlen": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *, "
        + PACKED
    ),
    "flash_attention_varlen_qkvpacked": "qkv, cu_seqlens, max_seqlen=None, **options",
    "flash_cosine_sim_attention": COSINE,
    "l2norm_tensors": "*tensors, groups=1",
    "memory_efficient_attention": (
        "q, k, v, mask=None, causal=False, attn_bias=None, q_bucket_size=512, k_bucket_size=1024, "
        "**options"
    ),
    "merge_attention": "*parts",
    "pad_input": "packed, indices, batch, seqlen",
    "plain_attention": "q, k, v, mask=None, **options",
    "plain_cosine_sim_attention": COSINE,
    "rabe_attention": (
        "q, k, v, mask=None, causal=False, attn_bias=None, q_bucket_size=512, k_bucket_size=1024, "
        "**options"
    ),
    "unpad_input": "hidden_states, attention_mask, *, total=None",
    "value_and_grad_difference": (
        "fn1, fn2, seed=42, batch=2, heads=4, q_seq_len=4096, k_seq_len=8192, add_key_mask=True, "
        "dim=512"
    ),
}
COMMON = [
    *("window", "q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths"),
    *("softcap", "sinks", "alibi_slopes", "relative_bias", "dropout_rate", "dropout_key"),
    *("return_lse", "block_q", "block_kv", "implementation", "differentiation", "precision"),
    "deterministic_backward",
]


def test_public_names_are_these():
    assert set(f.__all__) == {*SIGNATURES, "__version__"}
    assert f.__all__ == sorted(f.__all__)
    assert all(hasattr(f, name) for name in f.__all__)


def test_nothing_else_looks_public():
    # Modules appear as attributes when anything imports them.
    others = {
        name
        for name, x in vars(f).items()
        if not name.startswith("_") and not isinstance(x, types.ModuleType)
    }
    assert others == set(f.__all__) - {"__version__"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(f, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    signature = signature.replace(parameters=bare, return_annotation=signature.empty)
    assert str(signature) == f"({SIGNATURES[name]})"


def test_options_are_these():
    assert list(get_type_hints(CommonOptions)) == COMMON
    assert list(get_type_hints(ScaleOptions)) == [*COMMON, "scale"]
    assert list(get_type_hints(Options)) == [*COMMON, "scale", "bias", "causal"]


def test_two_names_are_one_function():
    assert f.plain_attention is f.attention
    assert f.rabe_attention is f.memory_efficient_attention


def test_version_is_that_of_the_distribution():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert f.__version__ == config["metadata"]["version"]


# --- docstrings ---


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstring_has_every_section(name):
    public = getattr(f, name)
    text = inspect.getdoc(public) or ""
    summary = text.splitlines()[0]
    assert summary.endswith((".", ":")) or "`" in summary
    assert "\nExample:\n" in text
    assert ">>> " in text
    sections = {"Args", "Raises"} if inspect.isclass(public) else {"Args", "Returns", "Raises"}
    # A variant of another function says which, and has no need to repeat it.
    if not re.search(r"`\w*attention`", text.partition("\nExample:")[0].split("Args:")[0]):
        assert sections <= set(re.findall(r"^(\w+):$", text, re.MULTILINE))


@pytest.mark.parametrize(
    "name", [name for name in SIGNATURES if "Args:" in (getattr(f, name).__doc__ or "")]
)
def test_docstring_names_every_argument(name):
    text = inspect.getdoc(getattr(f, name)) or ""
    arguments = text.partition("Args:\n")[2]
    named = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \(.*\))?:", arguments, re.MULTILINE))
    assert set(inspect.signature(getattr(f, name)).parameters) <= named


def test_docstring_explains_every_option():
    text = inspect.getdoc(f.flash_attention) or ""
    options = text.partition("**options")[2].partition("Returns:")[0]
    assert [
        name for name in get_type_hints(Options) if not re.search(rf"\b{name}\b", options)
    ] == []


def test_every_module_has_a_docstring():
    files = [*(ROOT / "flash_attention_jax").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    assert len(files) > 60
    bare = [path for path in files if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not bare


# --- upstream's positional calls ---


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


q, k, v = normal(2, 4, 9, 8), normal(2, 4, 11, 8) + 1, normal(2, 4, 11, 8) - 1
mask = jnp.arange(11)[None] < jnp.array([[11], [6]])
attn_bias = normal(4, 9, 11)
per_batch = normal(2, 9, 11)


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_key_mask_is_the_fourth_argument():
    for function in (f.flash_attention, f.cosine_sim_flash_attention, f.attention):
        same(function(q, k, v, mask), function(q, k, v, mask=mask))
        out = function(q, k, v, mask)
        kept = function(q[1:], k[1:, :, :6], v[1:, :, :6])
        same(out[1:], kept)
        assert not np.allclose(out, function(q, k, v), atol=1e-3)


def test_key_mask_beside_two_axes():
    out = f.flash_attention(q[1, 0], k[1, 0], v[1, 0], mask[1])
    same(out, f.attention(q[1, 0], k[1, 0, :6], v[1, 0, :6]))


def test_order_of_flash_cosine_sim_attention():
    for function in (f.flash_cosine_sim_attention, f.plain_cosine_sim_attention):
        qn, kn = f.l2norm_tensors(q, k)
        positional = function(qn, kn, v, mask, per_batch, 7.0, True, False, True)
        named = f.attention(qn, kn, v, mask, bias=per_batch[:, None], scale=7.0, causal=True)
        same(positional, named)
        same(function(q, k, v, None, attn_bias), function(qn, kn, v, None, attn_bias, 8))


def test_order_of_memory_efficient_attention():
    positional = f.memory_efficient_attention(q, k, v, mask, True, attn_bias, 4, 5)
    same(positional, f.attention(q, k, v, mask, causal=True, bias=attn_bias))


@pytest.mark.parametrize("is_causal", [False, True])
def test_order_of_jax_nn(is_causal):
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    arguments = (query, key, value, attn_bias[None], mask[:, None, None])
    ours = f.dot_product_attention(*arguments, is_causal=is_causal)
    same(ours, jax.nn.dot_product_attention(*arguments, is_causal=is_causal))


def test_arguments_of_jax_nn_have_its_order_and_defaults():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(f.dot_product_attention).parameters
    assert list(theirs) == list(ours)[: len(theirs)]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default


@pytest.mark.filterwarnings("ignore:`scale` took 3 values")
def test_default_scales():
    unit = functools.partial(f.attention, *f.l2norm_tensors(q, k), v)
    same(f.flash_attention(q, k, v), f.attention(q, k, v, scale=8**-0.5))
    same(f.flash_cosine_sim_attention(q, k, v), unit(scale=8.0))
    same(f.plain_cosine_sim_attention(q, k, v), unit(scale=8.0))
    same(f.cosine_sim_flash_attention(q, k, v), unit(scale=10.0))
    same(f.causal_cosine_sim_flash_attention(q, k, v), unit(scale=10.0, causal=True))
    same(f.cosine_sim_attention(q, k, v), unit(scale=10.0))
    heads_last = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    out = f.dot_product_attention(*heads_last, similarity="cosine")
    same(jnp.swapaxes(out, 1, 2), unit(scale=10.0))


# --- the README and the pages that it points to ---

DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "LONG_SEQUENCES.md", *DOCS)
OPTIONAL = ("flax", "optax", "tqdm", "torch", "matplotlib")


def snippets(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RUN_ALL = """
import json, sys, traceback
namespace, found = {}, []
for snippet in json.load(sys.stdin):
    try:
        exec(compile(snippet, "page", "exec"), namespace)
        found.append("")
    except ModuleNotFoundError as error:
        found.append(f"needs {error.name}")
    except Exception as error:
        cause = error.__cause__
        missing = isinstance(error, ImportError) and isinstance(cause, ModuleNotFoundError)
        found.append(f"needs {cause.name}" if missing else traceback.format_exc())
print("\\n" + json.dumps(found))
"""


def test_pages_have_snippets():
    assert snippets("README.md")
    assert sum(len(snippets(page)) for page in PAGES) >= 15


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_of_a_page_run(page):
    # In order and in one namespace, as a reader types them, with JAX's own settings.
    shown = snippets(page)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_ALL],
        cwd=ROOT,
        input=json.dumps(shown),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    raised = json.loads(done.stdout.splitlines()[-1])
    assert len(raised) == len(shown)
    # A snippet about an optional package may lack it; the others may not.
    absent = {f"needs {name}" for name in OPTIONAL if importlib.util.find_spec(name) is None}
    faults = [error + snippet for error, snippet in zip(raised, shown, strict=True) if error]
    assert [fault for fault in faults if not fault.startswith(tuple(absent))] == []


def test_links_between_pages_lead_somewhere():
    folders = (ROOT, *(ROOT / name for name in ("docs", "tests", "benchmarks")))
    pages = [path for folder in folders for path in sorted(folder.glob("*.md"))]
    broken = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / link).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_page_of_a_folder_has_a_line_for_each_file(folder):
    page = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    lines = [
        f"| `{path.name}` | {summary.splitlines()[0].removesuffix('.')} |"
        for path in sorted((ROOT / folder).glob("*.py"))
        if (summary := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert re.findall(r"^\| `\w+\.py` .*$", page, re.MULTILINE) == lines


def test_readme_lists_every_public_name():
    index = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Every public name")[2]
    index = index.partition("\n## ")[0]
    assert {name for name in f.__all__ if f"`{name}`" not in index} == set()
