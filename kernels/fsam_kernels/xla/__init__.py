"""Plain JAX, for any device: the readable implementation beside `fsam_kernels.spec`."""

from fsam_kernels.xla.adamw import Updated, adamw
from fsam_kernels.xla.cross_entropy import cross_entropy
from fsam_kernels.xla.direction import Adam
from fsam_kernels.xla.linear_cross_entropy import Cotangent, HeadGradients, linear_cross_entropy
from fsam_kernels.xla.logit_vjp import logit_vjp
from fsam_kernels.xla.perturb import perturb
from fsam_kernels.xla.preconditioned_norm import preconditioned_norm

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
