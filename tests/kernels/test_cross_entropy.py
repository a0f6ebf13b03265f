"""`cross_entropy`, the differentiable loss of a head, in both frameworks: reductions, compilation, sharding."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from operations import back, to
from test_linear_cross_entropy import SIXTEEN_ROWS, V, problem, with_options

import fsam_kernels.torch
import fsam_kernels.xla
from fsam_kernels import spec

FUNCTIONS = {"xla": fsam_kernels.xla.cross_entropy, "torch": fsam_kernels.torch.cross_entropy}


def options_of(p, reduction: str) -> dict:
    bias = {"loss": p.loss, "chunk_bytes": SIXTEEN_ROWS}
    return {**bias, **({"reduction": "mean", "count": 7.0} if reduction == "count" else {"reduction": reduction})}


def value_and_grads(backend: str, p, reduction: str, **more):
    """(the loss, gradients of Σ of it with respect to h, w and bias)."""
    f, options = FUNCTIONS[backend], {**options_of(p, reduction), **more}
    give = lambda x: None if x is None else to(backend, x, "float32")
    arrays = [x for x in (give(p.h), give(p.w), give(p.bias)) if x is not None]
    y, weights = to(backend, p.y), None if reduction == "none" else give(p.weights)
    call = lambda h, w, b=None: f(h, w, y, weights, bias_V=b, **options)
    if backend == "torch":
        arrays = [x.requires_grad_() for x in arrays]
        loss = call(*arrays)
        return back(loss.detach()), [back(x) for x in torch.autograd.grad(loss.sum(), arrays)]
    loss, grads = jax.value_and_grad(lambda *x: call(*x).sum(), argnums=tuple(range(len(arrays))))(*arrays)
    return back(call(*arrays)), [back(x) for x in grads]


def oracle(p, reduction: str):
    seen = np.where(p.y >= 0, p.weights, 0.0)
    factor = {"none": (p.y >= 0) * 1.0, "sum": seen, "mean": seen / seen.sum(), "count": seen / 7}[reduction]
    loss_N, _, zbar = spec.linear_cross_entropy(p.h, p.w, p.y, factor, bias_V=p.bias, loss=p.loss)
    kind, count = ("mean", 7.0) if reduction == "count" else (reduction, None)
    grads = spec.logit_vjp(zbar, p.h, p.w, bias_V=p.bias, soft_cap=p.loss.soft_cap)
    return spec.reduce(loss_N, seen, kind, count), grads[: 2 if p.bias is None else 3]


@pytest.mark.parametrize(
    ("names", "reduction"),
    [
        ((), "none"),
        ((), "count"),
        (("smoothing", "bias"), "sum"),
        (("smoothing", "bias"), "none"),
        (("z-loss", "soft-cap"), "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", FUNCTIONS)
def test_value_and_gradients_match_the_oracle(backend, names, reduction):
    p = with_options(names, scale=2)
    loss, grads = value_and_grads(backend, p, reduction)
    expected, expected_grads = oracle(p, reduction)
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
    for x, o in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(x, o, rtol=1e-4, atol=2e-6 * np.abs(o).max())


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_leading_axes_layout_and_ignore_index(backend):
    p = problem(n=12)
    p = p._replace(y=np.maximum(p.y, 0))
    give = lambda x, shape=None: to(backend, np.reshape(x, shape or np.shape(x)), "float32")
    y = to(backend, p.y.reshape(3, 4))
    f = functools.partial(FUNCTIONS[backend], ignore_index=int(p.y[2]))
    got = f(give(p.h, (3, 4, -1)), give(p.w.T), y, give(p.weights, (3, 4)), layout="DV")
    seen = np.where(p.y == p.y[2], 0, p.weights)
    loss_N, *_ = spec.linear_cross_entropy(p.h, p.w, p.y, ignore_index=int(p.y[2]))
    assert float(got) == pytest.approx(spec.reduce(loss_N, seen, "mean"), rel=1e-5)
    rows = f(give(p.h, (3, 4, -1)), give(p.w), y, reduction="none")
    assert rows.shape == (3, 4)
    assert not back(rows).ravel()[p.y == p.y[2]].any()


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_a_mean_over_nothing_is_zero_with_zero_gradients(backend):
    p = problem()
    loss, grads = value_and_grads(backend, p._replace(y=np.full_like(p.y, -1)), "mean")
    assert loss == 0
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "none, sum or mean"),
        ({"reduction": "sum", "count": 3}, "count"),
        ({"reduction": "none"}, "weights"),
    ],
)
@pytest.mark.parametrize("backend", FUNCTIONS)
def test_bad_reductions_are_named(backend, options, message):
    p = problem()
    arrays = [to(backend, x, "float32") for x in (p.h, p.w)]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[backend](*arrays, to(backend, p.y), to(backend, p.weights, "float32"), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_operators_pass_pytorchs_own_check(reduction):
    p = problem(bias=True)
    h, w, b = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w, p.bias))
    y, weights = to("torch", p.y), to("torch", p.weights, "float32")
    options = (0.1, 1e-3, None, SIXTEEN_ROWS, "torch")
    if reduction == "mean":
        torch.library.opcheck(torch.ops.fsam.cross_entropy_total.default, (h, w, b, y, weights, True, *options))
    else:
        torch.library.opcheck(torch.ops.fsam.cross_entropy_rows.default, (h, w, b, y, *options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compiles_as_one_node_without_a_graph_break(reduction):
    p, seen = problem(bias=True), []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def loss(h, w, b, y):
        return fsam_kernels.torch.cross_entropy(h, w, y, bias_V=b, reduction=reduction).sum()

    h, w, b = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w, p.bias))
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    got = torch.autograd.grad(compiled(h, w, b, to("torch", p.y)), (h, w, b))
    for x, plain in zip(got, torch.autograd.grad(loss(h, w, b, to("torch", p.y)), (h, w, b)), strict=True):
        torch.testing.assert_close(x, plain)
    assert sum("fsam" in target for target in seen[0]) == 1


def test_torch_compiles_through_autograd_too():
    p = problem()
    h, w = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w))
    loss = lambda h, w: fsam_kernels.torch.cross_entropy(h, w, to("torch", p.y))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for x, plain in zip(*(torch.autograd.grad(f(h, w), (h, w)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(x, plain)


def test_torch_without_grad_forms_no_gradient():
    p = problem()
    h, w = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w))
    with torch.no_grad():
        loss = fsam_kernels.torch.cross_entropy(h, w, to("torch", p.y))
    assert not loss.requires_grad
    assert torch.equal(loss, fsam_kernels.torch.cross_entropy(h, w, to("torch", p.y)).detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_refuses_a_second_derivative(reduction):
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = fsam_kernels.torch.cross_entropy(h, w, torch.arange(4), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, [h, w], create_graph=True)


def test_torch_refuses_a_forward_derivative():
    p = problem(bias=True)
    head = [to("torch", x, "float32") for x in (p.h, p.w, p.bias)]
    loss = lambda h, w, b: FUNCTIONS["torch"](h, w, to("torch", p.y), bias_V=b)
    for place, x in enumerate(head):
        moved = lambda x, place=place: loss(*[x if i == place else y for i, y in enumerate(head)])
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative; use torch\.nn\.functional"):
            torch.func.jvp(moved, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        assert torch.isfinite(loss(*head))


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("backend", FUNCTIONS)
def test_float16_gradients_keep_their_digits_under_a_loss_scale(backend, scale):
    """A mean's 1/N is not rounded into h̄ before the scale is known, and the default scale of 65536 is no infinity."""
    p = problem("float16", n=3000, bias=True)._replace(y=np.arange(3000) % 53)
    give = lambda x: to(backend, x, "float16")
    arrays, y = (give(p.h), give(p.w), give(p.bias)), to(backend, p.y)
    loss = lambda h, w, b: FUNCTIONS[backend](h, w, y, bias_V=b) * scale
    if backend == "torch":
        arrays = [x.requires_grad_() for x in arrays]
        grads = torch.autograd.grad(loss(*arrays), arrays)
    else:
        grads = jax.grad(loss, (0, 1, 2))(*arrays)
    _, _, zbar = spec.linear_cross_entropy(p.h, p.w, p.y, np.full(3000, 1 / 3000), bias_V=p.bias)
    for got, expected, like in zip(grads, spec.logit_vjp(zbar, p.h, p.w, bias_V=p.bias), arrays, strict=True):
        assert got.dtype == like.dtype
        error = np.linalg.norm(back(got).astype(np.float64) / scale - expected) / np.linalg.norm(expected)
        assert error < (6e-4 if scale > 1 else 3e-3)  # without a scale, what is below 2^-24 is lost


