"""Products with the Hessian in JAX, and with its two summands: what is sharp, the logits or the function.

    curvature = Curvature(features, params, batch)
    Gv, Nv = curvature.both(v)              # H v = G v + N v; v is a tree like params

H is the Hessian of the mean loss over the batch, G = Jᵀ (∂²L/∂z²) J the Gauss–Newton matrix, which is the curvature
of the loss as a function of the logits z, and N = H − G = Σ z̄ ∂²z/∂θ², that of the function.

The gradient is the head's cotangent at (h, W), pulled back by the trunk; its derivative along v is taken in forward
mode. Both summands of the cotangent's derivative come from the head (`fsam_kernels.xla.head_curvature`), so no N×V
array exists. By count of a decoder's matrix products H v costs 2.7 gradients, and G v and N v together 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fsam_core import split
from fsam_core.ascents import Ascent
from fsam_core.curvature import (
    NO_SECOND_DERIVATIVE,
    PATHS,
    RADIUS,
    Operators,
    Products,
    check_not_quantised,
    check_products,
    check_weight,
)
from fsam_core.errors import UserError
from fsam_core.heads import of_batch
from fsam_core.jax import heads, meshes, passes, trees
from fsam_core.jax.heads import Outputs, Part
from fsam_core.jax.passes import Features, Params
from fsam_core.jax.step import value_and_grad
from fsam_core.methods import Plain
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.xla.head_curvature import head_curvature


class Curvature(Operators):
    """Products with H, G and N of the mean loss of `batch` at `params`.

    Attributes:
        loss: the mean loss.
        gradient: its gradient, a tree like params.
    """

    def __init__(
        self,
        features: Features,
        params: Params,
        batch: Any,
        *,
        products: Products = "exact",
        radius: float = RADIUS,
        memory: Memory = AUTO,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            features: as in `fsam_core.jax.value_and_grad`, with dropout off (no key in the batch).
            params: a tree of real arrays; those of float32 or float64 give products of that precision.
            batch: one batch, or `MicroBatches([...])`, whose products are those of one batch of them all.
            products: "exact", or "difference" for a model that JAX cannot differentiate twice: central differences of
                gradients at distance `radius`.
            radius: the length of the step of "difference", in the units of the weights.
            memory: the head's memory budget.
            backend: that of the gradients; exact products are computed by "xla".

        Raises:
            UserError: for a batch without labels, labels ≥ V, quantised weights, or a loss that is not finite.
        """
        check_products(products, radius)
        check_not_quantised(
            [(n, str(x.dtype)) for n, x in zip(trees.names(params), jax.tree.leaves(params), strict=True)]
        )
        self.products, self.radius = products, radius
        self._features, self._memory, self._backend = features, memory, backend
        self._batches = split.micro_batches(batch)
        self._jitted: dict[Any, Callable[..., Any]] = {}
        self._start(params)

    def at(self, params: Params) -> Curvature:
        """The same at other weights, without compiling again."""
        other = copy.copy(self)
        other._start(params)
        return other

    def loss_at(self, v: Params) -> float:
        """The loss at θ + v."""

        def run(params: Params, batches: list[Any], v: Params) -> Any:
            moved = jax.tree.map(jnp.add, trees.floats(params), trees.floats(params, v))
            return self._gradient(trees.joined(params, moved), batches)[0][0]

        return float(self._call("loss", run, self.params, self._batches, v))

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(x.size for x in jax.tree.leaves(trees.floats(self.params)))

    def vector(self, tree: Params) -> NDArray[Any]:
        """The float leaves of a tree like params as one array [size]."""
        return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(trees.floats(self.params, tree))])

    def tree(self, vector: NDArray[Any]) -> Params:
        """The inverse of `vector`, in the dtypes of params."""
        leaves, structure = jax.tree.flatten(trees.floats(self.params))
        pieces = np.split(vector, np.cumsum([x.size for x in leaves])[:-1])
        found = [jnp.asarray(x.reshape(p.shape), p.dtype) for x, p in zip(pieces, leaves, strict=True)]
        return trees.gradients(self.params, jax.tree.unflatten(structure, found))

    def _start(self, params: Params) -> None:
        self.params = params
        (loss, info), self.gradient = self._call("gradient", self._gradient, params, self._batches)
        if int(info.bad_label) >= 0:
            raise UserError(f"batch: label {int(info.bad_label)} is not below the head's number of rows")
        check_weight(float(info.weight))
        if not bool(info.finite):
            raise UserError(f"params: the loss ({float(loss)}) or its gradient is not finite at these weights")
        self.loss = float(loss)

    def _gradient(self, params: Params, batches: list[Any]) -> Any:
        call = value_and_grad(self._features, Plain(), memory=self._memory, backend=self._backend)
        return call(params, split.MicroBatches(batches))

    def _exact(self, which: str, v: Params) -> Any:
        product = partial(exact_product, self._features, self._memory, which)

        def run(*arguments: Any) -> Any:
            of_v = lambda specs: (specs[2], specs[2]) if which == "both" else specs[2]
            return meshes.in_auto_mode(product, arguments, of_v)

        try:
            return self._call(which, run, self.params, self._batches, v)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise UserError(NO_SECOND_DERIVATIVE.format("a custom_vjp")) from error
        except NotImplementedError as error:
            raise UserError(NO_SECOND_DERIVATIVE.format(str(error).partition("\n")[0])) from error

    def _moved(self, which: str, v: Params, rho: float) -> Params:
        def run(params: Params, batches: list[Any], v: Params) -> Params:
            along = Ascent("given", lambda seen: trees.floats(params, v), "none")
            call = value_and_grad(
                self._features, PATHS[which](rho, ascent=along), memory=self._memory, backend=self._backend
            )
            return call(params, split.MicroBatches(batches))[1]

        return self._call((which, rho), run, self.params, self._batches, v)

    @staticmethod
    def _map(function: Callable[..., Any], *trees: Params) -> Params:
        return jax.tree.map(function, *trees)

    def _length(self, v: Params) -> float:
        squares = [jnp.vdot(x, x) for x in jax.tree.leaves(trees.floats(self.params, v))]
        return float(jnp.sqrt(sum(squares[1:], squares[0])))

    def _call(self, key: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        if key not in self._jitted:
            self._jitted[key] = jax.jit(function)
        return self._jitted[key](*arguments)


def exact_product(features: Features, memory: Memory, which: str, whole: Params, batches: list[Any], v: Params) -> Any:
    """H v, G v, N v or (G v, N v) of the mean over the micro-batches."""
    params, along = trees.floats(whole), trees.floats(whole, v)
    along = jax.tree.map(lambda x, p: x.astype(p.dtype), along, params)

    def one(batch: Any) -> Any:
        seen: list[heads.FlatHeads] = []

        def linearized(p: Params) -> Any:
            def outputs(p: Params) -> Any:
                head = features(trees.joined(whole, p), batch)
                seen.append(heads.flat(of_batch(head, batch, passes.is_key)))
                return heads.outputs(seen[-1])

            return jax.vjp(outputs, p)

        # The pull-back is a tree of the arrays that it saved, so it has a tangent itself.
        (out, vjp_fn), (outdot, vjp_fn_dot) = jax.jvp(linearized, (params,), (along,))
        head = heads.with_outputs(seen[-1], out)
        every = [_at_outputs(*x, memory) for x in zip(head.parts, head.factors, out, outdot, strict=True)]
        zbar, of_G, of_N = zip(*every, strict=True)
        weight = _weight(head.parts[0])
        if which == "gauss_newton":
            return (jnp.zeros_like(weight), weight, vjp_fn(of_G)[0]), ()
        moves = of_N if which != "hessian" else jax.tree.map(jnp.add, of_N, of_G)
        apply = lambda vjp_fn, bars: vjp_fn(bars)[0]
        _, product = jax.jvp(apply, (vjp_fn, zbar), (vjp_fn_dot, moves))
        found = product if which != "both" else (vjp_fn(of_G)[0], product)
        return (jnp.zeros_like(weight), weight, found), ()

    (_, _, found), _ = passes.micro_batch_mean(one, passes.stacked(batches))
    finished = lambda tree: trees.gradients(whole, jax.tree.map(lambda x, p: x.astype(p.dtype), tree, params))
    return tuple(map(finished, found)) if which == "both" else finished(found)


def _at_outputs(part: Part, factor: Any, out: Any, outdot: Any, memory: Memory) -> tuple[Any, Any, Any]:
    """(the loss's cotangent at a part's outputs, the derivatives of it that belong to G and to N)."""
    scaled = lambda x: x * jnp.asarray(factor, x.dtype)
    if isinstance(part, Outputs):
        found = jax.jvp(jax.grad(part.loss), (out,), (outdot,))
        # A mean over no targets is 0/0; its weight is 0.
        zbar, q = jax.tree.map(lambda x: scaled(jnp.where(jnp.asarray(part.weight) == 0, 0, x)), found)
        return zbar, q, jax.tree.map(jnp.zeros_like, q)
    assert part.token_weights is not None
    assert isinstance(part.count, jax.Array)
    share_N = scaled(part.token_weights / jnp.where(part.count == 0, 1, part.count))
    hdot, wdot, *bias_dot = outdot
    every = head_curvature(
        part.hidden,
        part.weight,
        part.labels,
        share_N,
        hdot,
        wdot,
        bias_V=part.bias,
        bias_dot_V=bias_dot[0] if bias_dot else None,
        loss=part.loss,
        chunk_bytes=memory.chunk_bytes,
        row_axes=memory.row_axes,
    )
    present = lambda gradients: tuple(x for x in gradients if x is not None)
    zbar, of_G, of_N = map(present, every)
    return zbar, of_G, of_N


def _weight(part: Part) -> jax.Array:
    """The weight of a micro-batch whose head's first part this is."""
    if isinstance(part, Outputs):
        return jnp.asarray(part.weight, jnp.result_type(float))
    assert isinstance(part.count, jax.Array)
    return part.count
