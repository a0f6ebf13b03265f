"""Heads in JAX against autograd of ⟨F(θ+ε), stop_gradient(∂L/∂z(θ))⟩, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import distance

from fsam_core.jax import (
    SAM,
    FunctionalSAM,
    Heads,
    LinearHead,
    Logits,
    LogitSAM,
    Memory,
    MicroBatches,
    Outputs,
    Plain,
    UserError,
    mean_loss,
    skip_nonfinite,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("float64")
IN, D, V, E, RHO = 6, 5, 9, 4, 0.3
FACTORS = [1.0, 0.3, 0.05]


def params() -> dict:
    random = np.random.default_rng(0)
    shapes = {"a": (IN, D), "b": (D, D), "w": (V, D), "bias": (V,), "router": (D, E)}
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


def batch(seed: int = 1, n: int = 12) -> dict:
    random = np.random.default_rng(seed)
    y, y2 = (np.where(random.random(n) < share, -1, random.integers(0, V, n)) for share in (0.2, 0.5))
    return {
        "x": jnp.asarray(random.normal(size=(n, IN))),
        "y": jnp.asarray(y),
        "y2": jnp.asarray(y2),
        "weights": jnp.asarray(random.uniform(0.5, 2, n)),
    }


def trunk(p: dict, x: jax.Array) -> dict:
    """Hidden states of two predictions, and the router's logits."""
    h = jnp.tanh(x @ p["a"])
    return {"h": h, "h2": jnp.tanh(h @ p["b"]), "router": h @ p["router"]}


def balance(out: dict) -> jax.Array:
    """A load-balancing loss: the share of tokens times the mean probability of each expert."""
    chosen = jnp.mean(jax.nn.one_hot(out["chosen"], E), 0)
    return E * jnp.sum(chosen * jnp.mean(jax.nn.softmax(out["router"]), 0))


def several(p: dict, b: dict) -> Heads:
    seen = trunk(p, b["x"])
    chosen = jnp.argmax(seen["router"], -1)
    return Heads(
        [
            LinearHead(seen["h"], p["w"], b["y"], b["weights"], p["bias"]),
            LinearHead(seen["h2"], p["w"].T, b["y2"], layout="DV"),
            Outputs({"router": seen["router"], "chosen": chosen}, balance),
        ],
        weights=FACTORS,
    )


# --- the reference: nothing below calls the package -------------------------------------------------------------------


def outputs(p: dict, b: dict, cut: str = "logits") -> dict:
    """F: what the method holds the cotangent of."""
    seen = trunk(p, b["x"])
    if cut == "hidden":
        return seen
    return {"z": seen["h"] @ p["w"].T + p["bias"], "z2": seen["h2"] @ p["w"].T, "router": seen["router"]}


def loss_of(z: dict, b: dict) -> tuple[jax.Array, jax.Array]:
    """(Σ_k w_k loss_k, the first head's weight) of the logits."""

    def nll(z, y, weights):
        each = jnp.where(y >= 0, -jax.nn.log_softmax(z)[jnp.arange(len(y)), y] * weights, 0)
        return jnp.sum(each), jnp.sum(jnp.where(y >= 0, weights, 0))

    first, count = nll(z["z"], b["y"], b["weights"])
    second, count2 = nll(z["z2"], b["y2"], jnp.ones(len(b["y2"])))
    aux = balance({"router": z["router"], "chosen": jnp.argmax(z["router"], -1)})
    return FACTORS[0] * first / count + FACTORS[1] * second / count2 + FACTORS[2] * aux, count


def mean_of(zs: list[dict], batches: list[dict]) -> jax.Array:
    found = [loss_of(z, b) for z, b in zip(zs, batches, strict=True)]
    return sum(loss * n for loss, n in found) / sum(n for _, n in found)


