"""Triton on NVIDIA and AMD GPUs: the head's work between the matrix products, the parameters' in a launch or two."""

from fsam_kernels.torch import Adam, Cotangent, HeadGradients, Rounding, Update
from fsam_kernels.triton.adamw import AdamW, adamw
from fsam_kernels.triton.cross_entropy import cross_entropy
from fsam_kernels.triton.linear_cross_entropy import linear_cross_entropy
from fsam_kernels.triton.logit_vjp import logit_vjp
from fsam_kernels.triton.perturb import perturb
from fsam_kernels.triton.preconditioned_norm import preconditioned_norm

__all__ = [
    "Adam",
    "AdamW",
    "Cotangent",
    "HeadGradients",
    "Rounding",
    "Update",
    "adamw",
    "cross_entropy",
    "linear_cross_entropy",
    "logit_vjp",
    "perturb",
    "preconditioned_norm",
]
