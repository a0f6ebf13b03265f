"""The user's optimizers: one, or several with parameters of their own (Muon for matrices beside AdamW, say)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Perturbed
from fsam_kernels.torch.adamw import AdamW

Optimizers = tuple[torch.optim.Optimizer, ...]


def as_tuple(given: Any, names: Mapping[Tensor, str]) -> Optimizers:
    """The optimizers, whether one or several were given.

    Raises:
        UserError: for none, a parameter that two of them have, or one whose own step does not fit.
    """
    found = tuple(given) if isinstance(given, Iterable) and not hasattr(given, "param_groups") else (given,)
    if not found or not all(hasattr(one, "param_groups") for one in found):
        raise UserError(f"optimizer: give a torch.optim.Optimizer or a list of them, got {given!r}")
    owner: dict[Tensor, Any] = {}
    for one in found:
        for p in params([one]):
            if p in owner:
                both = f"{type(owner[p]).__name__} and {type(one).__name__}"
                raise UserError(f"optimizer: {names.get(p) or 'a parameter'} is in {both}; give each parameter to one")
            owner[p] = one
        closure = inspect.signature(type(one).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"optimizer: {type(one).__name__} evaluates the loss itself, by a closure, and here the step does; use "
                "one that follows a given gradient"
            )
        if any(group.get("differentiable") for group in one.param_groups):
            raise UserError(
                f"optimizer: {type(one).__name__} has differentiable=True, and a step keeps no graph; leave it out"
            )
    return found


def params(optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    """All of their tensors."""
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def groups(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Any, dict[str, Any]]:
    """The parameter group of each tensor, and so its settings."""
    return {p: group for one in optimizers for group in one.param_groups for p in group["params"]}


def states(optimizers: Sequence[torch.optim.Optimizer], wanted: Sequence[Any]) -> list[Mapping[str, Any]]:
    """What an optimizer keeps of each of these tensors; empty before the first step.

    Raises:
        UserError: for a ZeroRedundancyOptimizer, whose state is not there for all of them.
    """
    for one in optimizers:
        if hasattr(one, "consolidate_state_dict"):
            raise UserError(
                f"optimizer: {type(one).__name__} keeps the moments of a parameter on one rank alone, and this method "
                "needs them on each; use fully_shard to save memory, or precondition=None and another ascent"
            )
    owner = {p: one for one in optimizers for p in params([one])}
    return [owner[p].state.get(p, {}) for p in wanted]


def copies(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Any, Any]:
    """Master -> the model's parameter that is cast from it, of every `fsam_core.torch.AdamW` that has any."""
    return {master: p for one in optimizers for master, p in (getattr(one, "copies", None) or {}).items()}


def check_second_moments(optimizers: Sequence[torch.optim.Optimizer], moving: Mapping[Any, str]) -> None:
    """Check that a tensor which moves along a preconditioned direction is in an optimizer that keeps `exp_avg_sq`.

    Args:
        moving: the tensors that the scope holds, with their names.

    Raises:
        UserError: naming the optimizer and a tensor.
    """
    for one in optimizers:
        keeps = all("betas" in group and "eps" in group for group in one.param_groups)
        mine = [p for p in params([one]) if p in moving]
        if mine and (not keeps or isinstance(one, torch.optim.Adamax)):
            raise UserError(
                f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {type(one).__name__} "
                f"for {moving[mine[0]] or 'a parameter'}; leave its parameters out by scope=, or use precondition=None"
            )


def check_minimises(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that the optimizers go down the gradient that the ascent goes up.

    Raises:
        UserError: for maximize=True.
    """
    for one in optimizers:
        if any(group.get("maximize") for group in one.param_groups):
            raise UserError(
                f"optimizer: {type(one).__name__} has maximize=True, and the perturbation goes up the loss that is "
                "minimised; return the negative loss from features and leave maximize out"
            )


def check_real(method: Perturbed, moving: Mapping[Any, str]) -> None:
    """Check that no tensor which moves is complex where the method multiplies its numbers with each other.

    Raises:
        UserError: naming one.
    """
    found = [name or "a parameter" for p, name in moving.items() if p.is_complex() and p.requires_grad]
    asked = [name for name in ("precondition", "combine", "reuse") if getattr(method, name) is not None]
    asked += ["norm_from"] * (method.norm_from == "previous")
    if found and asked:
        raise UserError(
            f"model: {found[0]} is complex, and {asked[0]}={getattr(method, asked[0])!r} is for real numbers; store "
            "torch.view_as_real of it, or leave it out by scope="
        )


def check_copies(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that the model's weights are their float32 masters, rounded.

    Raises:
        UserError: where others have written to the model's alone.
    """
    stale = sum(one.stale_copies() for one in optimizers if isinstance(one, AdamW))
    if stale:
        raise UserError(
            f"model: {stale} of its weights are no longer their masters rounded, as after model.load_state_dict; load "
            "the optimizer's state too, which has the masters, or load the weights before masters(model)"
        )


def check_hooks(params: Sequence[Any]) -> None:
    """Check that nothing acts on gradients while a pass accumulates them.

    Raises:
        UserError: for post-accumulate-grad hooks, and for PyTorch's own optimizers in the backward pass.
    """
    hooked = [p for p in params if p._post_accumulate_grad_hooks or hasattr(p, "_in_backward_optimizers")]
    if hooked:
        raise UserError(
            f"model: {len(hooked)} parameters have post-accumulate-grad hooks or optimizers in their backward pass, "
            "which would run in every pass of a step; remove them, and act on .grad after step.gradient(batch)"
        )