def reference(batches: list[dict], path: str = "functional", cut: str = "logits") -> dict:
    p = params()
    plain = lambda p: mean_of([outputs(p, b) for b in batches], batches)
    g = jax.grad(plain)(p)
    moved = jax.tree.map(lambda x, d: x + RHO * d / optax.tree.norm(g), p, g)
    if path == "sam":
        return jax.grad(plain)(moved)
    at, pulled_at = (p, moved) if path == "functional" else (moved, p)

    def head(zs, w, bias):  # the loss of what is cut, as a function of the head
        if cut == "logits":
            return mean_of(zs, batches)
        logits = [{"z": z["h"] @ w.T + bias, "z2": z["h2"] @ w.T, "router": z["router"]} for z in zs]
        return mean_of(logits, batches)

    zs = [outputs(at, b, cut) for b in batches]
    zbar, wbar, bias_bar = jax.grad(head, (0, 1, 2))(zs, p["w"], p["bias"])
    inner = lambda p: sum(
        jnp.sum(x * bar)
        for b, bars in zip(batches, zbar, strict=True)
        for x, bar in zip(jax.tree.leaves(outputs(p, b, cut)), jax.tree.leaves(bars), strict=True)
    )
    found = jax.grad(inner)(pulled_at)
    if cut == "hidden":
        found |= {"w": found["w"] + wbar, "bias": found["bias"] + bias_bar}
    return found


@pytest.mark.parametrize("method", [FunctionalSAM(RHO), SAM(RHO), LogitSAM(RHO)], ids=lambda m: m.path)
def test_several_heads_are_each_pulled_back_alike(method):
    (loss, info), g = value_and_grad(several, method)(params(), batch())
    assert distance(g, reference([batch()], method.path)) < 1e-12
    expected = mean_of([outputs(params(), batch())], [batch()])
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(info.weight) == pytest.approx(float(loss_of(outputs(params(), batch()), batch())[1]))
    assert float(mean_loss(several)(params(), batch())) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("cut", ["logits", "hidden"])
@pytest.mark.parametrize("memory", [Memory("keep"), Memory("recompute", chunk_bytes=5 * V * 8)], ids=["keep", "again"])
@pytest.mark.parametrize("sizes", [(12,), (12, 12, 12), (12, 7)], ids=["one", "scanned", "ragged"])
def test_several_heads_of_micro_batches(sizes, memory, cut):
    batches = [batch(seed, n) for seed, n in enumerate(sizes, 1)]
    call = jax.jit(value_and_grad(several, FunctionalSAM(RHO, cut=cut), memory=memory))
    (loss, _), g = call(params(), MicroBatches(batches))
    assert distance(g, reference(batches, cut=cut)) < 1e-12
    assert float(loss) == pytest.approx(float(mean_of([outputs(params(), b) for b in batches], batches)), rel=1e-12)


def test_fraction_with_several_heads():
    batches = [batch(1), batch(2)]
    got = value_and_grad(several, FunctionalSAM(RHO, fraction=1 / 2, ascent="part"))(params(), MicroBatches(batches))[1]
    base = lambda some: jax.grad(lambda p: mean_of([outputs(p, b) for b in some], some))(params())
    expected = jax.tree.map(lambda b, moved, s: b + moved - s, base(batches), reference(batches[:1]), base(batches[:1]))
    assert distance(got, expected) < 1e-12


def test_unperturbed_several_heads_are_autograd():
    g = value_and_grad(several, Plain())(params(), batch())[1]
    assert distance(g, jax.grad(lambda p: loss_of(outputs(p, batch()), batch())[0])(params())) < 1e-12


def test_several_heads_form_logits_only_in_chunks():
    n = 64
    call = value_and_grad(several, FunctionalSAM(RHO), memory=Memory("recompute", chunk_bytes=16 * V * 8))
    text = jax.jit(call).lower(params(), batch(n=n)).compile().as_text()
    assert f"[16,{V}]" in text or f"[8,{V}]" in text
    assert f"[{n},{V}]" not in text


# --- what a loss may reach --------------------------------------------------------------------------------------------


def logits(p, b):
    return jnp.tanh(b["x"] @ p["a"])


