"""Params of the JAX step that are no plain tree of float32 arrays."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_model import RHO, arrays, features, head_of, params
from problems import B2, distance

from fsam_core.jax import (
    SAM,
    FunctionalSAM,
    LinearHead,
    Logits,
    UserError,
    carry_of,
    skip_nonfinite,
    value_and_grad,
)


def test_integer_leaves_do_not_move_and_have_zero_gradients():
    extra = {"steps": jnp.int32(3), "table": jnp.arange(6), "mask": jnp.ones(5, bool), "nothing": None}
    p = {**params(), **extra}
    scaled = lambda p, b: LinearHead(jnp.tanh(b[0] @ p["a"]) * p["mask"], p["w"], b[1] * 1 + 0 * p["steps"])
    groups = {"train": optax.adamw(1e-2, b2=B2), "fixed": optax.set_to_zero()}
    tx = skip_nonfinite(optax.partition(groups, {k: "train" if k in params() else "fixed" for k in p}))
    state, method = tx.init(p), FunctionalSAM(RHO, precondition="adam")
    _, g = jax.jit(value_and_grad(scaled, method, b2=B2))(p, arrays(), state)
    expected = value_and_grad(features, method, b2=B2)(params(), arrays(), optax.adamw(1e-2).init(params()))[1]
    assert distance({k: g[k] for k in "aw"}, expected) < 1e-6
    assert {k: (x.dtype, x.shape) for k, x in g.items() if x is not None and k in extra} == {
        k: (x.dtype, x.shape) for k, x in extra.items() if x is not None
    }
    assert not any(jnp.any(g[k]) for k in ("steps", "table", "mask"))
    updates, _ = tx.update(g, state, p)
    after = optax.apply_updates(p, updates)
    assert int(after["steps"]) == 3
    assert jax.tree.structure(after) == jax.tree.structure(p)


def test_integer_leaves_are_in_the_carry():
    p = {**params(), "steps": jnp.int32(3)}
    method = SAM(RHO, ascent="previous")
    grad = jax.jit(value_and_grad(features, method))
    _, g, carry = grad(p, arrays(), None, carry_of(method, p))
    _, again, carry = grad(p, arrays(), None, carry)
    assert jax.tree.structure(carry.previous) == jax.tree.structure(p)
    assert distance({k: again[k] for k in "aw"}, {k: g[k] for k in "aw"}) > 1e-3


def test_random_key_among_the_params_has_a_gradient_without_values():
    p = {**params(), "key": jax.random.key(0)}
    noisy = lambda p, b: head_of(p, b[0] + jax.random.normal(p["key"], b[0].shape), b[1])
    g = value_and_grad(noisy, FunctionalSAM(RHO))(p, arrays())[1]
    assert g["key"].dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    ("leaf", "says"), [(1.5, "got c of type float"), (jnp.ones(2, complex), "got c of type complex64")]
)
def test_params_that_are_no_real_arrays_are_refused(leaf, says):
    with pytest.raises(UserError, match=f"params: every leaf must be a real array, {says}"):
        value_and_grad(features, FunctionalSAM(RHO))({**params(), "c": leaf}, arrays())


def test_a_module_of_nnx_is_refused_and_its_parts_train():
    class Model(nnx.Module):
        def __init__(self):
            self.norm, self.head = nnx.BatchNorm(6, rngs=nnx.Rngs(0)), nnx.Linear(6, 9, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.norm(x))

    def head(model, batch):
        return Logits(model(batch[0]), lambda z: (z**2).mean())

    with pytest.raises(UserError, match=r"params: an nnx.Module holds more .* nnx.split\(module, nnx.Param, ...\)"):
        value_and_grad(head, FunctionalSAM(RHO))(Model(), arrays())
    graph, p, rest = nnx.split(Model(), nnx.Param, ...)

    def of(p, batch):
        model = nnx.merge(graph, p, rest, copy=True)
        return head(model, batch), nnx.state(model, nnx.Not(nnx.Param))

    method, state = FunctionalSAM(RHO, precondition="adam"), optax.adamw(1e-2, b2=B2).init(p)
    (_, _, moved), grads = value_and_grad(of, method, b2=B2, has_aux=True)(p, arrays(), state)
    assert jax.tree.structure(grads) == jax.tree.structure(p)
    assert not np.array_equal(moved["norm"]["mean"][...], rest["norm"]["mean"][...])


def test_params_of_eight_bits_are_refused():
    with pytest.raises(UserError, match="params: c is of float8_e4m3fn, which takes no update; keep it wider"):
        value_and_grad(features, FunctionalSAM(RHO))({**params(), "c": jnp.zeros(3, jnp.float8_e4m3fn)}, arrays())


@pytest.mark.parametrize("options", [{"precondition": "adam"}, {"precondition": lambda a, g, v: g / (1 + jnp.sqrt(v))}])
def test_float32_params_stay_float32_in_a_program_of_64_bits(options):
    with jax.enable_x64(True):
        p = jax.tree.map(lambda x: x.astype(jnp.float32), params())
        x, y = arrays()
        grad = value_and_grad(features, FunctionalSAM(RHO, **options), b2=B2)
        given = p, (x.astype(jnp.float32), y), optax.adamw(1e-2, b2=B2).init(p)
        large = re.findall(r"f64\[\d+,[\d,]+\]", str(jax.make_jaxpr(grad)(*given)))
        assert not large
        kinds = [jax.eval_shape(functools.partial(grad, kind=kind), *given) for kind in ("corrected", "plain")]
        assert jax.tree.map(lambda x: x.dtype, kinds[0]) == jax.tree.map(lambda x: x.dtype, kinds[1])


def test_boxes_of_flax_keep_their_names_and_moments():
    box = lambda x: nn.Partitioned(x, names=(None,) * x.ndim)
    p = jax.tree.map(box, params())
    boxed = lambda p, b: features(nn.meta.unbox(p), b)
    method = FunctionalSAM(RHO, precondition="adam", scope=lambda name: {"a": True, "w": False}[name])
    state = optax.adamw(1e-2, b2=B2)
    g = jax.jit(value_and_grad(boxed, method, b2=B2))(p, arrays(), state.init(p))[1]
    expected = value_and_grad(features, method, b2=B2)(params(), arrays(), state.init(params()))[1]
    assert isinstance(g["a"], nn.Partitioned)
    assert distance(nn.meta.unbox(g), expected) < 1e-6
