"""`adamw` in plain PyTorch and JAX: against the oracle, torch.optim.AdamW, optax.adamw, and their checkpoints."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from operations import back

from fsam_kernels import spec
from fsam_kernels.torch import Adam, perturb, preconditioned_norm
from fsam_kernels.torch.adamw import AdamW, Update, adamw
from fsam_kernels.torch.rounding import Rounding
from fsam_kernels.xla.adamw import adamw as of_xla

SHAPES = [(300, 40), (7,), (1,), (), (0,), (3, 1, 2)]
SETTINGS = {"lr": 1e-2, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# A hundred updates of about lr each, every one rounded: half a unit in the last place of the weight a step, as a random
# walk, against the oracle; two implementations part by as much. In units of 2⁻²⁴ of the largest weight of the tensor.
AFTER_100 = 60


def tensors(seed: int, shapes=SHAPES, scale: float = 1.0) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make) * scale for shape in shapes]


def params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(x.to(dtype)) for x in tensors(0)]


def walk(optimizer: torch.optim.Optimizer, weights, steps: range, **options) -> None:
    for t in steps:
        for p, g in zip(weights, tensors(100 + t), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step(**options)


def far(xs, ys) -> float:
    """The largest difference, in units of 2⁻²⁴ of the tensor's largest element."""
    pairs = [(back(x), back(y)) for x, y in zip(xs, ys, strict=True)]
    return max(np.abs(x - y).max() / np.abs(y).max() / 2**-24 for x, y in pairs if x.size)


def detached(weights) -> list[torch.Tensor]:
    return [p.detach() for p in weights]


def own(weights, **options) -> AdamW:
    return AdamW(weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)


def theirs(weights, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)


def oracle(weights, steps: int, clip: float = 1.0):
    theta = [back(p) for p in weights]
    m, v = [0 * x for x in theta], [0 * x for x in theta]
    for t in range(steps):
        rows = zip(theta, tensors(100 + t), m, v, strict=True)
        moved = [spec.adamw(p, back(g), a, b, step=t + 1, clip=clip, **SETTINGS) for p, g, a, b in rows]
        theta, m, v = (list(x) for x in zip(*moved, strict=True))
    return [torch.from_numpy(np.asarray(x)) for x in theta]


@pytest.mark.parametrize("fused", [False, True])
def test_hundred_steps_match_torch_and_the_oracle(fused):
    mine, others = params(), params()
    walk(own(mine), mine, range(100))
    walk(theirs(others, fused=fused), others, range(100))
    want = oracle(tensors(0), 100)
    assert far(detached(mine), detached(others)) <= AFTER_100
    assert far(detached(mine), want) <= AFTER_100
    assert far(detached(others), want) <= AFTER_100


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_hundred_steps_match_optax_and_the_oracle(decay):
    theta = {"a": jnp.asarray(tensors(0)[0].numpy()), "b": [jnp.asarray(tensors(0)[1].numpy()), jnp.float32(0.5)]}
    optimizer = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=decay)
    state, other, mine = optimizer.init(theta), theta, theta
    m = v = jax.tree.map(jnp.zeros_like, theta)
    step = jax.jit(lambda p, g, m, v, t: of_xla(p, g, m, v, step=t, lr=1e-2, b2=0.95, weight_decay=decay))
    exact = [(np.asarray(x, np.float64), 0.0, 0.0) for x in jax.tree.leaves(theta)]
    for t in range(1, 101):
        random = np.random.default_rng(t)
        g = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), theta)
        update, state = optimizer.update(g, state, other)
        other = optax.apply_updates(other, update)
        mine, m, v, _ = step(mine, g, m, v, t)
        settings = {**SETTINGS, "weight_decay": decay}
        exact = [
            spec.adamw(p, x, a, b, step=t, **settings) for (p, a, b), x in zip(exact, jax.tree.leaves(g), strict=True)
        ]
    want = [x for x, _, _ in exact]
    assert far(jax.tree.leaves(mine), jax.tree.leaves(other)) <= AFTER_100
    assert all(
        np.abs(back(x) - y).max() <= AFTER_100 * 2**-24 * np.abs(y).max()
        for x, y in zip(jax.tree.leaves(mine), want, strict=True)
    )


