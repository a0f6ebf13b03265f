"""The basis of the commands that time and count steps: rows, ratios, counted operations, equivalent peers."""

from __future__ import annotations

import base64
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spawn
import torch

from fsam_core import NAMES, MicroBatches
from fsam_core.errors import UserError
from fsam_profiling import flops, rows
from fsam_profiling.settings import random_tokens, step_settings
from fsam_profiling.timing import matmul_rate, step, torch_flops, variants
from fsam_profiling.timing.variants import Variant
from fsam_profiling.tpu import inserted
from fsam_profiling.tpu import step as tpu_step

SMALL = {"batch": 2, "seq_len": 8, "vocab_size": 64}


def test_rows_are_selected_by_name_with_adamw():
    names = lambda only: [saving or method for method, saving, _ in rows.table_rows(only)]
    everything = [*NAMES, *(name for name, _ in rows.SAVINGS), *(name for _, name, _ in rows.OF_SAM)]
    assert names("") == names("all") == everything
    assert names("1/8") == ["adamw", "1/8"]
    assert set(names("common,logit-sam")) == {*rows.COMMON, "logit-sam"}
    with pytest.raises(UserError, match=r"--only: half is no row; use all, common, or some of adamw, sam"):
        names("half")
    with pytest.raises(UserError, match=r"--repeats must be at least 10 .* got 3"):
        step.measure(step.StepOptions(repeats=3))
    with pytest.raises(UserError, match="--batch must be at least 1, got 0"):
        step_settings("tiny", "adamw", batch=0)


def test_schedule_is_a_timed_row_but_no_program():
    names = [saving for _, saving, _ in rows.programs("all")]
    assert "every 4 reused" in names
    assert not {"every 4", "start 0.9", "no correction"} & set(names)
    assert rows.programs("1/8") == rows.table_rows("1/8")
    with pytest.raises(UserError, match=r"--only: every 4, no correction is a schedule, with steps as of adamw and of"):
        rows.programs("1/8,every 4,no correction")


@pytest.mark.parametrize(
    ("ratios", "resolved"),
    [([1.9, 2.0, 2.1], True), ([0.9, 1.1, 1.3], False), ([0.5, 0.6, 0.7], True), ([1.0, 1.0, 1.0], True)],
)
def test_ratio_is_distinguishable_from_1_by_its_percentiles(ratios, resolved):
    base = np.array([100.0, 200.0, 50.0])
    found = step.ratio_figures(np.array(ratios) * base, base)
    assert found["ratio"] == pytest.approx(ratios[1])
    assert found["ratio_resolved"] is resolved
    text = step.ratio_text(found, "ratio")
    assert text.startswith(f"{ratios[1]:.2f} (") == resolved


def test_figures_follow_from_step_times():
    found = step.figures(np.full(10, 200.0), np.full(10, 100.0), work=3e9, ceiling=60e9)
    assert (found["step_ms"], found["ratio"], found["ratio_resolved"]) == (200, 2, True)
    assert (found["flops_per_s"], found["utilisation"]) == pytest.approx((15e9, 0.25))


def test_average_step_weighs_kinds_by_their_share(monkeypatch):
    kinds = {"corrected": (0.25, None)}
    of = {("jax", "adamw", "", ""): [100.0, 200.0], ("jax", "m", "every", "corrected"): [300.0, 400.0]}
    assert step._mean(("jax", "m", "every"), kinds, of).tolist() == [150, 250]


def test_live_products_are_counted_through_control_flow():
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    one = 2 * 8 * 16 * 16

    def looped(x, w):
        dead = jnp.sin(x @ w)  # no result depends on it
        y = jax.lax.scan(lambda y, _: (y @ w, None), x, length=5)[0]
        return jax.lax.cond(y[0, 0] > 0, lambda y: (y @ w) @ w, lambda y: y @ w, y), dead[0, 0] * 0

    assert flops.of_step(lambda x, w: looped(x, w)[0], (x, w)) == (5 + 2) * one
    assert flops.of_step(lambda x, w: jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w), (x, w)) == 2 * one

    def excluded(x, w):
        with jax.named_scope("conditional branch"):
            return (x @ w) @ w

    assert flops.of_step(lambda x, w: x @ w + excluded(x, w), (x, w)) == one
    image = jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 3, 3, 3), jnp.float32)
    convolution = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME")
    assert flops.of_step(convolution, (image, kernel)) == 2 * (4 * 8 * 8) * (3 * 3 * 3)
    unbounded = lambda x, w: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ w, x)
    with pytest.raises(UserError, match="loop of unknown length"):
        flops.of_step(unbounded, (x, w))


