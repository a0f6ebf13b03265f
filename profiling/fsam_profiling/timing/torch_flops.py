"""Floating-point operations of the matrix products that PyTorch code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter

_ATEN = torch.ops.aten
# Missing in PyTorch's own table: attention on a CPU, and products added in place. Functions of shapes.
_MORE: dict[Any, Any] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        flop_counter.sdpa_backward_flop_count(g, q, k, v)
    ),
    _ATEN.addmm_: lambda _, a, b, *__, **___: flop_counter.mm_flop(a, b),
}


def count(run: Callable[[], Any]) -> int:
    """2 · multiply-adds of the products in run().

    Attention's backward pass counts its recomputed scores, five products where its forward pass has two.
    """
    with flop_counter.FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        run()
    return int(counter.get_total_flops())
