"""Sharding: claims about 8 devices, run in a process that has so many; and what is refused."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from flash_attention_jax.sharding import (
    context_parallel_attention,
    explain_context_parallel,
    ring_attention,
    shard_positions,
    ulysses_attention,
    unzigzag,
    zigzag,
)

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "eight_devices.py"],
        cwd=TESTS,
        env=os.environ
        | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]


def test_ring_compiles_for_gpus_that_are_not_there_or_says_what_is_missing():
    run = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--compile", "--most", "4", "--strong", "1024"],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        said = "Nothing was compiled for GPUs: jax-cuda13-plugin is not installed."
        assert run.stdout.strip() == said
    else:
        assert "collective-permute in the program" in run.stdout


# --- what is chosen, and why ---


def explained(q, k=None, *, axes=((8,), ("context",)), **options):
    shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, k or q, k or q)]
    return explain_context_parallel(*shapes, mesh=AbstractMesh(*axes), **options)


def test_ring_is_chosen_where_devices_do_not_divide_the_heads():
    said = explained((1, 6, 4096, 64))
    assert (said.way, said.reason) == (
        "ring",
        "because 6 heads cannot be shared by 8 devices",
    )


def test_the_way_that_sends_less_is_chosen_otherwise():
    few = explained((1, 64, 4096, 64), (1, 1, 4096, 64), axes=((2,), ("context",)))
    many = explained((1, 8, 4096, 64))
    assert (few.way, many.way) == ("ring", "ulysses")
    ring, ulysses = (
        explained((1, 8, 4096, 64), context_parallel=way) for way in ("ring", "ulysses")
    )
    assert many.reason == (
        f"because it sends less: {ring.bytes_forward + ring.bytes_backward:,} bytes sent by each "
        f"device in a ring, {ulysses.bytes_forward + ulysses.bytes_backward:,} with Ulysses"
    )


def test_window_bounds_the_hops():
    # A device has 512 tokens: the one before is seen, and from 513 on the one before that.
    for left, hops in ((0, 0), (1, 1), (512, 1), (513, 2), (None, 7)):
        said = explained((1, 6, 4096, 64), causal=True, window=(left, 0))
        assert said.hops == hops, left
    both = explained((1, 6, 4096, 64), window=(512, 513))
    assert both.hops == 3


def test_nothing_is_sent_where_there_are_no_queries_or_no_keys():
    for q, k in (((1, 8, 0, 64), (1, 8, 64, 64)), ((1, 8, 64, 64), (1, 8, 0, 64))):
        said = explained(q, k)
        assert (said.way, said.reason) == ("none", "there are no queries or no keys")
        assert (said.hops, said.forward, said.backward, said.bytes_forward) == (0, {}, {}, 0)


def test_zigzag_needs_the_ring():
    assert explained((1, 8, 4096, 64), order="zigzag").way == "ring"


# --- order ---


def test_zigzag_is_undone():
    x = np.arange(48).reshape(2, 24)
    for devices in (1, 2, 3):
        assert (unzigzag(zigzag(x, -1, devices=devices), 1, devices=devices) == x).all()


# --- what is refused ---

Q = np.zeros((2, 4, 8, 4), np.float32)


def two(**axes):
    devices = np.array(jax.devices()[: np.prod([*axes.values()])])
    return Mesh(devices.reshape([*axes.values()]), tuple(axes))


def inside(function, *args, **options):
    """A function inside `shard_map` over 2 devices."""
    cut = PartitionSpec(None, None, "context")
    return jax.shard_map(
        lambda *args: function(*args, **options),
        mesh=two(context=2),
        in_specs=cut,
        out_specs=cut,
    )(*args)


BAD = {
    "unknown axis": (
        lambda: inside(ring_attention, Q, Q, Q, axis_name="ctx"),
        ValueError,
        "`axis_name` must be a manual mesh axis, got 'ctx'. Manual here: 'context'. Call it inside "
        "jax.shard_map over a mesh that has this axis, or use `context_parallel_attention`.",
    ),
    "no axis": (
        lambda: ring_attention(Q, Q, Q, axis_name="context"),
        ValueError,
        "`axis_name` must be a manual mesh axis, got 'context'. Manual here: none. Call it inside "
        "jax.shard_map over a mesh that has this axis, or use `context_parallel_attention`.",
    ),
    "axis that is no name": (
        lambda: inside(ulysses_attention, Q, Q, Q, axis_name=0),
        TypeError,
        "`axis_name` must be the name of a mesh axis, got int 0. Name one axis of the mesh.",
    ),
    "heads over too many devices": (
        lambda: inside(ulysses_attention, Q[:, :3], Q[:, :3], Q[:, :3], axis_name="context"),
        ValueError,
        "`heads` must be a multiple of the devices that share them, got 3 over 2 devices. Use ring "
        "attention, or a second mesh axis for it.",
    ),
    "unknown option": (
        lambda: inside(ring_attention, Q, Q, Q, axis_name="context", is_causal=True),
        TypeError,
        "`ring_attention` got an unexpected keyword argument 'is_causal'. Did you mean `causal`?",
    ),
    "dtypes that differ": (
        lambda: inside(ring_attention, Q, Q.astype(jnp.bfloat16), Q, axis_name="context"),
        TypeError,
        "`q`, `k` and `v` must share one dtype, got q float32, k bfloat16, v float32. Cast them to "
        "the same.",
    ),
    "length that zigzag does not divide": (
        lambda: context_parallel_attention(
            Q[:, :, :6], Q, Q, mesh=two(context=2), order="zigzag", context_parallel="ring"
        ),
        ValueError,
        "`q` must have a multiple of 2 * devices = 4 tokens in zigzag order, got 6. Pad it, and "
        "hide the rest by `kv_lengths`; or use order='contiguous'.",
    ),
    "axis that the mesh has not": (
        lambda: context_parallel_attention(Q, Q, Q, mesh=two(data=2)),
        ValueError,
        "`length_axis` must be an axis of the mesh {'data': 2}, got 'context'. Name one of its "
        "axes.",
    ),
    "axis twice": (
        lambda: context_parallel_attention(Q, Q, Q, mesh=two(context=2), batch_axis="context"),
        ValueError,
        "`length_axis`, `batch_axis` and `head_axis` must differ, got 'context', 'context'. An "
        "axis cuts one thing.",
    ),
    "no mesh": (
        lambda: context_parallel_attention(Q, Q, Q),
        ValueError,
        "`mesh` must be a jax.sharding.Mesh, got None, and none is set. Pass one, or call inside "
        "jax.set_mesh(mesh).",
    ),
    "mesh of another type": (
        lambda: context_parallel_attention(Q, Q, Q, mesh=8),
        TypeError,
        "`mesh` must be a jax.sharding.Mesh, got int 8. jax.make_mesh makes one.",
    ),
    "batch that the mesh does not divide": (
        lambda: context_parallel_attention(
            Q[:1], Q[:1], Q[:1], mesh=two(context=1, data=2), batch_axis="data"
        ),
        ValueError,
        "`batch_axis` must divide the batch, got 1 over 2 devices of 'data'. Use a smaller axis, "
        "or None.",
    ),
    "key heads that the mesh does not divide": (
        lambda: context_parallel_attention(
            Q, Q[:, :1], Q[:, :1], mesh=two(context=1, model=2), head_axis="model"
        ),
        ValueError,
        "`head_axis` must divide the heads of k, got 1 over 2 devices of 'model'. Use a smaller "
        "axis, or None.",
    ),
    "one axis for two ways": (
        lambda: context_parallel_attention(
            Q, Q, Q, mesh=two(context=2), context_parallel="ring+ulysses"
        ),
        ValueError,
        "`length_axis` must name two axes for 'ring+ulysses', got one. Pass length_axis=(ring "
        "axis, axis for the heads).",
    ),
    "two axes for one way": (
        lambda: context_parallel_attention(
            Q, Q, Q, mesh=two(a=2, b=2), length_axis=("a", "b"), context_parallel="ring"
        ),
        ValueError,
        "`length_axis` must name one axis for 'ring', got two. Use 'ring+ulysses', or name one "
        "axis.",
    ),
    "axes of another type": (
        lambda: context_parallel_attention(Q, Q, Q, mesh=two(context=2), length_axis=3),
        TypeError,
        "`length_axis` must be one mesh axis or two, got int 3. Pass 'context', say, or ('ring', "
        "'heads').",
    ),
    "unknown way": (
        lambda: context_parallel_attention(Q, Q, Q, mesh=two(context=2), context_parallel="ulises"),
        ValueError,
        "`context_parallel` must be one of 'auto', 'ring', 'ulysses', 'ring+ulysses', got "
        "'ulises'. Did you mean 'ulysses'?",
    ),
    "kernel that is for another device": (
        lambda: inside(ring_attention, Q, Q, Q, axis_name="context", implementation="hopper"),
        NotImplementedError,
        "implementation='hopper' declines this call: it runs on NVIDIA Hopper GPUs, and this is "
        "traced for cpu. Use implementation=None to let the library choose.",
    ),
    "unknown order": (
        lambda: shard_positions(4, axis_name="context", order="zig"),
        ValueError,
        "`order` must be one of 'contiguous', 'zigzag', got 'zig'. Did you mean 'zigzag'?",
    ),
    "axis of an array that has it not": (
        lambda: zigzag(Q, 4, devices=2),
        ValueError,
        "`axis` must be below 4, got 4. Name an axis of `x`.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_full_words(case):
    call, error, text = BAD[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == text
