"""`tools/device_check.py` on a CPU: it runs to its end without the trainers' packages, and it finds faults."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import spawn

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

import torch

SCRIPT = Path(__file__).parents[2] / "tools" / "device_check.py"
sys.path.insert(0, str(SCRIPT.parent))

import device_check  # noqa: E402
from device_checks import clock, decoder, errors, logits, products, weights  # noqa: E402
from device_checks.report import Report  # noqa: E402
from device_checks.sizes import FULL, SMALL  # noqa: E402

from fsam_kernels import spec  # noqa: E402
from fsam_kernels.triton import softmax_stats  # noqa: E402
from fsam_trainers.models import torch_decoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# What an image with PyTorch and Triton need not have.
ABSENT = ("tyro", "rich", "jax", "flax", "optax", "tokenizers", "datasets", "matplotlib", "pytest")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = [{str(SCRIPT)!r}, "--small", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_script_needs_none_of_the_packages_that_an_image_may_lack():
    assert "--seconds" in spawn.run("-c", RUN, "--help").stdout


@pytest.mark.slow
def test_whole_check_runs_on_a_cpu(tmp_path):
    out = tmp_path / "device.json"
    spawn.run("-c", RUN, "--out", out, "--seconds", 1000)  # under a minute, and no case skipped on a busy machine
    found = json.loads(out.read_text())
    assert found["failed"] is False
    assert list(found["sections"]) == list(device_check.SECTIONS)
    for name, section in found["sections"].items():
        assert section["cases"], name
        assert not [case for case in section["cases"] if "error" in case or "skipped" in case], name
    steps = {case["case"] for case in found["sections"]["steps"]["cases"]}
    assert {"small, split, triton, 64 tokens", "small, textbook, 64 tokens"} <= steps


def checked(run, tmp_path):
    report = Report(tmp_path / "out.json")
    with report.section("one", 60):
        run(report)
    return report, report.sections["one"]["cases"]


def test_wrong_cotangent_is_found(tmp_path, monkeypatch):
    u_CxV, labels_C = logits.logits(2, 4500, torch.bfloat16, "cpu")
    check = lambda report: report.check("one", lambda: logits.errors(u_CxV.clone(), labels_C))
    assert checked(check, tmp_path)[0].failed is False
    own = softmax_stats.cotangent

    def wrong(state_CxV, rows, *rest):
        own(state_CxV, rows._replace(scale_C=rows.scale_C * 1.03), *rest)

    monkeypatch.setattr(softmax_stats, "cotangent", wrong)
    report, (case,) = checked(check, tmp_path)
    assert report.failed
    assert case["ok"] is False
    assert case["error_over_allowed"]["cotangent"] > 1 > case["error_over_allowed"]["loss"]


def test_reference_is_the_specification():
    u_CxV, labels_C = logits.logits(3, 40, torch.float32, "cpu")
    eye = torch.eye(40, dtype=torch.float64)
    for loss in logits.LOSSES.values():
        want = spec.linear_cross_entropy(u_CxV.double(), eye, labels_C, loss=loss)
        got = logits.reference(u_CxV, labels_C, loss)
        for x, y in zip(got, want, strict=False):
            torch.testing.assert_close(x, torch.from_numpy(y), rtol=1e-12, atol=1e-15)


def test_wrong_weights_are_found(monkeypatch):
    tensors = lambda: weights.make([(5,), (2049,)], "cpu")
    assert max(weights.of_adamw(tensors(), copies=True).values()) <= 1
    monkeypatch.setattr(weights, "CLIP", 0.7001)
    calls = {"clip": 0.7}
    own = weights.adamw
    monkeypatch.setattr(weights, "adamw", lambda *args, **options: own(*args, **{**options, **calls}))
    assert max(weights.of_adamw(tensors()).values()) > 1


def test_device_decisions_are_checked(monkeypatch):
    tensors = lambda: weights.make([(5,), (2049,)], "cpu")
    right = [weights.of_adamw(tensors(), counted=True), weights.of_skip(tensors()), weights.of_optimizer(tensors())]
    assert all(max(found.values()) <= 1 for found in right)
    own = weights.adamw

    def update_anyway(*args, found_inf=None, **options):
        own(*args, **options)

    monkeypatch.setattr(weights, "adamw", update_anyway)
    monkeypatch.setattr(weights.AdamW, "update", staticmethod(update_anyway))
    assert weights.of_skip(tensors())["exp_avg"] == torch.inf
    found = weights.of_optimizer(tensors())
    assert found["theta"] > 1 >= found["count"]
    monkeypatch.setattr(weights.AdamW, "_counted", lambda self, params, states, _: [10.0] * len(params))
    assert weights.of_optimizer(tensors())["count"] == torch.inf


def test_wrong_share_is_found(monkeypatch):
    tensors = lambda: weights.make([(5,), (2049,)], "cpu", g=torch.bfloat16)
    assert max(weights.of_lerp(tensors()).values()) <= 1
    own = weights.lerp_
    monkeypatch.setattr(weights, "lerp_", lambda x, y, share: own(x, y, share * 1.001))
    assert max(weights.of_lerp(tensors()).values()) > 1


def test_wrong_product_is_found():
    size = {"N": 9, "D": 8, "V": 300, "dtype": torch.float32, "keep": True, "device": "cpu"}
    plain = products.BACKENDS["torch"]
    assert max(products.errors(plain, **size).values()) <= 1

    class Forgetful:
        linear_cross_entropy = staticmethod(plain.linear_cross_entropy)

        @staticmethod
        def logit_vjp(z, h, w, *, onto_VxD=None, **options):
            found = plain.logit_vjp(z, h, w, **options)
            return found if onto_VxD is None else found._replace(wbar_VxD=onto_VxD)

    found = products.errors(Forgetful, **size)
    assert found["wbar added"] > 1 >= found["second wbar"]


def test_nan_is_never_within_the_error_allowed():
    x = torch.tensor([1.0, torch.nan])
    assert errors.worst(x, torch.ones(2, dtype=torch.float64)) == torch.inf
    assert errors.relative_norm(x, torch.ones(2, dtype=torch.float64), 1.0) == torch.inf


def test_report_outlives_errors_and_a_lack_of_time(tmp_path):
    path = tmp_path / "out.json"
    report = Report(path)
    with report.section("first", 60):
        report.case("breaks", lambda: {}["nothing"])
        report.case("works", lambda: {"ms": float("nan")})
    assert json.loads(path.read_text())["sections"]["first"]["cases"][1] == {"case": "works", "ms": "nan"}
    with report.section("second", -1):
        report.check("late", lambda: pytest.fail("has no time"))
    sections = json.loads(path.read_text())["sections"]
    assert "KeyError" in sections["first"]["cases"][0]["error"]
    assert sections["second"]["cases"] == [{"case": "late", "skipped": "no time left"}]
    assert report.failed
    assert "first: 2 cases" in report.summary()


def test_idle_share_counts_overlapping_kernels_once():
    found = clock.idle([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (9.0, 10.0)])
    assert found == {"idle_share": pytest.approx(0.4), "launches": 4}
    assert clock.idle([]) == {}


def test_full_sizes_are_those_that_a_device_needs():
    C, V = FULL.huge_logits
    assert C * V > 2**31
    assert FULL.huge_weights > 2**31
    assert FULL.tokens == (8192, 16384, 32768)
    assert {50257, 128256} < set(FULL.vocabularies)
    assert softmax_stats.BLOCK == 4096
    assert min(SMALL.vocabularies) >= softmax_stats.BLOCK  # a whole tile, at the kernels' real size


def test_without_cuda_the_full_check_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        device_check.main(["--out", str(tmp_path / "x.json")])
    assert "no CUDA device was found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        device_check.main(["--small", "--only", "everything"])
    assert "everything is not a section: use environment" in capsys.readouterr().err


def test_decoder_is_that_of_the_trainers():
    (config,) = SMALL.models.values()
    theirs, ours = torch_decoder.Decoder(config), decoder.Decoder(config, "cpu")
    named = dict(theirs.named_parameters())
    block = ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out")
    blocks = [f"block_{i}.{name}" for i in range(config.layers) for name in block]
    names = ["embedding", "positions", *blocks, "final_norm"]
    assert sorted(names) == sorted(named)
    with torch.no_grad():
        for p, name in zip(ours.weights, names, strict=True):
            p.copy_(named[name])
    tokens_BxL = torch.randint(0, config.vocab_size, (3, config.seq_len))
    for x, y in zip(ours(tokens_BxL), theirs(tokens_BxL), strict=True):
        torch.testing.assert_close(x, y)
