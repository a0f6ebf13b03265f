"""The region of a step that an instruction belongs to, from the name its operation was traced under."""

from __future__ import annotations

import re

from fsam_core.regions import REGIONS

OTHER = "other"
IDLE = "idle"
_REGION = re.compile(rf"(?:^|/)((?:\w+\()*)({'|'.join(REGIONS)})\)*(?=/|$)")


def region(op_name: str) -> str | None:
    """The outermost region in a name such as "jit(step)/base backward/transpose(jvp())/dot_general".

    What is transposed of an operation traced under a forward region, and under no region of its own, is its backward
    pass. A function that is called like a region and jitted ("jit(norm)") is none.
    """
    for wrapped, name in _REGION.findall(op_name):
        if "jit(" not in wrapped:
            return name.replace("forward", "backward") if "transpose(" in wrapped else name
    return None


def in_order(found: dict[str, float]) -> dict[str, float]:
    """Regions in the order they run in, those that are there; what belongs to none, and when nothing ran, last."""
    return {name: found[name] for name in (*REGIONS, OTHER, IDLE) if name in found}
