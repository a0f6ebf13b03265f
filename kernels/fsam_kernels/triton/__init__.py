"""Triton on NVIDIA and AMD GPUs: the head's work between the matrix products, which stay the library's.

The parameter operations are those of the plain `torch` backend.
"""

from fsam_kernels.torch import Adam, Cotangent, HeadGradients, perturb, preconditioned_norm
from fsam_kernels.triton.cross_entropy import cross_entropy
from fsam_kernels.triton.linear_cross_entropy import linear_cross_entropy
from fsam_kernels.triton.logit_vjp import logit_vjp

__all__ = [
    "Adam",
    "Cotangent",
    "HeadGradients",
    "cross_entropy",
    "linear_cross_entropy",
    "logit_vjp",
    "perturb",
    "preconditioned_norm",
]
