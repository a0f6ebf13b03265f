"""The region of a step that an instruction belongs to, read from the scope it was traced under."""

from __future__ import annotations

import re

from fsam_core.regions import REGIONS

OTHER = "other"  # belongs to no region
IDLE = "idle"  # nothing ran
# A branch that is rarely taken is traced under this `jax.named_scope`; its work is shown apart and excluded from sums.
CONDITIONAL = "conditional branch"
_REGION = re.compile(rf"(?:^|/)((?:\w+\()*)({'|'.join(REGIONS)})\)*(?=/|$)")


def region(op_name: str) -> str | None:
    """The outermost region in a name such as "jit(step)/base backward/transpose(jvp())/dot_general".

    A transposed operation of a forward region that has no region of its own belongs to the backward region. A jitted
    function with the name of a region ("jit(norm)") is no region.
    """
    for wrapped, name in _REGION.findall(op_name):
        if "jit(" not in wrapped:
            return name.replace("forward", "backward") if "transpose(" in wrapped else name
    return None


def in_order(found: dict[str, float]) -> dict[str, float]:
    """The regions present, in the order they run; OTHER and IDLE come last."""
    return {name: found[name] for name in (*REGIONS, OTHER, IDLE) if name in found}
