"""Methods of other papers as values of ours, against their published formulas written out in float64 autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import FRAMEWORKS, batch_of, distance, gradient, mlp, values
from torch.nn import functional as F

from fsam_core import SAM, FunctionalSAM, UserError, ascents
from fsam_core.combining import gsam, renormalised

pytestmark = [pytest.mark.parametrize("framework", FRAMEWORKS), pytest.mark.usefixtures("float64")]
RHO = 0.3


def theta() -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.array(x)) for k, x in values().items()}


def grad_at(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """∇L by PyTorch's own loss."""
    batch = {k: torch.from_numpy(np.array(x)) for k, x in batch_of().items()}
    leaves = {k: x.clone().requires_grad_() for k, x in weights.items()}
    head = mlp(leaves, batch)
    loss = F.cross_entropy(head.hidden @ head.weight.T, batch["y"], ignore_index=-1)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def moved(epsilon: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: x + epsilon[k] for k, x in theta().items()}


def dot(x, y) -> torch.Tensor:
    return sum((x[k] * y[k]).sum() for k in x)


def error(framework, method, expected) -> float:
    found = gradient(framework, mlp, method, values(), batch_of())[2]
    return distance(found, {k: x.numpy() for k, x in expected.items()})


def sam() -> tuple[dict, dict]:
    """(g, g')."""
    g = grad_at(theta())
    return g, grad_at(moved({k: RHO * x / dot(g, g).sqrt() for k, x in g.items()}))


def test_asam(framework):
    """arXiv 2102.11600: ε = ρ T² g / ‖T g‖, T = |w| + η."""
    g, T = grad_at(theta()), {k: x.abs() + 0.01 for k, x in theta().items()}
    scaled = {k: T[k] * x for k, x in g.items()}
    epsilon = {k: RHO * T[k] * x / dot(scaled, scaled).sqrt() for k, x in scaled.items()}
    method = SAM(RHO, precondition="weights", norm="dual")
    assert error(framework, method, grad_at(moved(epsilon))) < 1e-12


def test_gsam(framework):
    """arXiv 2203.08065: g' − α g_⊥, g_⊥ = g − (g·g' / g'·g') g'."""
    g, there = sam()
    across = {k: x - dot(g, there) / dot(there, there) * there[k] for k, x in g.items()}
    expected = {k: x - 0.4 * across[k] for k, x in there.items()}
    assert error(framework, SAM(RHO, combine=gsam(0.4)), expected) < 1e-12


def test_stable_sam(framework):
    """arXiv 2401.07250: g' with the length of g."""
    g, there = sam()
    expected = {k: x * (dot(g, g) / dot(there, there)).sqrt() for k, x in there.items()}
    assert error(framework, SAM(RHO, combine=renormalised), expected) < 1e-12


def test_penalty_of_the_gradient_norm_and_wsam_are_a_strength(framework):
    """arXiv 2202.03599: (1 − α) g + α g'. arXiv 2305.15817, coupled: g + γ/(1 − γ) (g' − g)."""
    g, there = sam()
    for strength in (0.8, 0.5 / (1 - 0.5)):
        expected = {k: (1 - strength) * x + strength * there[k] for k, x in g.items()}
        assert error(framework, SAM(RHO, strength=strength), expected) < 1e-12


def test_quantisation_aware_training_is_a_known_ascent(framework):
    """The gradient at Q(θ), straight through, in one pass."""

    def rounded(w: torch.Tensor) -> torch.Tensor:
        if w.ndim < 2:
            return w
        step = w.abs().amax(1, keepdim=True) / 7
        return (w / step).round() * step

    method = SAM(1.0, ascent=ascents.quantised(4), norm="none")
    expected = grad_at({k: rounded(x) for k, x in theta().items()})
    assert error(framework, method, expected) < 1e-12
    with pytest.raises(UserError, match="bits must be a whole number >= 2, got 1"):
        ascents.quantised(1)


def test_a_preconditioner_of_ones_own(framework):
    """A sparse perturbation: only weights whose gradient is large move."""
    mask = lambda theta, g: g * (abs(g) > 1e-3)
    g = {k: mask(None, x) for k, x in grad_at(theta()).items()}
    expected = grad_at(moved({k: RHO * x / dot(g, g).sqrt() for k, x in g.items()}))
    assert error(framework, SAM(RHO, precondition=mask), expected) < 1e-12


def test_combinations_that_lack_a_gradient_are_refused(framework):
    for options in ({"fraction": 0.5}, {"strength": 0.5}, {"ascent": "momentum"}):
        with pytest.raises(UserError, match="combine: it needs g and g' of the whole batch"):
            FunctionalSAM(RHO, combine=renormalised, **options)
    with pytest.raises(UserError, match="precondition: 'asam' is not known; use one of None, adam, weights"):
        SAM(RHO, precondition="asam")
    with pytest.raises(UserError, match="eta must be a finite number >= 0, got -1"):
        SAM(RHO, precondition="weights", eta=-1)
