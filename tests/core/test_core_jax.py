"""What only the JAX step does: jit, scan, optax states in all their wrappings, and what XLA makes of it."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import B2, METHODS, batch_of, distance, gradient, mlp, values
from problems import adam_state as moments

from fsam_core.jax import (
    SAM,
    FunctionalSAM,
    LinearHead,
    Logits,
    LogitSAM,
    MicroBatches,
    Plain,
    UserError,
    adam_state,
    heads,
    skip_nonfinite,
    value_and_grad,
)

ADAM = FunctionalSAM(0.3, precondition="adam")


def params() -> dict:
    return jax.tree.map(jnp.asarray, values(dtype="float32"))


def batch(seed: int = 1, n: int = 12) -> dict:
    return jax.tree.map(jnp.asarray, batch_of(n, seed, dtype="float32"))


def identical(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("precond-sam-dual-previous", (6, 6)), pytest.param("functional", (6, 3), marks=pytest.mark.slow)],
    ids=["scan", "unrolled"],
)
def test_jit_changes_nothing(name, sizes):
    method, batches = METHODS[name], [batch_of(n, seed) for seed, n in enumerate(sizes, 1)]
    with jax.enable_x64(True):
        eager = gradient("jax", mlp, method, values(), batches, clip_norm=0.1)
        jitted = gradient("jax", mlp, method, values(), batches, clip_norm=0.1, jit=True)
    assert distance(jitted[2], eager[2]) < 1e-12
    np.testing.assert_allclose(jitted[1], eager[1], rtol=1e-12)


def test_equal_micro_batches_are_scanned_and_others_unrolled():
    grad = value_and_grad(mlp, FunctionalSAM(0.1))
    count = lambda *batches: str(jax.make_jaxpr(grad)(params(), MicroBatches(batches))).count("scan[")
    assert count(batch(1), batch(2), batch(3)) == 2
    assert count(batch(1), batch(2, n=5)) == 0
    assert count(batch(1)) == 0


def dropout(p, batch):
    out = mlp(p, batch)
    keep = jax.random.bernoulli(batch["key"], 0.5, out.hidden.shape)
    return LinearHead(out.hidden * keep * 2, out.weight, out.labels)


@pytest.mark.parametrize(
    ("kind", "new", "keys"),
    [
        (SAM, jax.random.key, [1]),
        (LogitSAM, jax.random.key, [1]),
        (FunctionalSAM, jax.random.PRNGKey, [1]),
        (FunctionalSAM, jax.random.key, [1, 2, 3]),
    ],
)
def test_both_passes_see_the_same_dropout(kind, keys, new):
    batches = MicroBatches({**batch(s), "key": new(s)} for s in keys)
    plain, twice = (jax.jit(value_and_grad(dropout, x))(params(), batches)[1] for x in (Plain(), kind(0.0)))
    assert distance(twice, plain) < 1e-5


def test_batch_may_hold_other_values_than_arrays():
    named = lambda p, batch: mlp(p, batch) if batch["kind"] == "text" else None
    (loss, _), _ = value_and_grad(named, FunctionalSAM(0.1))(params(), {**batch(), "kind": "text"})
    assert np.isfinite(loss)


# --- optax ------------------------------------------------------------------------------------------------------------

WRAPPED = {
    "adamw": lambda: optax.adamw(1e-2, b2=B2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=B2), optax.scale(-0.1)),
    "skip_nonfinite": lambda: skip_nonfinite(optax.adamw(1e-2, b2=B2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, b2=B2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2, b2=B2), 1),
    "nadamw": lambda: optax.nadamw(1e-2, b2=B2),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED.keys())
def test_adam_state_is_found_in(tx):
    tx, p = tx(), params()
    state = tx.init(p)
    for seed in range(2):
        updates, state = tx.update(value_and_grad(mlp, Plain())(p, batch(seed))[1], state, p)
        p = optax.apply_updates(p, updates)
    found = adam_state(state)
    assert int(found.count) == 2
    got = value_and_grad(mlp, ADAM, b2=B2)(p, batch(), state)[1]
    assert distance(got, value_and_grad(mlp, ADAM, b2=B2)(p, batch(), found)[1]) == 0


def test_multi_steps_has_the_count_of_adam():
    tx, p = optax.MultiSteps(optax.adamw(1e-2), 2), params()
    state = tx.init(p)
    for _ in range(3):
        _, state = tx.update(p, state, p)
    assert int(adam_state(state).count) == 1


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "got None"),
        (optax.sgd(0.1).init({"a": jnp.ones(2)}), "got none in tuple"),
        ((optax.adam(0.1).init(params()),) * 2, "opt_state: 2 Adam states hold a; "),
    ],
)
def test_state_without_one_adam_for_each_leaf_is_refused(state, says):
    with pytest.raises(UserError, match=says):
        value_and_grad(mlp, ADAM, b2=B2)(params(), batch(), state)


def test_parameter_masked_from_adam_must_be_outside_the_scope():
    groups = {"on": optax.adamw(1e-2), "off": optax.set_to_zero()}
    p = params()
    state = optax.multi_transform(groups, {"a": "on", "w": "off"}).init(p)
    with pytest.raises(UserError, match=r"no Adam state holds w, .* scope=, or use precondition=None"):
        value_and_grad(mlp, ADAM, b2=B2)(p, batch(), state)
    only_a = dataclasses.replace(ADAM, scope=lambda name: name == "a")
    (_, info), got = value_and_grad(mlp, only_a, b2=B2)(p, batch(), state)
    # The same with w as a constant of the model.
    alone = value_and_grad(lambda q, b: mlp({**q, "w": p["w"]}, b), ADAM, b2=B2)
    (_, expected), g = alone({"a": p["a"]}, batch(), optax.adamw(1e-2).init({"a": p["a"]}))
    np.testing.assert_allclose(got["a"], g["a"], rtol=1e-6)
    assert float(info.perturbation_norm) == pytest.approx(float(expected.perturbation_norm))
    _, other = value_and_grad(mlp, ADAM, b2=B2)(p, batch(), optax.adamw(1e-2).init(p))
    assert abs(other["a"] - got["a"]).max() > 1e-4  # w does move where it is in the scope


def test_adam_state_of_other_parameters_is_refused():
    with pytest.raises(UserError, match="opt_state: its Adam state is not of these params"):
        value_and_grad(mlp, ADAM, b2=B2)(params(), batch(), optax.adamw(1e-2).init({"a": jnp.ones(2)}))


def test_rho_schedule_takes_the_count_of_adam():
    schedule, tx, p = optax.linear_schedule(0.0, 1.0, 4), optax.adamw(1e-3), params()
    state, grad, seen = tx.init(p), jax.jit(value_and_grad(mlp, SAM(schedule))), []
    for seed in range(3):
        (_, info), g = grad(p, batch(seed), state)
        seen.append(float(info.perturbation_norm))
        _, state = tx.update(g, state, p)
    assert seen == pytest.approx([0, 0.25, 0.5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"b2": 1.0}, "b2.*1.0"),
        ({"b2": B2, "clip_norm": 0.0}, "clip_norm.*0"),
        ({"b2": B2, "clip_norm": -1.0}, "clip_norm.*-1"),
    ],
)
def test_bad_settings_are_refused_where_they_are_made(options, says):
    with pytest.raises(UserError, match=says):
        value_and_grad(mlp, ADAM, **options)


def test_missing_b2_is_refused_where_the_state_lacks_it():
    with pytest.raises(UserError, match="b2 is missing"):
        value_and_grad(mlp, ADAM)(params(), batch(), optax.adamw(1e-2).init(params()))


@pytest.mark.parametrize("clip_norm", [0.05, 1e3])
def test_the_optax_chain_clips_the_returned_gradient_once(clip_norm):
    (_, info), g = value_and_grad(mlp, SAM(0.3), clip_norm=clip_norm)(params(), batch())
    assert distance(g, value_and_grad(mlp, SAM(0.3))(params(), batch())[1]) < 1e-6
    clipped, _ = optax.clip_by_global_norm(clip_norm).update(g, optax.EmptyState())
    assert float(optax.tree.norm(clipped)) == pytest.approx(min(clip_norm, float(info.grad_norm)), rel=1e-5)


# --- non-finite values ------------------------------------------------------------------------------------------------


def overflows_when_moved(theta):
    def features(p, batch):
        out = mlp(p, batch)
        moved = jnp.any(p["a"] != theta["a"])
        return LinearHead(out.hidden * jnp.where(moved, jnp.inf, 1), out.weight, out.labels)

    return features


PASSES = [
    ("base", METHODS["adamw"]),
    ("base", METHODS["precond-functional"]),
    ("second", METHODS["sam"]),
    ("second", METHODS["precond-functional"]),
    ("second", METHODS["logit"]),
]


@pytest.mark.parametrize(("where", "method"), PASSES, ids=[f"{where}-{m.path}" for where, m in PASSES])
def test_non_finite_value_skips_the_update(where, method):
    tx, p, bad = (
        skip_nonfinite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b2=B2))),
        params(),
        batch(),
    )
    state = tx.init(p)
    updates, state = tx.update(value_and_grad(mlp, Plain())(p, batch())[1], state, p)
    p = optax.apply_updates(p, updates)
    features = overflows_when_moved(p) if where == "second" else mlp
    if where == "base":
        bad["x"] = bad["x"].at[3, 2].set(jnp.inf)
    (loss, info), g = value_and_grad(features, method, b2=B2)(p, bad, state)
    assert not info.finite
    assert np.isfinite(info.base_norm) == (where == "second")
    assert np.isfinite(loss)
    updates, after = tx.update(g, state, p)
    assert identical(optax.apply_updates(p, updates), p)
    assert identical(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == int(state.total_notfinite) + 1


# --- precision --------------------------------------------------------------------------------------------------------


def test_half_precision_token_weights_are_summed_in_float32():
    many = batch(n=300)
    mask = jnp.ones(300, jnp.bfloat16)
    (loss, info), _ = value_and_grad(mlp, Plain())(params(), {**many, "y": jnp.abs(many["y"]), "weights": mask})
    (expected, _), _ = value_and_grad(mlp, Plain())(params(), {**many, "y": jnp.abs(many["y"])})
    assert float(info.weight) == 300
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("size", [1e3, 1e-6])
def test_float16_gradients_have_their_norm_in_float32(size):
    def features(p, batch):
        z = p["a"].astype(jnp.float32) * size
        return Logits(z, lambda z: jnp.sum(z))

    p = {"a": jnp.ones((4, 4), jnp.float16)}
    (_, info), _ = value_and_grad(features, SAM(0.1))(p, batch())
    assert float(info.base_norm) == pytest.approx(4 * float(np.float16(size)), rel=1e-3)
    assert bool(info.finite)


@pytest.mark.parametrize("sizes", [(6, 6), (6, 5)], ids=["scan", "unrolled"])
def test_float16_micro_batches_of_many_tokens_do_not_overflow(sizes):
    p = jax.tree.map(lambda x: x.astype(jnp.float16), params())
    batches = MicroBatches({**batch(s, n=n), "weights": jnp.full(n, 2e4, jnp.float32)} for s, n in enumerate(sizes, 1))
    grad = jax.jit(value_and_grad(mlp, FunctionalSAM(0.1)))
    (_, info), g = grad(p, batches)
    reference = grad(jax.tree.map(lambda x: x.astype(jnp.float32), p), batches)[1]
    assert bool(info.finite)
    assert distance(g, reference) < 0.01


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_params_keep_their_dtype_in_gradients(dtype):
    p = jax.tree.map(lambda x: x.astype(dtype), params())
    state = optax.adamw(1e-2).init(params())
    for method in (ADAM, SAM(0.3)):
        (_, info), g = value_and_grad(mlp, method, b2=B2)(p, {**batch(), "x": batch()["x"].astype(dtype)}, state)
        assert bool(info.finite)
        assert all(x.dtype == dtype for x in jax.tree.leaves(g))


def test_bfloat16_micro_batches_are_summed_in_float32():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    batches = [batch(s, n=8) for s in range(1, 33)]
    whole = {k: jnp.concatenate([b[k] for b in batches]) for k in batches[0]}
    grad = jax.jit(value_and_grad(mlp, Plain()))
    exact = grad(jax.tree.map(lambda x: x.astype(jnp.float32), p), whole)[1]
    error = distance(grad(p, MicroBatches(batches))[1], exact)
    assert error <= 3 * distance(grad(p, whole)[1], exact)


# --- what XLA makes of it ---------------------------------------------------------------------------------------------


def vocabulary_dots(method) -> int:
    """Matrix products in the optimized program whose result is [N, V] or [V, N]."""
    N, V = 29, 37
    p = jax.tree.map(jnp.asarray, values(v=V, dtype="float32"))
    b = jax.tree.map(jnp.asarray, batch_of(N, v=V, dtype="float32"))
    text = jax.jit(value_and_grad(mlp, method)).lower(p, b).compile().as_text()
    return len(re.findall(rf"= f32\[(?:{N},{V}|{V},{N})\]\S* (?:dot|custom-call)\(", text))


def test_second_pass_of_functional_sam_forms_no_logits():
    plain, functional, sam = (vocabulary_dots(m) for m in (Plain(), FunctionalSAM(0.3), SAM(0.3)))
    assert 1 <= plain <= 2
    assert functional <= 2
    assert sam > plain


@pytest.mark.parametrize(("method", "calls"), [(Plain(), 1), (SAM(0.1), 2), (FunctionalSAM(0.1), 2)])
def test_features_is_called_once_a_pass(method, calls):
    seen = []
    value_and_grad(lambda p, b: seen.append(None) or mlp(p, b), method)(params(), batch())
    assert len(seen) == calls


def test_features_may_be_rematerialised():
    def inner(p, b):
        out = mlp(p, b)
        return out.hidden, out.weight, out.labels, (b["x"][:, 0] > 0) * 1.0

    features = lambda p, b: LinearHead(*jax.checkpoint(inner)(p, b))
    without = lambda p, b: LinearHead(*inner(p, b))
    for batches in (batch(), MicroBatches([batch(1), batch(2)])):
        got = jax.jit(value_and_grad(features, FunctionalSAM(0.3)))(params(), batches)[1]
        assert distance(got, jax.jit(value_and_grad(without, FunctionalSAM(0.3)))(params(), batches)[1]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"precondition": "adam"}], ids=["plain", "adam"])
def test_hidden_cut_on_a_part_of_one_batch_computes_its_head_once(options, monkeypatch):
    """As micro-batches the two parts have a head each, and the same gradient."""
    evaluated, cotangent = [], heads.cotangent
    monkeypatch.setattr(heads, "cotangent", lambda *given, **more: evaluated.append(1) or cotangent(*given, **more))
    method = FunctionalSAM(0.3, fraction=1 / 4, strength=0.7, cut="hidden", **options)
    with jax.enable_x64(True):
        whole, p = jax.tree.map(jnp.asarray, (batch_of(12, 1), values()))
        parts = [jax.tree.map(lambda x, i=i: x[i::4], whole) for i in range(4)]
        state = moments(p, jax.tree.map(jnp.square, p))
        grad = value_and_grad(mlp, method, b2=B2)
        (_, one), g = grad(p, whole, state)
        assert len(evaluated) == 1
        (_, other), expected = grad(p, MicroBatches(parts), state)
        assert len(evaluated) > 2
        assert distance(g, expected) < 1e-13
        for name in ("loss", "weight", "base_norm", "grad_norm", "perturbation_norm", "bad_label"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-13)
