"""The head's memory: what a process grows by, against the bytes that `memory.head_bytes` states."""

from __future__ import annotations

import itertools
import sys

import pytest
import spawn

from fsam_kernels.memory import chunk_rows, head_bytes
from fsam_kernels.options import CROSS_ENTROPY, Loss

N, D, V, CHUNK = 1024, 256, 32768, 64 * 2**20

# Runs by itself: prints by how many bytes the peak of the process passes what it held before the call, and before one
# bare product of a chunk, which on some CPUs makes a float32 copy of half-precision results.
MEASURE = """
import sys
framework, dtype, keep, n, d, v, chunk = sys.argv[1], sys.argv[2], sys.argv[3] == "keep", *map(int, sys.argv[4:])

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def growth(call):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = status("VmRSS")
    held = call()
    return status("VmHWM") - before

library = 0
options = {"gradient": True, "keep": keep, "chunk_bytes": chunk}
if framework == "torch":
    import torch, fsam_kernels.torch as ops
    from fsam_kernels.options import CROSS_ENTROPY
    from fsam_kernels.torch.linear_cross_entropy import chunks
    kind = getattr(torch, dtype)
    h, w = torch.randn(n, d, dtype=kind), torch.randn(v, d, dtype=kind)
    head = h, w, torch.zeros(n, dtype=int), torch.full((n,), 1 / n)
    small = head[0][:8], head[1][:256].clone(), head[2][:8], head[3][:8]
    ops.linear_cross_entropy(*small, gradient=True)  # the library's own buffers
    rows = chunks(h, w, CROSS_ENTROPY, chunk)[0]
    logits = torch.zeros(rows.stop, v, dtype=kind)
    library = growth(lambda: torch.mm(h[rows], w.T, out=logits))
    del logits
    call = lambda: ops.linear_cross_entropy(*head, **options)
else:
    import jax, jax.numpy as jnp, fsam_kernels.xla as ops
    h, w = (jax.random.normal(jax.random.key(i), (rows, d), dtype) for i, rows in enumerate((n, v)))
    head = h, w, jnp.zeros(n, int), jnp.full(n, 1 / n)
    def results(*head):
        loss, lse, z, gradients = ops.linear_cross_entropy(*head, **options)
        return loss, lse, z.top_N, z.scale_N, z.target_N, z.kept, gradients
    compiled = jax.jit(results).lower(*head).compile()
    call = lambda: jax.block_until_ready(compiled(*head))
print(growth(call), library)
"""


@pytest.mark.slow  # a process of its own for each, and peaks that other processes can disturb
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("framework", "dtype", "form"),
    itertools.product(("jax", "torch"), ("float32", "bfloat16"), ("keep", "recompute")),
)
def test_process_grows_by_the_stated_bytes(framework, dtype, form):
    arguments = [framework, dtype, form, *map(str, (N, D, V, CHUNK))]
    # Without the flags of conftest.py, with which XLA optimises less.
    out = spawn.run("-c", MEASURE, *arguments, env={"XLA_FLAGS": None})
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    stated = head_bytes(framework, N, D, V, itemsize, keep=form == "keep", chunk_bytes=CHUNK)
    grew, library = map(int, out.stdout.split())
    assert grew <= 1.2 * stated + library, f"grew by {grew / 2**20:.0f} MiB, stated {stated / 2**20:.0f}"
    assert grew > 0.7 * stated


def test_chunk_is_what_fits_and_at_least_one_row():
    assert chunk_rows(1000, 4, 4, CROSS_ENTROPY, 40_000) == 10
    assert chunk_rows(1000, 2, 4, CROSS_ENTROPY, 40_000) == 6
    assert chunk_rows(1000, 4, 4, Loss(soft_cap=5.0), 40_000) == 2
    assert chunk_rows(1000, 4, 4, CROSS_ENTROPY, 1) == 1
