"""`sync="local"`: each data shard along its own perturbation, against the shards taken one by one."""

from __future__ import annotations

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import B2, EPS, METHODS, adam_state, batch_of, distance, mlp, moments, values

from fsam_core.jax import FunctionalSAM, LinearHead, Memory, MicroBatches, UserError, mean_loss, value_and_grad
from fsam_core.jax.curvature import Curvature

SHARDS, ROWS = 4, 3  # conftest.py asks for four devices


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((SHARDS,), ("data",), axis_types=(AxisType.Auto,))


def problem():
    """(params, Adam state, batch whose shards have 3, 2, 1 and 0 targets)."""
    params = jax.tree.map(jnp.asarray, values())
    nu = jax.tree.map(jnp.asarray, moments(values()))
    batch = batch_of(SHARDS * ROWS, 1)
    hidden = [i * ROWS + j for i in range(SHARDS) for j in range(ROWS) if j < i]
    labels = np.abs(batch["y"])
    labels[hidden] = -1
    return params, adam_state(params, nu), jax.tree.map(jnp.asarray, {**batch, "y": labels})


def one_by_one(grad, params, batches, state):
    """(loss, ĝ) as the definition has it: Σ N_i ĝ_i / Σ N_i over the shards i of all micro-batches."""
    cut = lambda i: jax.tree.map(lambda x: x[i * ROWS : (i + 1) * ROWS], batches)
    found = [grad(params, cut(i), state) for i in range(SHARDS)]
    weights = [info.weight for (_, info), _ in found]
    assert len({float(w) for w in weights}) == SHARDS  # unequal, and 0 for one
    mean = lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)) / sum(weights)
    return mean(*(loss for (loss, _), _ in found)), jax.tree.map(mean, *(g for _, g in found))


NAMES = ["functional", "precond-functional", "sam", "logit"]
QUICK = [("functional", 1), ("precond-functional", 2)]
CASES = [(name, micro) for name in NAMES for micro in (1, 2) if (name, micro) not in QUICK]


@pytest.mark.parametrize(("name", "micro"), [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in CASES)])
def test_local_correction_is_the_mean_over_shards(mesh, name, micro):
    with jax.enable_x64(True):
        params, state, batch = problem()
        batches = MicroBatches([batch, {**batch, "x": batch["x"][::-1]}][:micro])
        options = {"b2": B2, "eps": EPS, "clip_norm": 0.1}
        alone, sharded = (value_and_grad(mlp, METHODS[name], **options, **more) for more in ({}, {"sync": "local"}))
        loss, expected = one_by_one(alone, params, batches, state)
        with jax.set_mesh(mesh):
            placed = jax.device_put(batches, NamedSharding(mesh, PartitionSpec("data")))
            (got_loss, info), got = jax.jit(sharded)(params, placed, state)
        assert distance(got, expected) < 1e-12
        assert float(got_loss) == pytest.approx(float(loss), rel=1e-12)
        assert float(info.weight) == micro * 6
        # And it is another gradient than the exact one's.
        assert distance(got, alone(params, batches, state)[1]) > 1e-4


def test_gradients_are_reduced_once_a_step(mesh):
    """The exact method reduces g, waits for it, and reduces g'."""
    params, state, batch = problem()
    method = FunctionalSAM(0.3, precondition="adam")
    large = {}
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        for sync in ("global", "local"):
            grad = value_and_grad(mlp, method, b2=B2, sync=sync)
            text = jax.jit(grad).lower(params, placed, state).compile().as_text()
            shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
            large[sync] = sum(int(np.prod([int(n) for n in dims.split(",")])) for s in shapes for dims in
                              re.findall(r"f32\[([\d,]+)\]", s))  # fmt: skip
    values_of_a_gradient = sum(x.size for x in jax.tree.leaves(params))
    assert large == {"global": 2 * values_of_a_gradient, "local": values_of_a_gradient}


def test_dropout_differs_from_shard_to_shard(mesh):
    def dropout(p, batch):
        out = mlp(p, batch)
        keep = jax.random.bernoulli(batch["key"], 0.5, out.hidden.shape)
        return LinearHead(out.hidden * keep * 2, out.weight, out.labels)

    params, _, batch = problem()
    batch["y"] = jnp.abs(batch["y"])
    grad = value_and_grad(dropout, FunctionalSAM(0.1), sync="local")
    with jax.set_mesh(mesh):
        (loss, _), _ = jax.jit(grad)(params, {**batch, "key": jax.random.key(0)}, None)
    cut = lambda i: jax.tree.map(lambda x: x[i * ROWS : (i + 1) * ROWS], batch)
    key = lambda i: jax.random.fold_in(jax.random.key(0), i)
    alone = value_and_grad(dropout, FunctionalSAM(0.1))
    losses = [alone(params, {**cut(i), "key": key(i)})[0][0] for i in range(SHARDS)]
    assert float(loss) == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_unsupported_setup_is_refused(mesh):
    params, _, batch = problem()
    grad = value_and_grad(mlp, FunctionalSAM(0.1), sync="local")
    with pytest.raises(UserError, match=r"axis: the mesh in use has no axis 'data'; it has none: call the step under"):
        grad(params, batch)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="10 rows cannot be cut into the 4 shards of axis 'data'"):
        grad(params, jax.tree.map(lambda x: x[:10], batch))
    with pytest.raises(UserError, match="sync must be global or local, got 'none'"):
        value_and_grad(mlp, FunctionalSAM(0.1), sync="none")


