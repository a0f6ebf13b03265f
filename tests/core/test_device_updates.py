"""Steps that are clipped and skipped on the device: the same as by the host, and nothing between them is read."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Weights, as_torch, batch_of, mlp, values

from fsam_core.torch import AdamW, FunctionalSAM, LinearHead, LossScale, Plain, Schedule, Step, masters, update
from fsam_kernels.torch.preconditioned_norm import norm_of

BETAS = (0.9, 0.95)
METHOD = FunctionalSAM(0.1, precondition="adam", fraction=1 / 4)


def batch(seed: int, *, broken: bool = False) -> dict:
    found = as_torch(batch_of(12, seed, dtype="float32"))
    if broken:
        found["x"][0, 0] = float("inf")
    return found


def features(model, batch):
    return mlp(model, {**batch, "x": batch["x"].to(model["a"].dtype)})


def made(kind: str, method=METHOD, **options) -> tuple[Weights, torch.optim.Optimizer, Step]:
    model = Weights(values(dtype="float32"))
    if kind == "torch.optim, fused":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, fused=True)
    elif kind == "masters":
        copies = masters(model)
        optimizer = AdamW(copies, lr=1e-2, betas=BETAS, copies=copies)
    else:
        optimizer = AdamW(model.parameters(), lr=1e-2, betas=BETAS)
    return model, optimizer, Step(model, optimizer, method, features=features, clip_norm=0.5, **options)


def state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [*weights, *(x for one in optimizer.state.values() for x in one.values())]


@pytest.fixture
def on_device(monkeypatch):
    """The CPU stands in for a device that nothing is read from."""
    monkeypatch.setattr(update, "can_stay_on_device", lambda *_: True)


@pytest.mark.parametrize("kind", ["own", "masters", "torch.optim, fused"])
def test_device_decides_as_the_host_does(kind, monkeypatch):
    pair = [made(kind), made(kind)]
    for i in range(5):
        for of_device, (_, _, step) in enumerate(pair):
            monkeypatch.setattr(update, "can_stay_on_device", lambda *_, of_device=of_device: bool(of_device))
            step(batch(i, broken=i in (0, 3)))
    (model, host, by_host), (other, device, by_device) = pair
    assert (by_device.steps, by_device.skipped_steps) == (by_host.steps, by_host.skipped_steps) == (3, 2)
    assert by_device.info.grad_norm == pytest.approx(by_host.info.grad_norm, rel=1e-4)
    assert by_device.info.grad_norm > 0.5  # it was clipped
    for x, y in zip(state(device), state(host), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    for x, y in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if kind == "masters" else 1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["own", "masters", "torch.optim, fused"])
def test_step_skipped_on_the_device_changes_no_bit(kind, on_device):
    model, optimizer, step = made(kind)
    step(batch(0))
    before = [x.clone() for x in (*state(optimizer), *model.parameters())]
    step(batch(1, broken=True))
    assert all(torch.equal(x, y) for x, y in zip((*state(optimizer), *model.parameters()), before, strict=True))
    assert step.info.skipped
    assert step.skipped_steps == 1


def test_figures_are_read_when_they_are_asked_for(on_device, monkeypatch):
    read = []
    own = update.Figures.read
    monkeypatch.setattr(update.Figures, "read", lambda figures: read.append(1) or own(figures))
    monkeypatch.setattr(update.Figures, "has_arrived", lambda figures: False)
    step = made("own")[2]
    step(batch(0))
    step(batch(1))
    assert not read
    step(batch(2))  # no more than two are left on the device
    assert len(read) == 2
    assert step.steps == 3
    assert len(read) == 3


def test_copied_step_has_counts_of_its_own(on_device):
    step = made("own")[2]
    step(batch(0))
    other = copy.copy(step)
    other.gradient(batch(1))
    assert (step.steps, other.steps) == (1, 2)


def test_late_skip_looks_for_wrong_labels(on_device, monkeypatch):
    explained = []
    monkeypatch.setattr(update, "explain", lambda found, replay: explained.append(found.batches))
    step = made("own")[2]
    given = batch(0, broken=True)
    step(given)
    assert not explained
    assert step.info.skipped
    assert explained == [[given]]


# --- on tensors without storage, from which nothing can be read -------------------------------------------------------


def without_storage(method, backend: str = "torch", **options) -> Step:
    with torch.device("meta"):
        model = torch.nn.Linear(8, 16, bias=False)
    copies = masters(model, torch.float16 if options else torch.bfloat16)
    optimizer = AdamW(copies, lr=1e-2, betas=BETAS, copies=copies)

    def head(model, x_NxD):
        h_NxD = x_NxD * model.weight.sum()
        return LinearHead(h_NxD, model.weight, torch.zeros(len(x_NxD), dtype=torch.int64, device="meta"))

    return Step(model, optimizer, method, features=head, clip_norm=1.0, backend=backend, **options)


def taken(step: Step) -> None:
    dtype = next(step.model.parameters()).dtype
    step(torch.empty(8, 8, device="meta", dtype=dtype))


@pytest.mark.parametrize("method", [Plain(), METHOD, FunctionalSAM(0.1, precondition="adam", norm="per-tensor")])
def test_step_over_masters_reads_nothing(method):
    taken(without_storage(method))


def test_what_needs_the_host_is_read():
    """The negative control: what has no storage cannot be read."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        taken(without_storage(METHOD, loss_scale=LossScale()))
    step = without_storage(METHOD)
    taken(step)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        _ = step.info


def test_optimizers_that_cannot_decide_leave_it_to_the_host():
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    can = lambda optimizer, sharded=False: update.can_stay_on_device([optimizer], [p], sharded)
    fused, own, plain = torch.optim.AdamW([p]), AdamW([p]), torch.optim.AdamW([p])
    fused._step_supports_amp_scaling = True  # as fused=True sets it, which is refused on this device
    assert can(fused)
    assert can(own)
    assert not can(fused, sharded=True)
    assert can(own, sharded=True)
    assert not can(plain)
    own.rounding = own.rounding._replace(stochastic=True)
    assert not can(own)
    assert not update.can_stay_on_device([AdamW([p])], [torch.zeros(3)], False)


def test_method_that_carries_state_is_decided_by_the_host():
    step = without_storage(FunctionalSAM(0.1, ascent="previous"))
    assert not step._stays_on_device()
    assert without_storage(METHOD)._stays_on_device()
    assert not without_storage(METHOD, schedule=Schedule(every=2, between="reuse"))._stays_on_device()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norm_of_a_long_tensor_keeps_its_digits(dtype):
    """PyTorch's own is 2.2e-3 off for these equal elements in float32."""
    equal = torch.full((2**22 + 5,), 0.1, dtype=dtype)
    transposed = torch.randn(2**11, 2**10, generator=torch.Generator().manual_seed(0)).to(dtype).T
    for tensors in ([equal], [transposed], [equal, transposed, torch.ones(3)], [torch.zeros(2**17)]):
        wanted = torch.cat([x.double().flatten() for x in tensors]).norm()
        torch.testing.assert_close(norm_of(tensors).double(), wanted, rtol=4e-5, atol=0)
    equal[-1] = torch.nan
    assert norm_of([equal]).isnan()
