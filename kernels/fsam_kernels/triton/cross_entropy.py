"""The loss of a linear head as one differentiable function: the `torch` backend's, with this backend's stages."""

from functools import partial

from fsam_kernels.torch.cross_entropy import cross_entropy as of_torch

cross_entropy = partial(of_torch, stages="triton")
