"""Products with the Hessian in PyTorch, and with its two summands: what is sharp, the logits or the function.

    curvature = Curvature(model, features, batch)
    Gv, Nv = curvature.both(v)              # H v = G v + N v; v is {name: tensor}, as model.named_parameters()

H is the Hessian of the mean loss over the batch, G = Jᵀ (∂²L/∂z²) J the Gauss–Newton matrix, which is the curvature
of the loss as a function of the logits z, and N = H − G = Σ z̄ ∂²z/∂θ², that of the function.

The gradient is the head's cotangent at (h, W), pulled back by the trunk; its derivative along v is taken in forward
mode (`torch.autograd.forward_ad`). Both summands of the cotangent's derivative come from the head
(`fsam_kernels.torch.head_curvature`), so no N×V tensor exists. By count of a decoder's matrix products H v costs 3.0
gradients, and G v and N v together 3.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

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
from fsam_core.methods import SAM, Method, Plain
from fsam_core.torch import cotangents, heads, optimizers
from fsam_core.torch.evaluation import mean_loss
from fsam_core.torch.heads import FlatHead, FlatOutputs
from fsam_core.torch.parallel import detect_parallelism, plain_name
from fsam_core.torch.pass_config import Features
from fsam_core.torch.replay import Replay
from fsam_core.torch.step import Step
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.torch.head_curvature import head_curvature

Tensors = dict[str, Any]
REPEATS = 1e-5
"""The relative difference of two losses of one batch that rounding may make on a device with atomic sums."""


class Curvature(Operators):
    """Products with H, G and N of the mean loss of `batch` at the model's weights, with respect to those that train.

    Weights, buffers, `.grad` and the generators are afterwards as before.

    Attributes:
        loss: the mean loss.
        gradient: its gradient by the parameters' names.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Features,
        batch: Any,
        *,
        products: Products = "exact",
        radius: float = RADIUS,
        memory: Memory = AUTO,
        backend: str | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ) -> None:
        """
        Args:
            model: any module in evaluation mode; for "difference" also in DistributedDataParallel or under
                `fully_shard`. Weights of float32 or float64 give products of that precision.
            features: as in `Step`.
            batch: one batch, or `MicroBatches([...])`, whose products are those of one batch of them all.
            products: "exact", or "difference" for a model that PyTorch cannot differentiate twice: central differences
                of gradients at distance `radius`.
            radius: the length of the step of "difference", in the units of the weights.
            memory: the head's memory budget.
            backend: that of the gradients; exact products are computed by "torch".
            optimizer: with "difference", a `fsam_core.torch.AdamW` with float32 masters of a half-precision model; the
                products are then those of the masters. It takes no step.

        Raises:
            UserError: for a batch without labels, labels ≥ V, quantised weights, a loss that is not finite or that
                changes from call to call (dropout), or exact products of a wrapped model.
        """
        check_products(products, radius)
        parallel = detect_parallelism(model)
        if products == "exact" and (parallel.count > 1 or parallel.inner is not model or parallel.sharded):
            raise UserError("products: 'exact' takes a plain model in one process; use products='difference'")
        check_not_quantised([(plain_name(n), str(p.dtype)) for n, p in parallel.inner.named_parameters()])
        self.model, self.products, self.radius = model, products, radius
        self._features, self._memory, self._backend = features, memory, backend
        self._inner, self._batch = parallel.inner, batch
        self._replay = Replay(parallel.inner)
        trained = {plain_name(n): p for n, p in self._inner.named_parameters() if p.requires_grad}
        self._call = _Call(self._inner, features)
        self._names = {plain_name(n): f"model.{n}" for n, _ in self._inner.named_parameters()}
        self._optimizer = torch.optim.SGD(trained.values(), lr=0.0) if optimizer is None else optimizer
        copied = {p: master for master, p in optimizers.copies(_as_tuple(self._optimizer)).items()}
        self.params: Tensors = {name: copied.get(p, p) for name, p in trained.items()}
        self._needs_graph = False
        self._check_repeats()
        self.loss, self.gradient = self._gradient(Plain())

    def loss_at(self, v: Tensors) -> float:
        """The loss at θ + v."""
        return self._along(SAM, v, self._length(v))[0]

    @property
    def size(self) -> int:
        """The number of weights that train."""
        return sum(p.numel() for p in self.params.values())

    def vector(self, tensors: Tensors) -> NDArray[Any]:
        """The tensors, whole ones also where they are sharded, as one array [size]."""
        return np.concatenate([_whole(tensors[name]).detach().cpu().numpy().ravel() for name in self.params])

    def tree(self, vector: NDArray[Any]) -> Tensors:
        """The inverse of `vector`, in the parameters' dtypes; not for sharded parameters."""
        pieces = np.split(vector, np.cumsum([p.numel() for p in self.params.values()])[:-1])
        shaped = lambda x, p: torch.from_numpy(np.ascontiguousarray(x)).view(p.shape).to(p)
        return {name: shaped(x, p).detach() for x, (name, p) in zip(pieces, self.params.items(), strict=True)}

    def _check_repeats(self) -> None:
        """Compare two losses of one batch, with other random draws."""
        first, before = split.micro_batches(self._batch)[0], self._replay.state()
        loss = mean_loss(self._features, memory=self._memory, backend=self._backend)
        try:
            once, again = (float(loss(self.model, first)) for _ in range(2))
        finally:
            self._replay.restore(before)
        if abs(once - again) > REPEATS * abs(once):
            raise UserError(
                f"model: the same batch has the losses {once:.6g} and {again:.6g}; turn dropout off with model.eval()"
            )

    def _gradient(self, method: Method) -> tuple[float, Tensors]:
        """(loss at θ, the method's gradient by name)."""
        kept, before = {p: p.grad for p in (*self.params.values(), *self._inner.parameters())}, self._replay.state()
        try:
            step = Step(
                self.model,
                self._optimizer,
                method,
                features=self._features,
                memory=self._memory,
                backend=self._backend,
            )
            with _PlainEmbeddings():
                loss, info = float(step.gradient(self._batch)), step.info
            assert info is not None
            check_weight(info.weight)
            if info.skipped:
                raise UserError(f"model: the loss ({loss}) or its gradient is not finite at these weights")
            dense = lambda p: _dense(torch.zeros_like(p) if p.grad is None else p.grad)
            return loss, {name: dense(p) for name, p in self.params.items()}
        finally:
            self._replay.restore(before)
            for p, gradient in kept.items():
                p.grad = gradient

    def _moved(self, which: str, v: Tensors, rho: float) -> Tensors:
        return self._along(PATHS[which], v, rho)[1]

    @staticmethod
    def _map(function: Callable[..., Any], *trees: Tensors) -> Tensors:
        return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}

    def _along(self, method: Any, v: Tensors, rho: float) -> tuple[float, Tensors]:
        """(the loss of the last pass, the gradient) of a method whose perturbation is ρ v / ‖v‖."""
        names = {id(p): name for name, p in self.params.items()}
        order = [names[id(p)] for p in optimizers.params(_as_tuple(self._optimizer)) if p.requires_grad]
        along = Ascent("given", lambda seen: [v[name] for name in order], "none")
        return self._gradient(method(rho, ascent=along))

    def _length(self, v: Tensors) -> float:
        return float(torch.stack([_whole(x.square().sum()) for x in v.values()]).sum().sqrt())

    def _exact(self, which: str, v: Tensors) -> Any:
        before = self._replay.state()
        try:
            every = self._of_batches(which, v)
        except CheckpointError as error:
            raise UserError(
                "model: recomputed blocks have no tangents; turn activation checkpointing off, or use "
                "products='difference'"
            ) from error
        except (RuntimeError, NotImplementedError) as error:
            text = str(error)
            if not any(x in text for x in ("forward AD", "forward mode AD", "jvp", "derivative for")):
                raise
            raise UserError(NO_SECOND_DERIVATIVE.format(text.partition("\n")[0].rstrip("."))) from error
        finally:
            self._replay.restore(before)
        total = sum(weight for weight, _ in every)
        mean = lambda i: {n: sum(found[i][n] * (w / total).to(p) for w, found in every) for n, p in self.params.items()}
        return (mean(0), mean(1)) if which == "both" else mean(0)

    def _of_batches(self, which: str, v: Tensors) -> list[tuple[Tensor, list[Tensors]]]:
        run = lambda: [self._of_batch(which, v, batch) for batch in split.micro_batches(self._batch)]
        if self._needs_graph:
            return run()
        try:
            return run()
        except NotImplementedError:
            # SiLU's derivative, for one, has no tangent. With a graph PyTorch writes it in operations that have one.
            self._needs_graph = True
            return run()

    def _of_batch(self, which: str, v: Tensors, batch: Any) -> tuple[Tensor, list[Tensors]]:
        """(the weight of a micro-batch, the product with its loss, or the two of "both")."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        found = []
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _PlainEmbeddings():
            with forward_ad.dual_level():
                duals = {self._names[n]: forward_ad.make_dual(p, v[n].detach().to(p)) for n, p in leaves.items()}
                head = heads.flat(of_batch(torch.func.functional_call(self._call, duals, (batch,)), batch))
                out = [x for part in head for x in part.tensors]
                bars = [_at_outputs(part, by, self._memory) for part, by in zip(head, _divisors(head), strict=True)]
                zbar, of_G, of_N = ([x for one in bars for x in one[i]] for i in range(3))
                if which != "gauss_newton":
                    moves = of_N if which != "hessian" else [x + y for x, y in zip(of_N, of_G, strict=True)]
                    moving = [forward_ad.make_dual(x, y) for x, y in zip(zbar, moves, strict=True)]
                    graphs = {"retain_graph": which == "both" or self._needs_graph, "create_graph": self._needs_graph}
                    pulled = _vjp(out, leaves, moving, **graphs)
                    found.append({n: _unpacked(x)[1] for n, x in pulled.items()})
            if which in ("gauss_newton", "both"):
                found.insert(0, _vjp(out, leaves, of_G))
        return head[0].count, found


class _PlainEmbeddings(torch.overrides.TorchFunctionMode):
    """Embeddings whose gradients are the loss's derivatives, and dense: sparse ones have no tangents.

    A padding_idx and scale_grad_by_freq change the gradient alone, whose derivative is then no symmetric matrix.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.embedding:
            ignored = ("padding_idx", "scale_grad_by_freq", "sparse")  # the 3rd, 6th and 7th argument
            kwargs = {name: value for name, value in kwargs.items() if name not in ignored}
            args = args if len(args) < 3 else (*args[:2], None, *args[3:5])
        return func(*args, **kwargs)


