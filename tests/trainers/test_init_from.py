"""`fsam train --init-from`: the source's logits and loss at step 0, its sizes and its tokenizer."""

import json

import numpy as np
import pytest
import torch
import transformers
from small_runs import SMALL, arguments, fsam, train_options
from trained_runs import FRAMEWORKS, logits, random_model, runs, saved  # noqa: F401

from fsam_core import UserError
from fsam_trainers import pretrained, registry
from fsam_trainers.config import difference
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import nested
from fsam_trainers.models.layout import ModelConfig, shapes


def hf_model(folder, **changes) -> transformers.PreTrainedModel:
    """A GPT-2 of transformers whose arrays are all random, biases and norms too, saved in a folder."""
    sizes = {"n_layer": 2, "n_embd": 12, "n_head": 3, "n_positions": 9, "vocab_size": 31, "n_inner": None}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "n_inner": 48}, {"activation_function": "gelu_pytorch_tanh"}],
    ids=["tied", "untied", "gelu"],
)
def test_gpt2_of_transformers_has_the_same_logits_here(framework, changes, tmp_path):
    model = hf_model(tmp_path / "hf", **changes)
    found = pretrained.find(f"hf:{tmp_path / 'hf'}", "--init-from")
    tokens = np.random.default_rng(0).integers(0, 31, (3, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(
        logits(framework, found.config, found.weights(), tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_files_without_the_prefix_and_in_shards_are_read(tmp_path):
    model = hf_model(tmp_path / "hf")
    model.transformer.save_pretrained(tmp_path / "bare", max_shard_size="5kB")
    assert len(list((tmp_path / "bare").glob("*.safetensors"))) > 1
    (tmp_path / "bare" / "consolidated.safetensors").write_bytes(b"the same again, under other names")
    whole, bare = (pretrained.find(str(tmp_path / name), "--init-from").weights() for name in ("hf", "bare"))
    assert all(np.array_equal(whole[name], bare[name]) for name in whole)


def test_biases_give_the_same_loss_and_gradients_in_both_frameworks():
    import jax
    import torch.nn.functional as F

    config, weights = random_model(biases=True, norm_eps=1e-5)
    tokens = np.random.default_rng(0).integers(0, 31, (3, 10))

    def loss_of(params):
        out = flax_decoder.features(flax_decoder.Decoder(config), params, {"tokens": tokens})
        return -jax.nn.log_softmax(out.hidden @ out.weight.T)[np.arange(27), out.labels].mean()

    grads = jax.jit(jax.grad(loss_of))(nested(weights))
    model = torch_decoder.Decoder(config, weights=weights)
    out = torch_decoder.features(model, torch.from_numpy(tokens))
    F.cross_entropy(out.hidden @ out.weight.T, out.labels).backward()
    for name, p in model.named_parameters():
        block, _, leaf = name.rpartition(".")
        g = np.asarray((grads[block] if block else grads)[leaf])
        np.testing.assert_allclose(p.grad, g, rtol=1e-3, atol=1e-5 * np.abs(g).max() + 1e-8, err_msg=name)


def test_biases_are_parameters_of_both_frameworks_in_one_layout():
    import jax

    config = ModelConfig(2, 12, 3, 9, 31, tied=False, biases=True)
    names = {name: tuple(p.shape) for name, p in torch_decoder.Decoder(config).named_parameters()}
    assert names == shapes(config)
    tree = jax.eval_shape(lambda: flax_decoder.Decoder(config).init(jax.random.key(0), np.zeros((1, 9), int)))
    assert {k.removesuffix("_bias") for k in names if k.endswith("_bias")} == {
        k for k in names if k.rpartition(".")[2] not in ("embedding", "positions", "head") and not k.endswith("_bias")
    }
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(nested(shapes_as_arrays(config)))


def shapes_as_arrays(config):
    return {name: np.zeros(shape) for name, shape in shapes(config).items()}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_begins_with_the_weights_and_loss_of_its_source(framework, runs, text, tmp_path):  # noqa: F811
    other = ({*FRAMEWORKS} - {framework}).pop()
    source = runs[other]
    # A rate of almost 0: the weights after a step are still the source's.
    more = ("--framework", framework, "--method", "adamw", "--steps", 1, "--learning-rate", 1e-12, "--quiet")
    command = ["train", "--data", text, "--batch", 4, "--out", tmp_path / "run", "--init-from", source, *more]
    assert fsam(*command) == 0
    before, after = (
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (source, tmp_path / "run")
    )
    assert after[-1]["val_loss"] == pytest.approx(before[-1]["val_loss"], abs=1e-5)
    found = pretrained.find(str(tmp_path / "run"), "RUN")
    assert found.config == pretrained.find(str(source), "RUN").config  # the tiny preset is larger
    assert found.tokenizer.read_bytes() == (source / "tokenizer.json").read_bytes()
    for name, value in pretrained.find(str(source), "RUN").weights().items():
        np.testing.assert_allclose(found.weights()[name], value, atol=1e-6)


def test_every_source_gives_the_same_first_weights(runs, text, tmp_path):  # noqa: F811
    folders = {form: tmp_path / form for form in ("safetensors", "hf")}
    for form, folder in folders.items():
        assert fsam("export", runs["torch"], "--to", form, "--out", folder) == 0
    made = {}
    for source in (runs["torch"], *folders.values(), f"hf:{folders['hf']}"):
        options = train_options(["train", "--data", str(text), "--init-from", str(source), "--framework", "torch"])
        made[str(source)] = registry.make(options.settings()).weights()
    first, *others = made.values()
    for other in others:
        assert other.keys() >= first.keys()
        assert all(np.array_equal(other[name], first[name]) for name in first)
        assert not any(other[name].any() for name in other.keys() - first.keys())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fine_tuning_lowers_the_loss_with_fresh_moments(framework, runs, text, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    more = ("--framework", framework, "--method", "precond-functional-sam", "--rho", 0.05, "--probe-steps", 0)
    command = ["train", "--data", text, "--batch", 4, "--out", run, "--init-from", runs[framework], "--steps", 20]
    assert fsam(*command, *more, "--learning-rate", 0.01, "--quiet") == 0
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [x["val_loss"] for x in lines if "val_loss" in x]
    source = [json.loads(x) for x in (runs[framework] / "metrics.jsonl").read_text().splitlines()][-1]["val_loss"]
    assert losses[-1] < source - 0.1
    assert lines[0]["learning_rate"] == 0  # its own warm-up


def test_a_stopped_run_resumes_from_its_own_weights(runs, text, tmp_path):  # noqa: F811
    more = ("--framework", "torch", "--method", "adamw", "--init-from", runs["torch"], "--schedule", "wsd")
    parts = tmp_path / "parts"
    for steps in (3, 6):
        assert fsam(*arguments(text, parts, *more, "--steps", steps, "--decay", 0)) == 0
    assert fsam(*arguments(text, tmp_path / "flat", *more, "--steps", 6, "--decay", 0)) == 0
    flat, extended = (pretrained.find(str(tmp_path / name), "RUN").weights() for name in ("flat", "parts"))
    assert all(np.array_equal(flat[name], extended[name]) for name in flat)


def test_a_shorter_context_keeps_the_first_positions(runs, tmp_path):  # noqa: F811
    options = train_options(["train", "--init-from", str(runs["torch"]), "--framework", "torch", "--seq-len", "7"])
    made, source = registry.make(options.settings()).weights(), pretrained.find(str(runs["torch"]), "RUN").weights()
    assert np.array_equal(made["positions"], source["positions"][:7])


def test_another_size_is_refused_before_anything_is_read_or_timed(tmp_path):
    with pytest.raises(UserError, match="has --width 12, got --width 24; leave the option out"):
        train_options(["train", "--init-from", str(saved(tmp_path / "source")), "--width", "24"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--width", 24), "has --width 12, got --width 24; leave the option out"),
        (("--seq-len", 12), "has --seq-len 9, got --seq-len 12; leave the option out"),
        (("--no-tied",), "has --tied True, got --tied False; leave the option out"),
        (("--data", "TEXT"), "has no tokenizer.json or tokenizer.model beside its weights; give --tokenizer FILE"),
        (("--init-from", "nowhere"), "--init-from: nowhere is not there; give a run's folder"),
        (("--init-from", "hf:nobody/nothing"), "--init-from: hf:nobody/nothing cannot be taken from the hub"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, says, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokens = tmp_path / "tokens.bin"
    np.zeros(2000, "<u2").tofile(tokens)
    source = saved(tmp_path / "source")
    more = [text if x == "TEXT" else x for x in more]
    command = ["train", "--framework", "torch", "--method", "adamw", "--batch", 4, "--steps", 1, "--quiet"]
    out = tmp_path / "run"
    assert fsam(*command, "--data", tokens, "--init-from", source, "--out", out, *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("option", ["--biases", "--qkv-biases"])
def test_biases_with_tensor_parallel_ranks_are_refused_in_torch(option):
    from fsam_trainers.torch import mesh

    options = [*SMALL, "--framework", "torch", option, "--tensor-parallel", "2"]
    with pytest.raises(UserError, match=f"--tensor-parallel: in torch a model with {option} is not cut"):
        mesh.check(train_options(["train", *options]).settings(), 2)


def test_the_soft_cap_of_the_source_is_kept_unless_another_is_given(tmp_path):
    source = str(saved(tmp_path / "source", soft_cap=5.0))
    for more, cap in (([], 5.0), (["--soft-cap", "0"], 0.0)):
        assert train_options(["train", "--init-from", source, *more]).settings().soft_cap == cap


def test_settings_from_before_biases_are_those_without():
    settings = train_options(["train", *SMALL, "--framework", "torch"]).settings().as_dict()
    older = {**settings, "model": {k: v for k, v in settings["model"].items() if k not in ("biases", "norm_eps")}}
    assert difference(settings, older) == ""
    changed = {**settings, "model": {**settings["model"], "biases": True}}
    assert difference(changed, older) == "model.biases False (now True)"