def leaking(where: str):
    def features(p, b):
        z = logits(p, b)
        h = z @ p["b"]
        ones = jnp.ones(len(z))
        return {
            "a parameter": lambda: Logits(z, lambda z: jnp.sum(z**2) + jnp.sum(p["b"] ** 2)),
            "a parameter in jit": lambda: Logits(z, lambda z: jax.jit(lambda z: jnp.sum(z @ p["b"]))(z)),
            "hidden states": lambda: Outputs({"z": z}, lambda out: jnp.sum(out["z"] * h)),
            "in a scan": lambda: Logits(
                z, lambda z: jax.lax.scan(lambda s, x: (s + jnp.sum(x * h[0]), None), 0.0, z)[0]
            ),
            "weight": lambda: Outputs(z, jnp.sum, weight=jnp.sum(p["b"] ** 2)),
            "token_weights": lambda: LinearHead(z, p["w"], b["y"], jnp.exp(h[:, 0])),
            "count": lambda: LinearHead(z, p["w"], b["y"], ones, count=jnp.sum(h**2)),
            "factor": lambda: Heads([Outputs(z, jnp.sum)], weights=[p["bias"][0]]),
            "second": lambda: Heads([LinearHead(z, p["w"], b["y"]), Logits(z, lambda z: jnp.sum(z * h))]),
        }[where]()

    return features


REACHED = {
    "a parameter": "Logits: loss reaches b by another way",
    "a parameter in jit": "Logits: loss reaches b by another way",
    "hidden states": r"Outputs: loss reaches an array float64\[12, 5\] computed from the params",
    "in a scan": r"Logits: loss reaches an array float64",
    "weight": r"Outputs: weight must not depend on the params, got an array float64\[\]",
    "token_weights": r"LinearHead: token_weights must not depend on the params, got an array float64\[12\]",
    "count": r"LinearHead: count must not depend on the params",
    "factor": r"Heads: weights must not depend on the params",
    "second": "Logits: loss reaches an array",
}


@pytest.mark.parametrize("where", REACHED)
def test_loss_that_reaches_more_than_its_outputs_is_refused(where):
    with pytest.raises(UserError, match=REACHED[where]):
        value_and_grad(leaking(where), FunctionalSAM(RHO))(params(), batch())


STATE = optax.ScaleByAdamState(jnp.int32(1), params(), params())
HOSTS = {
    "jit": lambda grad: jax.jit(grad)(params(), batch()),
    "scan": lambda grad: grad(params(), MicroBatches([batch(1), batch(2)])),
    "grad": lambda grad: jax.grad(lambda p: optax.tree.norm(grad(p, batch())[1]))(params()),
    "jvp": lambda grad: jax.jvp(lambda p: grad(p, batch())[1], (params(),), (params(),)),
}


@pytest.mark.parametrize("host", HOSTS)
def test_leak_is_found_wherever_the_step_is_traced(host):
    with pytest.raises(UserError, match="Logits: loss reaches b"):
        HOSTS[host](value_and_grad(leaking("a parameter"), FunctionalSAM(RHO)))


@pytest.mark.parametrize("method", [FunctionalSAM(RHO, ascent="momentum"), LogitSAM(RHO, ascent="momentum")])
def test_leak_is_found_without_a_base_backward_pass(method):
    with pytest.raises(UserError, match="Logits: loss reaches b"):
        value_and_grad(leaking("a parameter"), method)(params(), batch(), STATE)


def constants(p, b):
    """A loss that reaches labels, constants, and what no gradient goes through."""
    z, held = logits(p, b), jax.lax.stop_gradient(p["b"])
    target, best = jnp.cos(b["x"][:, :D]), jnp.argmax(z @ p["b"], -1)
    picked = lambda z: jnp.sum((z @ held - target) ** 2) + jnp.sum(z[jnp.arange(len(z)), best % D])
    return Logits(z, picked, weight=jnp.sum(b["y"] >= 0))


