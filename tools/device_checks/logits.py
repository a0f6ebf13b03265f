"""Correctness of the head's Triton kernels at their real block size, against float64 on the device."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from device_checks.errors import ARITHMETIC, worst
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.torch.softmax_stats import PartialStats, RowStats, combine_partials
from fsam_kernels.triton import softmax_stats as stages

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ALL = {"label_smoothing": 0.1, "z_loss": 1e-4, "soft_cap": 30.0}
LOSSES = {"plain": CROSS_ENTROPY, "all options": Loss(**ALL)}
ALONE = {name: Loss(**{name: value}) for name, value in ALL.items()}


class Reference(NamedTuple):
    """The results in float64; `through_CxV` is P times the soft-cap's derivative."""

    loss_C: Tensor
    lse_C: Tensor
    p_CxV: Tensor
    through_CxV: Tensor


def run(report: Report, sizes: Sizes) -> None:
    special_cases(report, sizes)
    # The usual dtype first: the time may not suffice for all.
    cases = [*itertools.product(DTYPES, LOSSES.items()), *((torch.bfloat16, one) for one in ALONE.items())]
    for (dtype, (name, loss)), V, C in itertools.product(cases, sizes.vocabularies, sizes.rows):
        title = f"{str(dtype).removeprefix('torch.')}, {name}, {C} x {V}"
        report.check(title, lambda: errors(*logits(C, V, dtype, sizes.device), loss))


def special_cases(report: Report, sizes: Sizes) -> None:
    V, C = max(sizes.vocabularies), max(sizes.rows)
    usual = logits(C, V, torch.bfloat16, sizes.device)
    report.check("offset view", lambda: of_offset_view(C, V, sizes.device))
    report.check("a tile of -inf", lambda: of_masked_tile(C, V, sizes.device))
    report.check("a label beyond the vocabulary", lambda: of_label_beyond(*usual))
    report.check("the vocabulary in two parts", lambda: of_two_parts(*usual))
    report.check("another stream", lambda: of_another_stream(*usual))
    report.check("more than 2^31 logits", lambda: of_huge_chunk(*sizes.huge_logits, sizes.device))


