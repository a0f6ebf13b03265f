"""The methods in PyTorch: ĝ = g_B + w (g'_S − g_S) into `.grad`, with no more passes than each of its forms needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from fsam_core import scopes, split
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed
from fsam_core.regions import in_torch
from fsam_core.scopes import Blocks
from fsam_core.torch import heads, rng
from fsam_core.torch.parallel import Sync, like, local, plain_name
from fsam_core.torch.passes import Kept, Passed, Passes, Staged, flatten, rescaled, shares, together
from fsam_core.torch.perturbation import Seen, perturbed


class Outcome(NamedTuple):
    """What the passes saw; None for what was not evaluated.

    Of several ranks the losses are such that their mean is that over all ranks, the weight is the ranks' mean, and the
    base norm is `Ranks.norm_here`.
    """

    loss: Tensor
    moved_loss: Tensor | None
    weight: Tensor
    base_norm: Tensor | None
    length: Tensor | None


class Corrections:
    """A method's gradient, step by step.

    Attributes:
        reuses: whether the correction itself is kept, in `correction`.
        previous: ĝ of the last step that was taken, for an ascent that remembers it.
        correction: w (g'_S − g_S) of the last corrected step.
    """

    def __init__(
        self,
        passes: Passes,
        method: Method,
        clip_norm: float | None,
        blocks: Blocks | None,
        *,
        reuses: bool,
        sync: Sync = "global",
    ) -> None:
        self.passes, self.method, self.clip_norm, self.reuses, self.sync = passes, method, clip_norm, reuses, sync
        self.ops, self.model, self.optimizer = passes.ops, passes.model, passes.optimizer
        self.previous: dict[Any, Tensor] = {}
        self.correction: dict[Any, Tensor] = {}
        self._names = {id(p): plain_name(name) for name, p in self.model.named_parameters()}
        self._names |= {id(master): self._names.get(id(p), "") for master, p in passes.copies.items()}
        self._outside = self._left_alone(blocks)
        self._shares_prefix: bool | None = None

    def gradient(self, batches: Sequence[Any], step: int) -> Outcome:
        """ĝ of these micro-batches into `.grad`, after `step` completed steps."""
        assert isinstance(self.method, Perturbed)
        self._step = step
        of = self._micro if self.method.direction.source == "micro" else self._corrected
        self.passes.apart = self.sync == "local"
        try:
            seen = of(batches, self.method)
        finally:
            self.passes.apart = False
        if self.sync == "local":
            own = list(self.correction.values()) if self.reuses else []
            self.passes.ranks.mean_([*self.passes.gradients().values(), *own])
        return seen

    def norm_here(self, params: Sequence[Any]) -> Tensor:
        """`Ranks.norm_here` of their gradients."""
        of = self.passes.gradients()
        with in_torch("norm"):
            return self.passes.ranks.norm_here(params, [of[p] for p in params])

    def all(self) -> list[Any]:
        """The optimizer's tensors."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def checked(self) -> list[Any]:
        """Those with a gradient, of which there must be some."""
        params = self.passes.params()
        if not params:
            raise UserError("optimizer: none of its parameters got a gradient; is the model frozen, or not its own?")
        return params

    def _corrected(self, batches: Sequence[Any], method: Perturbed) -> Outcome:
        """ĝ = g_B + w (g'_S − g_S) into `.grad`."""
        passes, ascent, path = self.passes, method.direction, method.path
        share = method.share if ascent.source == "part" else method.fraction
        first, others = split.split(list(batches), share, flatten)
        if self._is_staged(method, first, others):
            return self._staged(first[0], others, method)
        cut = method.cut if path == "functional" else None
        whole = method.fraction == 1  # S = B
        if ascent.known and method.exact:
            return self._known(first, method, cut)
        joins = bool(others) and not whole and ascent.source != "part" and path != "sam" and passes.joins
        with passes.left_apart(joins):
            seen = base = passes.base(first, cut=cut)
        g_S = passes.gradients()
        if joins:  # S and the rest in one reduction, and g'_S − g_S in the other
            g_S = {p: g.clone() for p, g in g_S.items()}
            seen = passes.base(others, onto=base)
        elif others and not method.exact:
            g_S = passes.held(g_S)
            seen = self._add(others, base, g_S, cut if whole else None)
        elif others and path == "functional":  # of these the cotangent alone is needed
            seen = together(base, passes.base(others, backward=False, cut=cut))
        S, kept = ([*first, *others], seen.kept) if whole else (first, base.kept)
        params = self.checked()
        scope = self._scope(params)
        base_norm = self.norm_here(scope if method.exact else params)
        ascends = {p: p.grad for p in params} if ascent.source == "full" else g_S
        norm = base_norm if ascent.name == "full" and len(scope) == len(params) else None
        moved, length = self._moved(scope, method, ascends, norm)
        if whole:
            g_S = passes.gradients()
        of_B = {p: p.grad.clone() for p in params} if self.reuses else {}
        left = {} if method.exact else self._less(g_S, method.strength)
        del g_S, ascends
        moved_pass: Passed | None = None
        # Where the second pass is the first to see the rest, what that draws counts.
        draws = contextlib.nullcontext() if len(kept) < len(S) else rng.kept(self.model)
        with passes.statistics_kept(), draws:
            if path == "functional":  # J(θ+ε)ᵀ z̄(θ), and linear in z̄: it adds up on what is there
                scaled = self._scaled(kept, method)
                with passes.at(scope, moved):
                    passes.pull_back(S, scaled, onto=left)
            elif path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
                with passes.at(scope, moved):
                    moved_pass = passes.base(S, replay=kept, region="second")
            else:  # J(θ)ᵀ z̄(θ+ε)
                with passes.at(scope, moved):
                    moved_pass = passes.base(S, backward=False, cut="logits", replay=kept, region="second")
                passes.refresh()
                passes.pull_back(S, self._scaled(moved_pass.kept, method), onto=left)
        if path == "sam":
            self._combine(left, method.strength)
        for p, g_B in of_B.items():
            self.correction[p] = p.grad - g_B
        moved_loss = moved_pass.loss if moved_pass else None
        weight = moved_pass.weight if moved_pass and whole and others else seen.weight
        return Outcome(seen.loss, moved_loss, weight, base_norm, length)

    def _known(self, batches: Sequence[Any], method: Perturbed, cut: str | None) -> Outcome:
        """The exact method along an ascent known before the step: nothing is pulled back at θ for its sake."""
        passes = self.passes
        scope = self._scope([p for p in self.all() if p.requires_grad])
        moved, length = self._moved(scope, method, None, None)
        if method.path == "functional":
            base = passes.base(batches, backward=False, cut=cut)
            with passes.statistics_kept(), rng.kept(self.model), passes.at(scope, moved):
                passes.pull_back(batches, base.kept)
            self.checked()
            return Outcome(base.loss, None, base.weight, None, length)
        is_sam = method.path == "sam"
        with passes.at(scope, moved):
            base = passes.base(batches, backward=is_sam, cut=None if is_sam else "logits")
        if not is_sam:
            passes.refresh()
            with passes.statistics_kept(), rng.kept(self.model):
                passes.pull_back(batches, base.kept)
        self.checked()
        return Outcome(base.loss, base.loss, base.weight, None, length)

    def _micro(self, batches: Sequence[Any], method: Perturbed) -> Outcome:
        """Each micro-batch corrected along its own gradient; the mean of them, each by its weight."""
        passes = self.passes
        total: dict[Any, Tensor] = {}
        of: list[Outcome] = []
        for batch in batches:
            one = self._corrected([batch], method)
            passes.refresh()
            for p, gradient in passes.held(passes.gradients()).items():
                total[p] = gradient.mul_(one.weight.to(gradient)).add_(total.get(p, 0))
            assert one.base_norm is not None
            of.append(one._replace(base_norm=passes.ranks.norm(one.base_norm)))
        weights = torch.stack([one.weight for one in of])
        weight = weights.sum()
        share = weights / torch.where(weight > 0, weight, 1)
        passes.put(total)
        for gradient in total.values():
            gradient.div_(torch.where(weight > 0, weight, 1).to(gradient))

        def mean(name: str) -> Any:
            values = [getattr(one, name) for one in of]
            return None if values[0] is None else (torch.stack(values) * share).sum()

        base_norm = passes.ranks.share_of(mean("base_norm"))
        return Outcome(mean("loss"), mean("moved_loss"), weight, base_norm, mean("length"))

    def _staged(self, batch: Any, others: Sequence[Any], method: Perturbed) -> Outcome:
        """As `_corrected` for one micro-batch, with its prefix run once: forwards for both passes, and backwards."""
        passes, features = self.passes, self.passes.features
        assert isinstance(features, Staged)
        passes.clear()
        with in_torch("base forward"):
            x = features.prefix(self.model, batch)
        leaves = [leaf for leaf in _pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.requires_grad]
        begins = rng.state(self.model)

        def head(needs: bool) -> tuple[Any, list[Tensor]]:
            """The suffix at the present weights, and its inputs."""
            detached = {id(leaf): leaf.detach().requires_grad_(needs) for leaf in leaves}
            inputs = _pytree.tree_map(lambda leaf: detached.get(id(leaf), leaf), x)
            return heads.flat(features.suffix(self.model, inputs, batch)), [detached[id(leaf)] for leaf in leaves]

        def gradients(inputs: list[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(one) if one.grad is None else one.grad for one in inputs]

        functional, exact = method.path == "functional", method.exact
        backward = not (exact and method.direction.known)
        cut = method.cut if functional else None
        with torch.set_grad_enabled(backward), in_torch("base forward"):
            at_theta, inputs = head(needs=not exact)
        with in_torch("base backward" if backward else "base forward"):
            seen = passes.head(at_theta, None, 1, cut=cut, backward=backward, before=begins)
        base = seen_all = Passed(seen[0], seen[1], [seen[2]])
        c_S = [] if exact else gradients(inputs)
        del at_theta, inputs
        g_S = {p: p.grad for p in passes.params()}
        mine = torch.ones_like(base.weight)
        if others:
            seen_all = self._add(others, base, g_S, None)
            mine = base.weight / torch.where(seen_all.weight > 0, seen_all.weight, 1)
        params = passes.params() if backward else [p for p in self.all() if p.requires_grad]
        scope = self._scope(params)
        # Of what the prefix alone reaches there is no gradient yet, and by the scope none is asked for.
        base_norm = self.norm_here(scope) if backward else None
        source = method.direction.source
        ascends = {p: p.grad for p in params} if source == "full" else g_S
        norm = base_norm if method.direction.name == "full" else None
        moved, length = self._moved(scope, method, None if source == "none" else ascends, norm)
        if method.fraction == 1:
            g_S = {p: p.grad for p in params}
        left = {} if exact else self._less(g_S, method.strength)
        del g_S, ascends
        passes.put(left if functional else {})
        moved_loss = None
        with passes.statistics_kept(), rng.kept(self.model), passes.at(scope, moved):
            rng.restore(begins)
            with in_torch("second forward"):
                at_moved, inputs = head(needs=True)
            with in_torch("second backward"):
                if functional:
                    (kept,) = self._scaled([seen[2]], method)
                    passes.pull_back_head(at_moved, kept.cotangent)
                else:
                    moved_loss = passes.head(at_moved, None, 1, cut=None, backward=True, before=begins)[0]
        if not functional:
            self._combine(left, method.strength)
        c = gradients(inputs)
        for moved_c, at_base in zip(c, c_S, strict=False):
            scaled_c = moved_c if functional else moved_c.mul_(method.strength)
            scaled_c.add_(at_base * (mine.to(at_base) - method.strength))
        if leaves:
            with in_torch("second backward"):
                torch.autograd.backward(leaves, c)
                passes.collect()
        self.checked()
        return Outcome(seen_all.loss, moved_loss, seen_all.weight, base_norm, length)

    # --- their parts --------------------------------------------------------------------------------------------------

    def _moved(
        self, scope: list[Any], method: Perturbed, gradients: dict[Any, Tensor] | None, norm: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        seen = Seen(scope, self.optimizer, gradients, self.previous, method.seed, self._step)
        ascent = [a.to(p.dtype) for a, p in zip(method.direction.of(seen), scope, strict=True)]
        return perturbed(
            self.ops, method, self.passes, scope, ascent, norm=norm, clip_norm=self.clip_norm, step=self._step
        )

    def _add(self, others: Sequence[Any], base: Passed, g_S: dict[Any, Tensor], cut: str | None) -> Passed:
        """The whole batch's pass from that of S, with g_B in `.grad`; with `cut`, cotangents are kept of all of it."""
        rest = self.passes.base(others, cut=cut)
        mine, other = shares(base, rest)
        for p, g in self.passes.gradients().items():
            if p in g_S:
                g.lerp_(g_S[p], mine.to(g))  # one pass: the shares add up to 1, or every gradient is 0
            else:
                g.mul_(other.to(g))
        for p, g in g_S.items():
            if p.grad is None:
                p.grad = like(p, g * mine.to(g))
        if cut is not None:
            return together(base, rest)
        return Passed(base.loss * mine + rest.loss * other, base.weight + rest.weight, [])

    def _less(self, g_S: dict[Any, Tensor], strength: float) -> dict[Any, Tensor]:
        """g_B − w g_S for every parameter, from the g_B in `.grad`."""
        of = self.passes.held(self.passes.gradients())
        of = {p: g.clone() if g_S.get(p) is g else g for p, g in of.items()}
        return {p: g.sub_(g_S[p], alpha=strength) if p in g_S else g for p, g in of.items()}

    def _scaled(self, kept: Sequence[Kept], method: Perturbed) -> list[Kept]:
        """w z̄ in place of z̄."""
        if method.exact or method.strength == 1:
            return list(kept)
        return [rescaled(one, torch.full_like(one.unit, method.strength)) for one in kept]

    def _combine(self, left: dict[Any, Tensor], strength: float) -> None:
        """ĝ = (g_B − w g_S) + w g'_S."""
        for p, gradient in left.items():
            p.grad = like(p, gradient if p.grad is None else gradient.add_(local(p.grad), alpha=strength))

    def _is_staged(self, method: Perturbed, first: Sequence[Any], others: Sequence[Any]) -> bool:
        """Whether the prefix is run once: it is one micro-batch's, and no tensor that moves is below."""
        features, ascent = self.passes.features, method.direction
        if not isinstance(features, Staged) or method.scope == "all" or len(first) > 1:
            return False
        if self.passes.ranks.count > 1 or self.passes.ranks.sharded:
            return False  # a wrapper's hooks run at one forward pass from end to end
        # A correction that is kept is kept of the lower stage too, whose g_B is then needed by itself.
        if method.path == "logit" or self.reuses or (method.exact and others):
            return False
        if method.path == "sam" and method.exact and ascent.known:
            return False  # it has but one pass
        if ascent.source == "micro" or (others and method.fraction == 1):
            return False
        if self._shares_prefix is None:
            with torch.enable_grad(), rng.kept(self.model), self.passes.statistics_kept():
                below = _leaves_of(features.prefix(self.model, first[0]))
            inside = [self._names[i] for i in below if i in self._names and i not in self._outside]
            self._shares_prefix = not inside
            if inside and isinstance(method.scope, str) and method.scope.startswith("top:"):
                raise UserError(
                    f"features: the prefix of Staged depends on {', '.join(sorted(inside)[:3])}, which scope="
                    f"{method.scope!r} moves; let it end where those blocks begin"
                )
        return self._shares_prefix

    def _left_alone(self, blocks: Blocks | None) -> set[int]:
        """What the scope does not hold, the model's parameters and their masters."""
        if not isinstance(self.method, Perturbed):
            return set()
        names = sorted(set(self._names.values()))
        mask = scopes.mask(self.method.scope, names, blocks)
        holds = dict(zip(names, mask, strict=True)) if mask is not None else {}
        return {i for i, name in self._names.items() if not holds.get(name, True)}

    def _scope(self, params: list[Any]) -> list[Any]:
        found = [p for p in params if id(p) not in self._outside]
        if not found:
            raise UserError("scope: none of the parameters it holds got a gradient; is that part of the model frozen?")
        return found


def _leaves_of(tree: Any) -> set[int]:
    """The ids of the parameters that these tensors' graphs reach."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [x.grad_fn for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [one for one, _ in node.next_functions if one is not None]
    return found
