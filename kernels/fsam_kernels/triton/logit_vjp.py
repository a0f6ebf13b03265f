"""The logit cotangent pulled back through a head: matrix products as in `torch`, what is between them in Triton."""

from functools import partial

from fsam_kernels.torch.logit_vjp import logit_vjp as of_torch
from fsam_kernels.triton import rows

logit_vjp = partial(of_torch, stages=rows)
