"""The options of the loss, alone and together, that tests of several folders go through."""

from fsam_kernels.options import Loss

LOSSES = {
    "plain": Loss(),
    "smoothed": Loss(label_smoothing=0.2),
    "z-loss": Loss(z_loss=0.05),
    "capped": Loss(soft_cap=1.5),
    "all": Loss(label_smoothing=0.1, z_loss=0.02, soft_cap=2.0),
}
