"""jax2torch: JAX functions on tensors, their gradients, their memory, and what is refused."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax

torch = pytest.importorskip("torch", reason="needs torch")

from flash_attention_jax._torch import bridge, read  # noqa: E402
from flash_attention_jax._torch import program as programs  # noqa: E402
from flash_attention_jax.torch import jax2torch  # noqa: E402

torch.set_num_threads(1)  # with tensors as small as these, more threads wait for each other
DOUBLE = torch.float64


def tensor(rng, *shape, dtype=DOUBLE, grad=False):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_(grad)


def same(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@jax2torch
def tanh_layer(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def torch_layer(params, x):
    return torch.tanh(x @ params["w"] + params["b"])


def layer_arguments(rng):
    params = {"w": tensor(rng, 3, 2, grad=True), "b": tensor(rng, 2, grad=True)}
    return params, tensor(rng, 5, 3, grad=True)


# --- values and gradients --------------------------------------------------------------------


def test_readme_example_of_upstream_has_its_shape_and_gradients(rng):
    q, k, v = (tensor(rng, 1024, 64, dtype=torch.float32, grad=True) for _ in range(3))
    out = jax2torch(flash_attention_jax.flash_attention)(q, k, v)
    assert out.shape == (1024, 64)
    weights = tensor(rng, 1024, 64, dtype=torch.float32)
    ours = torch.autograd.grad((weights * out).sum(), (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for a, b in zip(ours, torch.autograd.grad((weights * theirs).sum(), (q, k, v)), strict=True):
        same(a, b, atol=1e-5)


def test_nested_arguments_have_gradients(rng):
    params, x = layer_arguments(rng)
    leaves = [*params.values(), x]
    out, theirs = tanh_layer(params, x), torch_layer(params, x)
    same(out, theirs)
    weights = tensor(rng, 5, 2)
    ours = torch.autograd.grad(out, leaves, weights)
    for a, b in zip(ours, torch.autograd.grad(theirs, leaves, weights), strict=True):
        same(a, b)


def test_keywords_and_constants_of_every_kind_arrive(rng):
    def function(x, *rest, power, mode="sine", extra=None, **others):
        assert extra is None
        assert others == {"flag": True, "axes": [0, (1,)], "dtype": jnp.float64, "call": abs}
        assert rest == (2.5, None)
        return (jnp.sin(x) if mode == "sine" else x) ** power

    x = tensor(rng, 3, grad=True)
    others = {"flag": True, "axes": [0, (1,)], "dtype": jnp.float64, "call": abs}
    ours = jax2torch(function)
    same(ours(x, 2.5, None, power=3, **others), torch.sin(x) ** 3)
    same(ours(x, 2.5, None, power=2, mode="none", **others), x**2)


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0.0, -0.0)])
def test_constants_that_are_equal_and_not_the_same_are_kept_apart(one, other):
    kind = jax2torch(lambda x, c: x + (len(str(c)) if isinstance(c, float | int) else 0))
    x = torch.zeros((), dtype=DOUBLE)
    assert [kind(x, one).item(), kind(x, other).item()] == [len(str(one)), len(str(other))]


def test_integer_and_boolean_inputs_pass_without_gradient(rng):
    def take(table, index, keep):
        return jnp.where(keep[:, None], table[index], 0.0)

    table = tensor(rng, 4, 3, grad=True)
    index, keep = torch.tensor([3, 1, 3]), torch.tensor([True, False, True])
    jax2torch(take)(table, index, keep).sum().backward()
    same(table.grad.sum(1), torch.tensor([0.0, 0.0, 0.0, 6.0], dtype=DOUBLE))


def test_several_outputs_keep_their_structure_and_gradients(rng):
    def function(x):
        return {"a": (jnp.sin(x), [jnp.argmax(x)]), "b": None, "c": jnp.sum(x), "d": x > 0}

    x = tensor(rng, 5, grad=True)
    out = jax2torch(function)(x)
    (sine, [index]), total = out["a"], out["c"]
    assert out["b"] is None
    assert index.item() == x.argmax().item()
    assert total.shape == ()
    assert not index.requires_grad
    assert not out["d"].requires_grad
    assert out["d"].dtype == torch.bool
    # One of the outputs alone, and both.
    same(torch.autograd.grad(sine, x, torch.ones(5, dtype=DOUBLE), retain_graph=True)[0], x.cos())
    same(torch.autograd.grad(2 * total + sine.sum(), x)[0], 2 + x.cos())


def test_gradient_through_an_integer_output_is_torchs_error(rng):
    out = jax2torch(jnp.argsort)(tensor(rng, 5, grad=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "flipped", "0-d", "empty"])
def test_tensors_of_any_strides_and_sizes(rng, kind):
    base = tensor(rng, 4, 5, grad=True)
    view = {
        "transposed": lambda x: x.t(),
        "expanded": lambda x: x[:1].expand(3, 5),
        "sliced": lambda x: x[1:, ::2],
        "flipped": torch._neg_view,
        "0-d": lambda x: x[0, 0],
        "empty": lambda x: x[:0],
    }[kind]
    ours = jax2torch(lambda x: jnp.exp(x) * x)(view(base))
    theirs = view(base).exp() * view(base)
    same(ours, theirs)
    weights = tensor(rng, *theirs.shape)
    same(*(torch.autograd.grad(y, base, weights)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_float_dtypes_stay_themselves(rng, dtype):
    x = tensor(rng, 7, dtype=getattr(torch, dtype), grad=True)
    out = jax2torch(lambda x: x * x)(x)
    assert out.dtype == x.dtype
    out.sum().backward()
    same(x.grad, 2 * x.detach(), atol=0)


def test_complex_gradients_follow_torchs_convention(rng):
    z = torch.complex(tensor(rng, 4), tensor(rng, 4)).requires_grad_()
    ours, theirs = jax2torch(lambda z: jnp.sin(z) * z)(z), torch.sin(z) * z
    weights = torch.complex(tensor(rng, 4), tensor(rng, 4))
    same(*(torch.autograd.grad(y, z, weights)[0] for y in (ours, theirs)))


def test_arrays_of_numpy_and_jax_are_arguments_too(rng):
    def noisy(x, array, key):
        return x * array + jax.random.normal(key, x.shape, x.dtype)

    x, array, key = tensor(rng, 3, grad=True), rng.normal(size=3), jax.random.key(1)
    out = jax2torch(noisy)(x, array, key)
    expected = noisy(jnp.asarray(x.detach().numpy()), jnp.asarray(array), key)
    same(out, torch.from_numpy(np.array(expected)))
    array[:] = 0  # after the call, so without effect on the gradient
    out.sum().backward()
    assert (x.grad != 0).all()


def test_gradients_agree_with_finite_differences(rng):
    x, y = tensor(rng, 3, 2, grad=True), tensor(rng, 2, grad=True)
    function = jax2torch(lambda x, y: (jnp.sin(x @ y), jnp.sum(x**3) * y))
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


def test_third_derivative(rng):
    x = tensor(rng, 4, grad=True)
    y = jax2torch(jnp.sin)(x)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    same(y, -x.cos())


# --- what is computed ------------------------------------------------------------------------


def test_input_that_needs_no_gradient_costs_none(rng):
    @jax.custom_vjp
    def never(x):
        return x

    def forward(x):
        raise AssertionError("differentiated")

    never.defvjp(forward, lambda _, ct: (ct,))
    product = jax2torch(lambda x, y: never(x) * y)
    x, y = tensor(rng, 3), tensor(rng, 3, grad=True)
    product(x, y).sum().backward()
    same(y.grad, x)
    with torch.no_grad():
        product(y, x)
    with pytest.raises(AssertionError, match="differentiated"):
        product(y, x)


def test_traced_once_for_each_shape(rng):
    count = []

    def function(x, y):
        count.append(x.shape)
        return jnp.sin(x) * y

    for ours in (jax2torch(function), jax2torch(function)):
        for length in (3, 4, 3, 4):
            x = tensor(rng, length, grad=True)
            ours(x, 2.0).sum().backward()
    assert count == [(3,), (4,)]


def test_backward_is_compiled_once_for_each_shape(rng):
    ours = jax2torch(jnp.cosh)
    before = programs.gradients._cache_size()
    for _ in range(3):
        ours(tensor(rng, 6, grad=True)).sum().backward()
    assert programs.gradients._cache_size() == before + 1


def test_residuals_that_are_arguments_or_outputs_are_not_copied():
    program, arrays = read.read(
        flash_attention_jax.flash_attention, (torch.zeros(1, 2, 8, 4),) * 3, {}
    )
    wanted, given = (True,) * 3, [bridge.to_jax(x) for x in arrays]
    _, own, tape = programs.value_and_tape(program, wanted, given)
    kinds = [source for source in tape.sources if source[0] != "own"]
    assert kinds == [("array", 0), ("array", 1), ("array", 2), ("out", 0)]
    assert [x.shape for x in own] == [(1, 2, 8)] * 2  # lse, and what it lacks


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_memory_crosses_without_a_copy(dtype):
    x = torch.zeros(64, 8).to(dtype)
    array = bridge.to_jax(x)
    assert array.unsafe_buffer_pointer() == x.data_ptr()
    made = array | array if dtype == torch.bool else array + array
    (result,) = bridge.to_torch([made], [array])
    assert result.data_ptr() == made.unsafe_buffer_pointer()
    assert result.dtype == dtype


def test_array_that_lies_where_another_does_is_cloned():
    # As a JAX that forwards arguments to results, or merges equal results, would return it.
    array, other = jnp.ones(64, jnp.float32), jnp.zeros(64, jnp.float32)
    tensors = bridge.to_torch([array, other, other], [array])
    taken = {array.unsafe_buffer_pointer(), *(t.data_ptr() for t in tensors)}
    assert len(taken) == 4
    for found, expected in zip(tensors, (1.0, 0.0, 0.0), strict=True):
        same(found, torch.full((64,), expected))


def test_tensor_that_is_not_aligned_is_copied_and_right():
    x = torch.arange(10, dtype=torch.float32)[1:]
    same(jax2torch(lambda x: x + 1)(x), x + 1)


def test_writing_into_an_input_before_backward_is_refused(rng):
    x = tensor(rng, 5, grad=True)
    y = x * 1
    out = jax2torch(jnp.sin)(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_into_an_output_that_backward_needs_is_refused(rng):
    out = jax2torch(lambda q: flash_attention_jax.flash_attention(q, q, q))(
        tensor(rng, 1, 1, 5, 4, grad=True)
    )
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_into_an_input_after_the_call_leaves_the_result(rng):
    # Large, so that JAX is still at work when the call would otherwise have returned.
    x = tensor(rng, 1200, 1200, dtype=torch.float32)
    expected = x @ x
    out = jax2torch(lambda x: x @ x)(x)
    x.zero_()
    same(out, expected, atol=1e-2)


def test_results_share_no_memory_with_anything(rng):
    constant = jnp.arange(32, dtype=jnp.float64)
    given = jnp.arange(32, dtype=jnp.float64) + 1

    def function(x, given):
        double = 2 * x
        return x, x, double, double, given, constant

    x = tensor(rng, 32)
    outs = jax2torch(function)(x, given)
    expected = [t.clone() for t in outs]
    assert len({t.data_ptr() for t in (x, *outs)}) == 7
    for t, e in zip(outs, expected, strict=True):
        same(t, e)
        t.fill_(-1)
    same(torch.from_numpy(np.array(constant)), torch.arange(32, dtype=DOUBLE))
    same(torch.from_numpy(np.array(given)), torch.arange(32, dtype=DOUBLE) + 1)
    again = jax2torch(function)(x, given)
    for t, e in zip(again, expected, strict=True):
        same(t, e)


def test_gradients_that_are_the_same_array_do_not_share_memory(rng):
    x, y = tensor(rng, 32, grad=True), tensor(rng, 32, grad=True)
    ct = torch.ones(32, dtype=DOUBLE)
    dx, dy = torch.autograd.grad(jax2torch(lambda x, y: x + y)(x, y), (x, y), ct)
    assert len({dx.data_ptr(), dy.data_ptr(), ct.data_ptr()}) == 3


@pytest.mark.gpu
def test_streams_of_a_gpu_wait_for_each_other():
    if not torch.cuda.is_available():
        pytest.skip("needs a torch with CUDA")
    ours = jax2torch(lambda x: jnp.matmul(x, x, precision="highest"))
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):  # so that torch is at work when JAX begins, and JAX when torch writes
            x = x @ x / x.norm()
        expected = x @ x
        out = ours(x)
        x.zero_()
        assert out.device == x.device
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-5)


def test_result_kept_after_its_argument_is_gone(rng):
    out = jax2torch(lambda x: x)(tensor(rng, 1000))
    [tensor(rng, 1000) for _ in range(8)]
    assert out.isfinite().all()


def test_saved_tensors_are_freed_by_backward(rng):
    x = tensor(rng, 5, grad=True)
    out = jax2torch(jnp.tanh)(x).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


# --- torch's own machinery -------------------------------------------------------------------


def test_checkpoint_recomputes(rng):
    x = tensor(rng, 5, grad=True)
    torch.utils.checkpoint.checkpoint(jax2torch(jnp.tanh), x, use_reentrant=False).sum().backward()
    same(x.grad, 1 - x.detach().tanh() ** 2)


def test_func_grad_and_vmap_nest_either_way(rng):
    vmap, grad = torch.func.vmap, torch.func.grad
    x, y = tensor(rng, 4, 3), tensor(rng, 3)

    def results(function):
        def loss(x, y):
            return function(x, y).square().sum()

        return [
            vmap(grad(loss), (0, None))(x, y),
            grad(lambda x: vmap(loss, (0, None))(x, y).sum())(x),
            vmap(vmap(function, (0, None)), (None, 0))(x[0], y),
            vmap(function, (1, None), 1)(x.t(), y),
            torch.func.jacrev(function, 1)(x, y),
            grad(lambda x: grad(loss)(x, y).sum())(x),
            torch.func.vjp(function, x, y)[1](x)[1],
        ]

    ours = results(jax2torch(lambda x, y: jnp.sin(x) * y))
    for a, b in zip(ours, results(lambda x, y: x.sin() * y), strict=True):
        same(a, b)


def test_func_grad_reaches_keys_and_several_outputs(rng):
    ours = jax2torch(lambda x, key: (x * jax.random.normal(key, (3,), x.dtype), jnp.argmax(x)))
    x, key = tensor(rng, 3), jax.random.key(0)

    def total_and_index(x):
        noisy, index = ours(x, key)
        return noisy.sum(), index

    grad, index = torch.func.grad(total_and_index, has_aux=True)(x)
    same(grad, torch.from_numpy(np.array(jax.random.normal(key, (3,), jnp.float64))))
    assert index.item() == x.argmax().item()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused_and_never_dropped(rng):
    ours, x = jax2torch(jnp.sin), tensor(rng, 3)
    with pytest.raises(NotImplementedError, match=r"reverse mode.*torch\.func\.grad"):
        torch.func.jvp(ours, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="reverse mode"):
            ours(dual)


def test_older_batches_of_gradients_are_refused(rng):
    x = tensor(rng, 3, grad=True)
    out = jax2torch(jnp.sin)(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.jacrev"):
        torch.autograd.grad(out, x, torch.eye(3, dtype=DOUBLE), is_grads_batched=True)


# --- refusals --------------------------------------------------------------------------------


def add(a, b=0.0, *rest, **others):
    leaves = jax.tree.leaves((a, b, rest, others))
    return functools.reduce(lambda x, y: x + y, leaves)


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BAD = {
    "sparse": (lambda: (torch.eye(3).to_sparse(),), TypeError, r"`a` must be .*to_dense"),
    "nested": (
        lambda: (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),),
        TypeError,
        r"`a` must be a dense tensor, got a nested one\. Pad it",
    ),
    "quantised": (
        lambda: (quantised(),),
        TypeError,
        r"`a` must be a dense tensor, .*qint8.*dequantize",
    ),
    "dtype": (
        lambda: (torch.ones(3).to(torch.float8_e4m3fn),),
        TypeError,
        r"`a` must have a dtype that JAX shares with torch, got torch.float8_e4m3fn\. Cast",
    ),
    "devices": (
        lambda: (torch.ones(3), torch.ones(3, device="meta")),
        ValueError,
        r"`a` and `b` must be on one device, got a on cpu and b on meta\. Move",
    ),
    "inside": (
        lambda: ({"w": [torch.ones(3), torch.eye(3).to_sparse()]},),
        TypeError,
        r"`a\['w'\]\[1\]` must",
    ),
    "rest": (
        lambda: (torch.ones(3), 1.0, 2.0, torch.eye(3).to_sparse()),
        TypeError,
        r"`rest\[1\]` must",
    ),
    "no hash": (lambda: (torch.ones(3), {1, 2}), TypeError, r"`b` must be .*got set"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*[Qq]uantiz.*", "ignore:.*Sparse")
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_cross_is_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        jax2torch(add)(*make())


def test_keyword_is_named():
    with pytest.raises(TypeError, match=r"`scale\[0\]` must"):
        jax2torch(add)(torch.ones(3), scale=[torch.eye(3).to_sparse()])


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_64_bits_without_x64_are_refused_with_the_way_to_turn_it_on(dtype):
    x = torch.ones(3, dtype=getattr(torch, dtype))
    with jax.enable_x64(False), pytest.raises(TypeError, match=r"torch\.\w+32|64.*jax_enable_x64"):
        jax2torch(add)(x)
    assert jax2torch(lambda x: x)(x).dtype == x.dtype


WIDE = {"int64": (torch.int32, 2**31), "uint64": (torch.uint32, 2**32)}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_integers_of_64_bits_without_x64_pass_where_they_fit_and_are_named_where_not(dtype, make):
    narrow, limit = WIDE[dtype]
    kind = getattr(torch if make is torch.tensor else np, dtype)
    x = torch.ones(3, requires_grad=True)
    product = jax2torch(lambda x, n: (x * n.astype(x.dtype), n))
    with jax.enable_x64(False):
        out, n = product(x, make([limit - 1, 0, 2], dtype=kind))
        assert n.dtype == narrow
        assert n.tolist() == [limit - 1, 0, 2]
        out.sum().backward()
        same(x.grad, n.double().float())
        for worst in (limit, *([-limit - 1] if narrow is torch.int32 else [])):
            with pytest.raises(ValueError, match=rf"`n\['deep'\]` must .*, got {worst}\. .*x64"):
                jax2torch(lambda x, n: x)(x, n={"deep": make([3, worst], dtype=kind)})
    assert jax2torch(lambda n: n)(make([limit], dtype=kind)).tolist() == [limit]


def test_integers_that_do_not_fit_are_named_under_func_too():
    x, n = torch.ones(2, 3, requires_grad=True), torch.tensor([2**31, 1])
    ours = jax2torch(lambda x, n: x * n.astype(x.dtype))
    with jax.enable_x64(False):
        for inner in (lambda f: f, torch.func.grad):
            call = torch.func.vmap(inner(lambda x, n: ours(x, n).sum()))
            call(x.detach(), n % 7)
            with pytest.raises(ValueError, match=rf"`n` must hold integers of int32.*{2**31}"):
                call(x.detach(), n)


def test_cuda_tensor_and_jax_without_cuda_says_what_to_install():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a JAX without CUDA")
    with pytest.raises(RuntimeError, match=r"`q` must .*cuda:0.*pip install .*\[cuda13\]"):
        read.check_device(lambda _: "q", 0, torch.device("cuda:0"))


def test_output_that_torch_lacks_is_named():
    with pytest.raises(TypeError, match=r"Output 1 .*key<fry>.*key_data"):
        jax2torch(lambda x: (x, jax.random.key(0)))(torch.ones(3))


@pytest.mark.parametrize(("fn", "message"), [(3, "`fn` must be a function"), ({}, "a function")])
def test_what_is_no_function_is_refused(fn, message):
    with pytest.raises(TypeError, match=message):
        jax2torch(fn)


def test_function_without_hash_is_refused():
    class Unhashable(list):
        def __call__(self, x):
            return x

    with pytest.raises(TypeError, match="`fn` must have a hash"):
        jax2torch(Unhashable())


def test_errors_of_the_function_come_through():
    with pytest.raises(ValueError, match="`k` and `v` must agree"):
        jax2torch(flash_attention_jax.flash_attention)(
            torch.ones(2, 4, 8), torch.ones(2, 5, 8), torch.ones(2, 6, 8)
        )


# --- the package -----------------------------------------------------------------------------


def test_released_jax2torch_works_with_our_functions_or_says_why_not(rng):
    released = pytest.importorskip(
        "jax2torch", reason="needs jax2torch: pip install --no-deps jax2torch"
    )
    q, k, v = (tensor(rng, 16, 8, grad=True) for _ in range(3))
    try:
        out = released.jax2torch(flash_attention_jax.flash_attention)(q, k, v)
    except Exception as error:  # noqa: BLE001
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax2torch", "jax")]
        pytest.xfail(f"{versions[0]} fails with {versions[1]}: {type(error).__name__}: {error}")
    same(out, jax2torch(flash_attention_jax.flash_attention)(q, k, v))
