"""The rate of a plain matrix product on this device: the ceiling that a step's products are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from fsam_trainers import device

# Sides of square products; the fastest one counts.
SIZES = {"cpu": (512, 1024, 2048)}
LARGE = (4096, 8192)
REPEATS = 5


def flops_per_second(framework: str, dtype: str = "float32") -> float:
    """The best over some sizes of the median rate of X @ Y, in operations a second, the framework's own product."""
    return max(_rate(size, *_product(framework, size, dtype)) for size in sizes(framework))


def sizes(framework: str) -> tuple[int, ...]:
    return SIZES.get(device.platform(framework), LARGE)


def _rate(size: int, run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    wait(run())
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        wait(run())
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds)


def _product(framework: str, size: int, dtype: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if framework == "jax":
        import jax

        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(lambda x: x @ x)
        return lambda: product(x), jax.block_until_ready
    import torch

    matrix = torch.randn(size, size, dtype=getattr(torch, dtype), device=device.platform("torch"))
    wait = device.waiting([framework])
    return lambda: matrix @ matrix, lambda _: wait()
