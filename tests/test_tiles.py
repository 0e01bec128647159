"""Measured tiles: stored, read, ignored with a warning, and searched with a fake clock."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from flash_attention_jax._api import read
from flash_attention_jax._commands import tune
from flash_attention_jax.kernels import hopper_config, stored, triton_config

DEVICE = "NVIDIA H200"
NAME = stored.key("hopper", "forward", 64, banded=True, dtype="bfloat16")
SHIPPED = hopper_config.TABLE["forward"][64]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(stored.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(stored, "device_kind", lambda: DEVICE)
    for function in (stored.load, stored._warn):
        function.cache_clear()
    yield tmp_path
    for function in (stored.load, stored._warn):
        function.cache_clear()


def call_of(**options):
    q = jax.ShapeDtypeStruct((1, 8, 512, 64), jnp.bfloat16)
    reading = read.read(q, q, q, None, options, platform="gpu", capability=(9, 0))
    return reading.call


def test_stored_tiles_come_before_the_table(folder):
    assert hopper_config.tiles(call_of(causal=True), "forward") == SHIPPED
    path = stored.write(DEVICE, {NAME: {"warpgroups": 3, "inner": 64, "stages": 4}})
    assert path == folder / "tiles-NVIDIA-H200.json"
    assert hopper_config.tiles(call_of(causal=True), "forward") == hopper_config.Tiles(3, 64, 4)
    assert hopper_config.tiles(call_of(), "forward") == hopper_config.TABLE["forward"][64]
    assert hopper_config.tiles(call_of(causal=True), "dq") == hopper_config.TABLE["dq"][64]


def test_writing_keeps_what_was_stored(folder):
    stored.write(DEVICE, {NAME: {"warpgroups": 3, "inner": 64, "stages": 4}})
    other = NAME.replace("forward", "dq")
    path = stored.write(DEVICE, {other: {"warpgroups": 1, "inner": 64, "stages": 2}})
    assert set(json.loads(path.read_text())["tiles"]) == {NAME, other}


GOOD = {"format": 1, "device": DEVICE, "tiles": {}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON that can be read (Expecting property name"),
        ("[]", "it is not of format 1"),
        (json.dumps(GOOD | {"format": 2}), "it is not of format 1"),
        (
            json.dumps(GOOD | {"device": "NVIDIA A100"}),
            "it was measured on 'NVIDIA A100', and this is 'NVIDIA H200'",
        ),
        (json.dumps(GOOD | {"tiles": [1]}), "it has no `tiles`"),
        (
            json.dumps(GOOD | {"tiles": {NAME: {"warpgroups": 2}}}),
            f"its entry '{NAME}' is {{'warpgroups': 2}}, and must be positive "
            "warpgroups, inner, stages",
        ),
        (
            json.dumps(GOOD | {"tiles": {NAME: {"warpgroups": 2, "inner": -64, "stages": 2}}}),
            "and must be positive warpgroups, inner, stages",
        ),
        (
            json.dumps(GOOD | {"tiles": {NAME: {"warpgroups": 2, "inner": 128, "stages": 40}}}),
            "KiB of shared memory",
        ),
        (
            json.dumps(GOOD | {"tiles": {NAME: {"warpgroups": 9, "inner": 64, "stages": 2}}}),
            "and has 1, 2 or 3 warpgroups",
        ),
    ],
)
def test_file_that_cannot_be_used_is_one_clear_warning(folder, text, reason):
    path = stored.path_of(DEVICE)
    path.write_text(text)
    with pytest.warns(RuntimeWarning) as found:
        assert (
            hopper_config.tiles(call_of(causal=True), "forward")
            == hopper_config.TABLE["forward"][64]
        )
    message = str(found[0].message)
    assert message.startswith(f"The measured tiles in {path} are ignored: ")
    assert reason in message
    assert message.endswith("Measure again with `flash-attention-jax tune`, or delete the file.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        hopper_config.tiles(call_of(causal=True), "forward")


def test_nothing_is_read_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv(stored.FOLDER_VARIABLE, str(tmp_path))
    stored.device_kind.cache_clear()
    assert stored.device_kind() is None
    assert stored.lookup(NAME, ("warpgroups", "inner", "stages")) is None


def test_candidates_fit_into_shared_memory():
    for direction in tune.DIRECTIONS["hopper"]:
        for dim in (64, 128, 192, 256):
            found = list(tune.hopper_candidates(direction, dim))
            assert found
            assert dataclasses.asdict(hopper_config.TABLE[direction][dim]) in found, (
                direction,
                dim,
            )
            sizes = [
                hopper_config.shared_memory(direction, dim, hopper_config.Tiles(**entry))
                for entry in found
            ]
            assert max(sizes) <= hopper_config.SHARED_MEMORY


def test_fastest_candidate_is_found_by_medians_and_what_fails_is_left_out():
    now = 0.0
    taken = {2: iter([9, 1, 1, 8, 1]), 3: iter([2] * 5), 4: iter([3] * 5)}
    # The first run of each is not counted, nor is one outlier.

    def builder(kernel, entry):
        if entry["stages"] == 5:
            raise ValueError("too much shared memory")

        def run():
            nonlocal now
            now += next(taken[entry["stages"]])

        return run

    candidates = [{"warpgroups": 2, "inner": 64, "stages": n} for n in (4, 5, 3, 2)]
    kernel = tune.Kernel("hopper", "forward", 64, True, "bfloat16")
    best, medians = tune.tune(kernel, candidates, builder, 4, clock=lambda: now)
    assert best == candidates[3]
    assert medians == {0: 3, 2: 2, 3: 1}


def test_triton_takes_stored_tiles_too(folder):
    q = jax.ShapeDtypeStruct((1, 8, 512, 80), jnp.bfloat16)
    call = read.read(q, q, q, None, {}, platform="gpu", capability=(8, 0)).call
    own = triton_config.tiles((8, 0), 80, False, "bfloat16", "dq")
    assert triton_config.tiles_of(call, "dq") == own
    kernel = tune.Kernel("triton", "dq", 128, False, "bfloat16")
    first, second, *rest = tune.candidates(kernel, (8, 0))
    assert first == dataclasses.asdict(own)
    assert first not in (second, *rest)
    stored.write(DEVICE, {kernel.name: second})
    assert triton_config.tiles_of(call, "dq") == triton_config.Tiles(**second)


@pytest.mark.parametrize(
    ("direction", "dim", "expected"),
    [
        ("forward", 64, (128, 32)),
        ("dkv", 64, (32, 128)),
        ("dq", 256, (32, 16)),
        ("shares", 256, (32, 16)),
    ],
)
def test_triton_leaves_room_for_a_term_of_pairs(direction, dim, expected):
    q = jax.ShapeDtypeStruct((1, 8, 512, dim), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    options = {"bias": bias}
    call = read.read(q, q, q, None, options, platform="gpu", capability=(8, 0)).call
    found = triton_config.tiles_of(call, direction)
    assert found == triton_config.Tiles(*expected, num_warps=8, num_stages=1)


def test_trial_is_what_is_traced(folder):
    with stored.trial({NAME: {"warpgroups": 1, "inner": 32, "stages": 2}}):
        assert hopper_config.tiles(call_of(causal=True), "forward") == hopper_config.Tiles(1, 32, 2)
    assert hopper_config.tiles(call_of(causal=True), "forward") == SHIPPED


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--backend", "triton", "--directions", "decode"],
            "triton has no decode; it has forward, dq, dkv",
        ),
        (
            ["--dtype", "float32"],
            "hopper takes no float32: choose --backend triton, or another --dtype",
        ),
    ],
)
def test_tune_refuses_what_it_cannot_measure(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.tune_main(arguments)
    assert capsys.readouterr().err.endswith(f"flash-attention-jax tune: error: {text}\n")


def test_tune_says_what_is_missing(capsys):
    stored.device_kind.cache_clear()
    assert tune.tune_main([]) == 2
    assert capsys.readouterr().err == (
        "flash-attention-jax tune: error: JAX sees no NVIDIA GPU, and tiles are measured on the "
        "one that will use them\n"
    )
