"""Products with H, G and N of whole models: both frameworks, their cost, and models that have no second derivative."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spawn
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fsam_core import Plain, UserError
from fsam_core.jax import LinearHead as JaxHead
from fsam_core.jax import curvature as jax_curvature
from fsam_core.torch import AdamW, LinearHead, from_model, masters
from fsam_core.torch.curvature import Curvature
from fsam_kernels.memory import AUTO
from fsam_profiling import flops
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import flattened, nested
from fsam_trainers.models.layout import ModelConfig, initial

SMALL = ModelConfig(layers=1, width=8, heads=2, seq_len=6, vocab_size=11, tied=True)
MEDIUM = ModelConfig(layers=2, width=64, heads=2, seq_len=32, vocab_size=512, tied=True)
UNTIED = ModelConfig(layers=1, width=8, heads=2, seq_len=6, vocab_size=11, tied=False)


def tokens(config: ModelConfig, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, config.seq_len + 1))


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Three times the initial ones, so that neither part of H is small."""
    return {name: x.astype(np.float64) * 3 for name, x in initial(config, 0).items()}


def along(config: ModelConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.normal(size=x.shape) for name, x in initial(config, 0).items()}


def torch_model(config: ModelConfig, **options: Any) -> nn.Module:
    model = torch_decoder.Decoder(config, **options).double().eval()
    torch_decoder.load(model, weights_of(config))
    return model


def in_jax(config: ModelConfig, dtype: Any = jnp.float64) -> Any:
    features = partial(flax_decoder.features, flax_decoder.Decoder(config), dtype=dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), nested(weights_of(config)))
    return jax_curvature.Curvature(features, params, {"tokens": jnp.asarray(tokens(config))})


