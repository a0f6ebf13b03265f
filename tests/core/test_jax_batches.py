"""What the JAX step takes and gives: batches of any type, aux, and debugging of NaN."""

from __future__ import annotations

import collections
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax_model import RHO, arrays, features, head_of, params
from problems import B2, METHODS, adam_state, batch_of, distance, moments, values
from stacks import BLOCKS, I, staged
from stacks import weights as stack_weights

from fsam_core.jax import (
    SAM,
    FunctionalSAM,
    Heads,
    Logits,
    LogitSAM,
    MicroBatches,
    Outputs,
    Plain,
    Staged,
    UserError,
    carry_of,
    mean_loss,
    value_and_grad,
)

# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Example:
    x: jax.Array
    y: jax.Array


@flax.struct.dataclass
class Struct:
    x: jax.Array
    y: jax.Array


Pair = collections.namedtuple("Pair", "x y")
by_name, by_index = (lambda b: (b["x"], b["y"])), (lambda b: (b[0], b[1]))
by_field = lambda b: (b.x, b.y)
KINDS = {
    "list": (lambda x, y: [x, y], by_index, True),
    "tuple": (lambda x, y: (x, y), by_index, True),
    "namedtuple": (Pair, by_field, True),
    "dict": (lambda x, y: {"x": x, "y": y}, by_name, True),
    "UserDict": (lambda x, y: collections.UserDict(x=x, y=y), by_name, False),
    "dataclass": (Example, by_field, False),
    "struct": (Struct, by_field, True),
    "nested list": (lambda x, y: [[x], {"labels": [y]}], lambda b: (b[0][0], b[1]["labels"][0]), True),
}


@pytest.mark.parametrize("fraction", [1.0, 1 / 4])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_any_type_is_one_batch(kind, fraction):
    make, pick, in_jit = KINDS[kind]
    grad = value_and_grad(lambda p, b: head_of(p, *pick(b)), FunctionalSAM(RHO, fraction=fraction))
    if fraction == 1:
        expected = functional(params(), *arrays())
    else:
        plain = lambda rows: jax.jit(jax.grad(nll))(params(), *(x[rows] for x in arrays()))
        S, B = slice(None, None, 4), slice(None)
        of_S = functional(params(), *(x[S] for x in arrays()), along=plain(B))
        expected = jax.tree.map(lambda b, moved, s: b + moved - s, plain(B), of_S, plain(S))
    grad = jax.jit(grad) if in_jit else grad
    assert distance(grad(params(), make(*arrays()))[1], expected) < 2e-6
    micro = MicroBatches([make(*(x[:6] for x in arrays())), make(*(x[6:] for x in arrays()))])
    if fraction == 1:
        assert distance(grad(params(), micro)[1], expected) < 2e-6


def logits_of(p, x):
    return jnp.tanh(x @ p["a"]) @ p["w"].T


def mean_nll(z, y):
    return -jnp.sum(jnp.where(y >= 0, jax.nn.log_softmax(z)[jnp.arange(len(y)), y], 0)) / jnp.sum(y >= 0)


def nll(p, x, y):
    return mean_nll(logits_of(p, x), y)


@jax.jit
def functional(p, x, y, along=None):
    """The gradient of the method, by autograd alone."""
    g = jax.grad(nll)(p, x, y) if along is None else along
    moved = jax.tree.map(lambda w, d: w + RHO * d / optax.tree.norm(g), p, g)
    zbar = jax.grad(mean_nll)(logits_of(p, x), y)
    return jax.grad(lambda p: jnp.sum(logits_of(p, x) * zbar))(moved)


def test_micro_batches_pass_through_jax_transformations():
    given = MicroBatches([arrays(1), arrays(2)])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]
    assert paths == ["[0][0]", "[0][1]", "[1][0]", "[1][1]"]
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(given)
    assert isinstance(doubled, MicroBatches)
    np.testing.assert_array_equal(doubled.batches[1][1], 2 * arrays(2)[1])
    with pytest.raises(UserError, match="MicroBatches: got no micro-batch"):
        MicroBatches([])


def test_staged_model_takes_a_batch_that_is_no_pytree():
    b = jax.tree.map(jnp.asarray, batch_of(8, i=I))
    grad = value_and_grad(staged("jax", 1), FunctionalSAM(RHO, scope="top:2"), blocks=BLOCKS)
    p = jax.tree.map(jnp.asarray, stack_weights())
    assert distance(grad(p, collections.UserDict(b))[1], grad(p, b)[1]) == 0


# --- has_aux ----------------------------------------------------------------------------------------------------------


def with_aux(p, b):
    head = head_of(p, *b)
    return head, {"hidden": head.hidden, "norm": jnp.linalg.norm(p["a"])}


