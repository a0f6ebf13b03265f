"""Pallas, for TPUs: one kernel for the head's forward product and its row statistics; XLA does the other products.

The parameter operations are those of the plain `xla` backend. Its loops move the least possible bytes, and the kernels
that were tried for the norm and AdamW gained nothing (docs/parameters.md).
"""

from functools import partial

from fsam_kernels import xla
from fsam_kernels.pallas import softmax_stats
from fsam_kernels.xla import Adam, Cotangent, HeadGradients, Updated, adamw, perturb, preconditioned_norm

# Chunks and the gradients' products are those of the `xla` backend; the forward pass is in Pallas.
linear_cross_entropy = partial(xla.linear_cross_entropy, softmax=softmax_stats)
logit_vjp = partial(xla.logit_vjp, softmax=softmax_stats)
cross_entropy = partial(xla.cross_entropy, softmax=softmax_stats)

__all__ = [
    "Adam",
    "Cotangent",
    "HeadGradients",
    "Updated",
    "adamw",
    "cross_entropy",
    "linear_cross_entropy",
    "logit_vjp",
    "perturb",
    "preconditioned_norm",
]
