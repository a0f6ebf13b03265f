"""Products with H, G and N in both frameworks, compared with dense matrices in float64."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from losses import LOSSES
from problems import FRAMEWORKS, Weights, as_given, as_torch, batch_of, linear, mlp, mlp_logits, values

from fsam_core import UserError
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_core.curvature import shares
from fsam_core.jax import curvature as jax_curvature
from fsam_core.torch import curvature as torch_curvature
from fsam_kernels.memory import Memory
from fsam_kernels.options import Loss


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def with_loss(loss: Loss) -> Any:
    return lambda p, batch: dataclasses.replace(mlp(p, batch), loss=loss)


def biased(p, batch):
    """A bias, a weight stored as [D, V] that is no parameter itself, and an ignored label."""
    head = mlp(p, batch)
    tanh = torch.tanh if isinstance(head.hidden, torch.Tensor) else jnp.tanh
    return dataclasses.replace(head, weight=tanh(p["w"]).T, layout="DV", bias=tanh(p["w"][:, 0]), ignore_index=3)


def two_outputs(p, batch):
    """Two arrays, one of them of integers, and a loss that is not convex in them."""
    head = mlp(p, batch)
    kind = in_torch.Outputs if isinstance(head.hidden, torch.Tensor) else in_jax.Outputs
    z = head.hidden @ p["w"].T
    return kind({"z": z, "h": head.hidden, "y": batch["y"]}, lambda o: (o["z"].sum(-1) ** 3 * o["h"][:, 0]).mean(), 2.0)


def several(p, batch):
    kind = in_torch if isinstance(p["w"], torch.Tensor) else in_jax
    return kind.Heads([mlp(p, batch), two_outputs(p, batch), biased(p, batch)], weights=[0.5, 0.1, 2.0])


# Every option alone is in another case as well, beside others.
ALONE = ("smoothed", "z-loss", "capped", "logits", "outputs")
CASES = {name: with_loss(loss) for name, loss in LOSSES.items()} | {
    "plain": mlp,
    "biased": biased,
    "logits": mlp_logits,
    "outputs": two_outputs,
    "heads": several,
}


def token_weights(batch: dict, seed: int = 2) -> dict:
    return {**batch, "weights": np.random.default_rng(seed).uniform(0.5, 2, len(batch["y"]))}


def curvature_of(framework: str, features: Any, weights: dict, batch: Any, **options: Any) -> Any:
    if framework == "torch":
        return torch_curvature.Curvature(Weights(weights), features, as_torch(batch), **options)
    weights, batch = jax.tree.map(jnp.asarray, (weights, as_given(batch)))
    return jax_curvature.Curvature(features, weights, batch, **options)


def times(curvature: Any, product: str, V: np.ndarray | None = None) -> np.ndarray:
    """The product with each column of V, by default of the identity."""
    of = lambda e: curvature.vector(getattr(curvature, product)(curvature.tree(e)))
    return np.stack([of(e) for e in (np.eye(curvature.size) if V is None else V).T], axis=1)


# --- the oracle -------------------------------------------------------------------------------------------------------


def parts_of(head: Any) -> list[tuple[float, Any]]:
    if not isinstance(head, in_jax.Heads):
        return [(1.0, head)]
    return list(zip(head.weights, head.heads, strict=True))


def split_at_outputs(head: Any) -> tuple[Any, Any]:
    """(the logits, or the float outputs, of every part; their loss), written with all logits."""
    outputs, losses = [], []
    for factor, part in parts_of(head):
        if isinstance(part, in_jax.LinearHead):
            w = part.weight if part.layout == "VD" else part.weight.T
            u = part.hidden @ w.T + (0 if part.bias is None else part.bias)
            o, y = part.loss, part.labels
            outputs.append(u if o.soft_cap is None else o.soft_cap * jnp.tanh(u / o.soft_cap))
            seen = (y >= 0) & (y != (-1 if part.ignore_index is None else part.ignore_index))
            weights = seen * (1.0 if part.token_weights is None else part.token_weights)

            def loss(z, o=o, y=y, weights=weights):
                logp, s = jax.nn.log_softmax(z), o.label_smoothing
                each = -(1 - s) * logp[jnp.arange(len(y)), jnp.maximum(y, 0)] - s * logp.mean(1)
                return jnp.sum((each + o.z_loss * jax.nn.logsumexp(z, 1) ** 2) * weights) / weights.sum()
        else:
            given = part.logits if isinstance(part, in_jax.Logits) else part.outputs
            outputs.append(given)
            loss = part.loss
        losses.append((factor, loss))
    return outputs, lambda every: sum(f * loss(x) for (f, loss), x in zip(losses, every, strict=True))


def oracle(features: Any, weights: dict, batch: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gradient, H, G) of one batch, dense."""
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, weights))
    batch = jax.tree.map(jnp.asarray, batch)

    def floats(x):
        outputs, loss = split_at_outputs(features(unravel(x), batch))
        leaves, tree = jax.tree.flatten(outputs)
        is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        z, undo = jax.flatten_util.ravel_pytree([leaf for leaf, f in zip(leaves, is_float, strict=True) if f])

        def of(z):
            given = iter(undo(z))
            return loss(
                jax.tree.unflatten(tree, [next(given) if f else x for x, f in zip(leaves, is_float, strict=True)])
            )

        return z, of

    whole = lambda x: (lambda z, of: of(z))(*floats(x))

    @jax.jit
    def found(x):
        J, Hz = jax.jacobian(lambda x: floats(x)[0])(x), jax.hessian(floats(x)[1])(floats(x)[0])
        return jax.grad(whole)(x), jax.hessian(whole)(x), J.T @ Hz @ J

    return tuple(map(np.asarray, found(flat)))  # type: ignore[return-value]