def test_torch_backward_repeats_and_is_linear_in_its_cotangent():
    p = problem()
    h, w = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w))
    loss = fsam_kernels.torch.cross_entropy(h, w, to("torch", p.y))
    once, again = (torch.autograd.grad(loss, (h, w), retain_graph=True) for _ in range(2))
    half = torch.autograd.grad(loss, (h, w), torch.tensor(0.5))
    for x, y, z in zip(once, again, half, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(0.5 * x, z)


def test_torch_autocast_returns_gradients_in_input_dtypes():
    p = problem()
    h, w = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fsam_kernels.torch.cross_entropy(h, w, to("torch", p.y))
    hb, wb = (x.detach().bfloat16().requires_grad_() for x in (h, w))
    expected = fsam_kernels.torch.cross_entropy(hb, wb, to("torch", p.y))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for x, y in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (hb, wb)), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=2**-7, atol=1e-6)


def test_xla_under_jit_holds_no_array_of_all_logits():
    p = problem(n=512, d=8, v=1024)
    h, w, y = to("xla", p.h, "float32"), to("xla", p.w, "float32"), to("xla", np.maximum(p.y, 0))
    whole = 512 * 1024 * 4

    def temporaries(chunk_bytes):
        loss = lambda h, w: fsam_kernels.xla.cross_entropy(h, w, y, chunk_bytes=chunk_bytes)
        return jax.jit(jax.grad(loss, (0, 1))).lower(h, w).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(10**9) > whole
    assert temporaries(whole // 8) < whole // 2


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))  # conftest.py asks for 4 devices


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_xla_sharded_over_rows_is_the_same(mesh, form):
    p = problem(n=64)
    h, w, y = to("xla", p.h, "float32"), to("xla", p.w, "float32"), to("xla", np.maximum(p.y, 0))
    loss = lambda h, w, y: fsam_kernels.xla.cross_entropy(h, w, y, reduction="sum", chunk_bytes=V * 8 * 16)
    expected = jax.value_and_grad(loss, (0, 1))(h, w, y)
    rows, every = PartitionSpec("data"), PartitionSpec()
    if form == "jit":
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(
            *(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((h, rows), (w, every), (y, rows)))
        )
    else:

        def local(h, w, y):
            value, (hbar, wbar) = jax.value_and_grad(loss, (0, 1))(h, jax.lax.pcast(w, "data", to="varying"), y)
            return jax.lax.psum(value, "data"), (hbar, jax.lax.psum(wbar, "data"))

        got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, every, rows), out_specs=(every, (rows, every))))(
            h, w, y
        )
    for x, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-6 * float(jnp.abs(e).max()))


def test_three_options_agree_between_frameworks():
    for names in itertools.combinations(["smoothing", "z-loss", "soft-cap", "bias"], 3):
        p = with_options(names)
        for x, y in zip(value_and_grads("xla", p, "mean")[1], value_and_grads("torch", p, "mean")[1], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * np.abs(y).max())
