"""Methods of other papers as values of ours, against their published formulas written out in float64 autograd.

`python tests/core/test_family.py` prints the largest difference of each row, for the table of docs/methods.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from formula import momenta
from problems import B2, EPS, FRAMEWORKS, STEPS, Weights, adamw, as_given, as_torch, batch_of, distance, mlp, moments
from problems import values as initial
from torch.nn import functional as F

from fsam_core import SAM, FunctionalSAM, MicroBatches, Perturbed, Schedule, UserError, ascents
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_core.combining import gsam, looksam, renormalised

pytestmark = pytest.mark.usefixtures("float64")
RHO, RATE, ETA = 0.3, 0.1, 1e3
Tensors = dict[str, torch.Tensor]
BATCHES = [batch_of(8, seed, ignored=0) for seed in range(4)]


# --- the formulas -----------------------------------------------------------------------------------------------------


def tensors(tree: dict) -> Tensors:
    return {k: torch.from_numpy(np.array(x)) for k, x in tree.items()}


THETA = tensors(initial())


def logits(weights: Tensors, batch: dict) -> torch.Tensor:
    head = mlp(weights, tensors(batch))
    return head.hidden @ head.weight.T


def grad_of(loss: Callable[[Tensors], torch.Tensor], at: Tensors) -> Tensors:
    leaves = {k: x.detach().clone().requires_grad_() for k, x in at.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def grad(at: Tensors, batch: dict = BATCHES[0]) -> Tensors:
    """∇L by PyTorch's own loss."""
    return grad_of(lambda p: F.cross_entropy(logits(p, batch), torch.from_numpy(batch["y"])), at)


def dot(x: Tensors, y: Tensors) -> torch.Tensor:
    return sum((x[k] * y[k]).sum() for k in x)


def plus(x: Tensors, y: Tensors, factor: Any = 1.0) -> Tensors:
    return {k: x[k] + factor * y[k] for k in x}


def norm(x: Tensors) -> torch.Tensor:
    return dot(x, x).sqrt()


def ascended(theta: Tensors, d: Tensors) -> Tensors:
    """θ + ρ d / ‖d‖."""
    return plus(theta, d, RHO / norm(d)) if norm(d) else theta


def sam() -> tuple[Tensors, Tensors]:
    """(g, g')."""
    g = grad(THETA)
    return g, grad(ascended(THETA, g))


def of_both(formula: Callable[[Tensors, Tensors], Tensors]) -> Callable[[], Tensors]:
    return lambda: formula(*sam())


def functional_sam() -> Tensors:
    """arXiv 2502.02407 with this project's preconditioner: J(θ+ε)ᵀ z̄(θ), d = g / (sqrt(v̂) + δ)."""
    g, nu = grad(THETA), tensors(moments(initial()))
    v = {k: (B2 * nu[k] + (1 - B2) * x**2) / (1 - B2 ** (STEPS + 1)) for k, x in g.items()}
    there = ascended(THETA, {k: x / (v[k].sqrt() + EPS) for k, x in g.items()})
    z = logits(THETA, BATCHES[0]).detach().requires_grad_()
    (zbar,) = torch.autograd.grad(F.cross_entropy(z, torch.from_numpy(BATCHES[0]["y"])), z)
    return grad_of(lambda p: (logits(p, BATCHES[0]) * zbar).sum(), there)


def msam() -> Tensors:
    """arXiv 2206.06232: the mean of SAM's gradients of m parts of the batch."""
    each = [grad(ascended(THETA, grad(THETA, batch)), batch) for batch in BATCHES]
    return {k: sum(g[k] for g in each) / len(each) for k in THETA}


def asam() -> Tensors:
    """arXiv 2102.11600: ε = ρ T² g / ‖T g‖, T = |w| + η."""
    T = {k: x.abs() + 0.01 for k, x in THETA.items()}
    scaled = {k: T[k] * x for k, x in grad(THETA).items()}
    return grad(plus(THETA, {k: T[k] * x for k, x in scaled.items()}, RHO / norm(scaled)))


def fisher_sam() -> Tensors:
    """arXiv 2206.04920: ε = ρ F⁻¹ g / sqrt(gᵀ F⁻¹ g), F = 1 + η g²."""
    g = grad(THETA)
    d = {k: x / (1 + ETA * x**2) for k, x in g.items()}
    return grad(plus(THETA, d, RHO / dot(g, d).sqrt()))


def gsam_formula(g: Tensors, there: Tensors) -> Tensors:
    """arXiv 2203.08065: g' − α g_⊥, g_⊥ = g − (g·g' / g'·g') g'."""
    return plus(there, plus(g, there, -dot(g, there) / dot(there, there)), -0.4)


