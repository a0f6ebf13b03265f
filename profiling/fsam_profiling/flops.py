"""Floating-point operations of a traced JAX function's matrix products, loops counted once an iteration.

The compiler's own count takes the body of a loop once and omits Pallas kernels. Here the products are counted in the
traced program, after its dead code was removed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from fsam_core.errors import UserError
from fsam_profiling.regions import CONDITIONAL


def of_step(function: Any, arguments: tuple[Any, ...]) -> int:
    """`of_trace` of function(*arguments), conditional branches excluded."""
    return of_trace(jax.jit(function).trace(*arguments).jaxpr)


def of_trace(closed: Any) -> int:
    """2 · multiply-adds of every `dot_general` and convolution that a result depends on, without rarely taken branches.

    Args:
        closed: a closed jaxpr, `jax.jit(f).trace(*args).jaxpr`.

    Raises:
        UserError: for a product in a loop of unknown length.
    """
    jaxpr = closed.jaxpr
    alive, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _jaxpr(alive)


def _jaxpr(jaxpr: Any) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: Any) -> int:
    if CONDITIONAL in str(eqn.source_info.name_stack).split("/"):
        return 0
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
    if name == "conv_general_dilated":
        numbers, kernel = params["dimension_numbers"], eqn.invars[1].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    inner = [_jaxpr(x) for x in _inside(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise UserError("flops: a matrix product in a loop of unknown length; give the loop a fixed length")
    iterations = {"scan": params.get("length"), "pallas_call": _steps(params)}.get(name, 1)
    return iterations * sum(inner)


def _steps(params: dict[str, Any]) -> int:
    mapping = params.get("grid_mapping")
    return 1 if mapping is None else math.prod(int(x) for x in mapping.grid)


def _inside(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            one = one.jaxpr if isinstance(one, ClosedJaxpr) else one
            if hasattr(one, "eqns"):
                found.append(one)
    return found
