"""The decoder in Flax and in PyTorch: one layout, one function, the sizes of the presets."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fsam_core import UserError
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import flattened, nested
from fsam_trainers.models.layout import ModelConfig, initial, shapes
from fsam_trainers.presets import PRESETS, preset

each_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def config(**changes) -> ModelConfig:
    sizes = {"layers": 2, "width": 12, "heads": 3, "seq_len": 7, "vocab_size": 19}
    return ModelConfig(**{**sizes, **changes})


def tokens(rows: int = 3, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 19, (rows, length))


def hidden(framework: str, c: ModelConfig, inputs: np.ndarray) -> np.ndarray:
    if framework == "torch":
        return torch_decoder.Decoder(c).eval()(torch.from_numpy(inputs))[0].detach().numpy()
    return np.asarray(jax.jit(flax_decoder.Decoder(c).apply)({"params": flax_decoder.parameters(c, 0)}, inputs)[0])


@each_head
def test_same_weights_give_the_same_loss_and_gradients(tied):
    c = config(tied=tied)

    def loss_of(params):
        out = flax_decoder.features(flax_decoder.Decoder(c), params, {"tokens": tokens()})
        logp = jax.nn.log_softmax(out.hidden @ out.weight.T)
        return -logp[np.arange(len(out.labels)), out.labels].mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(flax_decoder.parameters(c, 3))
    model = torch_decoder.Decoder(c, seed=3)
    out = torch_decoder.features(model, torch.from_numpy(tokens()))
    other = F.cross_entropy(out.hidden @ out.weight.T, out.labels)
    other.backward()
    assert float(loss) == pytest.approx(float(other.detach()), rel=1e-5)
    grads = flattened(grads)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, grads[name], rtol=1e-3, atol=1e-5 * np.abs(grads[name]).max(), err_msg=name)


@each_head
def test_the_layout_names_the_parameters_of_both(tied):
    c = config(tied=tied)
    in_torch = {name: tuple(p.shape) for name, p in torch_decoder.Decoder(c).named_parameters()}
    in_flax = jax.eval_shape(lambda: flax_decoder.Decoder(c).init(jax.random.key(0), tokens(length=7)))["params"]
    assert in_torch == shapes(c)
    assert {name: x.shape for name, x in flattened(in_flax).items()} == shapes(c)
    assert ("head" in shapes(c)) != tied


def test_values_travel_through_both_and_back():
    flat = initial(config(tied=False), seed=2)
    model = torch_decoder.Decoder(config(tied=False), seed=0)
    torch_decoder.load(model, flat)
    for copy in (torch_decoder.as_numpy(model), flattened(nested(flat))):
        assert copy.keys() == flat.keys()
        assert all(np.array_equal(copy[k], flat[k]) for k in flat)
    with pytest.raises(RuntimeError):
        torch_decoder.load(model, {**flat, "other": np.zeros(1)})


def test_initial_values_are_a_function_of_the_seed():
    one, again, other = (initial(config(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[k], again[k]) for k in one)
    assert not np.array_equal(one["embedding"], other["embedding"])


@each_head
def test_a_fresh_model_is_close_to_uniform(tied):
    out = torch_decoder.features(torch_decoder.Decoder(config(tied=tied, width=48)), torch.from_numpy(tokens()))
    assert F.cross_entropy(out.hidden @ out.weight.T, out.labels).item() == pytest.approx(np.log(19), abs=0.1)


@pytest.mark.parametrize(
    ("name", "millions"), [("24m", 23.9), ("43m", 42.5), ("118m", 117.9), ("1208m", 1208), ("2m", 2)]
)
def test_presets_have_the_papers_number_of_parameters(name, millions):
    count = preset(name).model(tied=True, dropout=0.0).non_embedding_parameters
    assert count / 1e6 == pytest.approx(millions, rel=0.03 if name == "2m" else 0.01)


@each_head
def test_counts_are_those_of_the_model(tied):
    c = config(tied=tied)
    model = torch_decoder.Decoder(c)
    assert c.parameters == sum(p.numel() for p in model.parameters())
    embeddings = ("embedding", "positions", "head")
    assert c.non_embedding_parameters == sum(p.numel() for k, p in model.named_parameters() if k not in embeddings)


def test_every_preset_makes_a_model_and_may_be_resized():
    for found in PRESETS.values():
        assert found.model(tied=False, dropout=0.1).vocab_size == found.vocab_size
        assert found.model(tied=True, dropout=0.0, seq_len=5, vocab_size=11).seq_len == 5
    with pytest.raises(UserError, match="--preset: '7b' is not known"):
        preset("7b")


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_later_token_does_not_reach_an_earlier_state(framework):
    one = tokens(rows=2, length=7)
    other = one.copy()
    other[0, 4] = (one[0, 4] + 1) % 19
    a, b = (hidden(framework, config(), x).reshape(2, 7, 12) for x in (one, other))
    np.testing.assert_allclose(a[0, :4], b[0, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-6)
    assert (np.abs(a[0, 4:] - b[0, 4:]).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_shorter_sequence_is_a_prefix(framework):
    whole = hidden(framework, config(), tokens(rows=1, length=7))
    np.testing.assert_allclose(
        hidden(framework, config(), tokens(rows=1, length=7)[:, :4]), whole[:4], rtol=1e-4, atol=1e-5
    )


def test_dropout_is_drawn_by_key_in_flax():
    c = config(dropout=0.5)
    params, model = flax_decoder.parameters(c, 0), flax_decoder.Decoder(c)
    hidden_of = jax.jit(lambda batch: flax_decoder.features(model, params, {"tokens": tokens(), **batch}).hidden)
    call = lambda **batch: np.asarray(hidden_of(batch))
    one, again, other = (call(key=jax.random.key(s)) for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(call(), call())
    assert not np.array_equal(call(), one)


def test_dropout_is_on_in_training_mode_in_torch():
    model, batch = torch_decoder.Decoder(config(dropout=0.5)), torch.from_numpy(tokens())

    def call(seed):
        torch.manual_seed(seed)
        return torch_decoder.features(model, batch).hidden

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    model.eval()
    assert torch.equal(call(1), call(2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"width": 13}, "width 13 must be a multiple of heads 3"),
        ({"dropout": 1.0}, r"dropout.*1\.0"),
        ({"dropout": -0.1}, r"dropout.*-0\.1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        config(**changes)


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_remat_keeps_block_inputs_only_and_equal_gradients(framework, dropout):
    c = config(dropout=dropout)
    (loss, grads, kept), (again, same, fewer) = (differentiated(framework, c, remat) for remat in (False, True))
    assert again == pytest.approx(loss, rel=1e-6)
    for name, g in grads.items():
        np.testing.assert_allclose(same[name], g, rtol=1e-4, atol=1e-5 * np.abs(g).max(), err_msg=name)
    N, F = 3 * 7, 4 * 12
    assert kept.count((N, F)) >= 2
    assert (N, F) not in fewer
    assert (N, 3 * 12) not in fewer


def differentiated(framework: str, c: ModelConfig, remat: bool) -> tuple[float, dict, list[tuple[int, ...]]]:
    """(loss, gradients, the shapes of what the forward pass keeps for the backward pass)."""
    shapes_kept = []
    if framework == "torch":
        model = torch_decoder.Decoder(c, 3, remat=remat)
        torch.manual_seed(0)
        keep = lambda x: shapes_kept.append(tuple(x.shape)) or x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = torch_decoder.features(model, torch.from_numpy(tokens()))
            loss = F.cross_entropy(out.hidden @ out.weight.T, out.labels)
        kept = list(shapes_kept)
        loss.backward()
        return float(loss.detach()), {k: p.grad.numpy() for k, p in model.named_parameters()}, kept
    model = flax_decoder.Decoder(c, remat=remat)
    batch = {"tokens": tokens()} | ({"key": jax.random.key(0)} if c.dropout else {})

    def loss_of(params):
        out = flax_decoder.features(model, params, batch)
        return -jax.nn.log_softmax(out.hidden @ out.weight.T)[np.arange(len(out.labels)), out.labels].mean()

    params = flax_decoder.parameters(c, 3)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(params)
    residuals = jax.eval_shape(lambda params: jax.vjp(loss_of, params)[1], params)
    kept = [tuple(x.shape) for x in jax.tree.leaves(residuals)]
    return float(loss), {k: np.asarray(x) for k, x in flattened(grads).items()}, kept
