"""Models of Llama's shape: the logits of transformers both ways, one function in both frameworks, what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
import transformers
from small_runs import SIZES, arguments, final_weights, fsam, train_options
from trained_runs import logits, random_model, saved

from fsam_core import UserError, cost
from fsam_core.torch.curvature import Curvature
from fsam_trainers import pretrained, registry
from fsam_trainers.cost_table import counted
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import flattened, nested
from fsam_trainers.models.layout import ModelConfig, initial, rotation, shapes

LLAMA = {"rms_norm": True, "rotary": True, "swiglu": True, "kv_heads": 2}
EVERY = {**LLAMA, "heads": 4, "head_width": 6, "mlp_width": 20, "qkv_biases": True, "qk_norm": True}
OPTIONS = ("--rms-norm", "--rotary", "--swiglu", "--kv-heads", 2)
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 9, "max_position_embeddings": 32}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 6}),
}


def hf_model(folder, kind: str, **changes) -> transformers.PreTrainedModel:
    """A model of transformers whose arrays are all random, norms and biases too, saved in a folder."""
    name, own = KINDS[kind]
    sizes = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 31}
    sizes |= {"intermediate_size": 20, "max_position_embeddings": 9, "rms_norm_eps": 1e-5}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **rope, **own, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def in_transformers(model, tokens_BxL: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BxL)).logits.numpy()


def described(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits_there_and_back(kind, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 31, (3, 9))
    expected = in_transformers(hf_model(tmp_path / "hf", kind), tokens)
    found = pretrained.find(str(tmp_path / "hf"), "--init-from")
    assert found.config.seq_len == 9  # of Mistral the window
    close = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    for framework in ("jax", "torch") if kind in ("qwen2", "qwen3") else ("torch",):
        np.testing.assert_allclose(logits(framework, found.config, found.weights(), tokens), expected, **close)

    assert fsam("export", tmp_path / "hf", "--to", "hf", "--out", tmp_path / "back") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    np.testing.assert_array_equal(in_transformers(again, tokens), expected)
    before, after = (safetensors.numpy.load_file(tmp_path / x / "model.safetensors") for x in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_sizes_are_those_of_the_folder_and_may_be_left_out(tmp_path):
    hf_model(tmp_path / "hf", "qwen3")
    options = train_options(["train", "--init-from", str(tmp_path / "hf"), "--seq-len", "7"])
    model = options.settings().model
    assert (model.width, model.heads, model.K, model.d, model.F, model.seq_len) == (12, 3, 1, 6, 20, 7)
    # A file of version 4 of transformers: other keys, and defaults that are not stated.
    config = described(tmp_path / "hf")
    del config["rope_parameters"], config["tie_word_embeddings"], config["use_sliding_window"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_theta": 77.0, "rope_scaling": None}))
    found = pretrained.find(str(tmp_path / "hf"), "--init-from").config
    assert (found.rope_theta, found.tied, found.seq_len) == (77.0, False, 9)


def test_one_loss_and_gradient_in_both_frameworks():
    config, weights = random_model(**EVERY, tied=False)
    tokens = np.random.default_rng(0).integers(0, 31, (3, 10))

    def loss_of(params):
        out = flax_decoder.features(flax_decoder.Decoder(config, remat=True), params, {"tokens": tokens})
        return -jax.nn.log_softmax(out.hidden @ out.weight.T)[np.arange(27), out.labels].mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(nested(weights))
    model = torch_decoder.Decoder(config, remat=True, weights=weights)
    out = torch_decoder.features(model, torch.from_numpy(tokens))
    other = F.cross_entropy(out.hidden @ out.weight.T, out.labels)
    other.backward()
    assert float(loss) == pytest.approx(float(other.detach()), rel=1e-6)
    grads = flattened(grads)
    assert grads.keys() == shapes(config).keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        g = np.asarray(grads[name])
        np.testing.assert_allclose(p.grad, g, rtol=1e-3, atol=1e-5 * np.abs(g).max() + 1e-8, err_msg=name)


def test_second_derivatives_are_those_of_differences():
    config, weights = random_model(**EVERY)
    model = torch_decoder.Decoder(config, weights=weights).double().eval()
    given = model, torch_decoder.features, torch.from_numpy(np.random.default_rng(0).integers(0, 31, (2, 10)))
    exact, near = Curvature(*given), Curvature(*given, products="difference", radius=1e-4)
    v = exact.tree(np.random.default_rng(0).normal(size=exact.size))
    for got, want in zip(exact.both(v), near.both(v), strict=True):
        assert np.linalg.norm(exact.vector(got) - near.vector(want)) < 1e-5 * np.linalg.norm(near.vector(want))


def test_rotations_depend_on_distances_alone():
    """The product of a rotated query and key is a function of how far apart they are."""
    cos, sin = rotation(8, 100.0, 40)
    q, k = np.random.default_rng(0).normal(size=(2, 8))
    turned = lambda x, m: torch_decoder.rotated(torch.tensor(x)[None], *(torch.tensor(t[m]) for t in (cos, sin)))
    product = lambda m, n: float(turned(q, m) @ turned(k, n).T)
    assert product(5, 3) == pytest.approx(product(39, 37), rel=1e-4)
    assert product(5, 3) != pytest.approx(product(5, 4), rel=1e-2)
    np.testing.assert_allclose(cos[3], np.cos(3 * 100.0 ** (-np.arange(0, 8, 2) / 8)), rtol=1e-5)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_half_floats_are_near_float32(framework):
    config, weights = random_model(**EVERY)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9))
    exact = logits("torch", config, weights, tokens)
    if framework == "torch":
        model = torch_decoder.Decoder(config, weights=weights).bfloat16()
        h, w = (x.detach().float().numpy() for x in model(torch.from_numpy(tokens)))
    else:
        model = flax_decoder.Decoder(config)
        h, w = model.apply({"params": nested(weights)}, tokens, dtype=jax.numpy.bfloat16)
        assert h.dtype == jax.numpy.bfloat16
        h, w = np.asarray(h, np.float32), np.asarray(w, np.float32)
    assert np.abs((h @ w.T).reshape(exact.shape) - exact).max() < 0.05 * np.abs(exact).max()


def test_a_run_starts_from_llama_and_transformers_loads_its_end(text, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    source = hf_model(tmp_path / "hf", "llama", **sizes, max_position_embeddings=16)
    tokens = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 300, 4000).astype("<u2").tofile(tokens)
    more = ("--init-from", tmp_path / "hf", "--framework", "torch", "--rho", 0.05, "--probe-steps", 0)
    run = ["train", "--data", tokens, "--batch", 4, "--steps", 3, "--out", tmp_path / "run", "--quiet", *more]
    run = [str(x) for x in run]
    started = registry.make(train_options(run).settings()).weights()
    theirs = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert np.array_equal(started["embedding"], theirs["model.embed_tokens.weight"])
    batch = np.random.default_rng(1).integers(0, 300, (4, 17))
    config = pretrained.find(str(tmp_path / "hf"), "MODEL").config
    losses = pretrained.inference("torch").window_losses(
        config, started, train_options(run).settings().losses()[1], batch
    )
    expected = in_transformers(source, batch[:, :-1]).reshape(-1, 300)
    expected = F.cross_entropy(torch.from_numpy(expected), torch.from_numpy(batch[:, 1:].reshape(-1)))
    assert losses.mean() == pytest.approx(float(expected), rel=1e-6)

    assert fsam(*run) == 0
    assert fsam("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "after") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    found = logits("torch", config, final_weights(run), batch[:, :-1])
    assert np.abs(found - in_transformers(source, batch[:, :-1])).max() > 1e-3
    np.testing.assert_allclose(in_transformers(model, batch[:, :-1]), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_options_train_a_llama_from_the_start(framework, text, tmp_path):
    run = arguments(text, tmp_path / "run", "--framework", framework, *OPTIONS, "--steps", 20, "--probe-steps", 0)
    assert fsam(*run) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.3
    assert fsam("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf") == 0
    assert described(tmp_path / "hf")["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has rope_parameters {'rope_type': 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "has rope_scaling {'type'"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', and this decoder computes 'silu' only"),
        ({"attention_bias": True}, "has attention_bias True, and this decoder computes False only"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config {'bits': 4}, and"),
        (
            {"model_type": "gemma"},
            "is of model_type 'gemma'; this decoder computes those of gpt2, llama, mistral, qwen",
        ),
        ({"num_key_value_heads": 2}, "--kv-heads must divide --heads 3, got 2"),
        ({"hidden_size": None}, "its config.json cannot be used: TypeError"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_the_decoder_does_not_compute_is_one_sentence(changes, says, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3}
    config |= {"vocab_size": 31, "intermediate_size": 20}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as error:
        pretrained.find(str(folder), "--init-from")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm": True}, "is of neither GPT-2's shape nor Llama's"),
        ({"kv_heads": 1}, "is of neither GPT-2's shape nor Llama's"),
        ({**LLAMA, "kv_heads": 1, "qk_norm": True, "qkv_biases": True}, "has biases that no model of transformers"),
    ],
    ids=["rms", "grouped", "biases"],
)
def test_a_shape_without_a_name_is_not_exported(changes, says, tmp_path, capsys):
    assert fsam("export", saved(tmp_path / "ours", **changes), "--to", "hf", "--out", tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_heads": 2}, "--kv-heads must divide --heads 3, got 2"),
        ({"rotary": True, "head_width": 5}, "--rotary takes heads of an even number of features, and these have 5"),
        ({"rope_theta": 1.0}, r"--rope-theta must be a finite number > 1, got 1\.0"),
        ({"mlp_width": 0}, "mlp_width must be at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        random_model(**changes)


def test_defaults_are_those_of_before():
    config = ModelConfig(2, 12, 3, 9, 31)
    assert (config.K, config.d, config.F) == (3, 4, 48)
    assert ModelConfig(1, 128, 4, 9, 31, swiglu=True).F == 344
    values = initial(config, 0)
    draw = np.random.Generator(np.random.Philox(0))
    assert np.array_equal(values["embedding"], draw.standard_normal((31, 12), np.float32) * np.float32(0.02))
    assert [name for name in values if name.startswith("block_0.")] == [
        f"block_0.{x}" for x in ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out")
    ]


def test_the_cost_model_has_the_number_of_parameters():
    config = ModelConfig(3, 24, 4, 16, 50, **LLAMA, tied=False)
    assert counted(config, "torch").parameters == config.parameters
    assert cost.decoder(3, 24, 96, 4, 16, 50).parameters == ModelConfig(3, 24, 4, 16, 50).parameters


def test_sizes_of_the_command_line_make_the_model():
    model = train_options(["train", *SIZES, *map(str, OPTIONS), "--mlp-width", "24"]).settings().model
    assert model == ModelConfig(1, 16, 4, 16, 300, **LLAMA, mlp_width=24)