def test_optax_state_is_resumed():
    """Ten steps of optax.adamw, then ten of `adamw` from its count and moments: twenty of optax."""
    theta = {"a": jnp.asarray(tensors(0)[0].numpy()), "b": jnp.float32(0.5)}
    optimizer = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1)
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(t).normal(size=x.shape), jnp.float32), theta)
        for t in range(20)
    ]

    @jax.jit
    def theirs(p, g, state):
        update, state = optimizer.update(g, state, p)
        return optax.apply_updates(p, update), state

    step = jax.jit(lambda p, g, m, v, t: of_xla(p, g, m, v, step=t, lr=1e-2, b2=0.95, weight_decay=0.1))
    other, state = theta, optimizer.init(theta)
    for t, g in enumerate(gradients):
        if t == 10:
            mine, m, v, count = other, state[0].mu, state[0].nu, int(state[0].count)
        other, state = theirs(other, g, state)
    for g in gradients[10:]:
        count += 1
        mine, m, v, _ = step(mine, g, m, v, count)
    assert far(jax.tree.leaves(mine), jax.tree.leaves(other)) <= AFTER_100 / 5
    assert far(jax.tree.leaves(v), jax.tree.leaves(state[0].nu)) <= AFTER_100 / 5


def test_xla_takes_a_tree_of_decays_a_factor_and_writes_a_copy():
    theta = {"a": jnp.ones(3), "b": jnp.ones(2)}
    g = jax.tree.map(lambda x: 0.5 * x, theta)
    zero = jax.tree.map(jnp.zeros_like, theta)
    found = of_xla(
        theta, g, zero, zero, step=1, lr=0.1, weight_decay={"a": 0.5, "b": 0.0}, clip=0.1, copy_dtype="bfloat16"
    )
    for name, decay in (("a", 0.5), ("b", 0.0)):
        want, m, v = spec.adamw(
            np.ones(2),
            np.full(2, 0.5),
            0.0,
            0.0,
            step=1,
            **{**SETTINGS, "lr": 0.1, "b2": 0.999, "weight_decay": decay},
            clip=0.1,
        )
        np.testing.assert_allclose(found.theta[name][:2], want, rtol=1e-6)
        np.testing.assert_allclose(found.exp_avg[name][:2], m, rtol=1e-6)
        np.testing.assert_allclose(found.exp_avg_sq[name][:2], v, rtol=1e-6)
        assert found.copy[name].dtype == jnp.bfloat16
        assert jnp.array_equal(found.copy[name], found.theta[name].astype(jnp.bfloat16))


