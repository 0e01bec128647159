"""Attention on torch tensors: the functions, torch's own, the layers, and training with them."""

import contextlib
import math

import jax
import numpy as np
import pytest

import flash_attention_jax

torch = pytest.importorskip("torch", reason="needs torch")

from torch.nn.functional import scaled_dot_product_attention as imported_before  # noqa: E402

from flash_attention_jax.torch import (  # noqa: E402
    Attention,
    CosineSimAttention,
    flash_attention,
    flash_cosine_sim_attention,
    memory_efficient_attention,
    replace_scaled_dot_product_attention,
    scaled_dot_product_attention,
)

torch.set_num_threads(1)  # with tensors as small as these, more threads wait for each other
THEIRS = torch.nn.functional.scaled_dot_product_attention
DOUBLE = torch.float64


def tensor(rng, *shape, dtype=DOUBLE, grad=True):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_(grad)


def same(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def assert_agree(rng, ours, theirs, *tensors, atol=1e-12):
    """The same output, and the same gradients for a random cotangent."""
    outs = ours(*tensors), theirs(*tensors)
    same(*outs, atol=atol)
    weights = tensor(rng, *outs[0].shape, dtype=outs[0].dtype, grad=False)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    for a, b in zip(*(torch.autograd.grad(out, wanted, weights) for out in outs), strict=True):
        same(a, b, atol=10 * atol)


# --- the functions ---------------------------------------------------------------------------


def on_arrays(function, *tensors, **options):
    """The JAX function itself, its output and gradients as tensors."""
    arrays = [t.detach().numpy() for t in tensors]
    out, pullback = jax.vjp(lambda *x: function(*x, **options), *arrays)
    return [torch.from_numpy(np.array(x)) for x in (out, *pullback(out))]


@pytest.mark.parametrize(
    ("name", "causal"), [("flash_attention", False), ("flash_cosine_sim_attention", True)]
)
def test_function_is_that_of_jax(rng, name, causal):
    ours = {"flash_attention": flash_attention}.get(name, flash_cosine_sim_attention)
    tensors = tensor(rng, 2, 4, 5, 8), tensor(rng, 2, 2, 9, 8), tensor(rng, 2, 2, 9, 3)
    out = ours(*tensors, causal=causal)
    grads = torch.autograd.grad(out, tensors, out.detach())
    expected = on_arrays(getattr(flash_attention_jax, name), *tensors, causal=causal)
    for a, b in zip((out, *grads), expected, strict=True):
        same(a.detach(), b)


def test_memory_efficient_attention_has_the_arguments_of_its_package(rng):
    q, k, v = tensor(rng, 2, 4, 5, 8), tensor(rng, 2, 4, 9, 8), tensor(rng, 2, 4, 9, 8)
    bias, mask = tensor(rng, 4, 5, 9), torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    assert_agree(
        rng,
        lambda q, k, v, bias: memory_efficient_attention(
            q, k, v, mask, False, bias, 4, 8, 1e-8, 0.5, False
        ),
        lambda q, k, v, bias: THEIRS(q, k, v, bias.masked_fill(~mask[:, None, None], -math.inf)),
        q,
        k,
        v,
        bias,
    )


def test_gradients_agree_with_finite_differences(rng):
    q, k, v = (tensor(rng, 1, 1, 3, 2) for _ in range(3))
    scale, bias = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True), tensor(rng, 3, 3)

    def ours(q, k, v, scale, bias):
        return flash_attention(q, k, v, scale=scale, bias=bias, return_lse=True)

    assert torch.autograd.gradcheck(ours, (q, k, v, scale, bias), fast_mode=True)
    cosine = lambda q, k, v: flash_cosine_sim_attention(q, k, v, causal=True)  # noqa: E731
    assert torch.autograd.gradcheck(cosine, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(cosine, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_mask_of_any_integer_dtype(rng, dtype):
    x = tensor(rng, 2, 1, 4, 8, dtype=torch.float32)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).to(dtype)
    with jax.enable_x64(False):
        out = flash_attention(x, x, x, mask)
    same(out, THEIRS(x, x, x, mask[:, None, None] != 0), atol=1e-6)


def test_float_mask_and_unknown_option_are_refused(rng):
    x = tensor(rng, 1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"`mask` must be boolean or integer.*`bias`"):
        flash_attention(x, x, x, torch.full((1, 4), -1e9))
    with pytest.raises(TypeError, match=r"'windows'.*Did you mean `window`"):
        flash_attention(x, x, x, windows=3)


ATTENDED = {
    "flash_attention": lambda x, mask: flash_attention(x, x, x, mask),
    "flash_cosine_sim_attention": lambda x, mask: flash_cosine_sim_attention(x, x, x, mask),
    "memory_efficient_attention": lambda x, mask: memory_efficient_attention(x, x, x, mask),
    "Attention": lambda x, mask: Attention(dim=8, heads=1, dim_head=4)(x[:, 0].float(), mask=mask),
}


@pytest.mark.parametrize("name", ATTENDED)
def test_mask_whose_values_cannot_be_meant_is_refused(rng, name):
    x, attend = tensor(rng, 1, 1, 4, 8), ATTENDED[name]
    mask = torch.tensor([[1, 0, 1, 1]])
    attend(x, mask)
    with pytest.raises(TypeError, match=r"`mask` must be .*float32 of zeros and ones.*`mask != 0`"):
        attend(x, mask.float())
    for ids in (torch.tensor([[0, 1, 2, 2]]), np.array([[0, 1, -1, 1]])):
        with pytest.raises(
            ValueError, match=r"`mask` must hold 0 and 1 .*int64 with (2|-1)\..*ids"
        ):
            attend(x, ids)
    with pytest.raises(TypeError, match="`mask` must be a tensor, got list"):
        attend(x, [[True, False, True, True]])


def test_mask_is_looked_at_under_func_too(rng):
    x, ids = tensor(rng, 2, 1, 1, 4, 8, grad=False), torch.tensor([[[0, 1, 2, 2]]]).expand(2, 1, 4)
    attend = torch.func.vmap(lambda x, mask: flash_attention(x, x, x, mask))
    attend(x, ids % 2)
    with pytest.raises(ValueError, match="`mask` must hold 0 and 1"):
        attend(x, ids)


@pytest.mark.parametrize("name", ["flash_attention", "flash_cosine_sim_attention"])
def test_integer_options_are_torchs_integers(rng, name):
    q, k = (tensor(rng, 2, 1, n, 8, grad=False).float() for n in (3, 4))
    ours = {"flash_attention": flash_attention}.get(name, flash_cosine_sim_attention)
    options = {
        "kv_lengths": torch.tensor([3, 4]),
        "q_offset": torch.tensor([1, 0]),
        "q_segment_ids": torch.tensor([[0, 0, 7], [0, 1, 1]]),
        "kv_segment_ids": torch.tensor([[0, 0, 7, 7], [0, 1, 1, 1]]),
    }
    expected = ours(q, k, k, causal=True, **{n: x.int() for n, x in options.items()})
    with jax.enable_x64(False):
        same(ours(q, k, k, causal=True, **options), expected, atol=1e-6)
        options["kv_segment_ids"][0, 3] = 2**40
        with pytest.raises(ValueError, match=rf"`kv_segment_ids` must hold .*{2**40}"):
            ours(q, k, k, causal=True, **options)


NO_QUERIES = {
    "None": (None, "`q` must be a tensor, got NoneType.*torch.as_tensor"),
    "list": ([[1.0]], "`q` must be a tensor, got list"),
    "integers": (torch.ones(1, 1, 4, 8).int(), r"`q` must have one of.*got torch.int32.*\.to\("),
    "eight bits": (torch.ones(1, 1, 4, 8).to(torch.float8_e5m2), r"`q` must.*float8_e5m2"),
    "sparse": (torch.eye(4).to_sparse(), r"`q` must be a dense tensor.*to_dense"),
}


def test_arrays_of_numpy_are_queries_too(rng):
    q, k, v = tensor(rng, 3, 1, 2, 5, 8, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        same(flash_attention(*(x.numpy() for x in (q, k, v))), THEIRS(q, k, v))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_query_of_torchs_function_is_refused(rng):
    q, k, v = (tensor(rng, 4, 8, grad=False) for _ in range(3))
    with pytest.raises(TypeError, match=r"`query` must be a dense tensor.*to_dense"):
        scaled_dot_product_attention(q.to_sparse(), k, v)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", NO_QUERIES)
@pytest.mark.parametrize(
    "function", [flash_attention, flash_cosine_sim_attention, memory_efficient_attention]
)
def test_queries_that_are_none_are_refused_in_torchs_words(rng, function, kind):
    q, message = NO_QUERIES[kind]
    x = tensor(rng, 1, 1, 4, 8)
    with pytest.raises(TypeError, match=message):
        function(q, x, x)


# --- dropout ---------------------------------------------------------------------------------

DROPPED = {
    "flash_attention": lambda x: flash_attention(x, x, x, dropout_rate=0.5),
    "flash_cosine_sim_attention": lambda x: flash_cosine_sim_attention(x, x, x, dropout_rate=0.5),
    "memory_efficient_attention": lambda x: memory_efficient_attention(
        x, x, x, dropout=0.5, training=True
    ),
    "scaled_dot_product_attention": lambda x: scaled_dot_product_attention(x, x, x, None, 0.5),
}


RATES = {
    "flash_attention": ("dropout_rate", lambda x, p: flash_attention(x, x, x, dropout_rate=p)),
    "flash_cosine_sim_attention": (
        "dropout_rate",
        lambda x, p: flash_cosine_sim_attention(x, x, x, dropout_rate=p),
    ),
    "memory_efficient_attention": (
        "dropout",
        lambda x, p: memory_efficient_attention(x, x, x, dropout=p),
    ),
    "scaled_dot_product_attention": (
        "dropout_p",
        lambda x, p: scaled_dot_product_attention(x, x, x, dropout_p=p),
    ),
    "Attention": ("dropout", lambda x, p: Attention(dim=8, dropout=p)),
}


@pytest.mark.parametrize("rate", [-0.1, math.nan, 1.5, "0.1"])
@pytest.mark.parametrize("name", RATES)
def test_rate_out_of_range_is_refused_by_its_name(rng, name, rate):
    argument, call = RATES[name]
    with pytest.raises((ValueError, TypeError), match=rf"^`{argument}` must be .*{rate}"):
        call(tensor(rng, 1, 1, 4, 8), rate)


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_follows_torchs_generator(rng, name):
    x = tensor(rng, 1, 2, 16, 8)
    torch.manual_seed(3)
    first, second = DROPPED[name](x), DROPPED[name](x)
    torch.manual_seed(3)
    same(DROPPED[name](x), first, atol=0)
    assert (first != second).any()


def test_dropout_forward_and_backward_drop_the_same(rng):
    q, k, v = (tensor(rng, 1, 1, 3, 2) for _ in range(3))

    def ours(q, k, v):
        torch.manual_seed(0)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    assert torch.autograd.gradcheck(ours, (q, k, v))


def test_dropout_keeps_the_mean_and_its_share():
    ones = torch.ones(1, 1, 256, 256)
    out = scaled_dot_product_attention(ones, ones, torch.eye(256)[None, None], dropout_p=0.25)
    assert abs((out == 0).float().mean().item() - 0.25) < 0.01
    same(out[out != 0], torch.full_like(out[out != 0], 1 / 256 / 0.75), atol=1e-6)


def test_dropout_of_everything_is_zero_with_zero_gradient(rng):
    x = tensor(rng, 1, 2, 5, 8)
    out = scaled_dot_product_attention(x, x, x, dropout_p=1.0)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_dropout_under_vmap_is_drawn_as_vmap_says(rng):
    x = tensor(rng, 1, 1, 16, 8, grad=False).expand(2, -1, -1, -1, -1)
    for randomness, alike in (("same", True), ("different", False)):
        one, other = torch.func.vmap(DROPPED["flash_attention"], randomness=randomness)(x)
        assert torch.equal(one, other) == alike


# --- torch's own -----------------------------------------------------------------------------

SHAPES = {
    "no batch": ((5, 8), (7, 8), (7, 4)),
    "heads": ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    "batched": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "five axes": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 4)),
    "batch broadcasts": ((2, 3, 5, 8), (1, 3, 7, 8), (3, 7, 4)),
    "one key head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4)),
    "one query head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "tall": ((1, 2, 9, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    "no keys": ((1, 2, 5, 8), (1, 2, 0, 8), (1, 2, 0, 4)),
    "no queries": ((1, 2, 0, 8), (1, 2, 7, 8), (1, 2, 7, 4)),
    "no batch entries": ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 4)),
}


