"""Optax states in JAX: several Adam states, where b2 comes from, and what is refused."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import batch_of, distance, mlp, values

from fsam_core.jax import SAM, FunctionalSAM, LinearHead, MicroBatches, Plain, UserError, skip_nonfinite, value_and_grad

pytestmark = pytest.mark.usefixtures("float64")
RHO, EPS, CLIP = 0.3, 1e-6, 0.1
ADAM = FunctionalSAM(RHO, precondition="adam")


def params() -> dict:
    return jax.tree.map(jnp.asarray, values()) | {"b": jnp.linspace(-1, 1, 5)}


def features(p, b):
    return LinearHead(jnp.tanh(b["x"] @ p["a"] + p["b"]), p["w"], b["y"])


def batch(seed: int = 1) -> dict:
    return jax.tree.map(jnp.asarray, batch_of(12, seed))


def after(tx, p, steps: int = 3):
    """(params, state) after a few steps of AdamW."""
    state = tx.init(p)
    for seed in range(steps):
        updates, state = tx.update(value_and_grad(features, Plain())(p, batch(seed))[1], state, p)
        p = optax.apply_updates(p, updates)
    return p, state


def by_hand(p, b, held, norm="l2", second_moment="current", clip_norm=None) -> tuple[dict, float]:
    """(ĝ, ‖ε‖) by autograd, of FunctionalSAM with (v, b2, steps) of each leaf in `held`; other leaves do not move."""
    y = b["y"]
    z_of = lambda p: jnp.tanh(b["x"] @ p["a"] + p["b"]) @ p["w"].T
    nll = lambda z: jnp.where(y >= 0, -jax.nn.log_softmax(z)[jnp.arange(len(y)), y], 0)
    loss = lambda z: jnp.sum(nll(z)) / jnp.sum(y >= 0)
    g = jax.grad(lambda p: loss(z_of(p)))(p)
    size = optax.tree.norm({name: g[name] for name in held})
    c = 1 if clip_norm is None else jnp.minimum(1, clip_norm / size)
    d, square = {}, 0.0
    for name, (v, b2, t) in held.items():
        cg = c * g[name]
        if second_moment == "current":
            v, t = b2 * v + (1 - b2) * cg**2, t + 1
        d[name] = cg / (jnp.sqrt(v / (1 - b2**t)) + EPS)
        square += jnp.sum(d[name] ** 2 if norm == "l2" else cg * d[name])
    length = RHO / jnp.sqrt(square) * optax.tree.norm(d)
    moved = {name: x + RHO / jnp.sqrt(square) * d[name] if name in d else x for name, x in p.items()}
    zbar = jax.grad(loss)(z_of(p))
    return jax.grad(lambda p: jnp.sum(z_of(p) * zbar))(moved), float(length)


LABELS = {"a": "trunk", "b": "trunk", "w": "head"}
TWO = {
    "multi_transform": lambda trunk, head: optax.multi_transform({"trunk": trunk, "head": head}, LABELS),
    "partition": lambda trunk, head: optax.partition({"trunk": trunk, "head": head}, LABELS),
    "masked": lambda trunk, head: optax.chain(
        optax.masked(trunk, {"a": True, "b": True, "w": False}), optax.masked(head, {"a": False, "b": False, "w": True})
    ),
    "skipped": lambda trunk, head: skip_nonfinite(optax.partition({"trunk": trunk, "head": head}, LABELS)),
}


@pytest.mark.parametrize(("norm", "moment"), [("l2", "current"), ("dual", "previous")])
@pytest.mark.parametrize("wrap", TWO)
def test_each_leaf_has_the_moments_of_its_own_adam(wrap, norm, moment):
    wrap = TWO[wrap]
    p, state = after(wrap(optax.adamw(1e-2, b2=0.9), optax.adamw(1e-3, b2=0.9)), params())
    method = FunctionalSAM(RHO, precondition="adam", norm=norm, second_moment=moment)
    (_, info), got = jax.jit(value_and_grad(features, method, b2=0.9, eps=EPS, clip_norm=CLIP))(p, batch(), state)
    nu = second_moments(state)
    expected, length = by_hand(p, batch(), {k: (v, 0.9, 3) for k, v in nu.items()}, norm, moment, CLIP)
    assert distance(got, expected) < 1e-9
    assert float(info.perturbation_norm) == pytest.approx(length, rel=1e-9)


def second_moments(state) -> dict:
    """v of each leaf, from whichever Adam state has it."""
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    return {name: v for x in found for name, v in x.nu.items() if not isinstance(v, optax.MaskedNode)}


def test_each_adam_has_its_own_b2_and_count():
    injected = lambda b2: optax.inject_hyperparams(optax.adamw)(1e-2, b2=b2, eps=EPS)
    p, state = after(TWO["partition"](injected(0.9), injected(0.99)), params())
    states = state.inner_states
    late = states["head"].inner_state
    late = late._replace(inner_state=(late.inner_state[0]._replace(count=jnp.int32(7)), *late.inner_state[1:]))
    state = state._replace(inner_states={**states, "head": states["head"]._replace(inner_state=late)})
    nu = second_moments(state)
    got = jax.jit(value_and_grad(features, ADAM, eps=EPS))(p, batch(), state)[1]
    held = {"a": (nu["a"], 0.9, 3), "b": (nu["b"], 0.9, 3), "w": (nu["w"], 0.99, 7)}
    assert distance(got, by_hand(p, batch(), held)[0]) < 1e-6
    per_tensor = FunctionalSAM(RHO, precondition="adam", norm="per-tensor")
    (_, info), _ = value_and_grad(features, per_tensor, eps=EPS)(p, batch(), state)
    assert float(info.perturbation_norm) == pytest.approx(RHO * 3**0.5, rel=1e-6)


def test_momentum_is_that_of_the_leafs_own_adam():
    p, state = after(TWO["partition"](optax.adamw(1e-2), optax.adamw(1e-3)), params())
    single = after(optax.adamw(1e-2), params())[1]
    mu = {k: m for x in state.inner_states.values() for k, m in x.inner_state[0].mu.items() if hasattr(m, "shape")}
    assert set(mu) == set(p)
    joined = optax.ScaleByAdamState(jnp.int32(3), mu, single[0].nu)
    for ascent in ("momentum", "random"):
        grad = value_and_grad(features, SAM(RHO, ascent=ascent))
        assert distance(grad(p, batch(), state)[1], grad(p, batch(), joined)[1]) < 1e-12


def test_leaf_that_no_adam_holds_is_named():
    muon = optax.contrib.muon(1e-2)
    state = muon.init(params())
    needs = {"precondition='adam'": ADAM, "the ascent": SAM(RHO, ascent="momentum")}
    for what, method in needs.items():
        with pytest.raises(UserError, match=f"opt_state: no Adam state holds a, which {what} needs; .* scope="):
            value_and_grad(features, method, b2=0.999)(params(), batch(), state)
    only_bias = FunctionalSAM(RHO, precondition="adam", scope=lambda name: name == "b")
    got = value_and_grad(features, only_bias, b2=0.999, eps=EPS)(params(), batch(), state)[1]
    held = {"b": (jnp.zeros(5), 0.999, 0)}
    assert distance(got, by_hand(params(), batch(), held)[0]) < 1e-6
    whole = value_and_grad(features, FunctionalSAM(RHO))(params(), batch(), state)[0][1]
    assert float(whole.perturbation_norm) == pytest.approx(RHO)


def test_leaf_in_two_adams_is_named():
    both = optax.chain(optax.scale_by_adam(), optax.masked(optax.scale_by_adam(), {"a": False, "b": False, "w": True}))
    with pytest.raises(UserError, match="opt_state: 2 Adam states hold w; each leaf must be in one"):
        value_and_grad(features, ADAM, b2=0.9)(params(), batch(), both.init(params()))


def test_state_of_other_shapes_is_refused():
    other = optax.adamw(1e-2).init({**params(), "a": jnp.ones((3, 5))})
    with pytest.raises(UserError, match=r"not of these params, a is \[3, 5\] there and \[6, 5\] here"):
        value_and_grad(features, ADAM, b2=0.9)(params(), batch(), other)


@pytest.mark.parametrize(
    ("init", "held"),
    [
        (lambda p: optax.flatten(optax.adamw(1e-2)).init(p), "one array for all"),
        (lambda p: optax.adamw(1e-2).init({"model": p}), r"\['model'\]\['a'\]"),
    ],
    ids=["flatten", "nested"],
)
def test_state_of_another_tree_is_refused(init, held):
    with pytest.raises(UserError, match=rf"not of these params: it holds {held}, and they \['a'\]; pass the one from"):
        value_and_grad(features, ADAM, b2=0.9)(params(), batch(), init(params()))


# --- b2 ---------------------------------------------------------------------------------------------------------------


def test_b2_is_read_where_the_state_holds_it():
    p, state = after(optax.inject_hyperparams(optax.adamw)(1e-2, b2=0.9, eps=EPS), params())
    held = {k: (v, 0.9, 3) for k, v in second_moments(state).items()}
    for call in (lambda f: f, jax.jit):
        got = call(value_and_grad(features, ADAM, eps=EPS))(p, batch(), state)[1]
        assert distance(got, by_hand(p, batch(), held)[0]) < 1e-6
    with pytest.raises(UserError, match=r"b2: got 0.95, and opt_state holds 0.9; leave b2 out"):
        value_and_grad(features, ADAM, b2=0.95)(p, batch(), state)


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_eps_is_read_where_the_state_holds_it(call):
    p, state = after(optax.inject_hyperparams(optax.adamw)(1e-2, b2=0.9, eps=EPS), params())
    held = {k: (v, 0.9, 3) for k, v in second_moments(state).items()}
    assert distance(call(value_and_grad(features, ADAM))(p, batch(), state)[1], by_hand(p, batch(), held)[0]) < 1e-6
    with pytest.raises(UserError, match=r"eps: got 0.001, and opt_state holds 1e-06; leave eps out"):
        value_and_grad(features, ADAM, eps=1e-3)(p, batch(), state)


def test_optimizer_shows_its_b2():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), TWO["partition"](optax.adamw(1e-2, b2=0.9), optax.adam(1e-3, b2=0.99))
    )
    p, state = after(tx, params())
    nu = second_moments(state)
    held = {"a": (nu["a"], 0.9, 3), "b": (nu["b"], 0.9, 3), "w": (nu["w"], 0.99, 3)}
    got = jax.jit(value_and_grad(features, ADAM, eps=EPS, optimizer=tx))(p, batch(), state)[1]
    assert distance(got, by_hand(p, batch(), held)[0]) < 1e-9
    with pytest.raises(UserError, match=r"b2: got 0.95, and the optimizer's is 0.9"):
        value_and_grad(features, ADAM, b2=0.95, optimizer=tx)(p, batch(), state)
    accumulating = optax.MultiSteps(optax.adamw(1e-2, b2=0.9), 2)
    grad = value_and_grad(features, ADAM, b2=0.9, optimizer=accumulating)
    with pytest.warns(UserWarning, match="MultiSteps"):
        assert bool(grad(params(), batch(), accumulating.init(params()))[0][1].finite)


@pytest.mark.parametrize("tx", [optax.adamax(1e-2), optax.adamaxw(1e-2)], ids=["adamax", "adamaxw"])
def test_adamax_is_refused_where_the_optimizer_is_given(tx):
    state = tx.init(params())
    with pytest.raises(UserError, match=r"optimizer: the second moment .* no mean of squares. optax.adamax"):
        jax.jit(value_and_grad(features, ADAM, b2=0.999, optimizer=tx))(params(), batch(), state)
    assert value_and_grad(features, FunctionalSAM(RHO), optimizer=tx)(params(), batch(), state)[0][1].finite


# --- MultiSteps -------------------------------------------------------------------------------------------------------


def test_multi_steps_warns_that_each_micro_batch_has_its_own_ascent():
    tx = optax.MultiSteps(optax.adamw(1e-2, b2=0.9), 2)
    state = skip_nonfinite(tx).init(params())
    with pytest.warns(UserWarning, match=r"optax.MultiSteps .* give it MicroBatches\(\[...\]\)") as seen:
        value_and_grad(features, ADAM, b2=0.9)(params(), batch(), state)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_and_grad(features, Plain())(params(), batch(), state)
        plain_state = optax.adamw(1e-2, b2=0.9).init(params())
        given = MicroBatches([batch(1), batch(2)])
        (_, info), _ = value_and_grad(features, ADAM, b2=0.9)(params(), given, plain_state)
    assert np.isfinite(info.loss)


def test_single_adam_compiles_to_one_perturbation():
    p, grad = {k: params()[k] for k in ("a", "w")}, value_and_grad(mlp, ADAM, b2=0.9)
    one = str(jax.make_jaxpr(grad)(p, batch(), optax.adamw(1e-2).init(p)))
    two = optax.partition({"x": optax.adamw(1e-2), "y": optax.adamw(1e-2)}, {"a": "x", "w": "y"})
    split = str(jax.make_jaxpr(grad)(p, batch(), two.init(p)))
    assert one.count("rsqrt") == split.count("rsqrt") == 1
    assert one.count(" pow ") < split.count(" pow ")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    "tx",
    [
        skip_nonfinite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b2=0.95))),
        optax.chain(optax.add_decayed_weights(1e-2), optax.adam(1e-3, b2=0.95)),
        optax.chain(optax.adaptive_grad_clip(0.01), optax.adamw(1e-3, b2=0.95)),
        optax.MultiSteps(optax.adamw(1e-3, b2=0.95), 2),
    ],
    ids=["skip", "decay first", "clip by leaf", "MultiSteps"],
)
@pytest.mark.filterwarnings("ignore:opt_state. under optax.MultiSteps")
def test_optimizer_tells_its_b2_also_under_jit(tx, jitted):
    p = params()
    multi = isinstance(tx, optax.MultiSteps)
    asked = value_and_grad(features, ADAM, optimizer=tx, b2=0.95 if multi else None)
    grad, told = (jax.jit(f) if jitted else f for f in (asked, value_and_grad(features, ADAM, b2=0.95)))
    state = tx.init(p)
    assert distance(grad(p, batch(), state)[1], told(p, batch(), state)[1]) < 1e-4  # b2 is told in float32


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (optax.contrib.reduce_on_plateau(), r"cannot be tried on gradients alone \(.*value.*\); give b2 instead"),
        (optax.add_noise(0.1, 0.55, 0), "Where noise or a normalisation comes before Adam, give b2"),
    ],
)
def test_optimizer_that_cannot_be_tried_is_refused(other, says):
    tx = optax.chain(other, optax.adamw(1e-3))
    with pytest.raises(UserError, match=f"optimizer: .*{says}"):
        value_and_grad(features, ADAM, optimizer=tx)(params(), batch(), tx.init(params()))
