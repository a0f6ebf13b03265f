"""`fsam export`: transformers computes the run's own logits; the files need nothing of this project."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from small_runs import arguments, final_weights, fsam
from trained_runs import FRAMEWORKS, logits, random_model, runs, saved  # noqa: F401

from fsam_trainers import pretrained
from fsam_trainers.models.layout import shapes


def in_transformers(folder, tokens_BxL: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BxL)).logits.numpy()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_transformers_has_the_logits_and_ids_of_a_run(framework, runs, text, tmp_path):  # noqa: F811
    assert fsam("export", runs[framework], "--to", "hf", "--out", tmp_path / "hf") == 0
    found = pretrained.find(str(runs[framework]), "RUN")
    weights = final_weights(arguments(text, runs[framework], "--framework", framework, "--method", "adamw"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = np.array([tokenizer("def main(argv):\n    return argv")["input_ids"][:16]])
    assert tokenizer.decode(tokens[0]).startswith("def main(")
    expected = logits(framework, found.config, weights, tokens)
    np.testing.assert_allclose(in_transformers(tmp_path / "hf", tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"tied": False}, {"biases": True, "norm_eps": 1e-5}], ids=str)
def test_transformers_has_the_logits_of_every_kind_of_head_and_norm(changes, tmp_path):
    saved(tmp_path / "ours", **changes)
    assert fsam("export", tmp_path / "ours", "--to", "hf", "--out", tmp_path / "hf") == 0
    tokens = np.random.default_rng(1).integers(0, 31, (2, 9))
    expected = logits("torch", *random_model(**changes), tokens)
    np.testing.assert_allclose(in_transformers(tmp_path / "hf", tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_safetensors_hold_the_weights_of_a_run_to_the_bit(framework, runs, text, tmp_path):  # noqa: F811
    assert fsam("export", runs[framework], "--out", tmp_path / "ours") == 0
    read = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    weights = final_weights(arguments(text, runs[framework], "--framework", framework, "--method", "adamw"))
    assert read.keys() == weights.keys()
    assert all(np.array_equal(read[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model"]["width"] == 16
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (runs[framework] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_average_is_exported_where_evaluation_sees_it(framework, text, tmp_path):
    run = tmp_path / "run"
    options = arguments(text, run, "--framework", framework, "--method", "adamw", "--steps", 3, "--ema", 0.9)
    assert fsam(*options) == 0
    average, last = pretrained.find(str(run), "RUN").weights(), final_weights(options)
    assert not np.array_equal(average["embedding"], last["embedding"])
    np.testing.assert_allclose(average["embedding"], last["embedding"], atol=0.05)


def test_the_default_folder_is_beside_the_model(tmp_path, monkeypatch):
    saved(tmp_path / "ours")
    monkeypatch.chdir(tmp_path / "ours")
    assert fsam("export", ".") == 0
    assert (tmp_path / "ours-safetensors" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--to", "onnx"), "--to must be safetensors or hf, got 'onnx'"),
        (("--to", "hf"), "was trained with --soft-cap 20.0, which transformers' do not have; give --to safetensors"),
        (("--out", "used"), "is there already; give a new folder"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(more, says, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    saved(tmp_path / "ours", soft_cap=20.0)
    more = [tmp_path / x if x == "used" else x for x in more]
    assert fsam("export", tmp_path / "ours", "--out", tmp_path / "new", *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert [x.name for x in (tmp_path / "used").iterdir()] == ["mine"]


def spoiled(folder, name):
    """A folder that cannot be read, by what is wrong with it."""
    if name == "no such folder":
        return folder / "nowhere"
    if name == "an empty folder":
        folder.mkdir()
        return folder
    saved(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    if name == "a file":
        return file
    if name == "pickled weights":
        file.rename(folder / "pytorch_model.bin")
    elif name == "a truncated file":
        file.write_bytes(file.read_bytes()[:-40])
    elif name == "no weights":
        file.unlink()
    elif name == "gemma":
        config.write_text('{"model_type": "gemma"}')
    elif name == "an unknown size":
        config.write_text(config.read_text().replace('"heads"', '"teeth"'))
    elif name == "relu":
        config.write_text('{"model_type": "gpt2", "activation_function": "relu"}')
    elif name == "a missing array":
        tensors = safetensors.numpy.load_file(file)
        del tensors["final_norm"]
        safetensors.numpy.save_file(tensors, file)
    else:
        config.write_text("{")
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no such folder", "is not there; give a run's folder"),
        ("an empty folder", "holds neither checkpoints nor a config.json; give a run's folder"),
        ("a file", "is a file; give a run's folder"),
        ("pickled weights", "pytorch_model.bin holds pickled weights, which may run any code"),
        ("a truncated file", "model.safetensors cannot be read"),
        ("no weights", "has a config.json and no *.safetensors beside it"),
        ("gemma", "is of model_type 'gemma'; this decoder computes those of gpt2, llama"),
        ("an unknown size", "its config.json cannot be used: TypeError"),
        ("relu", "its config.json has activation_function 'relu', and this decoder computes 'gelu_new' only"),
        ("a missing array", "final_norm is missing, and config.json makes it [12]"),
        ("a damaged config", "its config.json cannot be used"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name, says, tmp_path, capsys):
    folder = spoiled(tmp_path / "model", name)
    assert fsam("export", folder, "--out", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_bfloat16_files_are_read(tmp_path):
    config, weights = random_model()
    saved(tmp_path / "ours")
    from safetensors.torch import save_file

    halved = {name: torch.from_numpy(value).bfloat16() for name, value in weights.items()}
    save_file(halved, tmp_path / "ours" / "model.safetensors")
    read = pretrained.find(str(tmp_path / "ours"), "MODEL").weights()
    assert read.keys() == shapes(config).keys()
    assert all(np.array_equal(read[name], halved[name].float().numpy()) for name in read)


def test_the_code_on_the_page_reads_every_kind_of_folder(runs, tmp_path):  # noqa: F811
    for name, form in (("EXPORTED", "safetensors"), ("EXPORTED_HF", "hf")):
        assert fsam("export", runs["torch"], "--to", form, "--out", tmp_path / name) == 0
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    paths = {"EXPORTED_HF": tmp_path / "EXPORTED_HF", "EXPORTED/": f"{tmp_path / 'EXPORTED'}/"}
    paths |= {"TORCH_RUN": runs["torch"], "JAX_RUN": runs["jax"]}
    found = []
    for block in blocks:
        for name, path in paths.items():
            block = block.replace(name, str(path))
        found.append({})
        exec(block, found[-1])
    ours, hf, in_torch, in_jax = found
    weights = {name: pretrained.find(str(runs[name]), "RUN").weights()["embedding"] for name in FRAMEWORKS}
    assert np.array_equal(ours["weights"]["embedding"], weights["torch"])
    assert ours["sizes"]["width"] == 16
    assert hf["tokenizer"].decode(hf["ids"][0]).startswith("def main(")
    assert np.array_equal(in_torch["weights"]["embedding"].numpy(), weights["torch"])
    assert np.array_equal(in_jax["restored"]["params"]["embedding"], weights["jax"])
