"""`from_model` and `check` in JAX, with flax.linen models that nobody wrote for this package."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsam_core.jax import (
    FunctionalSAM,
    Heads,
    LinearHead,
    MicroBatches,
    Outputs,
    UserError,
    check,
    from_model,
    mean_loss,
    value_and_grad,
)
from fsam_kernels.options import Loss

V, D, L, RHO = 19, 8, 6, 0.2


class Tied(nn.Module):
    """A language model whose logits are `Embed.attend`."""

    scale: float = 1.0
    cap: float | None = None

    @nn.compact
    def __call__(self, tokens, key=None):
        embed = nn.Embed(V, D, name="wte")
        x = nn.Dropout(0.5, deterministic=key is None)(embed(tokens), rng=key)
        x = nn.LayerNorm()(x + nn.tanh(nn.Dense(D, name="mix")(x)))
        z = embed.attend(x * self.scale)
        return z if self.cap is None else self.cap * jnp.tanh(z / self.cap)


class Trunk(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D)(tokens)
        return nn.LayerNorm()(x + nn.tanh(nn.Dense(D, name="mix")(x)))


class Untied(nn.Module):
    """A model with an `nn.Dense` head, in a scope of its own."""

    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(V, use_bias=self.use_bias, dtype=self.dtype, name="lm_head")(Trunk(name="trunk")(tokens))


MODELS = {"tied": (Tied(), "wte"), "scaled": (Tied(scale=0.3), "wte"), "bias": (Untied(), "lm_head"),
          "no bias": (Untied(use_bias=False), "lm_head")}  # fmt: skip


def batch(seed: int = 0, rows: int = 3) -> dict:
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, V, (rows, L)))
    return {"tokens": tokens, "labels": jnp.where(tokens % 5 == 0, -1, (tokens * 3 + 1) % V)}


@partial(jax.jit, static_argnums=0)  # op by op each is compiled for itself
def params_of(model) -> Any:
    found = model.init(jax.random.key(0), batch()["tokens"])
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) * 0.5, found)


def nll(z, y, shift: bool = False):
    z, y = (z[:, :-1], y[:, 1:]) if shift else (z, y)
    each = jnp.take_along_axis(jax.nn.log_softmax(z), jnp.maximum(y, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(y >= 0, each, 0)) / jnp.sum(y >= 0)


@partial(jax.jit, static_argnums=(0, 3))
def reference(model, p, b, shift=False) -> Any:
    """⟨F(θ+ε), stop_gradient(∂L/∂z(θ))⟩ by autograd."""
    g = jax.grad(lambda p: nll(model.apply(p, b["tokens"]), b["labels"], shift))(p)
    moved = jax.tree.map(lambda x, d: x + RHO * d / optax.tree.norm(g), p, g)
    zbar = jax.grad(lambda z: nll(z, b["labels"], shift))(model.apply(p, b["tokens"]))
    return jax.grad(lambda p: jnp.sum(model.apply(p, b["tokens"]) * zbar))(moved)


def error(a, b) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


def call_of(model):
    return lambda p, b: model.apply(p, b["tokens"])


@pytest.mark.parametrize("shift", [False, True], ids=["labels", "shifted"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_the_whole_models_logits(name, shift):
    model, head = MODELS[name]
    features = from_model(call_of(model), head, "labels", shift=shift)
    p, b = params_of(model), batch()
    step, expected = jax.jit(value_and_grad(features, FunctionalSAM(RHO))), reference(model, p, b, shift)
    (loss, _), g = step(p, b)
    assert error(g, expected) < 2e-6
    assert float(loss) == pytest.approx(float(nll(model.apply(p, b["tokens"]), b["labels"], shift)), rel=1e-6)
    halves = MicroBatches([jax.tree.map(lambda x: x[:2], b), jax.tree.map(lambda x: x[2:], b)])
    assert error(step(p, halves)[1], expected) < 5e-6


def test_both_passes_see_the_models_dropout():
    model, b = Tied(), {**batch(), "key": jax.random.key(3)}
    features = from_model(lambda p, b: model.apply(p, b["tokens"], b["key"]), "wte")
    p = params_of(model)
    none = jax.jit(value_and_grad(features, FunctionalSAM(0.0)))(p, b)[1]
    own = jax.jit(jax.grad(lambda p: nll(model.apply(p, b["tokens"], b["key"]), b["labels"])))(p)
    assert error(none, own) < 2e-6


def test_labels_are_a_key_an_index_or_a_function():
    model, b, p = Tied(), batch(), params_of(Tied())
    loss = lambda features, batch=b: float(jax.jit(mean_loss(features))(p, batch))
    expected = loss(from_model(call_of(model), "wte"))
    for labels in ("labels", lambda b: b["labels"]):
        assert loss(from_model(call_of(model), "wte", labels)) == expected
    by_index = from_model(lambda p, b: model.apply(p, b[0]), "wte", 1)
    assert loss(by_index, (b["tokens"], b["labels"])) == expected
    with pytest.raises(UserError, match="labels: the batch, a dict, has no 'targets'"):
        mean_loss(from_model(call_of(model), "wte", "targets"))(p, b)
    weighted = from_model(call_of(model), "wte", token_weights=lambda b: (b["tokens"] > 3) * 2.0, count=lambda b: 7.0)
    (_, info), _ = jax.jit(value_and_grad(weighted, FunctionalSAM(RHO)))(p, b)
    assert float(info.weight) == 7


def test_logits_of_the_model_itself_are_not_computed():
    model, b = Untied(), batch(rows=5)
    p, n = params_of(model), 5 * L
    text = jax.jit(value_and_grad(from_model(call_of(model)), FunctionalSAM(RHO))).lower(p, b).compile().as_text()
    assert f"f32[5,{L},{V}]" not in text
    assert f"f32[{n},{V}]" in text  # the one of the head


def test_half_precision_of_the_head_is_kept():
    seen = []
    features = from_model(call_of(Untied(dtype=jnp.bfloat16)), "lm_head")
    grad = value_and_grad(lambda p, b: seen.append(features(p, b)) or seen[-1], FunctionalSAM(RHO))
    jax.eval_shape(grad, params_of(Untied()), batch())
    assert seen[0].hidden.dtype == jnp.bfloat16
    assert seen[0].weight.dtype == jnp.float32


def test_boxed_weights_are_unboxed():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            kernel = nn.with_partitioning(nn.initializers.normal(1.0), (None, None))
            return nn.Dense(V, kernel_init=kernel, name="head")(Trunk()(tokens))

    p = jax.jit(Boxed().init)(jax.random.key(0), batch()["tokens"])
    g = jax.jit(value_and_grad(from_model(call_of(Boxed()), "head"), FunctionalSAM(RHO)))(p, batch())[1]
    assert error(g, reference(Boxed(), p, batch())) < 2e-6


# --- what is refused --------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A head with a low-rank adapter."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(V, name="base")(x) + nn.Dense(V, name="up")(nn.Dense(2, name="down")(x))


class Normalised(nn.Dense):
    def __call__(self, x):
        return super().__call__(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


def doubled(x, w, *args, **kwargs):
    return jax.lax.dot_general(2 * x, w, *args, **kwargs)


class With(nn.Module):
    head: Any
    times: int = 1

    @nn.compact
    def __call__(self, tokens):
        head, x = self.head(), Trunk(name="trunk")(tokens)
        return sum(head(x) for _ in range(self.times))


@pytest.mark.parametrize(
    ("make", "head", "says"),
    [
        (lambda: Adapted(name="lm_head"), "lm_head", "'lm_head' is a Adapted, which is no plain linear layer"),
        (lambda: Normalised(V, name="lm_head"), "lm_head", "'lm_head' is a Normalised, which is no plain"),
        (lambda: nn.Dense(V, name="lm_head", dot_general=doubled), "lm_head", "is a Dense, which is no plain"),
        (lambda: nn.DenseGeneral(V, name="lm_head"), "lm_head", "is a DenseGeneral"),
        (lambda: nn.Dense(V, name="out"), "lm_head", "'lm_head' was not called as a linear layer; .* out, trunk.mix"),
    ],
)
def test_head_that_is_no_plain_linear_layer_is_refused(make, head, says):
    model = With(make)
    with pytest.raises(UserError, match=says):
        mean_loss(from_model(call_of(model), head))(params_of(model), batch())


def test_head_that_is_called_twice_is_refused():
    model = With(lambda: nn.Dense(V, name="lm_head"), times=2)
    with pytest.raises(UserError, match="'lm_head' was called 2 times; write features with Heads"):
        mean_loss(from_model(call_of(model)))(params_of(model), batch())


def test_model_of_another_library_is_refused():
    from flax import nnx

    model = nnx.Linear(V, V, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    call = lambda p, b: nnx.merge(graph, p)(jax.nn.one_hot(b["tokens"], V))
    with pytest.raises(UserError, match=r"none of flax.linen; write features yourself"):
        mean_loss(from_model(call))(state, batch())


# --- check ------------------------------------------------------------------------------------------------------------


def own_loss(model):
    return lambda p, b: nll(model.apply(p, b["tokens"]), b["labels"])


@pytest.mark.parametrize(("model", "head"), MODELS.values(), ids=MODELS.keys())
def test_check_passes_where_the_head_is_the_models_own(model, head):
    found = check(from_model(call_of(model), head), own_loss(model), params_of(model), batch())
    assert found.loss < 1e-5
    assert found.gradient < 1e-4


def test_check_finds_a_soft_cap_and_a_scale_behind_the_head():
    capped = Tied(cap=3.0)
    p = params_of(capped)
    with pytest.raises(UserError, match=r"features: their loss is \d.* and the model's own \d.* a soft-cap"):
        check(from_model(call_of(capped), "wte"), own_loss(capped), p, batch())
    check(from_model(call_of(capped), "wte", loss=Loss(soft_cap=3.0)), own_loss(capped), p, batch())
    scaled = lambda p, b: nll(Tied().apply(p, b["tokens"]) * D**-0.5, b["labels"])
    with pytest.raises(UserError, match="features: their loss"):
        check(from_model(call_of(Tied()), "wte"), scaled, p, batch())


def test_check_finds_an_adapter_that_is_zero_yet():
    model = With(lambda: Adapted(name="lm_head"))
    p = params_of(model)
    p["params"]["lm_head"]["up"] = jax.tree.map(jnp.zeros_like, p["params"]["lm_head"]["up"])
    features = from_model(call_of(model), "lm_head.base")
    with pytest.raises(UserError, match=r"the gradient of 'params.lm_head.up.kernel' deviates"):
        check(features, own_loss(model), p, batch())


def test_check_finds_a_lost_auxiliary_loss():
    model, p = Untied(), params_of(Untied())
    own = lambda p, b: own_loss(model)(p, b) + 0.01 * jnp.mean(p["params"]["trunk"]["mix"]["kernel"] ** 2)
    whole = from_model(call_of(model))
    with pytest.raises(UserError, match="features: their loss"):
        check(whole, own, p, batch())
    aux = lambda p: Outputs(p["params"]["trunk"]["mix"]["kernel"], lambda w: jnp.mean(w**2))
    check(lambda p, b: Heads([whole(p, b), aux(p)], [1.0, 0.01]), own, p, batch())


def test_check_takes_integer_leaves_and_a_tolerance():
    p = {"w": jnp.ones((V, D)), "steps": jnp.int32(3), "x": jnp.linspace(-1, 1, V * D).reshape(V, D)}
    features = lambda p, b: LinearHead(p["x"][b["tokens"]], p["w"], b["labels"])
    own = lambda p, b: nll(p["x"][b["tokens"]] @ p["w"].T, b["labels"])
    assert check(features, own, p, batch()).gradient < 1e-4
    off = lambda p, b: 1.01 * own(p, b)
    with pytest.raises(UserError, match="features: their loss"):
        check(features, off, p, batch())
    assert check(features, off, p, batch(), rtol=0.02).loss == pytest.approx(0.01, rel=0.05)
