"""The operations on lists of tensors, which GPUs take, on a CPU: against the pieces that a CPU takes."""

from __future__ import annotations

import importlib

import pytest
import torch

from fsam_kernels.torch import Adam, Update, adamw, lerp_, multi_tensor, perturb, preconditioned_norm

norms, perturbing = (importlib.import_module(f"fsam_kernels.torch.{x}") for x in ("preconditioned_norm", "perturb"))

SHAPES = [(5, 16), (37,), (), (0,), (1,), (3, 7), (300,)]
MASK = [True, False, True, True, True, True, True]
B2 = 0.95


def tensors(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make) * scale for shape in SHAPES]


@pytest.fixture
def cut(monkeypatch):
    """Small batches, of which a larger tensor makes several."""
    own, size = multi_tensor.PIECE, 64

    def pieces(arrays):
        n = next(x for x in arrays if x is not None).numel()
        return [tuple(None if x is None else x[at : at + size] for x in arrays) for at in range(0, n, size)]

    monkeypatch.setattr(multi_tensor, "PIECE", size)
    monkeypatch.setattr(multi_tensor, "pieces", pieces)
    assert own > size


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("counts", ["equal", "each", "on the device"])
@pytest.mark.parametrize("clip", [1.0, torch.tensor(0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_give_what_pieces_give(current, counts, clip, dtype, cut, monkeypatch):
    theta, g, v = tensors(0), [x.to(dtype) for x in tensors(1, 1e-2)], [x.square() + 1e-6 for x in tensors(2, 1e-2)]
    steps = [3 + (i % 2 if counts != "equal" else 0) for i in range(len(SHAPES))]
    corrections = [1 - B2**t for t in steps]
    adam = [Adam(B2, 1e-8, x, current) for x in corrections]
    given = adam
    if counts == "on the device":
        monkeypatch.setattr(multi_tensor, "_on_host", lambda x: not isinstance(x, torch.Tensor))
        given = [one._replace(correction=torch.tensor(one.correction, dtype=torch.float64)) for one in adam]
    want = preconditioned_norm(g, v, adam=adam, clip=clip, gradient=True)
    got = norms._of_lists(g, v, float(clip), given, None, False, True)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=0)
    want = preconditioned_norm(g, v, adam=adam, clip=clip, per_tensor=True, mask=MASK)
    got = norms._of_lists(g, v, float(clip), given, MASK, True, False)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=0)
    for scale in (torch.tensor(0.1), torch.arange(1.0, 8.0) / 10):
        for kind in (torch.float32, torch.bfloat16):
            out = [torch.zeros_like(x, dtype=kind) for x in theta]
            perturbing._write_lists((g, v, theta, out), scale, float(clip), given, None)
            want = perturb(theta, g, v, scale, clip=clip, adam=adam, dtype=kind)
            torch.testing.assert_close(out, want, rtol=2e-6 if kind == torch.float32 else 1e-2, atol=1e-6)


def test_plain_direction_by_lists(cut):
    theta, g, out = tensors(0), tensors(1), tensors(2)
    square = sum(x.double().square().sum() for x in g)
    torch.testing.assert_close(norms._of_lists(g, None, 0.5, None, None, False, False)[0].double(), square / 4)
    perturbing._write_lists((g, None, theta, out), torch.tensor(0.1), 0.5, None, None)
    torch.testing.assert_close(out, [x + 0.05 * y for x, y in zip(theta, g, strict=True)])


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_leaves_weights_and_moments(found, copies):
    theta, g, m, v = tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]
    updates = [Update(1e-2, 0.9, B2, 1e-8, 0.1, 3)] * len(SHAPES)
    options = {"clip": 0.5}
    want, copy = [[x.clone() for x in each] for each in (theta, g, m, v)], None
    if copies:
        copy = [torch.zeros_like(x, dtype=torch.bfloat16) for x in theta]
    if found:
        g[0][0, 0] = torch.nan
    else:
        adamw(*want, updates, **options)
    adamw(theta, g, m, v, updates, **options, copy=copy, found_inf=torch.tensor(found))
    for got, expected in ((theta, want[0]), (m, want[2]), (v, want[3])):
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    if copy is not None:
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(copy, theta, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lerp_of_lists(share):
    x, y = tensors(0), tensors(1)
    x[1], y[1] = x[1].double(), y[1].double()
    want = [a + share * (b - a) for a, b in zip(x, y, strict=True)]
    lerp_(x, y, torch.tensor(share))
    torch.testing.assert_close(x, want)