@pytest.mark.slow
def test_head_counts_the_rows_of_its_shard(mesh):
    """Budgets are for a device, and inside the shards the rows are one device's already."""
    with jax.enable_x64(True):
        params, state, batch = problem()
        options = {"b2": B2, "eps": EPS, "memory": Memory(chunk_bytes=400, row_axes=("data",))}
        with jax.set_mesh(mesh):
            few = jax.jit(value_and_grad(mlp, METHODS["functional"], sync="local", **options))(params, batch, state)
            one = jax.jit(value_and_grad(mlp, METHODS["functional"], sync="local", b2=B2))(params, batch, state)
        assert distance(few[1], one[1]) < 1e-12


def test_old_style_random_key_is_folded_as_a_typed_one_is(mesh):
    def noisy(p, batch):
        noise = jax.random.normal(batch["key"], batch["x"].shape, batch["x"].dtype)
        return mlp(p, {**batch, "x": batch["x"] + 0.1 * noise})

    with jax.enable_x64(True), jax.set_mesh(mesh):
        params, _, batch = problem()
        grad = jax.jit(value_and_grad(noisy, FunctionalSAM(0.3), sync="local"))
        old = grad(params, {**batch, "key": jax.random.PRNGKey(3)})[1]
        assert distance(old, grad(params, {**batch, "key": jax.random.key(3)})[1]) == 0
        assert distance(old, grad(params, {**batch, "key": jax.random.key(4)})[1]) > 1e-3


# --- axes that JAX's types know ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["set_mesh", "arrays alone"])
@pytest.mark.parametrize("name", ["adamw", "precond-functional", "sam"])
def test_explicit_axes_are_those_of_one_device(name, context):
    """`jax.make_mesh` makes Explicit axes unless it is told otherwise."""
    mesh = jax.make_mesh((SHARDS,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)
    with jax.enable_x64(True):
        params, state, batch = problem()
        batch["name"] = "text"
        grad = value_and_grad(mlp, METHODS[name], b2=B2, eps=EPS)
        (loss, info), expected = grad(params, batch, state)
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
        name = batch.pop("name")
        rows = put(batch, "data")
        with jax.set_mesh(mesh) if context == "set_mesh" else contextlib.nullcontext():
            one = jax.jit(lambda p, b, s: grad(p, {**b, "name": name}, s))
            (got_loss, got_info), got = one(put(params), rows, put(state))
            assert jax.typeof(got["w"]) == jax.typeof(put(params)["w"])
            loss_only = jax.jit(mean_loss(mlp))(put(params), rows)
        assert float(got_loss) == pytest.approx(float(loss), rel=1e-12)
        assert float(got_info.grad_norm) == pytest.approx(float(info.grad_norm), rel=1e-12)
        assert float(loss_only) == pytest.approx(float(mean_loss(mlp)(params, batch)), rel=1e-12)
        assert distance(got, expected) < 1e-12


def test_explicit_axes_outside_of_jit_go_with_a_count_on_one_device():
    mesh = jax.make_mesh((SHARDS,), ("data",))
    with jax.enable_x64(True):
        params, state, batch = problem()
        grad = value_and_grad(mlp, METHODS["precond-functional"], b2=B2, eps=EPS)
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
        moments_alone = state._replace(mu=put(state.mu), nu=put(state.nu))  # as tx.init leaves them
        got = grad(put(params), put(batch, "data"), moments_alone)[1]
        assert distance(jax.device_get(got), grad(params, batch, state)[1]) < 1e-12


def test_curvature_on_explicit_axes_is_that_of_one_device():
    mesh = jax.make_mesh((SHARDS,), ("data",))
    with jax.enable_x64(True):
        params, _, batch = problem()
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
        one, several = Curvature(mlp, params, batch), Curvature(mlp, put(params), put(batch, "data"))
        assert several.loss == pytest.approx(one.loss, rel=1e-12)
        for a, b in zip(several.both(put(params)), one.both(params), strict=True):
            assert distance(jax.device_get(a), b) < 1e-12


def test_explicit_axes_go_with_sync_local(mesh):
    explicit = jax.make_mesh((SHARDS,), ("data",))
    with jax.enable_x64(True):
        params, state, batch = problem()
        grad = jax.jit(value_and_grad(mlp, METHODS["precond-functional"], b2=B2, eps=EPS, sync="local"))
        found = []
        for one in (mesh, explicit):
            put = lambda tree, *spec, one=one: jax.device_put(tree, NamedSharding(one, PartitionSpec(*spec)))
            with jax.set_mesh(one):
                found.append(jax.device_get(grad(put(params), put(batch, "data"), put(state))[1]))
        assert distance(*found) < 1e-12


def test_shard_map_that_checks_what_varies_is_refused(mesh):
    params, _, batch = problem()
    grad = value_and_grad(mlp, METHODS["functional"])

    def local(check):
        mean = lambda p, b: jax.lax.pmean(grad(p, b)[1], "data")
        specs = PartitionSpec(), PartitionSpec("data")
        return jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check))

    assert local(False)(params, batch)["w"].shape == params["w"].shape
    with pytest.raises(UserError, match=r"shard_map whose values vary over data, .* check_vma=False"):
        local(True)(params, batch)


def test_numbers_that_may_be_a_random_key_are_refused(mesh):
    two = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params, _, batch = problem()
    rows = jax.tree.map(lambda x: x[:2], batch) | {"length": jnp.array([3, 5], jnp.uint32)}
    with pytest.raises(UserError, match=r"fraction: a uint32 array .* \(2,\), may be a random key or data of its 2"):
        value_and_grad(mlp, FunctionalSAM(0.1, fraction=0.5))(params, rows)
    with jax.set_mesh(two), pytest.raises(UserError, match=r"sync='local': a uint32 array"):
        value_and_grad(mlp, FunctionalSAM(0.1), sync="local")(params, rows)
