"""The Vision Transformer in Flax and in PyTorch: one layout, one function, the gradient of every method."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
import torch

import fsam_core.jax
import fsam_core.torch
from fsam_core import NAMES, UserError, named
from fsam_trainers.jax import inference as jax_inference
from fsam_trainers.models import flax_vit, module_of, torch_vit
from fsam_trainers.models.flax_decoder import flattened, nested
from fsam_trainers.models.layout import blocks, initial, shapes
from fsam_trainers.models.vit_layout import ViTConfig, config_of
from fsam_trainers.presets import VIT_PRESETS, preset
from fsam_trainers.torch import inference as torch_inference

B2 = 0.95
SIZES = {"patch": 2, "height": 4, "image_width": 6, "channels": 3, "classes": 5}
RANDOM = np.random.default_rng(0)
BATCH = {
    "pixels": RANDOM.integers(0, 256, (4, 4, 6, 3), dtype=np.uint8),
    "labels": RANDOM.integers(0, 5, (4, 2)).astype(np.int32),
    "weights": np.array([[1, 0], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]], np.float32),
}
IN_TORCH = {k: torch.from_numpy(x).to(torch.int64 if k == "labels" else None) for k, x in BATCH.items()}
each_pool = pytest.mark.parametrize("pool", ["mean", "token"])


def config(**changes) -> ViTConfig:
    return ViTConfig(2, 12, 3, **{**SIZES, **changes})


def logits_in_numpy(c: ViTConfig, w: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """The model written down once more, image by image, in float64."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, name):
        y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + c.norm_eps)
        return y * w[name] + w[f"{name}_bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def logits(image):
        p, rows, columns = c.patch, c.height // c.patch, c.image_width // c.patch
        cut = [image[i * p : i * p + p, j * p : j * p + p].ravel() for i in range(rows) for j in range(columns)]
        x = (np.array(cut) / 127.5 - 1) @ w["patches"] + w["patches_bias"]
        if c.pool == "token":
            x = np.concatenate([np.zeros((1, c.width)), x])
        x = x + w["positions"]
        for i in range(c.layers):
            through = lambda h, name, i=i: h @ w[f"block_{i}.{name}"] + w[f"block_{i}.{name}_bias"]
            q, k, v = np.split(through(norm(x, f"block_{i}.attention_norm"), "qkv"), 3, axis=1)
            heads = []
            for q_h, k_h, v_h in zip(*(np.split(a, c.heads, axis=1) for a in (q, k, v)), strict=True):
                scores = np.exp(q_h @ k_h.T / np.sqrt(c.d))
                heads.append(scores / scores.sum(1, keepdims=True) @ v_h)
            x = x + through(np.concatenate(heads, axis=1), "attention_out")
            x = x + through(gelu(through(norm(x, f"block_{i}.mlp_norm"), "mlp_in")), "mlp_out")
        x = norm(x, "final_norm")
        return w["head"] @ (x[0] if c.pool == "token" else x.mean(0)) + w["head_bias"]

    return np.stack([logits(image.astype(np.float64)) for image in pixels])


@each_pool
def test_logits_are_those_of_the_model_written_down(pool):
    c = config(pool=pool)
    weights = {k: x + RANDOM.normal(0, 0.1, x.shape).astype(np.float32) for k, x in initial(c, 1).items()}
    expected = logits_in_numpy(c, weights, BATCH["pixels"])
    for module in (jax_inference, torch_inference):
        np.testing.assert_allclose(module.image_logits(c, weights)(BATCH["pixels"]), expected, rtol=1e-4, atol=1e-5)


def test_the_layout_names_the_parameters_of_both():
    c = config()
    in_torch = {name: tuple(p.shape) for name, p in torch_vit.ViT(c).named_parameters()}
    in_flax = jax.eval_shape(lambda: flax_vit.ViT(c).init(jax.random.key(0), BATCH["pixels"]))["params"]
    assert in_torch == shapes(c) == {name: x.shape for name, x in flattened(in_flax).items()}
    assert shapes(c)["patches"] == (12, 12)
    assert shapes(c)["head_bias"] == (5,)


def gradient_in_jax(method, scope: str) -> tuple[float, dict[str, np.ndarray]]:
    c, tx = config(), optax.adam(1e-3, b2=B2)
    model = flax_vit.ViT(c)
    features = flax_vit.staged(model, 1) if scope == "top:1" else partial(flax_vit.features, model)
    of = fsam_core.jax.value_and_grad(features, method, b2=B2, blocks=blocks(c))
    params = jax.tree.map(jax.numpy.asarray, nested(initial(c, 0)))
    (loss, _), g = jax.jit(lambda params: of(params, BATCH, tx.init(params))[:2])(params)
    return float(loss), flattened(jax.device_get(g))


# XLA compiles each for seconds; `test_image_runs.py` takes steps of precond-functional-sam in both.
QUICK = {("sam", "no-head"), ("functional-sam", "top:1")}
EACH = [*((name, "all") for name in NAMES), *QUICK]


@pytest.mark.parametrize(
    ("method", "scope"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in sorted(EACH)]
)
def test_both_frameworks_have_the_gradient_of_every_method(method, scope):
    c, chosen = config(), named(method, 0.1, **({} if method == "adamw" else {"scope": scope}))
    model = torch_vit.ViT(c)
    features = torch_vit.staged(1) if scope == "top:1" else torch_vit.features
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, B2))
    step = fsam_core.torch.Step(model, adamw, chosen, features=features, blocks=blocks(c))
    loss = float(step.gradient(IN_TORCH))
    expected, g = gradient_in_jax(chosen, scope)
    assert loss == pytest.approx(expected, rel=1e-5)
    norm = np.sqrt(sum(np.square(x).sum() for x in g.values()))
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, g[name], atol=1e-5 * norm, rtol=0, err_msg=name)