def test_half_moments_and_weights_keep_their_dtypes_in_xla():
    half = [jnp.ones(4, jnp.bfloat16)]
    found = of_xla(half, [jnp.ones(4)], half, [jnp.ones(4)], step=3, lr=0.1)
    assert [x[0].dtype for x in found[:3]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_wrong_decay_is_noticed():
    """The negative control: decay coupled to the gradient, as in Adam, is far outside the tolerance."""
    mine, others = params(), params()
    walk(own(mine), mine, range(100))
    walk(torch.optim.Adam(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), others, range(100))
    assert far(detached(mine), detached(others)) > 1000 * AFTER_100


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("from_torch", [True, False])
def test_checkpoint_resumes_in_the_other_optimizer(from_torch, fused):
    whole = params()
    walk(own(whole), whole, range(20))
    parts = params()
    first = theirs(parts, fused=fused) if from_torch else own(parts)
    walk(first, parts, range(10))
    second = own(parts) if from_torch else theirs(parts, fused=fused)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(second, parts, range(10, 20))
    assert all(float(state["step"]) == 20 for state in second.state.values())
    assert far(detached(parts), detached(whole)) <= AFTER_100 / 5


def test_state_dicts_are_equal_after_a_step():
    mine, others = params(), params()
    a, b = own(mine), theirs(others)
    walk(a, mine, range(1))
    walk(b, others, range(1))
    x, y = a.state_dict(), b.state_dict()
    assert x["param_groups"] == y["param_groups"]
    for i, state in y["state"].items():
        assert {name: (z.dtype, z.shape, z.device) for name, z in state.items()} == {
            name: (z.dtype, z.shape, z.device) for name, z in x["state"][i].items()
        }
        assert torch.equal(state["step"], x["state"][i]["step"])


def test_weights_without_a_gradient_stay():
    weights = params()
    optimizer = own(weights)
    weights[0].grad = torch.ones_like(weights[0])
    before = detached(weights)[1].clone()
    optimizer.step()
    assert torch.equal(weights[1], before)
    assert set(optimizer.state) == {weights[0]}


def test_bfloat16_moments_stay_so_through_a_checkpoint():
    weights = params(torch.bfloat16)
    optimizer = own(weights, state_dtype=torch.float32)
    walk(optimizer, weights, range(3))
    again = own(weights, state_dtype=torch.float32)
    again.load_state_dict(optimizer.state_dict())
    for p in weights:
        assert again.state[p]["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(again.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
        assert again.state[p]["exp_avg_sq"] is not optimizer.state[p]["exp_avg_sq"]


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_every_array_is_rounded_once_from_float32(weight, moments):
    theta, g, m, v = tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]
    theta, m, v = ([x.to(kind) for x in xs] for xs, kind in ((theta, weight), (m, moments), (v, moments)))
    wide = [[x.float().clone() for x in xs] for xs in (theta, g, m, v)]
    settings = [Update(**SETTINGS, step=3)] * len(theta)
    copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in theta]
    adamw(theta, g, m, v, settings, copy=copies)
    adamw(*wide, settings)
    for xs, ys in zip((theta, m, v, copies), (wide[0], wide[2], wide[3], wide[0]), strict=True):
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("clip", [0.3, torch.tensor(0.3)])
def test_clipping_scales_the_update_and_keeps_the_gradient(clip):
    mine, scaled = ([tensors(i) for i in range(3)] + [[x.square() for x in tensors(3)]] for _ in range(2))
    settings = [Update(**SETTINGS, step=3)] * len(SHAPES)
    scaled[1] = [0.3 * x for x in scaled[1]]
    adamw(*mine, settings, clip=clip)
    adamw(*scaled, settings)
    assert all(torch.equal(x, y) for x, y in zip(mine[1], tensors(1), strict=True))
    assert all(torch.equal(x, y) for i in (0, 2, 3) for x, y in zip(mine[i], scaled[i], strict=True))


def test_the_optimizer_writes_its_copies_and_clips():
    weights = params()
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in weights}
    walk(own(weights, copies=copies), weights, range(5), clip=0.5)
    want = oracle(tensors(0), 5, clip=0.5)
    assert far(detached(weights), want) <= AFTER_100
    assert all(torch.equal(copies[p], p.to(torch.bfloat16)) for p in weights)


@pytest.mark.parametrize("piece", [16, 2**18])
def test_pieces_change_nothing(piece, monkeypatch):
    monkeypatch.setattr("fsam_kernels.torch.direction.CPU_PIECE", piece)
    lists = [tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]]
    copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in lists[0]]
    adamw(*lists, [Update(**SETTINGS, step=3)] * len(SHAPES), copy=copies, rounding=Rounding(True, 1, 2))
    want = spec.rounded_at_random(lists[0][0].numpy(), seed=1, step=2, tensor=0, stream="copy")
    assert np.array_equal(back(copies[0]), want)