def test_torch_products_missing_from_its_table_are_counted():
    a, b, out = torch.ones(8, 16), torch.ones(16, 4), torch.zeros(8, 4)
    assert torch_flops.count(lambda: out.addmm_(a, b)) == 2 * 8 * 16 * 4
    q = torch.ones(2, 3, 16, 8, requires_grad=True)
    attention = 4 * 2 * 3 * 16 * 16 * 8
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch_flops.count(attend) == attention
    assert torch_flops.count(lambda: attend().sum().backward()) == 3.5 * attention


def test_both_frameworks_count_the_same_products():
    chosen = step_settings("tiny", "adamw", **SMALL)
    counted = {}
    for framework in ("jax", "torch"):
        one = Variant(dataclasses.replace(chosen, framework=framework))
        run = variants.make(one) if framework == "torch" else lambda index: None
        counted[framework] = variants.flops(one, run)
    model = chosen.model
    N = chosen.batch * model.seq_len
    scores = 2 * N * model.seq_len * model.width * model.layers  # one of attention's products
    trunk = 2 * N * 12 * model.width**2 * model.layers + 2 * scores
    assert counted["jax"] == 3 * (trunk + 2 * N * model.width * model.vocab_size)
    assert counted["torch"] == counted["jax"] + scores  # its backward pass recomputes the scores


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_reused_correction_counts_as_an_adamw_step(framework):
    changes = {"every": 4, "between": "reuse", "correction_fraction": 0.5}
    one = Variant(step_settings("tiny", rows.METHOD, framework=framework, changes=changes, **SMALL))
    plain = Variant(step_settings("tiny", "adamw", framework=framework, **SMALL))
    counted = {
        kind: (share, variants.flops(variant, variants.make(variant) if framework == "torch" else len))
        for kind, (share, variant) in {**step._kinds(one), "plain": (0.0, plain)}.items()
    }
    assert counted["corrected"][0] == 0.25
    assert counted["reused"] == (0.75, counted["plain"][1])
    assert counted["corrected"][1] > 1.3 * counted["plain"][1]


def weights_after_a_step(variant: Variant) -> dict[str, np.ndarray]:
    """The weights of our engine."""
    from fsam_trainers import registry

    trained = registry.make(variant.settings)
    tokens = random_tokens(variant.settings)
    trained.prepare(tokens)
    trained.step(tokens, 0)()
    return trained.weights()


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam"])
def test_torch_textbook_step_equals_ours(method, monkeypatch):
    from fsam_trainers.models import torch_decoder

    chosen = step_settings("tiny", method, framework="torch", **SMALL)
    ours = weights_after_a_step(Variant(chosen))
    models = []
    made = torch_decoder.Model
    monkeypatch.setattr(torch_decoder, "Model", lambda *args: models.append(made(*args)) or models[-1])
    plain = dataclasses.replace(chosen, method="adamw")
    variants.make(Variant(plain, f"textbook {method}"))(0)
    theirs = torch_decoder.as_numpy(models[0])
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["textbook adamw", "textbook sam", "textbook functional-sam", "optax.contrib sam"])
def test_jax_peer_step_equals_ours(peer):
    from fsam_profiling.tpu import step_programs
    from fsam_trainers.models import flax_decoder
    from fsam_trainers.models.flax_decoder import flattened

    whose, method = peer.split()
    chosen = step_settings("tiny", method, **SMALL)
    ours = weights_after_a_step(Variant(chosen))
    function, _ = step_programs.peer(chosen, whose, method)
    params = flax_decoder.parameters(chosen.model, chosen.seed)
    opt_state = step_programs.optimizer_of(chosen, whose).init(params)
    (params, _), _ = jax.jit(function)((params, opt_state), MicroBatches([{"tokens": random_tokens(chosen)}]))
    assert_close(ours, flattened(jax.tree.map(np.asarray, params)))


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Adam's first step moves each weight that has a gradient by about the learning rate, whatever its size."""
    assert set(ours) == set(theirs)
    for name in ours:
        difference = np.abs(ours[name] - theirs[name])
        assert np.mean(difference > 2e-5) < 1e-3, name  # a gradient near 0 may round to the other sign


