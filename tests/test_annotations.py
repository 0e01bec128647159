"""The annotations are true: the public functions run with every one of them executed.

In a subprocess, because the hook has to be there before the package is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PRELUDE = """
import jaxtyping
with jaxtyping.install_import_hook("flash_attention_jax", "beartype.beartype"):
    import flash_attention_jax as f
    import flash_attention_jax._commands.check as command
import jax, jax.numpy as jnp, numpy as np

def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)

def ids(*shape):
    return jnp.zeros(shape, jnp.int32)
"""

HEADS_FIRST = """
functions = [f.flash_attention, f.causal_flash_attention, f.flash_cosine_sim_attention]
functions += [f.cosine_sim_flash_attention, f.causal_cosine_sim_flash_attention, f.attention]
functions += [f.causal_attention, f.cosine_sim_attention, f.plain_cosine_sim_attention]
functions += [f.memory_efficient_attention]
shapes = {
    "alone": ((5, 8), (7, 8), (7, 4)),
    "merged": ((6, 5, 8), (6, 7, 8), (6, 7, 4)),
    "batched": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 4)),
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)),
    "single-headed": ((2, 4, 5, 8), (2, 7, 8), (2, 7, 4)),
}
for name, trio in shapes.items():
    q, k, v = (normal(*shape) for shape in trio)
    for function in functions if name == "batched" else functions[::9]:
        out, lse = jax.eval_shape(lambda *qkv: function(*qkv, return_lse=True), q, k, v)
        assert out.shape == (*q.shape[:-1], 4), (name, function)
        assert lse.shape == q.shape[:-1], (name, function)
"""

TERMS = """
q, k, v = normal(2, 4, 5, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8)
terms = dict(
    causal=True, window=(3, 0), q_offset=jnp.array([2, 3], jnp.int32), q_segment_ids=ids(2, 5),
    kv_segment_ids=ids(2, 7), q_lengths=jnp.array([5, 4], jnp.int32), kv_lengths=ids(2) + 7,
    softcap=20.0, sinks=normal(4), alibi_slopes=normal(4), relative_bias=normal(4, 11),
    bias=normal(4, 5, 7), scale=normal(4), dropout_rate=0.25, dropout_key=jax.random.key(1),
)
for implementation in ("dense", "blocked", "checkpointed"):
    def attend(q):
        return f.flash_attention(q, k, v, ids(2, 7) + 1, implementation=implementation, **terms)
    gradient = jax.eval_shape(jax.grad(lambda q: attend(q).sum()), q)
    assert gradient.shape == q.shape
assert f.flash_attention(*map(np.asarray, (q, k, v))).shape == q.shape
half = normal(2, 4, 5, 8, dtype=jnp.bfloat16)
assert f.flash_attention(half, half, half).dtype == jnp.bfloat16
"""

HEADS_LAST = """
for q, k in ((normal(2, 5, 4, 8), normal(2, 7, 2, 8)), (normal(5, 4, 8), normal(7, 2, 8))):
    options = dict(is_causal=True, local_window_size=2, similarity="cosine", return_residual=True)
    out, lse = jax.eval_shape(lambda q: f.dot_product_attention(q, k, k, **options), q)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
"""

RELATIVES = """
q = k = v = normal(2, 4, 6, 8)
assert "blocked" in str(f.explain(q, k, v, platform="cpu"))
assert "blocked" in str(f.explain(*[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3, platform="cpu"))
parts = [f.flash_attention(q, k[:, :, s], v[:, :, s], return_lse=True)
         for s in (slice(0, 2), slice(2, 6))]
out, lse = f.merge_attention(*parts)
assert out.shape == q.shape and lse.shape == q.shape[:-1]
one, other = f.l2norm_tensors(q, q[0], groups=2)
assert one.shape == q.shape and other.shape == q.shape[1:]
sizes = dict(batch=1, heads=2, q_seq_len=5, k_seq_len=7, dim=8)
o, (dq, dk, dv) = f.value_and_grad_difference(f.attention, f.flash_attention, **sizes)
assert max(o, dq, dk, dv) < 1e-5
assert next(f.PRNGKeyGenerator(3)).shape == ()
assert f.flash_attention is not f.attention and f.plain_attention is f.attention
"""

PACKED = """
x = normal(2, 6, 4, 8)
mask = jnp.arange(6)[None] < jnp.array([[4], [6]])
packed, indices, cu_seqlens, longest = f.unpad_input(x, mask)
out = f.flash_attention_varlen(packed, packed, packed, cu_seqlens, causal=True)
out, lse = f.flash_attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, longest,
                                    longest, window=(2, 0), return_lse=True)
assert lse.shape == packed.shape[:2]
qkv = jnp.stack([packed] * 3, axis=1)
f.flash_attention_varlen_qkvpacked(qkv, cu_seqlens, longest, similarity="cosine")
assert f.pad_input(out, indices, 2, 6).shape == x.shape
"""

ROTARY = """
x = normal(2, 4, 6, 8)
for offset in (0, 3, jnp.array(3, jnp.int32), jnp.array([1, 2], jnp.int32)):
    assert f.apply_rotary(x, offset=offset).shape == x.shape
for positions in (jnp.arange(6, dtype=jnp.int32), normal(2, 6)):
    assert f.apply_rotary(x, positions=positions, dim=4, interleaved=True).shape == x.shape
assert f.apply_rotary(x[0, 0]).shape == (6, 8)
assert f.apply_rotary(normal(2, 6, 4, 8), layout="heads_last").shape == (2, 6, 4, 8)
"""

EXECUTED = """
# The hook is at work: what the annotations do not allow is refused.
for bad in (lambda: command._Problem(8, 1, 1, 8, 3, False, "dot", 0),
            lambda: f.flash_attention("q", normal(5, 8), normal(5, 8))):
    try:
        bad()
    except jaxtyping.TypeCheckError:
        continue
    raise AssertionError("no annotation was executed")
"""

SCRIPTS = {
    "heads first, every rank": HEADS_FIRST,
    "every term": TERMS,
    "heads last": HEADS_LAST,
    "relatives": RELATIVES,
    "packed": PACKED,
    "rotary": ROTARY,
    "they are executed": EXECUTED,
}


def test_annotations_are_true():
    # One interpreter for all: importing takes long.
    code = PRELUDE + (
        "import json, sys, traceback\n"
        "found = {}\n"
        "for name, script in json.load(sys.stdin).items():\n"
        "    try:\n"
        "        exec(script, dict(globals()))\n"
        "        found[name] = ''\n"
        "    except Exception:\n"
        "        found[name] = traceback.format_exc()\n"
        "print(json.dumps(found))\n"
    )

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_NUMPY_DTYPE_PROMOTION": "strict"},
        input=json.dumps(SCRIPTS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    raised = {name: error for name, error in json.loads(done.stdout).items() if error}
    assert not raised, "\n".join(raised.values())
