"""Triton, for NVIDIA and AMD GPUs: the head's work between the matrix products, and the parameter operations."""

from functools import partial

from fsam_kernels import torch as plain
from fsam_kernels.torch import Adam, Cotangent, HeadGradients, Rounding, Update
from fsam_kernels.triton import softmax_stats
from fsam_kernels.triton.adamw import AdamW, adamw
from fsam_kernels.triton.lerp import lerp_
from fsam_kernels.triton.perturb import perturb
from fsam_kernels.triton.preconditioned_norm import preconditioned_norm

# Chunks and matrix products are those of the `torch` backend; the work between the products is in Triton.
linear_cross_entropy = partial(plain.linear_cross_entropy, softmax=softmax_stats)
logit_vjp = partial(plain.logit_vjp, softmax=softmax_stats)
cross_entropy = partial(plain.cross_entropy, softmax="triton")

__all__ = [
    "Adam",
    "AdamW",
    "Cotangent",
    "HeadGradients",
    "Rounding",
    "Update",
    "adamw",
    "cross_entropy",
    "lerp_",
    "linear_cross_entropy",
    "logit_vjp",
    "perturb",
    "preconditioned_norm",
]
