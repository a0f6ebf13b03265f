"""Plain PyTorch, for any device: the readable implementation beside `fsam_kernels.spec`."""

from fsam_kernels.torch.adamw import AdamW, Update, adamw
from fsam_kernels.torch.cross_entropy import cross_entropy
from fsam_kernels.torch.direction import Adam
from fsam_kernels.torch.lerp import lerp_
from fsam_kernels.torch.linear_cross_entropy import Cotangent, HeadGradients, linear_cross_entropy
from fsam_kernels.torch.logit_vjp import logit_vjp
from fsam_kernels.torch.perturb import perturb
from fsam_kernels.torch.preconditioned_norm import direction_and_norm, preconditioned_norm
from fsam_kernels.torch.rounding import Rounding

__all__ = [
    "Adam",
    "AdamW",
    "Cotangent",
    "HeadGradients",
    "Rounding",
    "Update",
    "adamw",
    "cross_entropy",
    "direction_and_norm",
    "lerp_",
    "linear_cross_entropy",
    "logit_vjp",
    "perturb",
    "preconditioned_norm",
]