@pytest.mark.parametrize("method", [Plain(), SAM(RHO), FunctionalSAM(RHO), LogitSAM(RHO)], ids=lambda m: m.path)
def test_aux_is_that_of_the_pass_at_theta(method):
    (loss, _, aux), g = jax.jit(value_and_grad(with_aux, method, has_aux=True))(params(), arrays())
    (expected, _), expected_g = value_and_grad(lambda p, b: head_of(p, *b), method)(params(), arrays())
    assert float(loss) == pytest.approx(float(expected))
    assert distance(g, expected_g) < 1e-6
    np.testing.assert_allclose(aux["hidden"], jnp.tanh(arrays()[0] @ params()["a"]), rtol=1e-5)
    assert float(mean_loss(with_aux, has_aux=True)(params(), arrays())) == pytest.approx(float(loss))


@pytest.mark.parametrize("options", [{}, {"fraction": 1 / 3}, {"ascent": "micro"}], ids=str)
@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 5, 4)], ids=["scanned", "ragged"])
def test_aux_of_micro_batches_is_a_list_in_their_order(sizes, options):
    batches = [arrays(seed, n) for seed, n in enumerate(sizes, 1)]
    grad = jax.jit(value_and_grad(with_aux, FunctionalSAM(RHO, **options), has_aux=True))
    (_, _, aux), _ = grad(params(), MicroBatches(batches))
    assert len(aux) == 3
    for found, (x, _) in zip(aux, batches, strict=True):
        np.testing.assert_allclose(found["hidden"], jnp.tanh(x @ params()["a"]), rtol=1e-5)


def test_aux_of_a_staged_model():
    b = jax.tree.map(jnp.asarray, batch_of(8, i=I))
    p, whole = jax.tree.map(jnp.asarray, stack_weights()), staged("jax", 1)
    both = Staged(whole.prefix, lambda p, x, b: (whole.suffix(p, x, b), jnp.sum(x)))
    grad = value_and_grad(both, FunctionalSAM(RHO, scope="top:2"), blocks=BLOCKS, has_aux=True)
    (_, _, aux), _ = grad(p, b)
    assert float(aux) == pytest.approx(float(jnp.sum(whole.prefix(p, b))), rel=1e-5)


def test_staged_model_with_several_heads_equals_the_whole():
    b = jax.tree.map(jnp.asarray, batch_of(8, i=I))
    p, whole = jax.tree.map(jnp.asarray, stack_weights()), staged("jax", 1)
    balance = lambda p, x, b: Outputs(x @ p["block_2_a"], lambda z: jnp.mean(z**2))
    both = Staged(whole.prefix, lambda p, x, b: Heads([whole.suffix(p, x, b), balance(p, x, b)], [1.0, 0.5]))
    for cut in ("logits", "hidden"):
        method = FunctionalSAM(RHO, scope="top:2", cut=cut)
        got = value_and_grad(both, method, blocks=BLOCKS)(p, b)[1]
        expected = value_and_grad(lambda p, b: both(p, b), method, blocks=BLOCKS)(p, b)[1]
        assert distance(got, expected) < 1e-5
        assert distance(got, value_and_grad(whole, method, blocks=BLOCKS)(p, b)[1]) > 1e-2
    leaky = Staged(whole.prefix, lambda p, x, b: Logits(x @ p["head"].T, lambda z: jnp.sum(z) + jnp.sum(x)))
    with pytest.raises(UserError, match="Logits: loss reaches prefix by another way"):
        value_and_grad(leaky, FunctionalSAM(RHO, scope="top:2"), blocks=BLOCKS)(p, b)


STATE = adam_state(params(), jax.tree.map(jnp.asarray, moments(values(dtype="float32"))))
NO_AUX = {
    "row-wise S": (FunctionalSAM(RHO, fraction=1 / 4), "has_aux: S, 0.25 of the batch, cuts a batch in two"),
    "known ascent": (SAM(RHO, ascent="momentum"), "has_aux: .* does not run the model at θ; use the full ascent"),
    "ascent of a part": (SAM(RHO, ascent="part", ascent_fraction=1 / 2), "has_aux: S, 0.5"),
}


@pytest.mark.parametrize(("method", "says"), NO_AUX.values(), ids=NO_AUX.keys())
def test_aux_that_would_not_be_whole_is_refused(method, says):
    with pytest.raises(UserError, match=says):
        value_and_grad(with_aux, method, has_aux=True)(params(), arrays(), STATE)


def test_aux_that_is_not_there_is_refused():
    two = MicroBatches([arrays(1), arrays(2)])
    with pytest.raises(UserError, match=r"has_aux: .* does not run the model at θ on the whole batch"):
        value_and_grad(with_aux, SAM(RHO, ascent="part", ascent_fraction=1 / 2), has_aux=True)(params(), two)
    with pytest.raises(UserError, match="has_aux: neither pass_axis nor sync='local'"):
        value_and_grad(with_aux, SAM(RHO), has_aux=True, sync="local")
    with pytest.raises(UserError, match=r"features must return \(head, aux\) with has_aux=True, got LinearHead"):
        value_and_grad(lambda p, b: head_of(p, *b), SAM(RHO), has_aux=True)(params(), arrays())


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def debug_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("method", METHODS)
def test_healthy_step_passes_under_debug_nans(debug_nans, method, jit):
    method = METHODS[method]
    for weight in (None, jnp.ones(12)):
        weighted = lambda p, b, weight=weight: dataclasses.replace(head_of(p, *b), token_weights=weight)
        grad = value_and_grad(weighted, method, b2=B2, clip_norm=1.0)
        for given in (arrays(), MicroBatches([arrays(1), arrays(2)])):
            for state in (STATE, optax.adamw(1e-2).init(params())):
                (loss, info), _ = (jax.jit(grad) if jit else grad)(params(), given, state)
                assert bool(info.finite)
                assert np.isfinite(loss)
                assert not any(np.isnan(x) for x in info)