class _Call(nn.Module):
    """`features(model, batch)` as a forward pass, for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module, features: Features) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, batch: Any) -> Any:
        return self.features(self.model, batch)


def _vjp(out: Sequence[Tensor], leaves: Tensors, bars: Sequence[Tensor], **graphs: bool) -> Tensors:
    used = [(x, bar) for x, bar in zip(out, bars, strict=True) if x.requires_grad]
    outputs, cotangent = zip(*used, strict=True)
    options: dict[str, bool] = {"allow_unused": True, "materialize_grads": True, **graphs}
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangent, **options), strict=True))


def _unpacked(x: Tensor) -> tuple[Tensor, Tensor]:
    """(value, tangent) of a dual tensor, without graph."""
    value, tangent = forward_ad.unpack_dual(x)
    return value.detach(), torch.zeros_like(value) if tangent is None else tangent.detach()


def _divisors(head: heads.Flat) -> list[Tensor]:
    """What each part's sum over its tokens is divided by: the mean over the micro-batch."""
    count = head[0].count
    return cotangents.divisors(head, torch.where(count != 0, count, 1))


def _at_outputs(
    part: FlatHead | FlatOutputs, divisor: Tensor, memory: Memory
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(the loss's cotangent at a part's tensors, which are dual, the derivatives of it that belong to G and to N)."""
    values, along = zip(*map(_unpacked, part.tensors), strict=True)
    if isinstance(part, FlatOutputs):
        share = part.count / divisor
        scaled = lambda every: [torch.where(share != 0, x.detach() * share.to(x), 0) for x in every]
        z = [x.requires_grad_() for x in values]
        zbar = torch.autograd.grad(part.loss(z), z, create_graph=True, allow_unused=True, materialize_grads=True)
        product = torch.stack([(x * y).sum() for x, y in zip(zbar, along, strict=True)]).sum()
        zeros = [torch.zeros_like(x) for x in values]
        if not product.requires_grad:  # a loss that is linear in the outputs
            return scaled(zbar), zeros, zeros
        q = torch.autograd.grad(product, z, allow_unused=True, materialize_grads=True)
        return scaled(zbar), scaled(q), zeros
    if part.vocabulary is not None:
        raise UserError("products: 'exact' takes a head with all of its vocabulary; use products='difference'")
    (hidden, weight, *bias), (hdot, wdot, *bias_dot) = values, along
    every = head_curvature(
        hidden,
        weight,
        part.labels,
        part.token_weights / divisor,
        hdot,
        wdot,
        bias_V=bias[0] if bias else None,
        bias_dot_V=bias_dot[0] if bias else None,
        loss=part.loss,
        chunk_bytes=memory.chunk_bytes,
    )
    gradient, gauss_newton, functional = ([x for x in one if x is not None] for one in every)
    return gradient, gauss_newton, functional


def _dense(gradient: Any) -> Any:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach()


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _as_tuple(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    return (optimizer,) if hasattr(optimizer, "param_groups") else tuple(optimizer)
