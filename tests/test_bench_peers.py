"""The peers of the benchmark: each computes what float64 says, or has its reason."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import apart
import peers
import suite
import workloads
from workloads import WORKLOADS

pytestmark = pytest.mark.usefixtures("quick_compiler")

CALLS = {
    "full": ("full-4k", False),
    "causal with gradients": ("causal-4k", True),
    "a head for several": ("llama-1k", True),
    "bias": ("alphafold-16x256", True),
    "a mask of keys": ("bert-masked-512", False),
    "decode": ("decode-1k", False),
}
UNSUITED = [("torch SDPA flash", "bias")]  # whose failure is a row of the table
OF_OURS = ("dense", "checkpointed", "blocked", "blocked, heads last")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("peer", [name for name in peers.PEERS if name != apart.LABEL])
def test_peer_is_right_or_has_its_reason(peer, call):
    if jax.default_backend() != "cpu":
        pytest.skip("the benchmark itself checks every peer on a GPU")
    name, backward = CALLS[call]
    workload = WORKLOADS[name].quick()
    reason = peers.PEERS[peer].why_not(workload, backward)
    if reason is not None:
        assert peer not in OF_OURS or call == "a mask of keys"
        return
    if (peer, call) in UNSUITED:
        with pytest.raises(RuntimeError):
            peers.PEERS[peer].prepare(workload, backward)
        return
    prepared = peers.PEERS[peer].prepare(workload, backward)
    names = {"out", *(f"d{n}" for n in workloads.gradients(workload))} if backward else {"out"}
    assert set(prepared.results()) == names
    assert suite.compute_error(workload, prepared.results(), backward) < 1e-5
    assert prepared.time() > 0


@pytest.mark.skipif(not apart.installed().exists(), reason=f"needs {apart.LABEL} (make bench)")
def test_older_package_runs_apart_beside_ours():
    workload = dataclasses.replace(WORKLOADS["causal-4k"].quick(), length=64)
    prepared = apart.prepare(workload, True)
    try:
        assert suite.compute_error(workload, prepared.results(), True) < 1e-5
        assert prepared.time() > 0
        assert prepared.temp_bytes
    finally:
        prepared.close()
    assert Path(sys.modules["flash_attention_jax"].__file__).parent.name == "flash_attention_jax"
    assert "peers" not in Path(sys.modules["flash_attention_jax"].__file__).parts


def test_older_package_that_is_not_installed_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "installed", lambda: tmp_path)
    why_not = peers.PEERS[apart.LABEL].why_not
    assert why_not(WORKLOADS["full-4k"], False) == f"{apart.LABEL} is not installed"


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (WORKLOADS["vit-4x577"].at(1025), "it is wrong for lengths that are no multiple of 1024"),
        (WORKLOADS["llama-1k"], "it has no grouped heads"),
        (WORKLOADS["gpt-oss-1k"], "it has no grouped heads"),
        (WORKLOADS["sweep-d64-full-512"], "its gradients are of float32 only"),
    ],
    ids=lambda x: getattr(x, "name", "reason"),
)
def test_older_package_declines_what_it_gets_wrong(workload, reason):
    assert apart.why_not(workload, True) == reason


def test_our_own_package_is_never_measured_as_the_older_one(monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "installed", lambda: tmp_path)  # so that it would import ours
    with pytest.raises(RuntimeError, match=r"ImportError: flash-attention-jax 0\.3\.1 is not in"):
        apart.prepare(WORKLOADS["causal-4k"].quick(), False)


@pytest.mark.parametrize(
    ("peer", "reason"),
    [("torch SDPA", "torch is not installed"), ("tokamax, chunked", "tokamax is not installed")],
)
def test_package_that_is_not_installed_is_a_reason(peer, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, peer.partition(" ")[0].rstrip(","), None)
    assert peers.PEERS[peer].why_not(WORKLOADS["full-4k"], False) == reason


def test_kernel_has_the_librarys_own_reason():
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    reason = peers.PEERS["hopper"].why_not(WORKLOADS["full-4k"], False)
    assert reason is not None
    assert "GPU" in reason


def test_unknown_peer_names_the_known_ones():
    with pytest.raises(ValueError, match="must be the name of a peer, got 'nobody'") as error:
        peers.find("nobody")
    assert str(error.value).endswith(f"Known: {', '.join(peers.PEERS)}.")


def test_unknown_workload_names_the_known_ones():
    with pytest.raises(ValueError, match="must be the name of a workload, got 'nope'") as error:
        workloads.named("nope")
    assert str(error.value).endswith(f"Known: {', '.join(WORKLOADS)}.")


def test_call_that_would_take_all_memory_is_not_run(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU's allocator refuses by itself")
    monkeypatch.setattr(peers.measure, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError):
        peers.PEERS["dense"].prepare(WORKLOADS["full-4k"].quick(), False)
