"""A model in two stages: passes share the prefix that no perturbation moves. Its gradients: `test_options`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import B2, FRAMEWORKS, Weights, adamw, as_torch, batch_of, distance, head
from stacks import BLOCKS, LAYERS, D, I, V, got, model, prefix, staged, through, weights

from fsam_core import SAM, FunctionalSAM, Plain, UserError
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch

pytestmark = pytest.mark.usefixtures("float64")
ONE = [batch_of(12, 1)]
TWO = [batch_of(8, 1), batch_of(8, 4, ignored=0.5)]
TOP = "top:2"


def stages_run(method: Any, batches: list[dict], **options: Any) -> list[str]:
    """The stages that a step runs in PyTorch, forwards and backwards, in order."""
    found: list[str] = []

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        found.append(name)
        if x.requires_grad:
            x.register_hook(lambda _: found.append(f"{name} back"))
        return x

    features = in_torch.Staged(
        lambda p, b: note("prefix", prefix(p, b, 1)),
        lambda p, x, b: head(note("suffix", through(p, x, range(1, LAYERS)) * p["final_norm"]), p["head"], b),
    )
    net = Weights(weights())
    step = in_torch.Step(net, adamw(net), method, features=features, blocks=BLOCKS, **options)
    step.gradient(as_torch(ONE[0]))  # the first step also checks whether the prefix may be shared
    found.clear()
    step.gradient(as_torch(batches))
    return found


def test_exact_method_runs_a_shared_prefix_once_each_way():
    both = ["suffix", "suffix back"]
    assert stages_run(FunctionalSAM(0.1, scope=TOP), ONE) == ["prefix", *both, *both, "prefix back"]
    assert stages_run(SAM(0.1, scope=TOP), ONE) == ["prefix", *both, *both, "prefix back"]
    known = stages_run(FunctionalSAM(0.1, scope=TOP, ascent="momentum"), ONE)
    assert known == ["prefix", "suffix", *both, "prefix back"]


def test_part_of_the_batch_has_one_backward_of_its_prefix():
    found = stages_run(FunctionalSAM(0.1, scope=TOP, fraction=0.5), TWO)
    one = ["prefix", "suffix", "suffix back"]
    assert found == [*one, *one, "prefix back", "suffix", "suffix back", "prefix back"]


def test_full_scope_or_many_micro_batches_share_nothing():
    assert stages_run(FunctionalSAM(0.1), ONE).count("prefix") == 2
    assert stages_run(FunctionalSAM(0.1, scope=TOP), TWO).count("prefix") == 4


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_prefix_with_a_weight_that_moves_is_refused(framework):
    with pytest.raises(UserError, match=r"prefix of Staged depends on block_1_a, block_1_norm, which scope='top:2'"):
        got(framework, FunctionalSAM(0.1, scope=TOP), ONE, features=staged(framework, 2))
    # A scope that is spread over the model is no mistake: the prefix is run twice.
    apart, whole = (
        got(framework, FunctionalSAM(0.1, scope="norms"), ONE, features=x)[1] for x in (staged(framework, 2), model)
    )
    assert distance(apart, whole) < 1e-12


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_reused_correction_reaches_the_prefix(framework):
    """Below the scope too there is a correction: the cotangent from the moved blocks differs."""
    method = FunctionalSAM(0.4, scope=TOP, fraction=0.5)
    found = [correction(framework, method, features) for features in (model, staged(framework, 1))]
    assert distance(*found) < 1e-12
    assert all(np.abs(x).max() > 0 for x in found[1].values())


def correction(framework: str, method: Any, features: Any) -> dict[str, np.ndarray]:
    """The correction that a step leaves for the next."""
    values, batch = weights(), ONE[0]
    if framework == "torch":
        net = Weights(values)
        schedule = in_torch.Schedule(every=2, between="reuse")
        step = in_torch.Step(net, adamw(net), method, features=features, schedule=schedule, blocks=BLOCKS)
        step.gradient(as_torch(batch))
        kept = step.state_dict()["correction"].values()
        return {name: x.numpy() for (name, _), x in zip(net.named_parameters(), kept, strict=True)}
    grad = in_jax.value_and_grad(features, method, blocks=BLOCKS)
    params = jax.tree.map(jnp.asarray, values)
    carry = in_jax.carry_of(method, params, in_jax.Schedule(every=2, between="reuse"))
    return jax.tree.map(np.asarray, grad(params, jax.tree.map(jnp.asarray, batch), None, carry)[2].correction)


def test_xla_runs_what_no_perturbation_reaches_once():
    """FLOPs of the compiled step: the blocks below the scope run once, forwards and backwards."""
    large = {k: np.ones([64 if n == D else n for n in x.shape]) * 0.01 for k, x in weights().items()}
    large |= {k: np.random.default_rng(1).normal(size=large[k].shape) for k in ("embedding", "head")}
    batch = {"x": np.ones((64, I)), "y": np.arange(64) % V}
    state = optax.ScaleByAdamState(jnp.int32(1), *[jax.tree.map(np.zeros_like, large)] * 2)

    def flops(method: Any) -> float:
        grad = in_jax.value_and_grad(model, method, b2=B2, blocks=BLOCKS)
        compiled = jax.jit(lambda p, b, s: grad(p, b, s)[1]).lower(large, batch, state).compile()
        return compiled.cost_analysis()["flops"]

    plain, whole = flops(Plain()), flops(FunctionalSAM(0.1))
    top = flops(FunctionalSAM(0.1, scope="top:1"))
    product = 2 * 64**3  # a block has one forwards and two backwards
    assert whole - plain == pytest.approx(plain, rel=0.1)
    # Two blocks, and at θ the backward pass from the third to its input.
    assert whole - top == pytest.approx((2 * 3 + 1) * product, rel=0.1)


class TwoStages(torch.nn.ModuleDict):
    def __init__(self, frozen: bool) -> None:
        super().__init__({"low": torch.nn.Linear(4, 4), "top": torch.nn.Linear(4, V)})
        self.low.requires_grad_(not frozen)


def gradients_of(prefix, suffix, scope, *, frozen=False, shared=True):
    """The gradients of two steps, the second with the lower stage trained, with a shared prefix or without."""
    torch.manual_seed(0)
    net = TwoStages(frozen)
    x, y = torch.randn(6, 4), torch.arange(6) % V
    of = lambda net, h, batch: in_torch.LinearHead(suffix(h), net.top.weight, y, bias=net.top.bias)
    features = in_torch.Staged(prefix, of) if shared else lambda net, batch: of(net, prefix(net, batch), batch)
    step = in_torch.Step(
        net, torch.optim.SGD(net.parameters(), lr=0.0), FunctionalSAM(0.5, scope=scope), features=features
    )
    step(x)
    net.low.requires_grad_(True)
    step(x)
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("case", ["one tensor twice", "no longer frozen"])
def test_shared_prefix_has_the_gradients_of_a_whole_model(case):
    if case == "one tensor twice":
        scope, frozen = lambda name: name.startswith("top"), False
        prefix, suffix = lambda m, b: [torch.tanh(m.low(b))] * 2, lambda h: h[0] + h[1] ** 2
    else:
        scope, frozen = lambda name: name.endswith("weight"), True
        prefix, suffix = lambda m, b: torch.tanh(m.low(b)), lambda h: h
    shared, whole = (gradients_of(prefix, suffix, scope, frozen=frozen, shared=x) for x in (True, False))
    assert shared.keys() == whole.keys()
    for name, g in shared.items():
        torch.testing.assert_close(g, whole[name])


def test_suffix_that_writes_to_the_prefix_output_is_refused():
    top = lambda name: name.startswith("top")
    with pytest.raises(UserError, match=r"suffix: it writes to a tensor of the prefix's output .* clone it first"):
        gradients_of(lambda m, b: m.low(b), lambda h: h.add_(1.0), top, frozen=True)
