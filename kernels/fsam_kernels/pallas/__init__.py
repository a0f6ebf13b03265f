"""Pallas on TPU: the head's forward pass with its row statistics in one kernel; the gradients' products are XLA's.

The parameter operations are those of the plain `xla` backend: its loops move the least bytes and wait for nothing else,
and kernels that were tried for the norm and AdamW gained nothing (docs/parameters.md).
"""

from fsam_kernels.pallas.cross_entropy import cross_entropy
from fsam_kernels.pallas.linear_cross_entropy import linear_cross_entropy
from fsam_kernels.pallas.logit_vjp import logit_vjp
from fsam_kernels.xla import Adam, Cotangent, HeadGradients, Updated, adamw, perturb, preconditioned_norm

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
