"""The update in one pass against the optax chain it stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import B2, batch_of, mlp, values

from fsam_core import FunctionalSAM, UserError
from fsam_core.jax import skip_nonfinite, value_and_grad
from fsam_core.jax.adamw import AdamW
from fsam_core.jax.optimizers import adam_state

RATE = optax.warmup_cosine_decay_schedule(0.0, 0.01, 3, 100)
DECAYS = lambda params: {k: x.ndim > 1 for k, x in params.items()}


def chain(clip_norm: float | None) -> optax.GradientTransformation:
    adamw = optax.adamw(RATE, b2=B2, weight_decay=0.1, mask=DECAYS)
    return skip_nonfinite(optax.chain(*([optax.clip_by_global_norm(clip_norm)] if clip_norm else []), adamw))


def batches(bad: int) -> list[dict]:
    found = [batch_of(12, seed, dtype="float32") for seed in range(100)]
    found[bad]["x"] = found[bad]["x"] * np.inf
    return found


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_hundred_steps_match_the_optax_chain(clip_norm):
    params = jax.tree.map(jnp.asarray, values(dtype="float32"))
    mine = AdamW(RATE, b2=B2, weight_decay=0.1, mask=DECAYS, clip_norm=clip_norm)
    tx = chain(clip_norm)
    grad = value_and_grad(mlp, FunctionalSAM(0.3, precondition="adam"), b2=B2, clip_norm=clip_norm)

    @jax.jit
    def one(params, state, batch):
        (_, info), grads = grad(params, batch, state)
        return mine.step(params, grads, state, info)

    @jax.jit
    def other(params, state, batch):
        _, grads = grad(params, batch, state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    a, a_state = params, mine.init(params)
    b, b_state = params, tx.init(params)
    for i, batch in enumerate(batches(bad=7)):
        before = a
        a, a_state = one(a, a_state, batch)
        b, b_state = other(b, b_state, batch)
        if i == 7:  # what is not finite leaves everything as it was
            assert all(bool((x == y).all()) for x, y in zip(before.values(), a.values(), strict=True))
    assert int(a_state.count) == int(adam_state(b_state).count) == 99
    for k in a:
        # A hundred steps' roundings, each of half an ulp of the weight: 1e-5 of the distance gone.
        np.testing.assert_allclose(a[k], b[k], atol=1e-5 * float(jnp.abs(a[k] - params[k]).max()) * 10)


def test_run_begun_with_optax_resumes():
    params = jax.tree.map(jnp.asarray, values(dtype="float32"))
    tx = chain(1.0)
    grad = value_and_grad(mlp, FunctionalSAM(0.3, precondition="adam"), b2=B2)
    state = tx.init(params)
    batch = batch_of(12, 1, dtype="float32")
    _, grads = grad(params, batch, state)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    (_, info), grads = grad(params, batch, state)
    mine = AdamW(RATE, b2=B2, weight_decay=0.1, mask=DECAYS, clip_norm=1.0)
    got, after = mine.step(params, grads, state, info)
    updates, expected = tx.update(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for k in got:
        np.testing.assert_allclose(got[k], optax.apply_updates(params, updates)[k], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(adam_state(after).nu[k], adam_state(expected).nu[k], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"), ({"clip_norm": 0.0}, "clip_norm must be > 0")],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        AdamW(0.1, **options)


def test_leaves_that_are_no_floats_stay_as_they_are():
    params = jax.tree.map(jnp.asarray, values(dtype="float32")) | {"table": jnp.array([-3, 0, 3, 100], jnp.int32)}
    optimizer = AdamW(0.01, weight_decay=0.5, mask={"a": True, "w": True, "table": True})
    grad = value_and_grad(mlp, FunctionalSAM(0.3, precondition="adam"), b2=0.999)
    state = optimizer.init(params)
    for seed in range(2):
        (_, info), g = grad(params, batch_of(12, seed, dtype="float32"), state)
        new, state = optimizer.step(params, g, state, info)
        assert not jnp.array_equal(new["a"], params["a"])
        np.testing.assert_array_equal(new["table"], params["table"])
        assert new["table"].dtype == jnp.int32
        params = new