def logits(C: int, V: int, dtype: torch.dtype, device: str, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Random logits in padded rows, with labels of which the second is ignored."""
    make = torch.Generator(device).manual_seed(C + V)
    u_CxV = stages.empty_chunk(C, V, torch.empty(0, dtype=dtype, device=device)).normal_(std=scale, generator=make)
    labels_C = torch.randint(0, V, (C,), device=device, generator=make)
    labels_C[1:2] = -1
    return u_CxV, labels_C


def reference(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> Reference:
    """The formulas of `fsam_kernels.spec` in PyTorch's float64."""
    z_CxV, s, V = u_CxV.double(), loss.label_smoothing, u_CxV.shape[1]
    slope_CxV: Tensor | float = 1.0
    if loss.soft_cap is not None:
        tanh_CxV = torch.tanh(z_CxV / loss.soft_cap)
        z_CxV, slope_CxV = loss.soft_cap * tanh_CxV, 1 - tanh_CxV**2
    seen_C, y_Cx1 = labels_C >= 0, labels_C.clamp_min(0)[:, None]
    lse_C = torch.logsumexp(z_CxV, 1)
    r_C = 2 * loss.z_loss * lse_C
    loss_C = lse_C - (1 - s) * z_CxV.gather(1, y_Cx1)[:, 0] + loss.z_loss * lse_C**2
    if s:
        loss_C -= s * z_CxV.mean(1)
    p_CxV = torch.exp(z_CxV - lse_C[:, None]).scatter_(1, y_Cx1, 0.0)
    miss_C = p_CxV.sum(1)
    p_CxV.mul_((1 + r_C)[:, None]).sub_(s / V)
    p_CxV.scatter_(1, y_Cx1, (-(1 + r_C) * miss_C + r_C + s - s / V)[:, None]).mul_(seen_C[:, None])
    return Reference(torch.where(seen_C, loss_C, 0), lse_C, p_CxV, p_CxV * slope_CxV)


def errors(u_CxV: Tensor, labels_C: Tensor, loss: Loss = CROSS_ENTROPY) -> dict[str, float]:
    """Of statistics, of the cotangent in another array and in place, and behind the soft-cap."""
    want = reference(u_CxV, labels_C, loss)
    rows, state_CxV = stages.statistics(u_CxV, labels_C, loss)
    out_CxV = torch.full_like(u_CxV, torch.nan)
    stages.cotangent(state_CxV, rows, labels_C, loss, out_CxV)
    floor = ARITHMETIC * loss.label_smoothing / u_CxV.shape[1]  # s/V is subtracted
    found = {
        "loss": worst(rows.loss_C, want.loss_C, 1e-5),
        "lse": worst(rows.lse_C, want.lse_C, 1e-5),
        "cotangent": worst(out_CxV, want.p_CxV, floor),
    }
    if loss.soft_cap is not None:
        through_CxV = out_CxV.clone()
        stages.through_cap_(through_CxV, u_CxV, loss.soft_cap)
        # P was rounded before.
        found["through_cap"] = worst(through_CxV, want.through_CxV, floor) / 2
    stages.cotangent(u_CxV, rows, labels_C, loss, u_CxV)
    return found | {"in place": 0.0 if torch.equal(u_CxV, out_CxV) else torch.inf}


def of_offset_view(C: int, V: int, device: str) -> dict[str, float]:
    """Rows that start at no multiple of 16 bytes, inside a larger array that has to stay as it is."""
    buffer = torch.full((C + 2, V + 24), 7.0, dtype=torch.bfloat16, device=device)
    u_CxV = buffer[1:-1, 5 : 5 + V]
    source_CxV, labels_C = logits(C, V, torch.bfloat16, device)
    u_CxV.copy_(source_CxV)
    found = errors(u_CxV, labels_C)
    u_CxV.fill_(7.0)
    return found | {"around it": 0.0 if bool((buffer == 7).all()) else torch.inf}


def of_masked_tile(C: int, V: int, device: str) -> dict[str, float]:
    u_CxV, labels_C = logits(C, V, torch.bfloat16, device)
    u_CxV[:, : min(stages.BLOCK, V - 1)] = -torch.inf
    return errors(u_CxV, torch.where(labels_C < 0, labels_C, V - 1))


def of_label_beyond(u_CxV: Tensor, labels_C: Tensor) -> dict[str, float]:
    labels_C = labels_C.clone()
    labels_C[0] = u_CxV.shape[1]
    rows, _ = stages.statistics(u_CxV, labels_C, CROSS_ENTROPY)
    return {"loss is NaN": 0.0 if bool(rows.loss_C[0].isnan() & rows.loss_C[1:].isfinite().all()) else torch.inf}


def of_two_parts(u_CxV: Tensor, labels_C: Tensor) -> dict[str, float]:
    """Columns of two ranks, combined."""
    loss = Loss(label_smoothing=0.1, z_loss=1e-4)
    V = u_CxV.shape[1]
    half = V // 2
    parts = []
    for columns in (slice(0, half), slice(half, V)):
        width = columns.stop - columns.start
        here_C = (labels_C >= columns.start) & (labels_C < columns.stop)
        local_C = torch.where(labels_C < 0, labels_C, torch.where(here_C, labels_C - columns.start, width))
        parts.append(stages.partial_statistics(u_CxV[:, columns], local_C, loss)[0])
    together = PartialStats(*(torch.stack(each) for each in zip(*parts, strict=True)))
    rows = combine_partials(together, labels_C, loss, V)
    want = reference(u_CxV, labels_C, loss)
    return {"loss": worst(rows.loss_C, want.loss_C, 1e-5), "lse": worst(rows.lse_C, want.lse_C, 1e-5)}


def of_another_stream(u_CxV: Tensor, labels_C: Tensor) -> dict[str, float]:
    """The same bits on a second stream as on the first."""
    first = _both(u_CxV, labels_C)
    if u_CxV.device.type != "cuda":
        second = _both(u_CxV, labels_C)
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            second = _both(u_CxV, labels_C)
        torch.cuda.current_stream().wait_stream(stream)
    return {"same bits": 0.0 if all(map(torch.equal, first, second)) else torch.inf}


def _both(u_CxV: Tensor, labels_C: Tensor) -> tuple[Tensor, ...]:
    rows, state_CxV = stages.statistics(u_CxV, labels_C, CROSS_ENTROPY)
    out_CxV = torch.empty_like(u_CxV)
    stages.cotangent(state_CxV, rows, labels_C, CROSS_ENTROPY, out_CxV)
    return (*rows, out_CxV)


def of_huge_chunk(C: int, V: int, device: str) -> dict[str, float]:
    """Only the first and the last rows are compared; offsets beyond 32 bits are in the last."""
    u_CxV, labels_C = logits(C, V, torch.bfloat16, device)
    ends = [slice(0, 2), slice(C - 2, C)]
    wants = [reference(u_CxV[rows], labels_C[rows], CROSS_ENTROPY) for rows in ends]
    rows, state_CxV = stages.statistics(u_CxV, labels_C, CROSS_ENTROPY)
    stages.cotangent(state_CxV, rows, labels_C, CROSS_ENTROPY, u_CxV)
    found = {}
    for name, part, want in zip(("first", "last"), ends, wants, strict=True):
        stats = RowStats(*(x_C[part] for x_C in rows))
        found[f"{name} losses"] = worst(stats.loss_C, want.loss_C, 1e-5)
        found[f"{name} cotangents"] = worst(u_CxV[part], want.p_CxV)
    return found
