"""The cost of a method's step relative to an AdamW step, computed from sizes and options before anything is run.

    model = decoder(layers=6, width=1280, mlp=5120, heads=20, seq_len=512, vocabulary=32768)
    found = estimate(model, Options(fraction=1/8, cut="hidden"), tokens=256 * 512)
    found.flops_ratio, found.time_ratio(published("h100")), found.peak_bytes

For any other model, make a `Model` by hand: the operations a token of its trunk's forward pass, the sizes of its head,
its number of parameters, and the values a token that it saves for its backward pass. `docs/cost.md` says what is exact
and what is approximate.

Importing this imports neither framework.
"""

from fsam_core.cost.estimate import PRESETS, Cost, estimate, within
from fsam_core.cost.machines import PUBLISHED, Machine, published
from fsam_core.cost.products import Model, Options, decoder
from fsam_core.cost.steps import Collectives, StepCost, Work

__all__ = [
    "PRESETS",
    "PUBLISHED",
    "Collectives",
    "Cost",
    "Machine",
    "Model",
    "Options",
    "StepCost",
    "Work",
    "decoder",
    "estimate",
    "published",
    "within",
]