def quantisation_aware() -> Tensors:
    """The gradient at Q(θ), straight through."""
    step = {k: x.abs().amax(1, keepdim=True) / 7 for k, x in THETA.items()}
    return grad({k: (x / step[k]).round() * step[k] for k, x in THETA.items()})


def momentum_sam() -> Tensors:
    """arXiv 2401.12033: the gradient at θ − ρ m / ‖m‖."""
    return grad(ascended(THETA, {k: -x for k, x in tensors(momenta(initial())).items()}))


def sam_on() -> Tensors:
    """arXiv 2306.04226: some of the weights are perturbed; here `a`, which stands for the norms."""
    return grad(THETA | ascended({"a": THETA["a"]}, {"a": grad(THETA)["a"]}))


def half_ascent() -> Tensors:
    """arXiv 2110.08529: ε from a part of the batch."""
    return grad(ascended(THETA, grad(THETA, {k: x[::2] for k, x in BATCHES[0].items()})))


MASK = 0.7


def sparse(theta: Any, g: Any, v: Any) -> Any:
    """Weights with a large second moment move: a Fisher mask."""
    return g * (v > MASK * v.mean())


def masked() -> Tensors:
    g, nu = grad(THETA), tensors(moments(initial()))
    v = {k: (B2 * nu[k] + (1 - B2) * x**2) / (1 - B2 ** (STEPS + 1)) for k, x in g.items()}
    return grad(ascended(THETA, {k: sparse(None, x, v[k]) for k, x in g.items()}))


class Row(NamedTuple):
    """A published method: its value here and its formula."""

    method: Perturbed
    formula: Callable[[], Tensors]
    micro: bool = False


PUBLISHED = {
    "SAM": Row(SAM(RHO), lambda: sam()[1]),
    "Functional-SAM": Row(FunctionalSAM(RHO, precondition="adam"), functional_sam),
    "mSAM": Row(SAM(RHO, ascent="micro"), msam, micro=True),
    "ASAM": Row(SAM(RHO, precondition="weights", norm="dual"), asam),
    "Fisher SAM": Row(SAM(RHO, precondition=lambda theta, g, v: g / (1 + ETA * g**2), norm="dual"), fisher_sam),
    "mask from v": Row(SAM(RHO, precondition=sparse), masked),
    "GSAM": Row(SAM(RHO, combine=gsam(0.4)), of_both(gsam_formula)),
    # arXiv 2401.07250: g' with the length of g.
    "StableSAM": Row(
        SAM(RHO, combine=renormalised), of_both(lambda g, m: {k: x * norm(g) / norm(m) for k, x in m.items()})
    ),
    # arXiv 2202.03599: (1 − α) g + α g'.
    "gradient-norm penalty": Row(SAM(RHO, strength=0.8), of_both(lambda g, m: plus(g, plus(m, g, -1), 0.8))),
    # arXiv 2305.15817, coupled: g + γ/(1 − γ) (g' − g).
    "WSAM": Row(SAM(RHO, strength=0.4 / (1 - 0.4)), of_both(lambda g, m: plus(g, plus(m, g, -1), 0.4 / (1 - 0.4)))),
    "QAT": Row(SAM(1.0, ascent="quantised:4", norm="none"), quantisation_aware),
    "MSAM": Row(SAM(RHO, ascent="-momentum"), momentum_sam),
    "SAM-ON": Row(SAM(RHO, scope=lambda name: name == "a"), sam_on),
    "ascent on part": Row(SAM(RHO, ascent="part", ascent_fraction=0.5), half_ascent),
}


# --- several steps ----------------------------------------------------------------------------------------------------


def of_steps(gradient: Callable[[Tensors, dict, dict], Tensors]) -> list[Tensors]:
    """ĝ of each step of gradient descent; `gradient` has a dictionary for what it remembers."""
    theta, found, memory = dict(THETA), [], {"d": {k: torch.zeros_like(x) for k, x in THETA.items()}}
    for i, batch in enumerate(BATCHES):
        memory["step"] = i
        found.append(gradient(theta, batch, memory))
        theta = plus(theta, found[-1], -RATE)
    return found