@pytest.mark.parametrize("host", HOSTS)
def test_constants_of_a_loss_are_no_leak(host):
    for method in (FunctionalSAM(RHO), SAM(RHO)):
        assert HOSTS[host](value_and_grad(constants, method)) is not None


def test_gradient_with_constants_in_the_loss():
    p, b = params(), batch()
    z = logits(p, b)
    best = jnp.argmax(z @ p["b"], -1)
    loss = lambda z: jnp.sum((z @ p["b"] - jnp.cos(b["x"][:, :D])) ** 2) + jnp.sum(z[jnp.arange(len(z)), best % D])
    g = jax.grad(lambda a: loss(logits({"a": a}, b)))(p["a"])
    moved = p["a"] + RHO * g / jnp.linalg.norm(g)
    expected = jax.grad(lambda a: jnp.sum(logits({"a": a}, b) * jax.grad(loss)(z)))(moved)
    got = value_and_grad(constants, FunctionalSAM(RHO))(p, b)[1]
    np.testing.assert_allclose(got["a"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (lambda z: Outputs(z, lambda z: z), "Outputs: loss must return one float, a scalar; got ShapeDtypeStruct"),
        (lambda z: Logits(z, lambda z: jnp.argmax(z)), "Logits: loss must return one float"),
        (lambda z: Outputs({"n": jnp.arange(3)}, lambda o: 1.0), "Outputs: outputs must contain a float array"),
        (lambda z: Heads([]), "Heads: give at least one"),
        (lambda z: Heads([Logits(z, jnp.sum)], weights=[1, 2]), "Heads: weights must have one number a head, got 2"),
        (lambda z: z, "features must return a LinearHead, Outputs, Logits or Heads, got"),
    ],
)
def test_other_return_values_are_refused(head, says):
    with pytest.raises(UserError, match=says):
        value_and_grad(lambda p, b: head(logits(p, b)), FunctionalSAM(RHO))(params(), batch())


def test_hidden_cut_needs_a_linear_head():
    grad = value_and_grad(constants, FunctionalSAM(RHO, cut="hidden"))
    with pytest.raises(UserError, match="cut: 'hidden' needs features to return a LinearHead"):
        grad(params(), batch())


# --- counts and labels ------------------------------------------------------------------------------------------------


def advantages(p, b):
    count = jnp.sum(b["y"] >= 0) if b.get("counted", True) else None
    return LinearHead(jnp.tanh(b["x"] @ p["a"]), p["w"], b["y"], b["weights"], count=count)


def signed(seed: int, n: int) -> dict:
    """Token weights that sum to less than 0."""
    b = batch(seed, n)
    weights = b["weights"] - 2.5
    assert float(jnp.sum(jnp.where(b["y"] >= 0, weights, 0))) < 0
    return {**b, "weights": weights}


@pytest.mark.parametrize("sizes", [(12,), (12, 12), (12, 7)], ids=["one", "scanned", "ragged"])
def test_count_divides_weights_that_sum_to_less_than_zero(sizes):
    batches, p = [signed(seed, n) for seed, n in enumerate(sizes, 1)], params()
    whole = {k: jnp.concatenate([b[k] for b in batches]) for k in batches[0]}
    seen = whole["y"] >= 0
    z_of = lambda p: jnp.tanh(whole["x"] @ p["a"]) @ p["w"].T
    nll = lambda z: jnp.where(seen, -jax.nn.log_softmax(z)[jnp.arange(len(seen)), whole["y"]], 0)
    loss = lambda z: jnp.sum(nll(z) * whole["weights"]) / jnp.sum(seen)
    g = jax.grad(lambda p: loss(z_of(p)))(p)
    moved = jax.tree.map(lambda x, d: x + RHO * d / optax.tree.norm(g), p, g)
    expected = jax.grad(lambda p: jnp.sum(z_of(p) * jax.grad(loss)(z_of(params()))))(moved)
    (value, info), got = jax.jit(value_and_grad(advantages, FunctionalSAM(RHO)))(p, MicroBatches(batches))
    assert distance(got, expected) < 1e-12
    assert float(value) == pytest.approx(float(loss(z_of(p))), rel=1e-12)
    assert int(info.weight) == int(jnp.sum(seen))


