"""Versions, the device, its copy bandwidth and the rate of a large bfloat16 product: the ceilings of all else."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

from device_checks.clock import milliseconds
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.torch.linear_cross_entropy import adds_in_float32


def has_cuda() -> bool:
    return torch.cuda.is_available()


def run(report: Report, sizes: Sizes) -> None:
    report.case("versions", lambda: versions(sizes.device))
    report.case("copy", lambda: {"bytes_per_second": bandwidth(sizes)})
    report.case("product", lambda: product(sizes))


def versions(device: str) -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    adds = {str(x): adds_in_float32(x, torch.device(device)) for x in (torch.bfloat16, torch.float16)}
    return found | {"adds_in_float32": adds}


def bandwidth(sizes: Sizes) -> float:
    """Bytes read and written a second by a copy that is much larger than the caches."""
    x = torch.randn(sizes.copy_elements, device=sizes.device)
    y = torch.empty_like(x)
    return 2e3 * x.nbytes / milliseconds(lambda: y.copy_(x), sizes.device, sizes.repeats)


def product(sizes: Sizes) -> dict[str, Any]:
    side = sizes.product_side
    a, b = (torch.randn(side, side, device=sizes.device).bfloat16() for _ in range(2))  # zeros would run faster
    ms = milliseconds(lambda: a @ b, sizes.device, sizes.repeats)
    return {"side": side, "ms": ms, "flops_per_second": 2e3 * side**3 / ms}