def test_random_rounding_keeps_what_small_updates_add_up_to():
    """bfloat16 weights and updates of a tenth of a unit in the last place: rounding to nearest never moves."""
    moved = {}
    for stochastic in (False, True):
        p = [torch.ones(20_000, dtype=torch.bfloat16)]
        m, v = [torch.zeros(20_000)], [torch.zeros(20_000)]
        for t in range(1, 11):
            settings = [Update(lr=2**-8 / 10, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, step=t)]
            adamw(p, [torch.ones(20_000)], m, v, settings, rounding=Rounding(stochastic, 5, t))
        moved[stochastic] = float((1 - p[0].double()).mean() / 2**-8)
    assert moved[False] == 0
    assert abs(moved[True] - 1) < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradient_reaches_its_own_weight_alone(bad):
    lists = [tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]]
    lists[1][0][5, 5] = bad
    copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in lists[0]]
    adamw(*lists, [Update(**SETTINGS, step=3)] * len(SHAPES), copy=copies, rounding=Rounding(True, 1, 2))
    for x in (lists[0][0], copies[0]):
        assert torch.isnan(x).sum() == 1
        assert torch.isnan(x[5, 5])


def test_unsupported_use_is_refused_in_one_sentence():
    weights = params()
    walk(amsgrad := theirs(weights, amsgrad=True), weights, range(1))
    optimizer = own(weights)
    optimizer.load_state_dict(amsgrad.state_dict())
    with pytest.raises(ValueError, match="neither amsgrad nor maximize; use torch"):
        walk(optimizer, weights, range(1))
    some = own(weights, copies={weights[0]: torch.zeros(300, 40)})
    with pytest.raises(ValueError, match="5 of 6 weights with a gradient have none"):
        walk(some, weights, range(1))
    with pytest.raises(ValueError, match="one for each of the 6 tensors is needed, got 0"):
        adamw(*[tensors(i) for i in range(4)], [])
    with pytest.raises(ValueError, match="must lie in memory as the others do"):
        adamw([torch.zeros(4, 4)[:, ::2]], *[[torch.zeros(4, 2)] for _ in range(3)], [Update(**SETTINGS, step=1)])
    half, settings = [torch.zeros(4, dtype=torch.float16)], [Update(**SETTINGS, step=1)]
    with pytest.raises(ValueError, match="at random is to bfloat16 alone"):
        adamw(half, half, [torch.zeros(4)], [torch.zeros(4)], settings, rounding=Rounding(True))


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors_are_updated_by_shard_without_dispatch(mesh):
    """Norm, perturbation and update of DTensors are those of their local parts, and what is new is a DTensor again."""
    from torch.distributed.tensor import DTensor, Shard

    spread = lambda xs: [DTensor.from_local(x.clone(), mesh, [Shard(0)]) for x in xs]
    shapes = [(6, 8), (5,)]
    plain = [tensors(i, shapes) for i in range(3)] + [[x.square() for x in tensors(3, shapes)]]
    theta, g, m, v = (spread(xs) for xs in plain)
    adam = [Adam(0.95, 1e-8, 0.5)] * 2
    want = preconditioned_norm(plain[1], plain[3], adam=adam)
    got = preconditioned_norm(g, v, adam=adam)
    assert not isinstance(got[0], DTensor)
    assert got == want
    moved = perturb(theta, g, v, torch.tensor(0.1), adam=adam)
    assert all(isinstance(x, DTensor) for x in moved)
    for x, y in zip(moved, perturb(plain[0], plain[1], plain[3], torch.tensor(0.1), adam=adam), strict=True):
        assert torch.equal(x.to_local(), y)
    for lists in ((theta, g, m, v), plain):
        adamw(*lists, [Update(**SETTINGS, step=3)] * 2)
    assert all(torch.equal(x.to_local(), y) for x, y in zip(theta, plain[0], strict=True))
    assert theta[0].placements == (Shard(0),)