CAUSAL = [(name, True) for name in ("no batch", "batched", "tall", "no keys")]


@pytest.mark.parametrize(("name", "causal"), [*CAUSAL, *((name, False) for name in SHAPES)])
def test_shape_and_causal_alignment_are_torchs(rng, name, causal):
    tensors = [tensor(rng, *shape) for shape in SHAPES[name]]
    assert_agree(
        rng,
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal),
        lambda q, k, v: THEIRS(q, k, v, is_causal=causal),
        *tensors,
    )


GROUPED = {
    "four axes": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)),
    "three axes": ((4, 5, 8), (2, 7, 8), (2, 7, 4)),
    "key and value differ": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 4)),
    "batch broadcasts": ((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 4)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads_are_torchs(rng, name):
    tensors = [tensor(rng, *shape) for shape in GROUPED[name]]
    assert_agree(
        rng,
        lambda *qkv: scaled_dot_product_attention(*qkv, enable_gqa=True, is_causal=True),
        lambda *qkv: THEIRS(*qkv, enable_gqa=True, is_causal=True),
        *tensors,
    )


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 1), (2, 1, 1, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_is_torchs_and_has_gradients(rng, shape, kind):
    q, k, v = (tensor(rng, *s) for s in SHAPES["batched"])
    mask = tensor(rng, *shape)
    if kind == "bool":
        mask = mask.detach() > -0.5
    assert_agree(rng, scaled_dot_product_attention, THEIRS, q, k, v, mask)


@pytest.mark.parametrize("shape", [(1, 2, 1, 5, 7), (1, 1, 3, 5, 7)])
def test_mask_of_five_axes_is_torchs(rng, shape):
    q, k, v = (tensor(rng, *s) for s in SHAPES["five axes"])
    assert_agree(rng, scaled_dot_product_attention, THEIRS, q, k, v, tensor(rng, *shape))


def test_row_that_sees_no_key_is_zero_as_torchs_is(rng):
    q, k, v = (tensor(rng, *s) for s in SHAPES["batched"])
    seen = torch.tensor([True, False, True, True, False])[:, None].expand(5, 7)
    additive = torch.zeros(5, 7, dtype=DOUBLE).masked_fill(~seen, -math.inf).requires_grad_()
    for mask in (seen, additive):
        assert_agree(rng, scaled_dot_product_attention, THEIRS, q, k, v, mask)
        assert not scaled_dot_product_attention(q, k, v, mask)[:, :, 1].any()


@pytest.mark.parametrize("scale", [0.3, 0.0, 2, torch.tensor(0.5)])
def test_scale_is_torchs(rng, scale):
    q, k, v = (tensor(rng, *s) for s in SHAPES["batched"])
    assert_agree(
        rng,
        lambda *qkv: scaled_dot_product_attention(*qkv, scale=scale),
        lambda *qkv: THEIRS(*qkv, scale=scale),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [None, torch.float32, "own"])
def test_error_is_within_that_of_torch(rng, dtype, mask_dtype):
    exact = [tensor(rng, 1, 2, 33, 16).detach().to(dtype).double() for _ in range(3)]
    tensors = [x.to(dtype).requires_grad_() for x in exact]
    mask, exact_mask = None, None
    if mask_dtype is not None:
        mask = tensor(rng, 33, 33, grad=False).to(dtype if mask_dtype == "own" else mask_dtype)
        exact_mask = mask.double()
    weights = tensor(rng, 1, 2, 33, 16, grad=False).to(dtype)

    def results(function, tensors, mask):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = function(*tensors, mask)
        return [out, *torch.autograd.grad(out, tensors, weights.to(out.dtype))]

    right = results(THEIRS, exact, exact_mask)
    found = results(scaled_dot_product_attention, tensors, mask), results(THEIRS, tensors, mask)
    for a, b, c in zip(*found, right, strict=True):
        assert a.dtype == dtype
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


AUTOCAST = {
    "flash_attention": flash_attention,
    "flash_cosine_sim_attention": flash_cosine_sim_attention,
    "memory_efficient_attention": memory_efficient_attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_heeded(rng, name):
    q, k, v = (tensor(rng, 1, 2, 5, 8, dtype=torch.float32) for _ in range(3))
    expected = AUTOCAST[name](*(x.bfloat16() for x in (q.half(), k, v)))
    double = tensor(rng, 1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = (f(q.half(), k, v) for f in (AUTOCAST[name], THEIRS))
        assert AUTOCAST[name](double, double, double).dtype == torch.float64
    assert out.dtype == theirs.dtype == torch.bfloat16
    same(out, expected, atol=0)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [x.dtype for x in grads] == [torch.float32] * 3
    with pytest.raises(TypeError, match=r"share one dtype, got \w+ (torch\.)?float16"):
        AUTOCAST[name](q.half(), k, v)


def refusals(rng):
    """Calls that torch refuses, and what is said here."""
    q, k, v = tensor(rng, 2, 4, 5, 8), tensor(rng, 2, 4, 7, 8), tensor(rng, 2, 4, 7, 4)
    ones = torch.ones(5, 7, dtype=torch.bool)
    grouped = {"enable_gqa": True}
    return {
        "one axis": ((q[0, 0, 0], k, v), {}, "`query` must have at least 2 axes, got shape"),
        "no tensor": ((q, k, "v"), {}, "`value` must be a tensor, got str"),
        "dimensions": ((q, k[..., :7], v), {}, r"`query` and `key` must agree in the dimension"),
        "lengths": ((q, k[:, :, :6], v), {}, r"`key` and `value` must agree in length"),
        "dtypes": ((q, k.float(), v), {}, "share one dtype, got query torch.float64, key torch"),
        "integers": ((q.int(), k.int(), v.int()), {}, "`query` must have one of the dtypes.*int32"),
        "heads": ((q, k[:, :2], v[:, :2]), {}, "must broadcast in batch and heads.*enable_gqa"),
        "batches": ((q[:1].expand(3, -1, -1, -1), k, v), {}, "must broadcast in batch"),
        "grouped": ((q, k[:, :3], v[:, :3]), grouped, "`key` must have heads that divide"),
        "grouped, no heads": ((q[0, 0], k[0, 0], v[0, 0]), grouped, "`query` must have heads"),
        "mask and causal": ((q, k, v, ones, 0.0, True), {}, "`attn_mask` must be None"),
        "mask shape": ((q, k, v, ones[:, :6]), {}, r"`attn_mask` must broadcast to .*\(5, 6\)"),
        "mask batch": ((q, k, v, ones.expand(3, 1, 5, 7)), {}, "`attn_mask` must broadcast"),
        "mask axes": ((q, k, v, ones[0]), {}, "`attn_mask` must have at least 2 axes"),
        "integer mask": (
            (q, k, v, ones.int()),
            {},
            "`attn_mask` must be boolean.*int32.*attn_mask != 0",
        ),
        "half mask": ((q, k, v, ones.half()), {}, "`attn_mask` must be boolean.*float16"),
        "rate": ((q, k, v, None, 1.1), {}, r"`dropout_p` must be in \[0, 1\], got 1.1"),
        "causal": ((q, k, v), {"is_causal": 1}, "`is_causal` must be True or False"),
        "grouping": ((q, k, v), {"enable_gqa": "yes"}, "`enable_gqa` must be True or False"),
        "scale": ((q, k, v), {"scale": "x"}, "`scale` must be a number"),
    }


@pytest.mark.parametrize("name", refusals(np.random.default_rng(0)))
def test_what_torch_refuses_is_refused_by_name(rng, name):
    args, options, message = refusals(rng)[name]
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        THEIRS(*args, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        scaled_dot_product_attention(*args, **options)


# --- in torch's place ------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often this library's function has run."""
    counted = []
    module = __import__("flash_attention_jax.torch", fromlist=["torch"])
    original = module.scaled_dot_product_attention

    def counting(*args, **options):
        counted.append(options)
        return original(*args, **options)

    monkeypatch.setattr(module, "scaled_dot_product_attention", counting)
    return counted


def test_replacement_reaches_every_name_and_ends_with_the_block(rng, calls):
    q, k, v = (tensor(rng, 1, 2, 5, 8) for _ in range(3))
    with replace_scaled_dot_product_attention():
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        imported_before(q, k, v, is_causal=True)
        with replace_scaled_dot_product_attention():
            torch.func.grad(lambda q: imported_before(q, k, v).sum())(q.detach())
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 4
    assert torch.nn.functional.scaled_dot_product_attention is THEIRS
    imported_before(q, k, v)
    with contextlib.suppress(ZeroDivisionError), replace_scaled_dot_product_attention():
        _ = 1 / 0
    torch.nn.functional.scaled_dot_product_attention(q, k, v)
    imported_before(q, k, v)
    assert len(calls) == 4


def test_replacement_in_torchs_own_layers(rng, calls):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    x = tensor(rng, 2, 7, 16)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=DOUBLE)
    theirs = layer(x, mask, is_causal=True)
    with replace_scaled_dot_product_attention():
        same(layer(x, mask, is_causal=True), theirs)
    assert len(calls) == 1


# --- layers ----------------------------------------------------------------------------------


def by_the_formula(layer, x, context, mask, bias, scale):
    """What memory-efficient-attention-pytorch computes, end-aligned."""
    q, kv = x @ layer.to_q.weight.T, context @ layer.to_kv.weight.T
    q, k, v = (
        t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1))
    )
    if scale is not None:
        q = torch.nn.functional.normalize(q, dim=-1) * scale.exp()
        k = torch.nn.functional.normalize(k, dim=-1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else 1) + bias
    logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    if layer.causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(
            logits.shape[-1] - logits.shape[-2] + 1
        )
        logits = logits.masked_fill(later, -math.inf)
    out = logits.softmax(-1) @ v
    return out.transpose(1, 2).flatten(-2) @ layer.to_out.weight.T


@pytest.mark.parametrize(
    ("cosine", "efficient", "causal"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_layer_is_its_formula(rng, cosine, efficient, causal):
    torch.manual_seed(1)
    options = {"dim": 12, "heads": 3, "dim_head": 4, "causal": causal}
    layer = (CosineSimAttention(**options, seq_len=9) if cosine else Attention(**options)).double()
    x, context, bias = tensor(rng, 2, 5, 12), tensor(rng, 2, 9, 12), tensor(rng, 3, 5, 9)
    mask = torch.arange(9) < torch.tensor([[9], [7]])
    params = list(layer.parameters())
    assert_agree(
        rng,
        lambda x, context, bias, *_: layer(x, context, mask, bias, efficient, 2, 4),
        lambda x, context, bias, *_: by_the_formula(
            layer, x, context, mask, bias, layer.scale if cosine else None
        ),
        x,
        context,
        bias,
        *params,
    )


def test_state_of_memory_efficient_attention_pytorch_loads():
    # The names and shapes that the released package saves.
    state = {
        "to_q.weight": torch.randn(512, 32),
        "to_kv.weight": torch.randn(1024, 32),
        "to_out.weight": torch.randn(32, 512),
    }
    layer = Attention(dim=32)
    layer.load_state_dict(state)
    assert layer.state_dict().keys() == state.keys()
    cosine = CosineSimAttention(dim=32, seq_len=128)
    cosine.load_state_dict({"scale": torch.zeros(1, 8, 1, 1), **state})
    same(cosine(torch.zeros(1, 4, 32)), torch.zeros(1, 4, 32))


def test_scale_of_cosine_similarity_begins_as_the_paper_has_it():
    scale = CosineSimAttention(dim=8, seq_len=64).scale
    assert scale.shape == (1, 8, 1, 1)
    same(scale.exp(), torch.full((1, 8, 1, 1), math.log2(64 * 63)), atol=1e-5)


def test_examples_of_memory_efficient_attention_pytorch_run():
    # At a length that a test can afford; the package's README has 65536.
    buckets = {"q_bucket_size": 1024, "k_bucket_size": 2048}
    attn = Attention(dim=512, dim_head=64, heads=8, causal=True, memory_efficient=True, **buckets)
    x = torch.randn(1, 512, 512)
    assert attn(x).shape == (1, 512, 512)
    cross_attn = Attention(dim=512, dim_head=64, heads=8, memory_efficient=True, **buckets)
    mask = torch.ones(1, 512).bool()
    assert cross_attn(x, context=torch.randn(1, 512, 512), mask=mask).shape == (1, 512, 512)


def test_layer_drops_in_training_alone(rng):
    layer = Attention(dim=12, heads=3, dim_head=4, dropout=0.5).double()
    x = tensor(rng, 1, 6, 12)
    assert (layer(x) != layer(x)).any()
    layer.eval()
    same(layer(x), layer(x), atol=0)


BAD_LAYERS = {
    "`dim` must be at least 1, got 0": lambda: Attention(dim=0),
    "`heads` must be an integer": lambda: Attention(dim=8, heads=2.5),
    r"`dropout` must be in \[0, 1\), got 1.5": lambda: Attention(dim=8, dropout=1.5),
    "`causal` must be True or False": lambda: Attention(dim=8, causal="no"),
    "`seq_len` must be at least 2, got 1": lambda: CosineSimAttention(dim=8, seq_len=1),
    r"`x` must have the axes .*dim = 8.*\(1, 4, 9\)": lambda: Attention(dim=8)(torch.ones(1, 4, 9)),
    r"`context` must have the axes": lambda: Attention(dim=8)(
        torch.ones(1, 4, 8), torch.ones(4, 8)
    ),
    r"`attn_bias` must broadcast to .*\(3, 3\)": lambda: Attention(dim=8)(
        torch.ones(1, 4, 8), attn_bias=torch.ones(3, 3)
    ),
    "`q_bucket_size` must be at least 1, got -3": lambda: Attention(
        dim=8, memory_efficient=True, q_bucket_size=-3
    )(torch.ones(1, 4, 8)),
    "`x` must be a dense tensor.*to_dense": lambda: Attention(dim=8)(torch.eye(8).to_sparse()),
    "`memory_efficient` must be": lambda: Attention(dim=8, memory_efficient=1)(torch.ones(1, 4, 8)),
}


@pytest.mark.parametrize("message", BAD_LAYERS)
def test_bad_layer_says_what_is_wrong(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_LAYERS[message]()


# --- training --------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two layers of causal attention over 16 symbols, by the attention given."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.embed = torch.nn.Embedding(16, 32)
        self.place = torch.nn.Embedding(24, 32)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
        self.head = torch.nn.Linear(32, 16)

    def forward(self, symbols):
        x = self.embed(symbols) + self.place.weight[: symbols.shape[1]]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            attended = self.attention(q, k, v, is_causal=True)
            x = x + out(torch.tanh(attended.transpose(1, 2).flatten(-2)))
        return self.head(x)


def losses(attention, steps=100):
    torch.manual_seed(0)
    model = Model(attention).double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    symbols = torch.randint(0, 16, (4, 1)) + torch.arange(25) * torch.tensor([[1], [2], [3], [5]])
    symbols = symbols % 16
    found = []
    for _ in range(steps):
        logits = model(symbols[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_gives_the_losses_of_torchs_attention():
    theirs, ours = losses(THEIRS), losses(scaled_dot_product_attention)
    assert theirs[-1] < 0.3 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
