"""What a step does whichever framework it is in: micro-batches, heads, shapes, zero and non-finite gradients."""

from __future__ import annotations

import numpy as np
import pytest
from problems import FRAMEWORKS, METHODS, batch_of, distance, flat, gradient, joined, linear, mlp, mlp_logits, values

from fsam_core import SAM, FunctionalSAM, LogitSAM, Plain, UserError

pytestmark = [pytest.mark.parametrize("framework", FRAMEWORKS), pytest.mark.usefixtures("float64")]
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def all_ignored(seed: int, n: int = 6) -> dict:
    return batch_of(n, seed, ignored=2.0)


MICRO = {
    "equal": [all_ignored(2, n=4), batch_of(4, 1, ignored=0), batch_of(4, 5, ignored=0.5)],
    "ragged": [all_ignored(2, n=4), batch_of(8, 1)],
}


@pytest.mark.parametrize(
    ("features", "name", "batches"),
    [
        (mlp, "precond-functional", "equal"),
        (mlp, "precond-functional", "ragged"),
        (mlp, "adamw", "equal"),
        (mlp_logits, "sam", "equal"),
        (mlp_logits, "logit", "ragged"),
    ],
)
def test_micro_batches_without_targets_count_for_nothing(framework, features, name, batches):
    batches, method = MICRO[batches], METHODS[name]
    loss, info, got = gradient(framework, features, method, values(), batches, clip_norm=0.05, jit=True)
    whole = gradient(framework, features, method, values(), joined(batches), clip_norm=0.05, jit=True)
    whole_loss, whole_info, expected = whole
    assert distance(got, expected) < 1e-11
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    for a, b in zip(info, whole_info, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-10, nan_ok=True)
    assert float(info.weight) == (joined(batches)["y"] >= 0).sum()


def test_integer_token_weights_are_repeated_tokens(framework):
    batches = [{**batch_of(6, s), "weights": np.array([0, 0, 1, 2, 0.5, 1]) * s} for s in (1, 2)]
    method = METHODS["functional"]
    got = gradient(framework, mlp, method, values(), batches, jit=True)[2]
    repeated = {
        k: np.concatenate([np.repeat(b[k], (2 * b["weights"]).astype(int), 0) for b in batches]) for k in ("x", "y")
    }
    assert distance(got, gradient(framework, mlp, method, values(), repeated, jit=True)[2]) < 1e-12


@each_method
def test_leading_axes_are_flattened(framework, method):
    batch = batch_of(12)
    nested = {"x": batch["x"].reshape(3, 4, 6), "y": batch["y"].reshape(3, 4)}
    _, _, got = gradient(framework, mlp, method, values(), nested)
    assert distance(got, gradient(framework, mlp, method, values(), batch)[2]) < 1e-12


@each_method
def test_all_labels_ignored_gives_zero_and_no_perturbation(framework, method):
    loss, info, got = gradient(framework, mlp, method, values(), all_ignored(1), clip_norm=1.0)
    assert loss == 0
    assert not flat(got).any()
    assert float(info.perturbation_norm) == 0
    assert float(info.weight) == 0
    assert bool(getattr(info, "finite", True))
    assert not getattr(info, "skipped", False)


@pytest.mark.parametrize("precondition", [None, "adam"])
def test_zero_gradient_of_nonzero_loss_is_not_nan(framework, precondition):
    batch = {**batch_of(), "x": np.zeros((12, 6))}
    loss, info, got = gradient(framework, mlp, SAM(0.5, precondition=precondition), values(), batch)
    assert loss == pytest.approx(np.log(9))
    assert not flat(got).any()
    assert float(info.perturbation_norm) == 0


@each_method
def test_clipping_by_a_large_norm_is_no_clipping(framework, method):
    got = gradient(framework, mlp, method, values(), batch_of(), clip_norm=1e6)[2]
    assert distance(got, gradient(framework, mlp, method, values(), batch_of())[2]) < 1e-12


def test_clipping_reaches_the_ascent_direction_of_adam_only(framework):
    change = lambda method: distance(
        gradient(framework, mlp, method, values(), batch_of(), clip_norm=1e-3)[2],
        gradient(framework, mlp, method, values(), batch_of())[2],
    )
    assert change(SAM(0.5)) < 1e-12
    assert change(SAM(0.5, precondition="adam")) > 1e-4


def test_rho_schedule_sees_the_number_of_completed_steps(framework):
    seen = lambda rho: float(gradient(framework, mlp, FunctionalSAM(rho), values(), batch_of())[1].perturbation_norm)
    # The helper's JAX state has completed 3 steps, its PyTorch Step none.
    done = {"jax": 3, "torch": 0}[framework]
    assert seen(lambda step: 0.1 + 0.05 * step) == pytest.approx(0.1 + 0.05 * done)


def test_perturbed_loss_is_reported_where_there_is_one(framework):
    info = lambda kind: gradient(framework, mlp, kind(0.1), values(), batch_of())[1]
    assert float(info(SAM).perturbed_loss) == pytest.approx(float(info(LogitSAM).perturbed_loss))
    assert float(info(SAM).perturbed_loss) > float(info(SAM).loss)
    assert np.isnan(float(info(FunctionalSAM).perturbed_loss))


def test_info_norms_are_those_of_the_gradients(framework):
    _, info, got = gradient(framework, mlp, SAM(0.3), values(), batch_of())
    plain = gradient(framework, mlp, Plain(), values(), batch_of())[2]
    assert float(info.grad_norm) == pytest.approx(np.linalg.norm(flat(got)))
    assert float(info.base_norm) == pytest.approx(np.linalg.norm(flat(plain)))


@pytest.mark.parametrize(
    ("features", "batch", "says"),
    [
        (lambda p, b: b["x"] @ p["a"], batch_of(), "LinearHead, Outputs, Logits or Heads"),
        (mlp, {**batch_of(), "y": batch_of(11)["y"]}, "labels"),
        (mlp, {**batch_of(), "weights": np.ones(11)}, "token_weights"),
        (linear, batch_of(), r"weight must be \[V, 6\]"),
        (mlp, [], "got no micro-batch"),
    ],
)
def test_wrong_output_of_features_is_refused(framework, features, batch, says):
    with pytest.raises(UserError, match=says):
        gradient(framework, features, FunctionalSAM(0.1), values(), batch)


def test_value_that_is_no_method_is_refused(framework):
    with pytest.raises(UserError, match="sam"):
        gradient(framework, mlp, "sam", values(), batch_of())