def test_the_loss_of_a_mixture_is_that_of_its_weighted_labels():
    c = config()
    z = torch.from_numpy(torch_inference.image_logits(c, initial(c, 0))(BATCH["pixels"]).astype(np.float64))
    logp = torch.log_softmax(z, 1).numpy()
    expected = -(np.take_along_axis(logp, BATCH["labels"], 1) * BATCH["weights"]).sum() / 4
    found = fsam_core.torch.mean_loss(torch_vit.features)(torch_vit.ViT(c), IN_TORCH)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@each_pool
def test_permuted_patches_change_the_logits_and_not_without_positions(pool):
    """The control: what a position holds comes from the learned positions alone."""
    c = config(pool=pool)
    weights = initial(c, 0)
    blind = {**weights, "positions": np.zeros_like(weights["positions"])}
    columns = BATCH["pixels"].reshape(4, 4, 3, 2, 3)
    permuted = columns[:, :, [2, 0, 1]].reshape(4, 4, 6, 3)
    for module in (jax_inference, torch_inference):
        moved = lambda w, at=module.image_logits: np.abs(at(c, w)(BATCH["pixels"]) - at(c, w)(permuted)).max()
        assert moved(weights) > 1e-3
        assert moved(blind) < 1e-5


def test_every_patch_reaches_every_other():
    """There is no causal mask: the class token, which comes first, sees the last patch."""
    c = config(pool="token")
    other = BATCH["pixels"].copy()
    other[:, -1, -1] ^= 255
    for module in (jax_inference, torch_inference):
        one, changed = (module.image_logits(c, initial(c, 0))(x) for x in (BATCH["pixels"], other))
        assert (np.abs(one - changed).max(1) > 1e-5).all()


def test_dropout_is_drawn_by_key_and_by_mode():
    c = config(dropout=0.5)
    model = torch_vit.ViT(c)
    torch.manual_seed(0)
    one, other = (torch_vit.features(model, IN_TORCH).hidden for _ in range(2))
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(*(torch_vit.features(model, IN_TORCH).hidden for _ in range(2)))
    params = nested(initial(c, 0))
    of = jax.jit(lambda key: flax_vit.features(flax_vit.ViT(c), params, {**BATCH, "key": key}).hidden)
    one, again, other = (np.asarray(of(jax.random.key(seed))) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_checkpointed_blocks_have_the_same_gradient():
    found = []
    for remat in (False, True):
        model = torch_vit.ViT(config(), remat=remat)
        fsam_core.torch.Step(
            model, torch.optim.AdamW(model.parameters()), named("sam", 0.1), features=torch_vit.features
        ).gradient(IN_TORCH)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-8) for name in found[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch": 3}, "--patch must divide both sides of the images, 4 x 6 pixels, got 3"),
        ({"patch": 0}, "--patch must divide"),
        ({"pool": "max"}, "--pool must be mean or token, got 'max'"),
        ({"rotary": True}, "--rotary"),
        ({"classes": 1}, "at least two classes, got 1"),
        ({"dropout": 1.5}, "--dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        config(**changes)


def test_sizes_are_what_the_images_make_them():
    c = config(pool="token")
    assert (c.seq_len, c.vocab_size, c.rows, c.tied, c.top) == (7, 5, 1, False, (1,))
    assert config(classes=11).top == (1, 5)
    assert c.parameters == sum(p.numel() for p in torch_vit.ViT(c).parameters())
    assert config_of(dataclasses.asdict(c)) == c
    assert dataclasses.replace(c, pool="mean").seq_len == 6
    assert module_of("torch", c) is torch_vit


def test_presets_have_the_published_sizes():
    millions = {name: found.model(tied=False, dropout=0.0).parameters / 1e6 for name, found in VIT_PRESETS.items()}
    # Dosovitskiy et al. 2021, table 1: ViT-B/16 has 86 M; Touvron et al. 2021: DeiT-S, the same as ViT-S/16, 22 M.
    assert millions["vit-b16"] == pytest.approx(86.6, abs=0.2)
    assert millions["vit-s16"] == pytest.approx(22.05, abs=0.1)
    with pytest.raises(UserError, match="vit-tiny is a model of images; give --task images, or one of tiny, 2m"):
        preset("vit-tiny", "text")
    with pytest.raises(UserError, match="follows from image and patch"):
        preset("vit-tiny").model(seq_len=4, tied=False, dropout=0.0)
