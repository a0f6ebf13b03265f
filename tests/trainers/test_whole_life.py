"""A run's whole life by the command: tune, train, extend, evaluate, export, transformers, fine-tune, sample."""

import json

import numpy as np
import pytest
import torch
import transformers
from small_runs import arguments, fsam
from trained_runs import FRAMEWORKS


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_command_takes_what_the_one_before_has_made(framework, text, tmp_path, capsys):
    base, hf, tuned = (tmp_path / name for name in ("base", "hf", "tuned"))
    more = ("--framework", framework, "--method", "precond-functional-sam")
    schedule = ("--schedule", "wsd", "--decay", 0.5, "--warmup", 1)
    search = ("--grid", "learning-rate=0.01,0.02", "--steps", 4)
    assert fsam(*arguments(text, tmp_path / "tune", *more, *search, command="tune")) == 0
    rows = json.loads((tmp_path / "tune" / "tuning.json").read_text())["rows"]
    best = {row["method"]: row["values"]["learning-rate"] for row in rows}
    assert best.keys() == {"adamw", "precond-functional-sam"}
    more = (*more, "--probe-steps", 0)
    rate = ("--learning-rate", best["precond-functional-sam"])
    for steps in (6, 12):
        assert fsam(*arguments(text, base, *more, *rate, *schedule, "--steps", steps)) == 0
    assert fsam("export", base, "--to", "hf", "--out", hf) == 0
    command = ["train", "--data", text, "--batch", 4, "--quiet", *more, "--learning-rate", 0.003, "--steps", 20]
    assert fsam(*command, "--init-from", hf, "--rho", 0.05, "--out", tuned) == 0
    figures = tmp_path / "figures.json"
    options = ("--data", text, "--quantize", "4", "--noise", "0.1", "--quiet", "--json", figures)
    assert fsam("evaluate", base, hf, tuned, *options) == 0
    rows = {(row["model"], row["weights"]): row for row in json.loads(figures.read_text())["rows"]}
    assert len(rows) == 9
    assert rows[str(hf), "as trained"]["difference"] == pytest.approx(0, abs=1e-6)
    gain = rows[str(tuned), "as trained"]
    assert gain["difference"] < -3 * gain["difference_error"]

    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    ids = torch.tensor([tokenizer("import ")["input_ids"]])
    capsys.readouterr()
    assert fsam("sample", base, "--prompt", "import ", "--temperature", 0, "--tokens", 6) == 0
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
    assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"
    assert fsam("runs", tmp_path) == 0
    table = capsys.readouterr().out
    assert np.all([text in table for text in ("base", "12 of 12", "tuned", "20 of 20")])
