"""The savings as options of a run: what the command makes of them, and that both frameworks then do the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import save

from fsam_core import UserError
from fsam_trainers import registry, timing
from fsam_trainers.cli.compare import Compare
from fsam_trainers.cli.options import parse
from fsam_trainers.cli.train import Train
from fsam_trainers.cli.variants import variants
from fsam_trainers.config import Settings
from fsam_trainers.models import torch_decoder
from fsam_trainers.models.layout import ModelConfig

MODEL = ModelConfig(layers=2, width=16, heads=2, seq_len=16, vocab_size=64)
BASE = Settings("jax", "precond-functional-sam", MODEL, steps=8, batch=8, warmup=2, rho=0.2)
QUICK: dict[str, dict[str, Any]] = {
    "half of the batch, upper blocks, late, with the learning rate": {
        "correction_fraction": 0.5, "scope": "top:1", "start": 0.5, "rho_schedule": "learning-rate",
    },
    "every second, reused, average of the weights": {"every": 2, "between": "reuse", "ema": 0.9},
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "half of the batch, upper blocks": {"correction_fraction": 0.5, "scope": "top:1"},
    "late, with the learning rate": {"start": 0.5, "rho_schedule": "learning-rate"},
    "exact": {},
    "half": {"correction_fraction": 0.5},
    "upper blocks": {"scope": "top:1"},
    "norms": {"scope": "norms"},
    "no head": {"scope": "no-head"},
    "hidden": {"cut": "hidden", "correction_fraction": 0.25},
    "cosine": {"rho_schedule": "cosine"},
    "momentum": {"ascent": "momentum"},
    "previous": {"ascent": "previous"},
    "micro": {"ascent": "micro", "micro_batches": 2},
    "part": {"ascent": "part", "ascent_fraction": 0.25},
    "per tensor": {"norm": "per-tensor"},
    "some steps": {"probability": 0.5},
    "checkpointed blocks": {"remat": True, "correction_fraction": 0.5, "scope": "top:1"},
    "sam": {"method": "sam", "every": 3},
    "split": {"form": "split", "ascent": "rest", "correction_fraction": 0.5},
    "sam, split by micro-batches": {
        "method": "precond-sam",
        "form": "split",
        "ascent": "rest",
        "correction_fraction": 0.25,
        "micro_batches": 4,
    },
}


def losses(framework: Any, changes: dict[str, Any]) -> np.ndarray:
    """Training losses of a run, and its evaluation at the end."""
    random = np.random.default_rng(0)
    batches = [random.integers(0, 64, (8, 17), dtype=np.int32) for _ in range(BASE.steps)]
    one = registry.make(dataclasses.replace(BASE, framework=framework, **changes))
    one.prepare(batches[0])
    seen = [one.step(tokens, i)().loss for i, tokens in enumerate(batches)]
    return np.array([*seen, one.evaluate(batches[:2]).loss])


@pytest.mark.slow
@pytest.mark.parametrize("changes", QUICK.values(), ids=QUICK.keys())
def test_both_frameworks_train_the_same(changes):
    np.testing.assert_allclose(losses("jax", changes), losses("torch", changes), atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", SLOW.values(), ids=SLOW.keys())
def test_both_frameworks_train_the_same_with_every_option(changes):
    np.testing.assert_allclose(losses("jax", changes), losses("torch", changes), atol=3e-6)


def test_an_option_set_by_name_and_what_is_given_beside_it():
    settings = lambda *given: parse(Train, given, "fsam train").settings()
    cheap = settings("--savings", "cheap")
    assert (cheap.correction_fraction, cheap.cut) == (0.125, "hidden")
    assert settings("--savings", "cheap", "--correction-fraction", "1/2").correction_fraction == 0.5
    with pytest.raises(UserError, match="--savings: 'free' is not known; use one of exact, balanced, split, cheap"):
        settings("--savings", "free")


def compared(methods: str, *more: str) -> dict[str, Settings]:
    return variants(parse(Compare, more, "fsam compare"), methods)


def test_methods_of_a_comparison_have_options_of_their_own():
    text = "adamw, sam:rho=0.1:start=0.75,precond-functional-sam:correction-fraction=1/4:scope=top:2"
    plain, sam, mine = compared(text, "--rho", "0.3", "--steps", "100").values()
    assert (plain.method, plain.rho) == ("adamw", 0.3)
    assert (sam.method, sam.rho, sam.start) == ("sam", 0.1, 0.75)
    assert (mine.rho, mine.correction_fraction, mine.scope) == (0.3, 0.25, "top:2")
    assert [sam.kind(i) for i in (0, 74, 75, 99)] == ["plain", "plain", "corrected", "corrected"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sam:rho", "'rho' in 'sam:rho' is no option=value"),
        ("sam:steps=3", "'steps=3' in 'sam:steps=3' is no option=value; the options are learning-rate"),
        ("sam:rho=much", "rho=much in 'sam:rho=much' is no float"),
        ("sam:every=0", "every must be a whole number >= 1, got 0"),
        ("sam:scope=top:5", r"--scope must be at most top:4, the model's blocks, got 'top:5'"),
        ("sam:correction-fraction=1/3", "--correction-fraction must be a share that cuts --batch 16"),
        ("sam:correction-fraction=1/1000000", "--correction-fraction must be a share that cuts --batch 16"),
        ("sam:ascent=part:ascent-fraction=1/3", "--ascent-fraction must be a share that cuts --batch 16"),
        ("sam:start=2", r"--start must be a share of the run"),
    ],
)
def test_wrong_options_of_a_comparison_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        compared(text)


def test_a_run_costs_what_its_kinds_of_steps_do():
    late = dataclasses.replace(BASE, framework="torch", steps=100, start=0.9, every=2, between="reuse")
    kinds = timing.kinds_of(late)
    assert {kind: share for kind, (share, _) in kinds.items()} == pytest.approx({"corrected": 0.05, "reused": 0.05})
    assert {one.kind(50) for _, one in kinds.values()} == {"corrected", "reused"}
    assert timing.kinds_of(timing.as_adamw(late)) == {}
    never = dataclasses.replace(BASE, probability=0.0)
    assert timing.kinds_of(never) == {"plain": (1.0, never)}  # timed too: what stands by is not AdamW's code
    tokens = np.zeros((8, 17), np.int32)
    found = timing.measure({"late": late}, tokens, repeats=3)
    assert found["adamw"].ratio == 1
    assert 0.5 < found["late"].ratio < 2


@pytest.mark.slow
def test_half_precision_follows_float32_in_both_frameworks():
    halves = [("jax", "bfloat16"), ("torch", "bfloat16"), ("torch", "float16")]
    runs = {
        (f, d): losses(f, {"dtype": d, "rho": 0.05}) for f, d in [("jax", "float32"), ("torch", "float32"), *halves]
    }
    for framework, dtype in halves:
        np.testing.assert_allclose(runs[framework, dtype], runs[framework, "float32"], atol=5e-3)
        assert not np.array_equal(runs[framework, dtype], runs[framework, "float32"])


@pytest.mark.parametrize("changes", [{"framework": "jax"}, {"framework": "torch", "fsdp": 2}])
def test_float16_without_a_loss_scale_is_refused(changes):
    with pytest.raises(UserError, match="--dtype must be float32 or bfloat16 there: float16's loss scale is PyTorch's"):
        dataclasses.replace(BASE, dtype="float16", **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_blocks_are_compiled_whole_and_train_the_same(dtype, monkeypatch):
    compiled, real = [], torch_decoder.Block.compile

    def compile_(module, **options):
        compiled.append((type(module).__name__, options))
        real(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch_decoder.Block, "compile", compile_)
    torch._dynamo.reset()
    eager, found = (losses("torch", {"dtype": dtype, "rho": 0.05, "compile": x}) for x in (False, True))
    assert compiled == [("Block", {"fullgraph": True})] * BASE.model.layers
    np.testing.assert_allclose(found, eager, atol=1e-5 if dtype == "float32" else 5e-3)


def test_the_loss_scale_of_a_run_is_in_its_checkpoint(tmp_path):
    settings = dataclasses.replace(BASE, framework="torch", dtype="float16")
    first, second = registry.make(settings), registry.make(settings)
    first._step._scaling.scale = 8.0
    first.step(np.zeros((8, 17), np.int32), 0)()
    save(first, tmp_path / "state")
    second.restore(tmp_path / "state")
    assert second._step.state_dict()["loss_scale"] == {"scale": 8.0, "finite": 1}


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "ema": 0.9, "every": 3, "between": "reuse", "probability": 0.5},
        pytest.param({"ascent": "previous", "rho_schedule": "cosine"}, marks=pytest.mark.slow),
        pytest.param({"ascent": "vasso", "norm_from": "previous"}, marks=pytest.mark.slow),
    ],
    ids=["bfloat16, average, reused", "previous", "memory"],
)
def test_a_restored_run_is_bit_identical(framework, changes, tmp_path):
    random = np.random.default_rng(0)
    batches = [random.integers(0, 64, (8, 17), dtype=np.int32) for _ in range(BASE.steps)]
    settings = dataclasses.replace(BASE, framework=framework, **changes)
    first, second = (registry.make(settings) for _ in range(2))
    for i in range(5):
        first.step(batches[i], i)()
    save(first, tmp_path / "state")
    second.restore(tmp_path / "state")
    assert second.evaluate(batches[:1]) == first.evaluate(batches[:1])
    for i in range(5, BASE.steps):
        for one in (first, second):
            one.step(batches[i], i)()
    for name, weight in first.weights().items():
        np.testing.assert_array_equal(second.weights()[name], weight, err_msg=name)
    assert second.evaluate(batches[:1]) == first.evaluate(batches[:1])
