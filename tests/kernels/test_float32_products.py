"""w̄ where the library adds half-precision products in float32, as on a GPU: `torch.addmm(out_dtype=)`.

No CPU has that product. Its calls are checked on tensors without storage, and its values with a product that converts
the operands to float32, which is the same arithmetic in another order.
"""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
from operations import OPS, assert_all_as_good, back, to
from test_linear_cross_entropy import SIXTEEN_ROWS, problem
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = importlib.import_module("fsam_kernels.torch.linear_cross_entropy")
HALF = ("bfloat16", "float16")


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append((str(func).removeprefix("aten."), args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu_like(monkeypatch):
    """Products that can add in float32, on the CPU."""
    own_mm, own_addmm = torch.mm, torch.addmm

    def mm(a, b, *, out, out_dtype=None):
        return own_mm(a, b, out=out) if out_dtype is None else out.copy_(own_mm(a.to(out_dtype), b.to(out_dtype)))

    def addmm(total, a, b, *, out, out_dtype=None):
        if out_dtype is None:
            return own_addmm(total, a, b, out=out)
        assert total is out
        assert total.dtype == out_dtype == torch.float32
        return out.add_(own_mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(MODULE, "adds_in_float32", lambda dtype, device: dtype in (torch.bfloat16, torch.float16))


def test_only_half_precision_off_the_cpu_adds_in_float32():
    for dtype, device in itertools.product((torch.bfloat16, torch.float16), ("cpu", "meta")):
        assert MODULE.adds_in_float32(dtype, torch.device(device)) is (device == "meta")
    for dtype in (torch.float32, torch.float64):
        assert not MODULE.adds_in_float32(dtype, torch.device("meta"))


def test_library_that_refuses_a_float32_sum_is_not_asked_again(monkeypatch):
    def refuses(*args, **options):
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    MODULE.adds_in_float32.cache_clear()
    monkeypatch.setattr(torch, "addmm", refuses)
    assert not MODULE.adds_in_float32(torch.bfloat16, torch.device("meta"))
    MODULE.adds_in_float32.cache_clear()


@pytest.mark.parametrize("has_onto", [False, True])
def test_calls_are_well_formed_and_whole(has_onto):
    N, D, V = 300, 16, 20_000  # more columns than a block of the fallback
    make = lambda *size, dtype=torch.bfloat16: torch.empty(*size, dtype=dtype, device="meta")
    onto = make(V, D, dtype=torch.float32) if has_onto else None
    given = make(N, D), make(V, D), make(N, dtype=torch.int64), make(N, dtype=torch.float32)
    MODULE.adds_in_float32(torch.bfloat16, torch.device("meta"))
    with Recorded() as recorded:
        *_, found = OPS["torch"].linear_cross_entropy(*given, gradient=True, onto_VxD=onto, chunk_bytes=6 * V * 128)
    assert (found.wbar_VxD is onto) if has_onto else (found.wbar_VxD.dtype == torch.bfloat16)
    named = [(name, args, options) for name, args, options in recorded.calls if name.endswith("dtype_out")]
    first = "addmm.dtype_out" if has_onto else "mm.dtype_out"
    assert [name for name, *_ in named] == [first, "addmm.dtype_out", "addmm.dtype_out"]
    for _, args, options in named:
        assert args[-1] == torch.float32
        assert options["out"].shape == (V, D)
        assert {x.dtype for x in args[-3:-1]} == {torch.bfloat16}
    # Besides, V·D values move only in the last cast, where there is one.
    others = [x for x in recorded.calls if not x[0].startswith(("mm", "addmm", "empty"))]
    passes = [name for name, args, _ in others if any(getattr(x, "shape", None) == (V, D) for x in args)]
    assert passes == ([] if has_onto else ["_to_copy.default"])


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", HALF)
def test_error_is_within_that_of_plain_code(gpu_like, dtype, bias, keep):
    assert_all_as_good("torch", dtype, problem(dtype, 3, bias=bias), keep=keep, chunk_bytes=SIXTEEN_ROWS)


@pytest.mark.parametrize("dtype", HALF)
def test_product_adds_onto_what_is_there(gpu_like, dtype):
    p = problem(dtype)
    args = [to("torch", x, dtype) for x in (p.h, p.w)] + [to("torch", p.y), to("torch", p.weights, "float32")]
    there = torch.randn(p.w.shape, generator=torch.Generator().manual_seed(0))
    onto = there.clone()
    call = OPS["torch"].linear_cross_entropy
    *_, got = call(*args, gradient=True, onto_VxD=onto, chunk_bytes=SIXTEEN_ROWS)
    *_, alone = call(*args, gradient=True, upcast_wbar=True, chunk_bytes=SIXTEEN_ROWS)
    assert got.wbar_VxD is onto
    np.testing.assert_allclose(onto, there + alone.wbar_VxD, rtol=1e-6, atol=1e-6)


def test_small_equal_weights_lose_no_digit_of_w_bar(gpu_like):
    """1/N rounded to bfloat16 would be wrong by as much in every row, and in float16 it would underflow."""
    N, V = 64, 9
    for dtype, share in (("bfloat16", 1 / 49_001), ("float16", 1e-9)):
        h, w = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (N, V))
        y, ones = torch.arange(N) % V, torch.ones(N)
        given = [to("torch", x.numpy(), dtype) for x in (h, w)]
        call = lambda weights, given=given, y=y: OPS["torch"].linear_cross_entropy(
            *given, y, weights, gradient=True, upcast_wbar=True
        )
        of_ones, of_shares = (back(call(weights)[3].wbar_VxD) for weights in (ones, ones * share))
        ratio = np.vdot(of_shares, of_ones) / np.vdot(of_ones, of_ones) / share
        assert abs(ratio - 1) < 2e-4, dtype