def test_weights_that_sum_to_less_than_zero_without_count_skip_the_step():
    uncounted = lambda p, b: advantages(p, {**b, "counted": False})
    tx = skip_nonfinite(optax.adamw(1e-2))
    (loss, info), g = jax.jit(value_and_grad(uncounted, FunctionalSAM(RHO)))(params(), signed(1, 12))
    assert np.isnan(loss)
    assert not info.finite
    updates, after = tx.update(g, tx.init(params()), params())
    assert int(after.total_notfinite) == 1
    assert float(optax.tree.norm(updates)) == 0
    micro = MicroBatches([batch(2), signed(1, 12)])
    assert not value_and_grad(uncounted, FunctionalSAM(RHO))(params(), micro)[0][1].finite


def test_weights_that_are_all_zero_count_nothing():
    uncounted = lambda p, b: advantages(p, {**b, "counted": False})
    none = {**batch(3), "weights": jnp.zeros(12)}
    (loss, info), g = value_and_grad(uncounted, FunctionalSAM(RHO))(params(), MicroBatches([batch(1), none]))
    (expected, _), alone = value_and_grad(uncounted, FunctionalSAM(RHO))(params(), batch(1))
    assert float(loss) == pytest.approx(float(expected))
    assert distance(g, alone) < 1e-12
    (loss, info), _ = value_and_grad(uncounted, Plain())(params(), none)
    assert (float(loss), float(info.weight), bool(info.finite)) == (0, 0, True)


def plain_head(p, b):
    return LinearHead(jnp.tanh(b["x"] @ p["a"]), p["w"], b["y"], ignore_index=b.get("ignore"))


def test_label_beyond_the_vocabulary_is_named():
    bad = {**batch(), "y": batch()["y"].at[3].set(V + 2).at[5].set(V)}
    grad = value_and_grad(plain_head, FunctionalSAM(RHO))
    with pytest.raises(UserError, match=f"labels must be below V = {V}, .* got {V + 2}"):
        grad(params(), bad)
    for given in (bad, MicroBatches([batch(1), bad]), MicroBatches([batch(1, 7), bad])):
        (loss, info), _ = jax.jit(grad)(params(), given)
        assert np.isnan(loss)
        assert not info.finite
        assert int(info.bad_label) == V + 2
    assert int(jax.jit(grad)(params(), batch())[0][1].bad_label) == -1
    assert grad(params(), {**batch(), "y": batch()["y"].at[3].set(V), "ignore": V})[0][1].finite


@pytest.mark.parametrize("fraction", [1.0, 1 / 4])
@pytest.mark.parametrize("kind", [SAM, FunctionalSAM, LogitSAM])
def test_bad_label_is_in_info_for_every_method(kind, fraction):
    bad = {**batch(), "y": batch()["y"].at[3].set(V + 2)}
    assert (
        int(jax.jit(value_and_grad(plain_head, kind(RHO, fraction=fraction)))(params(), bad)[0][1].bad_label) == V + 2
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "method", [Plain(), SAM(RHO), FunctionalSAM(RHO), LogitSAM(RHO)], ids=lambda x: type(x).__name__
)
def test_batch_without_rows_has_a_loss_and_a_gradient_of_zero(method, jit):
    grad = value_and_grad(lambda p, b: LinearHead(b["x"] @ p["a"], p["w"], b["y"]), method)
    params = {"a": jnp.ones((6, 5)), "w": jnp.ones((7, 5))}
    none = {"x": jnp.zeros((0, 6)), "y": jnp.zeros(0, jnp.int32)}
    (loss, info), got = (jax.jit(grad) if jit else grad)(params, none)
    assert (float(loss), float(info.weight), bool(info.finite)) == (0, 0, True)
    assert not any(x.any() for x in jax.tree.leaves(got))