@cache
def dense(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return oracle(CASES[case], values(), token_weights(batch_of()))


def off(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] if x in ALONE else []) for x in CASES])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_products_are_those_of_dense_matrices(framework, case):
    g, H, G = dense(case)
    found = curvature_of(framework, CASES[case], values(), token_weights(batch_of()))
    assert off(found.vector(found.gradient), g) < 1e-12
    V = np.random.default_rng(3).normal(size=(len(H), 3))
    for product, want in (("hessian", H), ("gauss_newton", G), ("functional", H - G)):
        assert off(times(found, product, V), want @ V) < 1e-12
    v = found.tree(np.random.default_rng(0).normal(size=found.size))
    g_v, n_v = map(found.vector, found.both(v))
    assert off(g_v + n_v, found.vector(found.hessian(v))) < 1e-13
    assert off(g_v, found.vector(found.gauss_newton(v))) < 1e-13


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gauss_newton_is_positive_semidefinite(framework):
    found = curvature_of(framework, mlp, values(), batch_of())
    G, H = times(found, "gauss_newton"), times(found, "hessian")
    assert np.abs(H - H.T).max() < 1e-15
    assert np.linalg.eigvalsh(G)[0] > -1e-14
    assert np.linalg.eigvalsh(H)[0] < -1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_last_layer_alone_has_no_functional_part(framework):
    found = curvature_of(framework, linear, {"w": values()["w"]}, batch_of(i=5))
    assert np.abs(times(found, "functional")).max() < 1e-15
    assert np.abs(times(found, "hessian")).max() > 1e-3


