"""Every option of the step, alone and in pairs, against its formula in float64; and what each must not do."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import B2, EPS, FRAMEWORKS, STEPS, Weights, adamw, as_torch, batch_of, distance, head, moments
from savings import gradient_of, momenta, part_of
from stacks import BLOCKS, LAYERS, D, I, V, got, hidden, model, prefix, staged, through, weights

from fsam_core import SAM, Ascent, FunctionalSAM, LogitSAM, Plain, UserError
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_core.torch import rng


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def holds(method: Any) -> Any:
    scope = method.scope
    if callable(scope):
        return scope
    return {
        "all": lambda name: True,
        "no-head": lambda name: name != "head",
        "norms": lambda name: "norm" in name,
        "top:2": lambda name: name in ("final_norm", "head") or name.startswith(("block_1", "block_2")),
    }[scope]


OPTIONS = {
    "half": {"fraction": 0.5},
    "strength": {"strength": 0.7},
    "part": {"ascent": "part", "ascent_fraction": 0.5},
    "previous": {"ascent": "previous"},
    "momentum": {"ascent": "momentum"},
    "-momentum": {"ascent": "-momentum"},
    "hidden": {"cut": "hidden"},
    "no-head": {"scope": "no-head"},
    "norms": {"scope": "norms"},
    "top": {"scope": "top:2"},
    "named": {"scope": lambda name: name.endswith("_a")},
    "per-tensor": {"norm": "per-tensor"},
    "dual": {"norm": "dual"},
    "adam": {"precondition": "adam"},
}
SINGLE = [(name,) for name in OPTIONS]
PAIRS = list(itertools.combinations(OPTIONS, 2))
KINDS = {"sam": SAM, "functional": FunctionalSAM, "logit": LogitSAM}


def made(kind: str, names: tuple[str, ...]) -> Any:
    """The method with those options, or None where they do not go together."""
    chosen: dict[str, Any] = {}
    for name in names:
        if set(chosen) & set(OPTIONS[name]):
            return None
        chosen |= OPTIONS[name]
    if chosen.get("cut") and kind != "functional":
        return None
    return KINDS[kind](0.4, **chosen)


def cases(combinations: list[tuple[str, ...]], kinds: Any = KINDS) -> list[Any]:
    """(kind, names of options) of those that go together."""
    together = [(kind, names) for names in combinations for kind in kinds if made(kind, names) is not None]
    return [pytest.param(kind, names, id=f"{'+'.join(names)}-{kind}") for kind, names in together]


def check(framework: str, kind: str, names: tuple[str, ...], batches: list[dict], features: Any = model) -> None:
    method = made(kind, names)
    clip_norm = 0.3 if "adam" in names else None
    expected, length = gradient_of(hidden, weights(), batches, method, clip_norm=clip_norm, holds=holds(method))
    info, grads = got(framework, method, batches, clip_norm=clip_norm, features=features)
    assert distance(grads, expected) < 1e-10
    assert float(info.perturbation_norm) == pytest.approx(length, rel=1e-9)
    assert float(info.weight) == sum((b["y"] >= 0).sum() for b in batches)


ONE = [batch_of(12, 1)]
TWO = [batch_of(8, 1), batch_of(8, 4, ignored=0.5)]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("kind", "names"), cases(SINGLE))
def test_every_option_alone_is_its_formula(framework, kind, names):
    check(framework, kind, names, ONE)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("names", SINGLE, ids="+".join)
def test_every_option_alone_is_its_formula_over_micro_batches(framework, names):
    check(framework, "functional", names, TWO)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("batches", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(("kind", "names"), cases(PAIRS))
def test_every_pair_of_options_is_its_formula(framework, kind, names, batches):
    check(framework, kind, names, batches)


@pytest.mark.parametrize(("kind", "names"), cases(PAIRS, ["functional"]))
def test_every_pair_of_options_is_its_formula_in_pytorch(kind, names):
    check("torch", kind, names, ONE)


# --- a prefix that both passes share ----------------------------------------------------------------------------------

WITH_TOP = [("top",), *((name, "top") for name in OPTIONS if name != "top")]


@pytest.mark.parametrize("batches", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(("kind", "names"), cases(WITH_TOP))
def test_a_shared_prefix_changes_nothing(names, kind, batches):
    check("torch", kind, names, batches, features=staged("torch", 1))


@pytest.mark.parametrize("names", [("top",), ("half", "top"), ("hidden", "top"), ("adam", "top")], ids="+".join)
def test_a_shared_prefix_changes_nothing_in_jax(names):
    check("jax", "functional", names, ONE, features=staged("jax", 1))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(("kind", "names"), cases(WITH_TOP, ["functional", "sam"]))
def test_a_shared_prefix_changes_nothing_in_jax_with_any_option(names, kind, batches):
    check("jax", kind, names, batches, features=staged("jax", 1))


def test_a_shared_prefix_changes_nothing_where_each_micro_batch_has_its_own_perturbation():
    method = FunctionalSAM(0.4, scope="top:2", ascent="micro")
    (_, whole), (_, apart) = (got("jax", method, TWO, features=x) for x in (model, staged("jax", 1)))
    assert distance(whole, apart) < 1e-12


def calls_of(method: Any, batches: list[dict], **options: Any) -> list[str]:
    """Which stages a step runs, in order, and which it pulls back."""
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
    step.gradient(as_torch(ONE[0]))  # the first step also looks whether the prefix may be shared
    found.clear()
    step.gradient(as_torch(batches))
    return found


def test_the_exact_method_runs_a_shared_prefix_once_each_way():
    both = ["suffix", "suffix back"]
    assert calls_of(FunctionalSAM(0.1, scope="top:2"), ONE) == ["prefix", *both, *both, "prefix back"]
    assert calls_of(SAM(0.1, scope="top:2"), ONE) == ["prefix", *both, *both, "prefix back"]
    known = calls_of(FunctionalSAM(0.1, scope="top:2", ascent="momentum"), ONE)
    assert known == ["prefix", "suffix", *both, "prefix back"]


def test_part_of_the_batch_pulls_its_prefix_back_once_with_both_cotangents():
    found = calls_of(FunctionalSAM(0.1, scope="top:2", fraction=0.5), TWO)
    one = ["prefix", "suffix", "suffix back"]
    assert found == [*one, *one, "prefix back", "suffix", "suffix back", "prefix back"]


def test_all_weights_or_many_micro_batches_run_the_prefix_in_each_pass():
    assert calls_of(FunctionalSAM(0.1), ONE).count("prefix") == 2
    assert calls_of(FunctionalSAM(0.1, scope="top:2"), TWO).count("prefix") == 4


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_prefix_that_holds_what_moves_is_refused(framework):
    with pytest.raises(UserError, match=r"prefix of Staged depends on block_1_a, block_1_norm, which scope='top:2'"):
        got(framework, FunctionalSAM(0.1, scope="top:2"), ONE, features=staged(framework, 2))
    # A scope that is spread over the model is no mistake: the prefix is run twice.
    check(framework, "functional", ("norms",), ONE, features=staged(framework, 2))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_reused_correction_is_the_one_of_the_whole_model(framework):
    """Below the scope too there is a correction: the cotangent that comes down from the moved blocks is another."""
    method = FunctionalSAM(0.4, scope="top:2", fraction=0.5)
    found = [reused(framework, method, features) for features in (model, staged(framework, 1))]
    assert distance(*found) < 1e-12
    assert all(np.abs(x).max() > 0 for x in found[1].values())


def reused(framework: str, method: Any, features: Any) -> dict[str, np.ndarray]:
    """The correction that a step leaves for the next."""
    values, batch = weights(), ONE[0]
    if framework == "torch":
        net = Weights(values)
        schedule = in_torch.Schedule(every=2, between="reuse")
        step = in_torch.Step(net, adamw(net), method, features=features, schedule=schedule, blocks=BLOCKS)
        step.gradient(as_torch(batch))
        return {name: step._correction[p].numpy() for name, p in net.named_parameters()}
    grad = in_jax.value_and_grad(features, method, blocks=BLOCKS)
    params = jax.tree.map(jnp.asarray, values)
    carry = in_jax.carry_of(method, params, in_jax.Schedule(every=2, between="reuse"))
    return jax.tree.map(np.asarray, grad(params, jax.tree.map(jnp.asarray, batch), None, carry)[2].correction)


def test_xla_runs_what_no_perturbation_reaches_once():
    """FLOPs of the compiled step: the blocks below the scope go forwards and backwards once."""
    wide = {k: np.ones([64 if n == D else n for n in x.shape]) * 0.01 for k, x in weights().items()}
    wide |= {k: np.random.default_rng(1).normal(size=wide[k].shape) for k in ("embedding", "head")}
    batch = {"x": np.ones((64, I)), "y": np.arange(64) % V}
    state = optax.ScaleByAdamState(jnp.int32(1), *[jax.tree.map(np.zeros_like, wide)] * 2)

    def flops(method: Any) -> float:
        grad = in_jax.value_and_grad(model, method, b2=B2, blocks=BLOCKS)
        compiled = jax.jit(lambda p, b, s: grad(p, b, s)[1]).lower(wide, batch, state).compile()
        return compiled.cost_analysis()["flops"]

    plain, whole = flops(Plain()), flops(FunctionalSAM(0.1))
    top = flops(FunctionalSAM(0.1, scope="top:1"))
    product = 2 * 64**3  # of a block, which has one forwards and two backwards
    assert whole - plain == pytest.approx(plain, rel=0.1)
    # Two blocks, and at θ the way from the third to its input.
    assert whole - top == pytest.approx((2 * 3 + 1) * product, rel=0.1)


# --- ascents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precondition", [None, "adam"])
def test_micro_gives_each_micro_batch_its_own_perturbation(framework, kind, precondition):
    method = KINDS[kind](0.4, ascent="micro", precondition=precondition)
    batches = [batch_of(6, 1), batch_of(6, 2), batch_of(6, 3, ignored=0.5)]
    expected, length = gradient_of(hidden, weights(), batches, method)
    info, grads = got(framework, method, batches)
    assert distance(grads, expected) < 1e-10
    assert float(info.perturbation_norm) == pytest.approx(length, rel=1e-9)


def test_the_random_ascent_is_drawn_from_seed_and_step():
    values = weights()
    names = list(Weights(values).state_dict())
    drawn = rng.normal([torch.from_numpy(values[k]) for k in names], 7, STEPS)
    method = FunctionalSAM(0.4, ascent="random", seed=7)
    expected, _ = gradient_of(hidden, values, ONE, method, drawn=dict(zip(names, map(np.asarray, drawn), strict=True)))
    assert distance(got("torch", method, ONE)[1], expected) < 1e-10


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_random_ascents_repeat_and_differ_by_seed(framework):
    of = lambda seed: got(framework, FunctionalSAM(0.4, ascent="random", seed=seed), ONE)[1]
    assert distance(of(1), of(1)) == 0
    assert distance(of(1), of(2)) > 1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_ascent_of_ones_own(framework):
    """The gradient itself, put together from what may be looked at, is the full ascent."""
    mine = Ascent("mine", lambda seen: seen.map(lambda g, m: (g + m) - m, seen.gradient, seen.momentum))
    expected = got(framework, FunctionalSAM(0.4), ONE)[1]
    assert distance(got(framework, FunctionalSAM(0.4, ascent=mine), ONE)[1], expected) < 1e-12
    known = Ascent("known", lambda seen: seen.gradient, "none")
    with pytest.raises(UserError, match="source must be 'full' or 'part'"):
        got(framework, FunctionalSAM(0.4, ascent=known), ONE)


def test_a_correction_on_random_parts_is_unbiased():
    """The mean over every part of a batch is the exact gradient, the perturbation being that of the full batch."""
    batch, method = batch_of(8, 1, ignored=0), FunctionalSAM(0.4, fraction=0.25)
    exact = got("torch", FunctionalSAM(0.4), [batch])[1]
    found = []
    for chosen in itertools.combinations(range(8), 2):
        others = [i for i in range(8) if i not in chosen]
        # Every 4th row carries the correction.
        order = [chosen[0], *others[:3], chosen[1], *others[3:]]
        found.append(got("torch", method, [{k: x[order] for k, x in batch.items()}])[1])
        assert part_of([{"i": np.array(order)}], 0.25)[0]["i"].tolist() == list(chosen)
    mean = {k: np.mean([g[k] for g in found], axis=0) for k in exact}
    assert distance(mean, exact) < 1e-12
    assert distance(found[0], exact) > 1e-3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scope": "top:4"}, "scope: 'top:4' asks for more than the 3 blocks"),
        ({"scope": lambda name: False}, "holds none of the 9 parameters"),
    ],
)
def test_scopes_that_do_not_fit_the_model_are_refused(framework, options, says):
    with pytest.raises(UserError, match=says):
        got(framework, FunctionalSAM(0.1, **options), ONE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scope": "top"}, r"scope: 'top' is not known; use all, no-head, norms, top:K"),
        ({"scope": "top:0"}, "scope: 'top:0' is not known"),
        ({"ascent": "up"}, "ascent: 'up' is not known; use one of full, part, micro, previous"),
        ({"ascent_fraction": 0.5}, "goes with ascent='part' and fraction=1"),
        ({"ascent": "part", "fraction": 0.5, "ascent_fraction": 0.25}, "goes with ascent='part' and fraction=1"),
        ({"ascent": "part", "ascent_fraction": 0}, r"ascent_fraction must be a number in \(0, 1\]"),
        ({"ascent": "micro", "fraction": 0.5}, "'micro' corrects every micro-batch"),
        ({"norm": "max"}, "norm: 'max' is not known"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        FunctionalSAM(0.1, **options)


def test_a_named_scope_needs_blocks():
    net = Weights(weights())
    with pytest.raises(UserError, match=r"scope: 'norms' needs blocks=Blocks"):
        in_torch.Step(net, adamw(net), FunctionalSAM(0.1, scope="norms"), features=model)


# --- two passes on two devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [ONE, [batch_of(8, 1), batch_of(8, 2)]], ids=["one", "two"])
def test_passes_that_do_not_wait_run_on_two_devices(batches):
    method = SAM(0.4, ascent="momentum", strength=0.3, precondition="adam")
    values, batch = jax.tree.map(jnp.asarray, (weights(), batches))
    state = optax.ScaleByAdamState(jnp.int32(STEPS), momenta(weights()), moments(weights()))
    state = jax.tree.map(jnp.asarray, state)
    alone = in_jax.value_and_grad(model, method, b2=B2, eps=EPS)
    (loss, info), expected = jax.jit(alone)(values, batch, state)
    mesh = jax.make_mesh((2,), ("passes",), devices=jax.devices()[:2])
    apart = in_jax.value_and_grad(model, method, b2=B2, eps=EPS, pass_axis="passes")
    with jax.set_mesh(mesh):
        compiled = jax.jit(apart).lower(values, batch, state).compile()
        (found_loss, found), grads = compiled(values, batch, state)
    assert distance(grads, expected) < 1e-12
    for a, b in zip((found_loss, *found), (loss, *info), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-9)
    if len(batches) == 1:  # of a loop over micro-batches XLA counts one turn
        both = jax.jit(alone).lower(values, batch, state).compile().cost_analysis()["flops"]
        assert compiled.cost_analysis()["flops"] < 0.75 * both


@pytest.mark.parametrize("method", [SAM(0.1), SAM(0.1, ascent="momentum"), FunctionalSAM(0.1, ascent="momentum")])
def test_passes_that_wait_for_each_other_cannot_be_taken_apart(method):
    with pytest.raises(UserError, match="pass_axis: two passes wait for each other but for SAM"):
        in_jax.value_and_grad(model, method, pass_axis="passes")
