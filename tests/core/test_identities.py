"""The identities of the method, in float64, in both frameworks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import B2, EPS, FRAMEWORKS, STEPS, batch_of, distance, flat, gradient, linear, mlp, moments, values

from fsam_core import SAM, FunctionalSAM, LogitSAM, Plain
from fsam_kernels import spec

KINDS = (SAM, FunctionalSAM, LogitSAM)
DIRECTIONS = [
    {},
    {"precondition": "adam"},
    {"precondition": "adam", "norm": "dual", "second_moment": "previous"},
]

pytestmark = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def grads(framework, method, features=mlp, weights=None, batch=None):
    return gradient(framework, features, method, weights or values(), batch or batch_of())[2]


def unit_perturbation(framework, **direction) -> dict[str, np.ndarray]:
    """ε / ρ from the oracle."""
    weights, current = values(), direction.get("second_moment", "current") == "current"
    g, v = grads(framework, Plain()), moments(weights)
    adam = {
        "b2": B2,
        "eps": EPS,
        "current": current,
        "correction": spec.bias_correction(STEPS + 1, B2, current=current),
    }
    adam = adam if direction else {}
    lists = [list(g.values()), [v[k] for k in g] if direction else None]
    size = spec.scale(1.0, *spec.preconditioned_norm(*lists, **adam), direction.get("norm", "l2"))
    zero = [np.zeros_like(x) for x in lists[0]]
    return dict(zip(g, spec.perturb(zero, *lists, size, **adam), strict=True))


def oracle(p, batch):
    """(logits, loss) in JAX float64, whatever framework is tested."""
    z_of = lambda p: jnp.tanh(batch["x"] @ p["a"]) @ p["w"].T
    y = jnp.asarray(batch["y"])

    def loss(z):
        nll = -jax.nn.log_softmax(z)[jnp.arange(len(y)), y]
        return jnp.sum(jnp.where(y >= 0, nll, 0)) / jnp.sum(y >= 0)

    return z_of, loss


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rho_zero_gives_the_plain_gradient(framework, kind, direction):
    assert distance(grads(framework, kind(0.0, **direction)), grads(framework, Plain())) < 1e-14


@pytest.mark.parametrize("rho", [0.1, 10.0])
@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_linear_model_has_the_plain_gradient_for_every_rho(framework, direction, rho):
    weights, batch = {"w": values()["w"]}, batch_of(i=5)
    plain = grads(framework, Plain(), linear, weights, batch)
    assert distance(grads(framework, FunctionalSAM(rho, **direction), linear, weights, batch), plain) < 1e-13
    assert distance(grads(framework, SAM(rho, **direction), linear, weights, batch), plain) > 1e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_method_is_its_definition_at_the_moved_weights(framework, direction):
    weights, batch, rho = values(), batch_of(), 0.7
    unit = unit_perturbation(framework, **direction)
    moved = {k: weights[k] + rho * unit[k] for k in weights}
    z_of, loss = oracle(weights, batch)
    against = lambda at, zbar: jax.grad(lambda p: jnp.sum(z_of(p) * jax.lax.stop_gradient(zbar)))(at)
    zbar, moved_zbar = jax.grad(loss)(z_of(weights)), jax.grad(loss)(z_of(moved))
    expected = {FunctionalSAM: against(moved, zbar), LogitSAM: against(weights, moved_zbar)}
    expected[SAM] = against(moved, moved_zbar)
    for kind, want in expected.items():
        assert distance(grads(framework, kind(rho, **direction)), want) < 1e-12


def test_functional_plus_logit_is_sam_plus_plain_to_first_order(framework):
    def residual(rho):
        sam, functional, logit = (flat(grads(framework, kind(rho))) for kind in KINDS)
        return np.linalg.norm(functional + logit - sam - flat(grads(framework, Plain())))

    large, small = residual(2e-2), residual(1e-2)
    assert small > 1e-8
    assert large / small == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_difference_quotients_are_the_two_halves_of_the_hessian(framework, direction):
    weights, batch = values(), batch_of()
    unit = unit_perturbation(framework, **direction)
    z_of, loss = oracle(weights, batch)
    p, e = jax.tree.map(jnp.asarray, (weights, unit))
    hessian = jax.jvp(jax.grad(lambda p: loss(z_of(p))), (p,), (e,))[1]
    z, dz = jax.jvp(z_of, (p,), (e,))
    gauss_newton = jax.vjp(z_of, p)[1](jax.jvp(jax.grad(loss), (z,), (dz,))[1])[0]
    rest = jax.tree.map(jnp.subtract, hessian, gauss_newton)
    plain = grads(framework, Plain())
    for kind, want in ((FunctionalSAM, rest), (LogitSAM, gauss_newton), (SAM, hessian)):
        errors = []
        for rho in (2e-4, 1e-4):
            moved = grads(framework, kind(rho, **direction))
            errors.append(distance({k: (moved[k] - plain[k]) / rho for k in plain}, want))
        assert errors[1] < 0.02
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reported_perturbation_norm_is_that_of_the_perturbation(framework, direction):
    info = gradient(framework, mlp, FunctionalSAM(0.3, **direction), values(), batch_of())[1]
    assert float(info.perturbation_norm) == pytest.approx(
        0.3 * np.linalg.norm(flat(unit_perturbation(framework, **direction)))
    )
    if direction.get("norm") != "dual":
        assert float(info.perturbation_norm) == pytest.approx(0.3)
