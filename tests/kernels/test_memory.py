"""The head's memory: what a process grows by, against the bytes that `memory.head_bytes` states."""

from __future__ import annotations

import itertools
import sys

import pytest
import spawn

from fsam_kernels.memory import chunk_rows, head_bytes, row_bytes
from fsam_kernels.options import CROSS_ENTROPY, Loss

N, D, V, CHUNK = 1024, 256, 32768, 64 * 2**20

# Runs by itself: prints by how many bytes the peak of the process passes what it held before the call, and before a
# chunk's largest bare product: some CPUs make a float32 copy of half-precision results, or copy an operand by tiles.
MEASURE = """
import sys
from fsam_profiling.timing.process_memory import growth
framework, dtype, keep, n, d, v, chunk = sys.argv[1], sys.argv[2], sys.argv[3] == "keep", *map(int, sys.argv[4:])

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
    products = ((h[rows], w.T, logits), (logits, w, h[rows].clone()), (logits.T, h[rows], w.clone()))
    library = max(growth(lambda: torch.mm(a, b, out=out)) for a, b, out in products)
    del logits, products
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
    list(itertools.product(("jax", "torch"), ("float32", "bfloat16"), ("keep", "recompute"))),
)
def test_process_grows_by_the_stated_bytes(framework, dtype, form):
    arguments = [framework, dtype, form, *map(str, (N, D, V, CHUNK))]
    # Without the flags of conftest.py, with which XLA optimises less. With a fixed threshold every large array that is
    # freed leaves the process: glibc raises it as it goes, and the peak then differs by 15 MiB from run to run.
    out = spawn.run("-c", MEASURE, *arguments, env={"XLA_FLAGS": None, "MALLOC_MMAP_THRESHOLD_": "65536"})
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


# On a GPU, in bfloat16: (V, in place, N) -> rows. A chunk of 4,096 rows, or of as many as fit into 2 GiB.
ON_A_GPU = {
    (32768, True, 8192): 4096,
    (32768, False, 8192): 4096,
    (50257, False, 8192): 4096,
    (128256, True, 8192): 4096,
    (128256, False, 8192): 2048,  # 2,688 fit, and would leave 128 rows for a fourth chunk
    (262144, True, 8192): 4096,
    (32768, True, 8194): 2816,  # and no chunk of two rows
    (32768, True, 17): 17,
    (32768, True, 1): 1,
}


@pytest.mark.parametrize(("V", "in_place", "N"), ON_A_GPU)
def test_gpu_chunks_are_few_equal_and_whole_tiles(V, in_place, N):
    rows = chunk_rows(V, 2, 4, CROSS_ENTROPY, None, "cuda", in_place=in_place, N=N)
    assert rows == ON_A_GPU[V, in_place, N]
    assert rows * row_bytes(V, 2, 4, CROSS_ENTROPY, in_place=in_place) <= 2 * 2**30
    count = -(-N // rows)
    assert count * rows - N < 128 * count  # the last chunk lacks less than a tile for each of them


def test_gpu_chunk_respects_the_bytes_that_were_asked_for():
    each = row_bytes(50257, 2, 4, CROSS_ENTROPY)
    for rows, expected in ((5000, 4992), (300, 256), (100, 100), (0.5, 1)):
        assert chunk_rows(50257, 2, 4, CROSS_ENTROPY, int(rows * each), "cuda") == expected
    assert chunk_rows(50257, 2, 4, CROSS_ENTROPY, 100 * each, "cuda", N=150) == 75


def test_in_place_row_has_one_array_and_two_with_a_soft_cap():
    assert row_bytes(1000, 2, 4, CROSS_ENTROPY, in_place=True) == 2000
    assert row_bytes(1000, 2, 4, Loss(soft_cap=5.0), in_place=True) == 4000
    assert row_bytes(1000, 4, 4, CROSS_ENTROPY, in_place=True) == 4000


def test_step_and_profiler_take_the_same_chunks():
    pytest.importorskip("triton")
    import torch

    from fsam_kernels.shapes import HEADS
    from fsam_kernels.torch.linear_cross_entropy import chunks
    from fsam_kernels.triton import softmax_stats
    from fsam_profiling.gpu import launches

    for head in HEADS.values():
        h, w = (torch.empty(rows, head.D, dtype=torch.bfloat16, device="meta") for rows in (head.N, head.V))
        taken = chunks(h, w, CROSS_ENTROPY, None, softmax_stats)
        assert len(launches.chunk(head, torch.bfloat16, "meta")[0]) == taken[0].stop
        assert len({range(head.N)[rows].stop - rows.start for rows in taken}) == 1
