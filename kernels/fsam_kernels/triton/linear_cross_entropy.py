"""Cross entropy of a linear head: chunks and matrix products as in `torch`, what is between them in Triton."""

from functools import partial

from fsam_kernels.torch.linear_cross_entropy import linear_cross_entropy as of_torch
from fsam_kernels.triton import rows

linear_cross_entropy = partial(of_torch, stages=rows)
