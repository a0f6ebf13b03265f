"""Which of the optimizers' tensors a method moves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fsam_core import scopes
from fsam_core.errors import UserError
from fsam_core.methods import Perturbed
from fsam_core.scopes import Blocks
from fsam_core.torch import optimizers
from fsam_core.torch.optimizers import Optimizers
from fsam_core.torch.parallel import plain_name


def names_of(model: nn.Module, copies: Mapping[Tensor, nn.Parameter]) -> dict[Tensor, str]:
    """The names of a model's parameters, without what wrappers put into them, and of the masters of `copies`."""
    names: dict[Tensor, str] = {p: plain_name(name) for name, p in model.named_parameters()}
    return names | {master: names.get(p, "") for master, p in copies.items()}


def moving(
    method: Perturbed, given: Optimizers, names: Mapping[Tensor, str], blocks: Blocks | None
) -> tuple[dict[Any, str], set[Any]]:
    """(the tensors that move, with their names; those that do not).

    Args:
        names: of the model's parameters and of their masters.

    Raises:
        UserError: for a scope that needs the names of tensors which have none, an optimizer that maximises, one without
            second moments where the direction needs them, or complex tensors where the method is for real ones.
    """
    optimizers.check_minimises(given)
    every: dict[Any, str] = dict.fromkeys(optimizers.params(given), "") | dict(names)
    known = sorted({name for name in every.values() if name})
    mask = scopes.mask(method.scope, known, blocks)
    unnamed = sum(not name for name in every.values())
    if mask is not None and unnamed:
        raise UserError(
            f"scope: {method.scope!r} goes by the names of parameters, and {unnamed} of the optimizer's are not the "
            "model's; give Step a module that holds them all, or use scope='all'"
        )
    inside = None if mask is None else set(itertools.compress(known, mask))
    found = {p: name for p, name in every.items() if inside is None or name in inside}
    optimizers.check_real(method, found)
    if method.needs_v:
        optimizers.check_second_moments(given, found)
    return found, every.keys() - found.keys()
