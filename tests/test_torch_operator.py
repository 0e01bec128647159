"""Calls that torch looks into: compiled, exported, of tensors without memory and of subclasses."""

import contextlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as imported_before  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

from flash_attention_jax._torch import operator  # noqa: E402
from flash_attention_jax._torch import program as programs  # noqa: E402
from flash_attention_jax.torch import (  # noqa: E402
    Attention,
    flash_attention,
    flash_cosine_sim_attention,
    jax2torch,
    memory_efficient_attention,
    replace_scaled_dot_product_attention,
    scaled_dot_product_attention,
)

torch.set_num_threads(1)  # with tensors as small as these, more threads wait for each other
THEIRS = torch.nn.functional.scaled_dot_product_attention
SHAPE = (1, 2, 6, 4)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler gives warnings of its own

FUNCTIONS = {
    "flash_attention": flash_attention,
    "flash_cosine_sim_attention": flash_cosine_sim_attention,
    "memory_efficient_attention": memory_efficient_attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


def tensor(rng, *shape, grad=True):
    return torch.from_numpy(rng.normal(size=shape)).requires_grad_(grad)


def same(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def full_graph(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def assert_agree(rng, ours, theirs, *tensors):
    """The same output, and the same gradients for a random cotangent."""
    outs = ours(*tensors), theirs(*tensors)
    same(*outs)
    weights = tensor(rng, *outs[0].shape, grad=False)
    for a, b in zip(*(torch.autograd.grad(out, tensors, weights) for out in outs), strict=True):
        same(a, b, atol=1e-11)


# --- without memory --------------------------------------------------------------------------


@contextlib.contextmanager
def meta():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("kind", [FakeTensorMode, meta])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_without_memory_have_results_and_gradients_of_the_right_shape(kind, name):
    with kind():
        q = torch.empty(2, 4, 5, 8, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 7, 8, dtype=torch.bfloat16, requires_grad=True)
        v = torch.empty(2, 2, 7, 3, dtype=torch.bfloat16)
        shared = {"enable_gqa": True} if name == "scaled_dot_product_attention" else {}
        out = FUNCTIONS[name](q, k, v, **shared)
        dq, dk = torch.autograd.grad(out.sum(), (q, k), create_graph=True)
        again = torch.autograd.grad(dq.sum(), k)[0]
    assert type(out) is type(q)
    assert out.shape == (2, 4, 5, 3)
    assert [x.shape for x in (dq, dk, again)] == [q.shape, k.shape, k.shape]
    for x in (out, dq, dk, again):
        assert (x.device, x.dtype) == (q.device, torch.bfloat16)


@pytest.mark.parametrize("kind", [FakeTensorMode, meta])
def test_options_and_transforms_of_tensors_without_memory(kind):
    with kind():
        x = torch.empty(2, 2, 5, 8)
        out, lse = flash_attention(x, x, x, torch.ones(2, 5).int(), return_lse=True)
        dropped = flash_attention(x, x, x, dropout_rate=0.5, kv_lengths=torch.tensor([3, 5]))
        batched = torch.func.vmap(flash_attention)(x, x, x)
        grad = torch.func.grad(lambda x: flash_attention(x, x, x).sum())(x)
        layer = Attention(dim=8, heads=2, dim_head=4)(x[0])
    assert [y.shape for y in (out, lse, dropped)] == [x.shape, (2, 2, 5), x.shape]
    assert [y.shape for y in (batched, grad, layer)] == [x.shape, x.shape, (2, 5, 8)]


def test_meta_tensor_beside_one_with_memory_is_refused():
    x = torch.ones(1, 2, 5, 8)
    with pytest.raises(
        ValueError, match=r"`query` and `key` must be on one device, got .* on meta"
    ):
        scaled_dot_product_attention(x, x.to("meta"), x)


def test_key_of_jax_without_memory_is_refused_with_the_way():
    with FakeTensorMode():
        x = torch.ones(1, 2, 5, 8)
        with pytest.raises(TypeError, match=r"`dropout_key` must be a tensor.*key_data"):
            flash_attention(x, x, x, dropout_rate=0.5, dropout_key=jax.random.key(0))


def test_output_that_torch_lacks_is_named_without_memory_too():
    with pytest.raises(TypeError, match=r"Output 1 .*key<fry>.*key_data"):
        jax2torch(lambda x: (x, jax.random.key(0)))(torch.ones(3, device="meta"))


# --- torch.compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_in_the_compiled_graph_with_its_gradients(rng, name):
    q, k, v = (tensor(rng, *SHAPE) for _ in range(3))

    def model(q, k, v):
        return FUNCTIONS[name](q * 2, k, v) + 1

    assert_agree(rng, full_graph(model), model, q, k, v)


def test_compiled_backward_runs_no_forward_again(rng):
    def model(q):
        return flash_attention(q, q, q, causal=True).sum()

    steps = set(operator.STEPS)
    full_graph(model)(tensor(rng, *SHAPE)).backward()
    made = [operator.STEPS[key] for key in set(operator.STEPS) - steps]
    functions = {step.function for step in made}
    assert functions == {programs.value_and_tape, programs.gradients}


def test_inductor_compiles_it(rng):
    q, k, v = (tensor(rng, *SHAPE) for _ in range(3))

    def model(q, k, v):
        return flash_attention(q, k, v, window=(2, 0))

    assert_agree(rng, torch.compile(model, fullgraph=True), model, q, k, v)


def test_compiled_numbers_lengths_and_masks_may_change(rng):
    def model(x, scale, window, mask):
        return flash_attention(x, x, x, mask, scale=scale, window=window)

    compiled = full_graph(model)
    for length, scale, window in ((5, 0.1, 1), (5, 0.2, 2), (6, 0.3, 3)):
        x = tensor(rng, 1, 2, length, 4, grad=False)
        mask = (torch.arange(length) < 4)[None].long()
        same(compiled(x, scale, window, mask), model(x, scale, window, mask))


def test_compiled_dropout_and_autocast(rng):
    x = tensor(rng, *SHAPE, grad=False).float()

    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            return flash_attention(x, x, x, dropout_rate=0.5)

    out = full_graph(model)(x)
    assert out.dtype == torch.bfloat16
    assert (out != full_graph(model)(x)).any()


def test_compiled_transforms(rng):
    x = tensor(rng, 3, *SHAPE, grad=False)

    def batched(x):
        return torch.func.vmap(lambda x: flash_attention(x, x, x))(x)

    def grad(x):
        return torch.func.grad(lambda x: flash_attention(x, x, x).sin().sum())(x[0])

    for model in (batched, grad, torch.no_grad()(batched)):
        same(full_graph(model)(x), model(x))


def test_argument_that_no_graph_holds_breaks_it(rng):
    apply, x, key = jax2torch(lambda x, f: f(x)), tensor(rng, 3), jax.random.key(0)
    drop = jax2torch(lambda x, key: x * jax.random.normal(key, x.shape, x.dtype))
    for model in (lambda x: apply(x * 2, abs) + 1, lambda x: drop(x * 2, key) + 1):
        same(torch.compile(model, backend="aot_eager")(x), model(x))
        torch.compiler.reset()
        with pytest.raises(Exception, match="must be given tensors, numbers and strings"):
            full_graph(model)(x)


def test_error_of_the_function_is_seen_through_the_compiler(rng):
    def model(q):
        return flash_attention(q, q[:, :1], q)

    with pytest.raises(ValueError, match="`k` and `v` must agree"):
        torch.compile(model, backend="aot_eager")(tensor(rng, *SHAPE))
    torch.compiler.reset()
    with pytest.raises(Exception, match="ValueError: `k` and `v` must agree"):
        full_graph(model)(tensor(rng, *SHAPE))


def test_compiled_integers_of_64_bits_that_do_not_fit_are_named(rng):
    x = tensor(rng, *SHAPE, grad=False).float()
    compiled = full_graph(lambda x, lengths: flash_attention(x, x, x, kv_lengths=lengths))
    with jax.enable_x64(False):
        same(compiled(x, torch.tensor([4])), THEIRS(x, x[:, :, :4], x[:, :, :4]), atol=1e-6)
        with pytest.raises(ValueError, match=rf"`kv_lengths` must hold .*int32.*{2**40}"):
            compiled(x, torch.tensor([2**40]))


# --- the replacement, compiled ---------------------------------------------------------------


def runs_ours(model, x):
    """Whether the operator is what the call runs."""
    with torch.profiler.profile() as profile:
        model(x)
    return any("flash_attention_jax" in event.key for event in profile.key_averages())


ATTENDING = {
    "F": (SHAPE, lambda _, x: torch.nn.functional.scaled_dot_product_attention(x, x, x)),
    "imported": (SHAPE, lambda _, x: imported_before(x, x, x)),
    "MultiheadAttention": ((2, 6, 8), lambda layer, x: layer(x, x, x, need_weights=False)[0]),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ATTENDING)
def test_replacement_holds_for_compiled_code_inside_the_block_alone(rng, name, full):
    shape, function = ATTENDING[name]
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = tensor(rng, *shape)

    def model(x):
        return function(layer, x) + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=full)
    found = [runs_ours(compiled, x)]
    with replace_scaled_dot_product_attention():
        found.append(runs_ours(compiled, x))
        assert_agree(rng, compiled, model, x)
    found.append(runs_ours(compiled, x))
    assert found == [False, True, False]


# --- export and the other tracers ------------------------------------------------------------


class Model(torch.nn.Module):
    def forward(self, x):
        return flash_attention(x * 2, x, x, causal=True)


def test_export_has_the_call_in_its_program(rng):
    x, other = tensor(rng, *SHAPE, grad=False), tensor(rng, *SHAPE, grad=False)
    program = torch.export.export(Model(), (x,), strict=False)
    same(program.module()(other), Model()(other))
    with pytest.raises(Exception, match="strict=False"):
        torch.export.export(Model(), (x,), strict=True)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_call(rng, mode):
    x, other = tensor(rng, *SHAPE, grad=False), tensor(rng, *SHAPE, grad=False)
    same(make_fx(Model(), tracing_mode=mode)(x)(other), Model()(other))


def test_jit_trace_keeps_the_call_and_not_its_numbers(rng):
    x, other = tensor(rng, *SHAPE, grad=False), tensor(rng, *SHAPE, grad=False)
    same(torch.jit.trace(Model(), (x,))(other), Model()(other))


def test_graph_of_another_process_says_so():
    with pytest.raises(RuntimeError, match=r"in the process that traced it, got 'value 0'.*again"):
        torch.ops.flash_attention_jax.call("value 0", [torch.ones(3)])


@pytest.mark.parametrize("grad", [False, True])
def test_operator_passes_torchs_own_check(rng, grad):
    x = tensor(rng, 3, grad=grad)
    steps = set(operator.STEPS)
    make_fx(jax2torch(lambda x: x**3))(x)
    (key,) = set(operator.STEPS) - steps
    torch.library.opcheck(torch.ops.flash_attention_jax.call.default, (key, [x]))


# --- subclasses ------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass without code."""


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_subclass_comes_back_as_itself_with_gradients(rng, name, place):
    tensors = [tensor(rng, *SHAPE, grad=False) for _ in range(3)]
    tensors[place] = tensors[place].as_subclass(Named).requires_grad_()
    out = FUNCTIONS[name](*tensors)
    assert type(out) is Named
    (grad,) = torch.autograd.grad(out.sin().sum(), tensors[place])
    plain = [x.detach().as_subclass(torch.Tensor) for x in tensors]
    plain[place].requires_grad_()
    expected = FUNCTIONS[name](*plain)
    same(out.as_subclass(torch.Tensor), expected)
    expected = torch.autograd.grad(expected.sin().sum(), plain[place])[0]
    same(grad.as_subclass(torch.Tensor), expected)


def test_subclass_comes_back_in_any_structure(rng):
    x = tensor(rng, 3, grad=False).as_subclass(Named)
    found = jax2torch(lambda x: {"a": (x, [x + 1]), "b": None})({"deep": [x]}["deep"][0])
    assert [type(found["a"][0]), type(found["a"][1][0]), found["b"]] == [Named, Named, None]


def test_subclass_that_refuses_is_asked(rng):
    x = tensor(rng, 3, grad=False).as_subclass(Refusing)
    with pytest.raises(TypeError, match=r"no implementation found for .*Refusing"):
        jax2torch(lambda x: x)(x)


def test_parameter_comes_back_as_a_tensor(rng):
    x = torch.nn.Parameter(tensor(rng, *SHAPE, grad=False))
    assert type(flash_attention(x, x, x)) is torch.Tensor


def test_mode_sees_the_call(rng):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = tensor(rng, *SHAPE, grad=False)
    with Mode():
        out = flash_attention(x, x, x)
    assert "flash_attention" in seen
    same(out, flash_attention(x, x, x))


def test_subclass_that_dispatches_is_asked(rng):
    parts = [tensor(rng, *SHAPE, grad=False) for _ in range(2)]
    x = TwoTensor(*parts)
    for function in (Model(), full_graph(Model())):
        out = function(x)
        assert type(out) is TwoTensor
        for found, part in zip((out.a, out.b), parts, strict=True):
            same(found, Model()(part))


def test_plain_subclass_breaks_a_compiled_graph(rng):
    x = tensor(rng, *SHAPE, grad=False).as_subclass(Named)
    model = torch.compile(lambda x: flash_attention(x, x, x), backend="eager")
    assert type(model(x)) is Named
    with pytest.raises(Exception, match=r"plain tensors: x\.as_subclass"):
        full_graph(Model())(x)


def test_numpy_beside_subclasses_stays_an_argument(rng):
    x = tensor(rng, 3, grad=False).as_subclass(Named)
    out = jax2torch(lambda x, y: x + y)(x, np.ones(3))
    same(out.as_subclass(torch.Tensor), x.as_subclass(torch.Tensor) + 1)
