"""The logit cotangent pulled back through a head: as in `xla`, from the tiles that the Pallas forward pass kept."""

from functools import partial

from fsam_kernels.pallas import rows
from fsam_kernels.xla.logit_vjp import logit_vjp as of_xla

logit_vjp = partial(of_xla, stages=rows)