def test_auxiliary_loss_passes_under_debug_nans(debug_nans):
    both = lambda p, b: Heads([features(p, b), Outputs(b[0] @ p["a"], lambda z: jnp.mean(z**2))], [1.0, 0.1])
    (_, info), _ = value_and_grad(both, FunctionalSAM(RHO))(params(), arrays())
    assert bool(info.finite)


def test_a_nan_still_stops_under_debug_nans(debug_nans):
    x, y = arrays()
    with pytest.raises(FloatingPointError, match="nan"):
        jax.jit(value_and_grad(features, FunctionalSAM(RHO)))(params(), (x.at[0].set(jnp.inf) * 0, y))


# --- shards -----------------------------------------------------------------------------------------------------------


def test_local_sync_has_heads_labels_and_leaks():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, y = arrays(n=16)
    two = lambda p, b: Heads([features(p, b), Logits(b[0] @ p["a"], lambda z: jnp.mean(z**2))], weights=[1.0, 0.1])
    leaky = lambda p, b: Logits(b[0] @ p["a"], lambda z: jnp.sum(z) + jnp.sum(p["w"]))
    with jax.set_mesh(mesh):
        grad = jax.jit(value_and_grad(two, FunctionalSAM(RHO), sync="local"))
        (_, info), g = grad(params(), (x, y))
        assert int(info.bad_label) == -1
        assert int(grad(params(), (x, y.at[9].set(77)))[0][1].bad_label) == 77
        with pytest.raises(UserError, match="Logits: loss reaches w"):
            value_and_grad(leaky, FunctionalSAM(RHO), sync="local")(params(), (x, y))
    each = [value_and_grad(two, FunctionalSAM(RHO))(params(), (x[i : i + 4], y[i : i + 4])) for i in range(0, 16, 4)]
    weights = [float(info.weight) for (_, info), _ in each]
    mean = jax.tree.map(
        lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)) / sum(weights), *(g for _, g in each)
    )
    assert distance(g, mean) < 1e-5


# --- outside of jax.jit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8,), (8, 6), (8, 8)], ids=str)
def test_micro_batches_of_one_size_are_as_those_of_several(sizes):
    """Text goes to `features` as it is, and a label that cannot be right raises."""
    seen = []

    def features(p, b):
        seen.append(b["id"][0])
        return head_of(p, b["x"], b["y"])

    def rows(n, bad=0):
        x, y = arrays(n=n)
        return {"x": x, "y": y + bad, "id": np.array(["text"] * n)}

    grad = value_and_grad(features, FunctionalSAM(RHO))
    grad(params(), MicroBatches([rows(n) for n in sizes]))
    assert set(seen) == {"text"}
    with pytest.raises(UserError, match="labels must be below V"):
        grad(params(), MicroBatches([*(rows(n) for n in sizes[:-1]), rows(sizes[-1], 99)]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_unsigned_labels_are_integers(dtype):
    x, y = arrays()
    y = abs(y).astype(dtype)
    loss = lambda kind: value_and_grad(lambda p, b: head_of(p, *b), Plain())(params(), (x, y.astype(kind)))[0][0]
    assert loss(dtype) == loss(np.int32)


def test_carry_with_the_last_norms_can_be_donated():
    method = FunctionalSAM(RHO, norm_from="previous")
    grad = value_and_grad(lambda p, b: head_of(p, *b), method)
    step = jax.jit(lambda p, carry, b: grad(p, b, None, carry)[1:], donate_argnums=1)
    _, carry = step(params(), carry_of(method, params()), arrays())
    assert float(step(params(), carry, arrays())[1].norms[0]) > 0


@pytest.mark.parametrize("staged", [False, True])
def test_features_may_take_items_out_of_a_batch(staged):
    def features(p, b):
        return head_of(p, b.pop("x"), b.pop("y"))

    suffix = lambda p, x, b: head_of(p, b.pop("x"), b.pop("y"))
    of = Staged(lambda p, b: b["x"] * 0 + b.pop("z", 1), suffix) if staged else features
    x, y = arrays()
    method = FunctionalSAM(RHO, scope=lambda name: name == "w")
    given = {"x": x, "y": y}
    got, expected = (
        value_and_grad(f, method)(params(), b)[1] for f, b in ((of, given), (lambda p, b: head_of(p, *b), (x, y)))
    )
    assert given.keys() == {"x", "y"}
    assert distance(got, expected) < 1e-6