@pytest.mark.parametrize("sizes", [(4, 8), (6, 6)])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_micro_batches_are_one_batch(framework, sizes):
    first, second = (token_weights(batch_of(n, seed=i), seed=i) for i, n in enumerate(sizes))
    joined = {k: np.concatenate([first[k], second[k]]) for k in first}
    features = with_loss(LOSSES["all"])
    whole, parts = (curvature_of(framework, features, values(), b) for b in (joined, [first, second]))
    v = whole.tree(np.random.default_rng(0).normal(size=whole.size))
    for x, y in zip((parts.gradient, *parts.both(v)), (whole.gradient, *whole.both(v)), strict=True):
        assert off(whole.vector(x), whole.vector(y)) < 1e-13
    assert parts.loss == pytest.approx(whole.loss, rel=1e-13)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_chunks_change_nothing(framework):
    one, many = (
        curvature_of(framework, CASES["all"], values(), batch_of(), memory=Memory(chunk_bytes=b)) for b in (None, 500)
    )
    v = one.tree(np.random.default_rng(0).normal(size=one.size))
    for x, y in zip(many.both(v), one.both(v), strict=True):
        assert off(one.vector(x), one.vector(y)) < 1e-13


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_head_without_its_cross_term_is_noticed(framework, monkeypatch):
    module = torch_curvature if framework == "torch" else jax_curvature
    right = module.head_curvature
    monkeypatch.setattr(module, "head_curvature", lambda h, w, y, n, hd, wd, **o: right(h, w, y, n, hd, 0 * wd, **o))
    _, H, G = dense("plain")
    found = curvature_of(framework, mlp, values(), token_weights(batch_of()))
    assert off(times(found, "functional"), H - G) > 1e-2


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["all", "heads"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_differences_converge_quadratically_to_the_products(framework, case):
    _, H, G = dense(case)
    v = np.random.default_rng(4).normal(size=len(H))
    want = {"hessian": H @ v, "gauss_newton": G @ v, "functional": (H - G) @ v}
    errors = {name: [] for name in want}
    for radius in (2e-3, 1e-3):
        found = curvature_of(
            framework, CASES[case], values(), token_weights(batch_of()), products="difference", radius=radius
        )
        for name, product in want.items():
            errors[name].append(off(found.vector(getattr(found, name)(found.tree(v))), product))
    for large, small in errors.values():
        assert small < 1e-4
        assert large / small == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_secants_are_the_methods_own_differences(framework):
    _, H, G = dense("plain")
    found = curvature_of(framework, mlp, values(), token_weights(batch_of()))
    d = np.random.default_rng(4).normal(size=found.size)
    of_H, of_G, of_N = (found.vector(x) for x in found.secants(found.tree(d), 1e-5))
    assert off(of_H, H @ d) < 1e-4
    assert off(of_G, G @ d) < 1e-4
    assert off(of_N, (H - G) @ d) < 1e-4
    far = [found.vector(x) for x in found.secants(found.tree(d), 0.5)]
    assert off(far[1] + far[2], far[0]) > 1e-2


def test_differences_in_float32_are_within_half_a_percent():
    weights, batch = (
        {k: x.astype("float32") if x.dtype.kind == "f" else x for k, x in t.items()} for t in (values(), batch_of())
    )
    exact = curvature_of("torch", mlp, values(), batch_of())
    v = np.random.default_rng(4).normal(size=exact.size)
    want = [exact.vector(x) for x in exact.both(exact.tree(v))]
    for framework in FRAMEWORKS:
        found = curvature_of(framework, mlp, weights, batch, products="difference")
        assert found.vector(found.gradient).dtype == np.float32
        for got, exactly in zip(found.both(found.tree(v)), want, strict=True):
            assert off(found.vector(got), exactly) < 5e-3


# --- shares -----------------------------------------------------------------------------------------------------------


def test_shares_are_the_ratios_of_their_definition():
    _, H, G = dense("plain")
    d = np.random.default_rng(4).normal(size=len(H))
    Gd, Nd, unit = G @ d, (H - G) @ d, d / np.linalg.norm(d)
    found = shares(d, Gd, Nd)
    assert found.gauss_newton + found.functional + found.cross == pytest.approx(1, rel=1e-12)
    assert found.gauss_newton == pytest.approx(np.sum(Gd**2) / np.sum((H @ d) ** 2))
    assert found.cosine == pytest.approx(Gd @ Nd / np.linalg.norm(Gd) / np.linalg.norm(Nd))
    assert found.d_G_d + found.d_N_d == pytest.approx(unit @ H @ unit)
    assert found.norm == pytest.approx(np.linalg.norm(H @ unit))


def test_shares_refuse_zeros_and_infinities():
    with pytest.raises(UserError, match="direction: it is 0"):
        shares(np.zeros(3), np.ones(3), np.ones(3))
    with pytest.raises(UserError, match="not finite"):
        shares(np.ones(3), np.full(3, np.nan), np.ones(3))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bad_input_is_one_sentence(framework):
    make = lambda *x, **options: curvature_of(framework, *x, **options)
    with pytest.raises(UserError, match="no token has a label"):
        make(mlp, values(), {**batch_of(), "y": np.full(12, -1)})
    with pytest.raises(UserError, match="label"):
        make(mlp, values(), {**batch_of(), "y": np.full(12, 9)})
    with pytest.raises(UserError, match="not finite"):
        make(mlp, {**values(), "a": np.full((6, 5), np.nan)}, batch_of())
    with pytest.raises(UserError, match="products must be"):
        make(mlp, values(), batch_of(), products="finite")
    with pytest.raises(UserError, match="radius must be"):
        make(mlp, values(), batch_of(), radius=0.0)


def test_a_quantised_weight_is_named():
    with pytest.raises(UserError, match="params: a is int8, a quantised weight"):
        curvature_of("jax", mlp, {**values(), "a": np.ones((6, 5), np.int8)}, batch_of())
    model = Weights(values())
    model.a = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"params: a is torch\.int8, a quantised weight"):
        torch_curvature.Curvature(model, mlp, as_torch(batch_of()))