def off(got: Any, want: Any) -> float:
    """The relative error over all tensors of a flat dictionary."""
    a, b = (np.concatenate([np.ravel(np.asarray(x[name])) for name in sorted(want)]) for x in (got, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def plain_autodiff(config: ModelConfig) -> dict[str, Any]:
    """H v and G v from all logits and nothing of this project but the model."""
    model, batch = flax_decoder.Decoder(config), {"tokens": jnp.asarray(tokens(config))}
    y = batch["tokens"][:, 1:].reshape(-1)

    def logits(p):
        head = flax_decoder.features(model, p, batch, dtype=jnp.float64)
        return head.hidden @ head.weight.T

    loss = lambda z: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    @jax.jit  # one compilation instead of one an operation
    def products(p, v):
        h = jax.jvp(jax.grad(lambda p: loss(logits(p))), (p,), (v,))[1]
        z, zdot = jax.jvp(logits, (p,), (v,))
        return h, jax.vjp(logits, p)[1](jax.jvp(jax.grad(loss), (z,), (zdot,))[1])[0]

    h, g = products(*(jax.tree.map(jnp.asarray, nested(x)) for x in (weights_of(config), along(config))))
    return {"hessian": flattened(h), "gauss_newton": flattened(g)}


@pytest.mark.parametrize("config", [SMALL, pytest.param(UNTIED, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_a_decoder_has_the_same_products_in_both(config):
    with jax.enable_x64(True):
        want = plain_autodiff(config)
        ours, v = in_jax(config), jax.tree.map(jnp.asarray, nested(along(config)))
        g_v, n_v = map(flattened, ours.both(v))
        other = Curvature(torch_model(config), torch_decoder.features, torch.from_numpy(tokens(config)))
        torch_g, torch_n = other.both({name: torch.from_numpy(x) for name, x in along(config).items()})
        assert off(g_v, want["gauss_newton"]) < 1e-12
        assert off({name: g_v[name] + n_v[name] for name in g_v}, want["hessian"]) < 1e-12
        assert off(torch_g, g_v) < 1e-10
        assert off(torch_n, n_v) < 1e-10


def test_a_model_is_afterwards_as_before():
    model = torch_model(SMALL)
    model.positions.grad = torch.ones_like(model.positions)
    before, random = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    for products in ("exact", "difference"):
        found = Curvature(model, torch_decoder.features, torch.from_numpy(tokens(SMALL)), products=products)
        found.both(found.gradient)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.positions.grad, torch.ones_like(model.positions))
    assert model.final_norm.grad is None


def test_frozen_weights_do_not_move():
    model = torch_model(SMALL)
    whole = Curvature(model, torch_decoder.features, torch.from_numpy(tokens(SMALL)))
    v = {name: torch.from_numpy(x) for name, x in along(SMALL).items()}
    frozen = ("positions", "final_norm")
    want = whole.hessian({name: torch.zeros_like(x) if name in frozen else x for name, x in v.items()})
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    part = Curvature(model, torch_decoder.features, torch.from_numpy(tokens(SMALL)))
    got = part.hessian(v)
    assert set(got) == set(want) - set(frozen)
    assert off(got, {name: x for name, x in want.items() if name not in frozen}) < 1e-13


def test_other_weights_of_one_curvature_in_jax():
    with jax.enable_x64(True):
        first = in_jax(SMALL)
        moved = jax.tree.map(lambda x: 0.5 * x, first.params)
        at, v = first.at(moved), jax.tree.map(jnp.asarray, nested(along(SMALL)))
        afresh = jax_curvature.Curvature(first._features, moved, {"tokens": jnp.asarray(tokens(SMALL))})
        assert at.loss == afresh.loss != first.loss
        assert off(flattened(at.hessian(v)), flattened(afresh.hessian(v))) < 1e-14


# --- cost -------------------------------------------------------------------------------------------------------------

# Matrix products over those of a gradient, as counted; the step may not become dearer unnoticed.
IN_TORCH = {"hessian": 3.0, "gauss_newton": 1.98, "functional": 3.0, "both": 3.51}
IN_JAX = {"hessian": 2.69, "gauss_newton": 1.67, "functional": 2.37, "both": 3.2}
# The peak of H v over that of a gradient with the same attention, as docs/sharpness.md says.
PEAK = {"jax": 2.4, "torch": 4.0}


def test_matrix_products_of_torch_are_counted():
    model = torch_decoder.Decoder(MEDIUM).eval()
    found = Curvature(model, torch_decoder.features, torch.from_numpy(tokens(MEDIUM)))

    def count(call: Any) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        return counter.get_total_flops()

    gradient = count(lambda: found._gradient(Plain()))
    for product, times in IN_TORCH.items():
        assert count(lambda p=product: getattr(found, p)(found.gradient)) / gradient == pytest.approx(times, rel=0.02)


def test_matrix_products_and_memory_of_jax_are_counted():
    found = in_jax(MEDIUM, jnp.float32)
    given = found.params, found._batches, found.gradient
    gradient = flops.of_step(found._gradient, given[:2])
    temporaries = lambda f, given: jax.jit(f).lower(*given).compile().memory_analysis().temp_size_in_bytes
    for product, times in IN_JAX.items():
        run = partial(jax_curvature.exact_product, found._features, AUTO, product)
        assert flops.of_step(run, given) / gradient == pytest.approx(times, rel=0.02)
    hessian = partial(jax_curvature.exact_product, found._features, AUTO, "hessian")
    assert temporaries(hessian, given) <= 1.2 * PEAK["jax"] * temporaries(found._gradient, given[:2])


# Runs by itself: prints by how many bytes the peak of the process passes what it held before a gradient and before H v.
MEASURE = """
import numpy as np, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from fsam_core import Plain
from fsam_core.torch.curvature import Curvature
from fsam_trainers.models import torch_decoder
from fsam_trainers.models.layout import ModelConfig
from fsam_profiling.timing.process_memory import growth

def of(rows, length):
    tokens = np.random.default_rng(0).integers(0, 4096, (rows, length + 1))
    model = torch_decoder.Decoder(ModelConfig(4, 256, 8, 256, 4096)).eval()
    return Curvature(model, torch_decoder.features, torch.from_numpy(tokens))

def gradient():
    with sdpa_kernel(SDPBackend.MATH):
        return found._gradient(Plain())

small, found = of(1, 8), of(8, 256)
small.hessian(small.gradient)  # the library's own buffers
print(growth(gradient), growth(lambda: found.hessian(found.gradient)))
"""


@pytest.mark.slow  # a process of its own, and peaks that other processes can disturb
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_torch_is_measured():
    # Freed memory goes back at once, so that what one call leaves does not serve the other.
    found = spawn.run("-c", MEASURE, env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    gradient, hessian = map(int, found.stdout.split())
    assert hessian / gradient == pytest.approx(PEAK["torch"], rel=0.2)


# --- models without a second derivative -------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """sin, with a gradient in reverse mode alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, bar):
        return bar * ctx.saved_tensors[0].cos()


class Toy(nn.Module):
    def __init__(self, function: Any, dropout: float = 0.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 5, generator=random, dtype=torch.float64))
        self.w = nn.Parameter(torch.randn(9, 5, generator=random, dtype=torch.float64))
        self.function, self.dropout = function, dropout

    def forward(self, x):
        return F.dropout(self.function(x @ self.a), self.dropout, self.training)


def toy_features(model: Any, batch: Any) -> LinearHead:
    return LinearHead(model(batch[0]), model.w, batch[1])


def toy_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(7, 6, generator=random, dtype=torch.float64), torch.randint(0, 9, (7,), generator=random)


def test_torch_functions_without_second_derivatives():
    once = Curvature(Toy(_Once.apply), toy_features, toy_batch())
    with pytest.raises(UserError, match=r"products: the model has an operation without a second derivative .*'eager'"):
        once.hessian(once.gradient)
    by_differences = Curvature(Toy(_Once.apply), toy_features, toy_batch(), products="difference", radius=1e-4)
    exact = Curvature(Toy(torch.sin), toy_features, toy_batch())
    for got, want in zip(by_differences.both(exact.gradient), exact.both(exact.gradient), strict=True):
        assert off(got, want) < 1e-6


def test_derivatives_without_a_tangent_are_written_in_others():
    """SiLU, as of Llama: `silu_backward` has no forward mode."""
    exact = Curvature(Toy(F.silu), toy_features, toy_batch())
    same = Curvature(Toy(lambda x: x * x.sigmoid()), toy_features, toy_batch())
    for got, want in zip(exact.both(same.gradient), same.both(same.gradient), strict=True):
        assert off(got, want) < 1e-12
    assert off(exact.hessian(same.gradient), same.hessian(same.gradient)) < 1e-12


def test_jax_functions_without_second_derivatives():
    once = jax.custom_vjp(jnp.sin)
    # The rule calls the function itself, as kernels do that are only known in reverse mode.
    once.defvjp(lambda x: (once(x), x), lambda x, bar: (bar * jnp.cos(x),))
    features = lambda p, batch: JaxHead(once(batch[0] @ p["a"]), p["w"], batch[1])
    x, y = (jnp.asarray(t.numpy()) for t in toy_batch())
    params = {"a": jnp.ones((6, 5)), "w": jnp.ones((9, 5))}
    found = jax_curvature.Curvature(features, params, (x, y))
    with pytest.raises(UserError, match=r"products: .* without a second derivative .*products='difference'"):
        found.hessian(found.gradient)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_products_with_options_of_an_embeddings_gradient_are_symmetric(options):
    """They change the gradient alone: a row of the matrix would be 0, and its column not."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3, **options), nn.Linear(3, 5, bias=False)
            nn.init.normal_(self.embedding.weight)

    model = Model().double()
    of = lambda m, b: LinearHead(torch.tanh(m.embedding(b)), m.head.weight, b.roll(1))
    curvature = Curvature(model, of, torch.tensor([0, 1, 0, 2, 3, 0, 4]))
    for product in (curvature.hessian, curvature.gauss_newton):
        rows = [curvature.vector(product(curvature.tree(v))) for v in np.eye(curvature.size)]
        np.testing.assert_allclose(np.array(rows), np.array(rows).T, atol=1e-14)


def test_dropout_is_noticed():
    model = Toy(torch.sin, dropout=0.5)
    with pytest.raises(UserError, match=r"turn dropout off with model\.eval\(\)"):
        Curvature(model, toy_features, toy_batch())
    Curvature(model.eval(), toy_features, toy_batch())


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_a_wrapped_model_needs_differences(wrap):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = wrap(Toy(torch.sin))
        with pytest.raises(UserError, match="'exact' takes a plain model"):
            Curvature(wrapped, toy_features, toy_batch())
        found = Curvature(wrapped, toy_features, toy_batch(), products="difference", radius=1e-4)
        plain = Curvature(Toy(torch.sin), toy_features, toy_batch())
        for got, want in zip(found.both(found.gradient), plain.both(plain.gradient), strict=True):
            exact = plain.vector(want)
            assert np.linalg.norm(found.vector(got) - exact) < 1e-6 * np.linalg.norm(exact)
    finally:
        torch.distributed.destroy_process_group()


def test_activation_checkpointing_is_refused():
    """Blocks that are recomputed have no tangents."""
    found = Curvature(torch_model(SMALL, remat=True), torch_decoder.features, torch.from_numpy(tokens(SMALL)))
    with pytest.raises(UserError, match="turn activation checkpointing off"):
        found.hessian(found.gradient)


def test_differences_of_half_precision_are_of_the_masters():
    model, given = torch_decoder.Decoder(SMALL).eval(), torch.from_numpy(tokens(SMALL))
    exact = Curvature(model, torch_decoder.features, given)
    v = {name: torch.from_numpy(x).float() for name, x in along(SMALL).items()}
    want, gradient = exact.hessian(v), exact.gradient
    copies = masters(model, torch.bfloat16)
    optimizer = AdamW(copies, lr=0.0, copies=copies)
    options = {"products": "difference", "radius": 0.03, "optimizer": optimizer}
    half = Curvature(model, torch_decoder.features, given, **options)
    assert all(x.dtype == torch.float32 for x in half.params.values())
    # bfloat16 rounds θ ± ε, so the step is longer than in float32: 9 % here.
    assert off(half.hessian(v), want) < 0.2
    assert off(half.gradient, gradient) < 0.03


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_models_of_transformers(kind):
    library = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    if kind == "Llama":
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(library, kind + head)(getattr(library, f"{kind}Config")(vocab_size=31, **sizes)).double().eval()
    ids = torch.randint(0, 31, (2, 9))
    given = from_model(head="lm_head"), {"input_ids": ids, "labels": ids}
    exact = Curvature(model, *given)
    v = exact.tree(np.random.default_rng(0).normal(size=exact.size))
    # Norms of Llama compute in float32, whose rounding a shorter step would see.
    near = Curvature(model, *given, products="difference", radius=1e-2)
    for got, want in zip(exact.both(v), near.both(v), strict=True):
        assert off(got, want) < 1e-3


def test_products_are_those_of_curvlinops():
    """Where this library is installed, which has H and G of small models in PyTorch."""
    library = pytest.importorskip("curvlinops")
    x, y = toy_batch()
    model = Toy(torch.sin)
    ours = Curvature(model, toy_features, (x, y))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x) @ self.body.w.T

    whole = Logits()
    params = dict(whole.named_parameters())
    v = np.random.default_rng(0).normal(size=ours.size)
    order = [name.removeprefix("body.") for name in params]
    assert order == list(ours.params)
    loss = nn.CrossEntropyLoss()
    for kind, product in (
        (library.HessianLinearOperator, ours.hessian),
        (library.GGNLinearOperator, ours.gauss_newton),
    ):
        theirs = kind(whole, loss, list(params.values()), [(x, y)]) @ torch.from_numpy(v)
        got = ours.vector(product(ours.tree(v)))
        assert np.linalg.norm(got - theirs.detach().numpy()) <= 1e-6 * np.linalg.norm(got)