def test_only_installed_peers_are_listed(monkeypatch):
    chosen = step_settings("tiny", "adamw", framework="torch", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(variants.importlib.util, "find_spec", lambda name: None)
        assert set(variants.peers(chosen)) == {(x, "textbook") for x in ("adamw", "sam", "functional-sam")}
    jax_peers = variants.peers(dataclasses.replace(chosen, framework="jax"))
    assert ("sam", "optax.contrib") in jax_peers


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_ceiling_is_a_matmul_rate(framework, monkeypatch):
    monkeypatch.setattr(matmul_rate, "SIZES", {"cpu": (64, 128)})
    assert 1e6 < matmul_rate.flops_per_second(framework) < 1e15


KERNEL = """
module {
  func.func @main(%arg0: i32, %arg1: i32) attributes {iteration_bounds = array<i64: 4, 2>, scratch_operands = 0 : i64,
window_params = [{transform_indices = @left, window_bounds = array<i64: 8, 16>}, {transform_indices = @right, window_bounds = array<i64: 16, 32>}, {transform_indices = @computed, window_bounds = array<i64: 8, 32>}]} {
    return
  }
  func.func @left(%arg0: i32, %arg1: i32) -> (i32, i32) {
    %c0_i32 = arith.constant 0 : i32
    return %arg0, %c0_i32 : i32, i32
  }
  func.func @right(%arg0: i32, %arg1: i32) -> (i32, i32) {
    %c0_i32 = arith.constant 0 : i32
    return %c0_i32, %arg1 : i32, i32
  }
  func.func @computed(%arg0: i32, %arg1: i32) -> (i32, i32) {
    %0 = arith.addi %arg0, %arg1 : i32
    return %0, %arg1 : i32, i32
  }
}
"""  # noqa: E501


def test_inserted_kernel_states_the_bytes_of_its_blocks():
    body = lambda code: f'custom-call(...), backend_config={{"body":"{base64.b64encode(code).decode()}"}}'
    shapes = ["f32[30,16]", "bf16[16,64]", "f32[30,64]"]
    found = inserted.inserted_kernel(body(KERNEL.encode()), shapes)
    assert found is not None
    assert found.grid == (4, 2)
    # The left block changes four times, ragged at the end; the right one eight times; the last index is computed.
    assert found.moved == (30 * 16 * 4, 8 * 16 * 32 * 2, None)
    assert inserted.inserted_kernel(body(KERNEL.encode()), shapes[:2]) is None
    assert inserted.inserted_kernel(body(b"\x00\xff\xfe"), shapes) is None
    assert inserted.inserted_kernel("custom-call(...)", shapes) is None


def test_floor_is_the_longer_of_products_and_arguments():
    chip: Any = SimpleNamespace(flops_per_cycle=100.0, bytes_per_cycle=10.0)
    one: Any = SimpleNamespace(product_flops=5000, argument_bytes=300, output_bytes=100, chip=chip)
    assert tpu_step.floors(one) == (50, 40)


def test_tpu_variants_list_backends_then_textbook():
    found = tpu_step.variants("1/8,textbook", ("xla", "pallas"), preset="tiny", batch=4)
    assert [(x.method, x.saving, x.backend) for x in found] == [
        ("adamw", "", "xla"),
        (rows.METHOD, "1/8", "xla"),
        ("adamw", "", "pallas"),
        (rows.METHOD, "1/8", "pallas"),
        *((kind, "textbook", "xla") for kind in tpu_step.TEXTBOOK),
    ]
    assert found[1].options["changes"] == {"correction_fraction": 0.125}
    with pytest.raises(UserError, match="--only: half is no row"):
        tpu_step.variants("half", ("xla",))


STEP = """
import sys
from fsam_profiling.cli import main
from fsam_profiling.timing import matmul_rate
matmul_rate.SIZES = {"cpu": (64,)}
frameworks = {"jax", "torch", "triton"}
assert not frameworks & set(sys.modules), "the command line itself needs no framework"
sizes = ("--batch", "2", "--seq-len", "8", "--vocab-size", "64")
main(["step", "--framework", "jax", "--only", "adamw", "--no-peers", *sizes])
assert frameworks & set(sys.modules) == {"jax"}
"""


@pytest.mark.slow
def test_step_command_imports_its_framework_alone():
    assert "x AdamW" in spawn.run("-c", STEP).stdout
