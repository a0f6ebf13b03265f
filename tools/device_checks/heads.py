"""Whole heads by the rows of a chunk, in both backends, against their bare products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from device_checks.clock import milliseconds, peak_bytes
from device_checks.products import BACKENDS
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.memory import row_bytes
from fsam_kernels.options import CROSS_ENTROPY
from fsam_kernels.shapes import Head
from fsam_kernels.torch.softmax_stats import softmax_ops


def run(report: Report, sizes: Sizes) -> None:
    for name, head in sizes.heads.items():
        of_head(report, sizes, name, head)


def of_head(report: Report, sizes: Sizes, name: str, head: Head) -> None:
    N, D, V = head
    device = sizes.device
    h_NxD, w_VxD = (torch.randn(rows, D, device=device).mul_(D**-0.25).bfloat16() for rows in (N, V))
    labels_N = torch.randint(0, V, (N,), device=device)
    weights_N = torch.full((N,), 1 / N, device=device)
    timed = lambda call: {"ms": milliseconds(call, device, sizes.repeats)}
    logits = report.case(f"{name}, one bare product", lambda: timed(lambda: h_NxD @ w_VxD.T)).get("ms")

    def contracted() -> dict[str, Any]:
        p_NxV = torch.randn(N, V, device=device, dtype=torch.bfloat16)
        return timed(lambda: (p_NxV @ w_VxD, p_NxV.T @ h_NxD))

    gradients = report.case(f"{name}, two bare products", contracted).get("ms")

    def against(call: Callable[[], Any], products: int) -> dict[str, Any]:
        found = timed(call)
        if logits and gradients:
            found["x_products"] = found["ms"] / (gradients + (logits if products == 3 else 0))
        return found | {"peak_bytes": peak_bytes(call, device)}

    for backend, ops in BACKENDS.items():
        in_place = softmax_ops(backend).IN_PLACE
        for rows in (None, *sizes.chunk_rows):
            chunk = None if rows is None else rows * row_bytes(V, 2, 4, CROSS_ENTROPY, in_place=in_place)
            title = f"{name}, {backend}, {'default' if rows is None else rows} rows"
            first = partial(ops.linear_cross_entropy, h_NxD, w_VxD, labels_N, weights_N, chunk_bytes=chunk)
            report.case(f"{title}, first pass", lambda: against(partial(first, gradient=True), 3))
            for keep in (True, False) if rows is None or rows == max(sizes.chunk_rows) else (False,):
                form = "kept" if keep else "recomputed"

                def second() -> dict[str, Any]:
                    z = first(keep=keep)[2]
                    return against(lambda: ops.logit_vjp(z, h_NxD, w_VxD, chunk_bytes=chunk), 2)

                report.case(f"{title}, second pass, {form}", second)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger() -> None:
            h, w = h_NxD.detach().requires_grad_(), w_VxD.detach().requires_grad_()
            liger_fused_linear_cross_entropy(h, w, labels_N).backward()

        report.case(f"{name}, Liger's fused head", lambda: against(liger, 3))