def vasso(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """arXiv 2309.15639: ε along d ← (1 − θ) d + θ g."""
    memory["d"] = plus({k: 0.6 * x for k, x in memory["d"].items()}, grad(theta, batch), 0.4)
    return grad(ascended(theta, memory["d"]), batch)


def friendly(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """arXiv 2403.12350: ε along g − σ m, m ← λ m + (1 − λ) g."""
    g = grad(theta, batch)
    memory["d"] = plus({k: 0.8 * x for k, x in memory["d"].items()}, g, 0.2)
    return grad(ascended(theta, plus(g, memory["d"], -0.7)), batch)


def previous(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """S2-SAM: ε along the gradient of the step before."""
    memory["d"] = grad(ascended(theta, memory["d"]), batch)
    return memory["d"]


def looks(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """arXiv 2203.02714: each 2nd step SAM, between them g + α (‖g‖ / ‖g_v‖) g_v, g_v = g' − (g·g' / g·g) g."""
    g = grad(theta, batch)
    if memory["step"] % 2:
        return plus(g, memory["d"], 0.6 * norm(g) / norm(memory["d"]))
    there = grad(ascended(theta, g), batch)
    memory["d"] = plus(there, g, -dot(g, there) / dot(g, g))
    return there


def last_norm(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """norm_from="previous": ε = ρ g / ‖the last g‖."""
    g = grad(theta, batch)
    found = grad(plus(theta, g, RHO / memory["norm"]) if "norm" in memory else theta, batch)
    memory["norm"] = norm(g)
    return found


def sampa(theta: Tensors, batch: dict, memory: dict) -> Tensors:
    """arXiv 2410.10683: (1 − λ) ∇f(x + ρ u / ‖u‖) + λ ∇f(y), y = x − η u, and u ← ∇f(y), the next batch's."""
    u = memory.setdefault("u", grad(theta, batch))
    following = BATCHES[min(memory["step"] + 1, len(BATCHES) - 1)]
    memory["u"] = grad(plus(theta, u, -RATE), following)
    return plus({k: 0.5 * x for k, x in grad(ascended(theta, u), batch).items()}, memory["u"], 0.5)


REUSED = Schedule(every=2, between="reuse")
SEQUENCES = {
    "VaSSO": (SAM(RHO, ascent="vasso"), Schedule(), vasso),
    "Friendly-SAM": (SAM(RHO, ascent=ascents.friendly(0.7, 0.8)), Schedule(), friendly),
    "S2-SAM": (SAM(RHO, ascent="previous"), Schedule(), previous),
    "LookSAM": (SAM(RHO, reuse=looksam(0.6)), REUSED, looks),
    "previous norm": (SAM(RHO, norm_from="previous"), Schedule(), last_norm),
}
LIKE = {"SAMPa": (SAM(RHO, ascent="previous", strength=0.5), Schedule(), sampa)}


# --- both frameworks --------------------------------------------------------------------------------------------------


def trained(framework: str, method: Perturbed, schedule: Schedule, cut: int | None = None) -> tuple[list, list]:
    """(ĝ, Info) of each step of gradient descent; at `cut` the run is stopped, and resumed from its state."""
    found: tuple[list, list] = ([], [])
    if framework == "torch":

        def begin(model: Weights) -> in_torch.Step:
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            return in_torch.Step(model, optimizer, method, features=mlp, schedule=schedule)

        step = begin(Weights(initial()))
        for i, batch in enumerate(BATCHES):
            if i == cut:
                state, model = step.state_dict(), step.model
                step = begin(Weights({k: p.detach().numpy() for k, p in model.named_parameters()}))
                step.load_state_dict(state)
            step(as_torch(batch))
            found[0].append({k: p.grad.numpy().copy() for k, p in step.model.named_parameters()})
            found[1].append(step.info)
        return found
    call = in_jax.value_and_grad(mlp, method)
    params = jax.tree.map(jnp.asarray, initial())
    carry = in_jax.carry_of(method, params, schedule)
    for i, batch in enumerate(BATCHES):
        (_, info), grads, carry = call(params, jax.tree.map(jnp.asarray, batch), None, carry, kind=schedule.kind(i))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        found[0].append({k: np.asarray(x) for k, x in grads.items()})
        found[1].append(info)
    return found


def one_step(framework: str, row: Row) -> dict[str, np.ndarray]:
    nu, mu, batches = moments(initial()), momenta(initial()), BATCHES if row.micro else BATCHES[:1]
    if framework == "torch":
        model = Weights(initial())
        optimizer = adamw(model, nu)
        for name, p in model.named_parameters():
            optimizer.state[p]["exp_avg"] = torch.from_numpy(mu[name])
        step = in_torch.Step(model, optimizer, row.method, features=mlp)
        step.gradient(MicroBatches(map(as_torch, batches)))
        return {k: p.grad.numpy() for k, p in model.named_parameters()}
    params, batch, state = jax.tree.map(
        jnp.asarray, (initial(), as_given(batches), optax.ScaleByAdamState(jnp.int32(STEPS), mu, nu))
    )
    return in_jax.value_and_grad(mlp, row.method, b2=B2, eps=EPS)(params, batch, state)[1]


def difference(found: dict, expected: Tensors) -> float:
    return distance({k: np.asarray(x) for k, x in found.items()}, {k: x.numpy() for k, x in expected.items()})


def differences(framework: str, name: str) -> list[float]:
    """‖ĝ − formula‖ / ‖formula‖ of each step."""
    if name in PUBLISHED:
        return [difference(one_step(framework, PUBLISHED[name]), PUBLISHED[name].formula())]
    method, schedule, formula = (SEQUENCES | LIKE)[name]
    return list(map(difference, trained(framework, method, schedule)[0], of_steps(formula)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", [*PUBLISHED, *SEQUENCES])
def test_a_published_method_is_a_value_of_ours(name, framework):
    assert max(differences(framework, name)) < 1e-12


def test_sampa_is_not_ours():
    """It takes the plain gradient at its look-ahead point, on the next batch."""
    assert min(differences("torch", "SAMPa")) > 1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_length_of_epsilon_from_the_last_norm_is_reported(framework):
    """‖ε‖ = ρ (1 + error), the error by the ratio of two steps' norms; the first step is not perturbed."""
    grads, infos = trained(framework, SAM(RHO, norm_from="previous"), Schedule())
    error = [float(info.perturbation_error) for info in infos]
    assert [float(info.perturbation_norm) for info in infos] == pytest.approx([RHO * (1 + e) for e in error])
    norms = [float(info.base_norm) for info in infos]
    assert error == pytest.approx([-1, *(b / a - 1 for a, b in itertools.pairwise(norms))])
    assert grads[0].keys() == THETA.keys()


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_resumed_run_takes_the_same_steps(name):
    """Bit for bit; in JAX the state is an argument."""
    method, schedule, _ = SEQUENCES[name]
    straight, resumed = (trained("torch", method, schedule, cut)[0] for cut in (None, 3))
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(straight, resumed, strict=True) for k in a)


def test_a_memory_may_be_the_gradient_itself():
    """PyTorch adds the correction to the gradient's own arrays, which are not the memory's."""

    def formula(theta: Tensors, batch: dict, memory: dict) -> Tensors:
        g, part, there = grad(theta, batch), {k: x[::2] for k, x in batch.items()}, ascended(theta, memory["d"])
        memory["d"] = g
        return plus(g, plus(grad(there, part), grad(theta, part), -1))

    last = ascents.Ascent("last", lambda seen: seen.previous, remembers=lambda seen: seen.gradient)
    found, _ = trained("torch", SAM(RHO, fraction=0.5, ascent=last), Schedule())
    assert max(map(difference, found, of_steps(formula))) < 1e-12


def test_what_does_not_go_together_is_refused():
    for options in ({"fraction": 0.5}, {"strength": 0.5}, {"ascent": "momentum"}):
        with pytest.raises(UserError, match="combine: it needs g and g' of the whole batch"):
            FunctionalSAM(RHO, combine=renormalised, **options)
    for options in ({"norm": "none"}, {"norm": "per-tensor"}, {"ascent": "micro"}):
        with pytest.raises(UserError, match="norm_from: 'previous' needs one ascent with norm='l2' or 'dual'"):
            SAM(RHO, norm_from="previous", **options)
    with pytest.raises(UserError, match="norm_from: 'previous' does not perturb the first step"):
        SAM(RHO, norm_from="previous", reuse=looksam(0.6))
    with pytest.raises(UserError, match="norm_from: 'next' is not known; use one of current, previous"):
        SAM(RHO, norm_from="next")
    each = ascents.Ascent("each", lambda seen: seen.memory, "micro", remembers=lambda seen: seen.gradient)
    with pytest.raises(UserError, match="ascent: 'each' has one memory"):
        SAM(RHO, ascent=each)
    with pytest.raises(UserError, match="norm_from: 'previous' keeps one norm, and each shard has its own"):
        in_jax.value_and_grad(mlp, SAM(RHO, norm_from="previous"), sync="local")
    with pytest.raises(UserError, match="carry is missing: norm_from='previous'"):
        in_jax.value_and_grad(mlp, SAM(RHO, norm_from="previous"))(*jax.tree.map(jnp.asarray, (initial(), BATCHES[0])))
    for value, says in (
        (lambda: SAM(RHO, precondition="asam"), "precondition: 'asam' is not known; use one of None, adam, weights"),
        (lambda: SAM(RHO, precondition="weights", eta=-1), "eta must be a finite number >= 0, got -1"),
        (lambda: ascents.quantised(1), "bits must be a whole number >= 2, got 1"),
        (lambda: ascents.vasso(0), r"theta must be in \(0, 1\], got 0"),
        (lambda: ascents.friendly(decay=1), r"decay must be in \[0, 1\), got 1"),
        (lambda: ascents.friendly(sigma=float("nan")), "sigma must be a finite number, got nan"),
    ):
        with pytest.raises(UserError, match=says):
            value()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for name in (*PUBLISHED, *SEQUENCES, *LIKE):
        print(f"{name}: {max(max(differences(framework, name)) for framework in FRAMEWORKS):.0e}")
