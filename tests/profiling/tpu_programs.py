"""Functions that `test_tpu` compiles for a TPU; imported by the process that compiles."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fsam_profiling.regions import CONDITIONAL
from fsam_profiling.tpu import step_programs


def of(name: str, args: list, options: dict):
    """(the function of that name with these options, the shapes of its arguments)."""
    return partial(globals()[name], **options), tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in args)


def matmul(x, y):
    return x @ y


def copied(x):
    return jnp.copy(x)


def axpy(x, y):
    return 3.0 * x + y


def twice_over(x, y, *, iterations: int):
    """The sum of `iterations` products, in a loop whose body XLA cannot hoist."""

    def one(total, x):
        return total + x @ y, None

    return jax.lax.scan(one, jnp.zeros((x.shape[1], y.shape[1]), jnp.float32), x[:iterations])[0]


def cross_entropy(h, w, y):
    """As written without this package: log-softmax of the logits, and autodiff."""

    def loss(h, w):
        z = (h @ w.T).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    return jax.value_and_grad(loss, (0, 1))(h, w)


def three_products(h, w, p):
    return h @ w.T, p @ w, p.T @ h


def sometimes(x, y):
    """A branch that is excluded, because it is traced as a conditional branch."""
    with jax.named_scope("head"):
        z = x @ y

    def again(z):
        with jax.named_scope(CONDITIONAL):
            return (z @ y) @ y

    return jax.lax.cond(jnp.isinf(z[0, 0]), again, lambda z: z, z)


def copy_kernel(x, *, rows: int):
    """A Pallas kernel that copies blocks of `rows`."""

    def kernel(x, out):
        out[...] = x[...]

    block = pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))
    grid = (-(-x.shape[0] // rows),)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=shape, name="copier")(x)


def copied_on_the_chip(x, *, rows: int):
    """A copy that is used at once, so that it stays in vector memory and a ragged last block is copied by a loop."""
    y = copy_kernel(x, rows=rows)
    return y @ y.T


def matmul_kernel(x, y, *, rows: int, columns: int):
    """A Pallas matrix product of whole rows with whole columns."""

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32).astype(out.dtype)

    (n, k), v = x.shape, y.shape[1]
    return pl.pallas_call(
        kernel,
        grid=(n // rows, v // columns),
        in_specs=[pl.BlockSpec((rows, k), lambda i, j: (i, 0)), pl.BlockSpec((k, columns), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((n, v), x.dtype),
        name="product",
    )(x, y)


def row_sums_kernel(x, *, rows: int, columns: int, iterations: int, first_only: bool, by_value: bool = False):
    """Row sums of a [N, V] array over a grid (N / rows, V / columns); a heavy branch with a loop of `iterations`.

    Args:
        first_only: the branch runs where a row block starts; else in every step.
        by_value: the branch depends on the data as well.
    """

    def kernel(x, out, total):
        first = pl.program_id(1) == 0

        @pl.when(first)
        def _():
            total[...] = jnp.zeros_like(total)

        def heavy():
            def iteration(i, value):
                return jnp.abs(value - 1.5) * 0.5

            total[...] += jax.lax.fori_loop(0, iterations, iteration, x[:, :128])

        runs = first if first_only else pl.program_id(1) >= 0
        pl.when(runs & (jnp.max(x[:8, :128]) > 0) if by_value else runs)(heavy)
        for start in range(0, x.shape[1], 128):
            total[...] += x[:, start : start + 128]

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _():
            out[...] = jnp.sum(total[...], axis=1, keepdims=True)

    n, v = x.shape
    return pl.pallas_call(
        kernel,
        grid=(n // rows, v // columns),
        in_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((rows, 1), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, 1), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, 128), jnp.float32)],
        name="row_sums",
    )(x)


def spilling_kernel(x):
    """Holds more registers than there are: a 512-wide chain that uses every row twice, far apart."""

    def kernel(x, out):
        parts = [jnp.exp(x[8 * i : 8 * i + 8, :]) for i in range(160)]
        total = parts[0]
        for part in (*parts, *parts):
            total = jnp.exp(total) + part
        out[...] = total

    shape = jax.ShapeDtypeStruct((8, 128), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, name="spiller")(x + 1)


def chain_kernel(*, parts: int):
    """(the kernel of `spilling_kernel` over so many parts, its argument)."""

    def kernel(x, out):
        held = [jnp.exp(x[8 * i : 8 * i + 8, :]) for i in range(parts)]
        total = held[0]
        for part in (*held, *held):
            total = jnp.exp(total) + part
        out[...] = total

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, name="chain")
    return lambda x: call(x + 1), (jax.ShapeDtypeStruct((8 * parts, 128), jnp.float32),)


def step_with_another_pass(**options):
    """A step that also writes its weights once and reads them back, as a wrapper that clones and restores does."""
    function, arguments = step_programs.step(**options)

    def slower(state, batches):
        params = jax.lax.optimization_barrier(jax.tree.map(lambda x: 1.5 * x, state.params))
        return function(state._replace(params=jax.tree.map(lambda x: x / 1.5, params)), batches)

    return slower, arguments
