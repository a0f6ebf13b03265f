"""Random crops, flips and mixtures of training images, drawn on the host.

The draws of a row depend on (seed, step, the row's place in the batch) alone: both passes of a step see one batch, a
resumed run draws what it would have, and so does another number of ranks.
"""

from dataclasses import dataclass

import numpy as np

from fsam_core.errors import UserError

_DRAW = 1  # of the seed's draws: which one is augmentation's (0: the order, see `batches.permutation`)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; not to those of an evaluation. Raises UserError for a value out of range."""

    crop_padding: int = 0
    """pixels of black around each image, out of which one of its own size is cut at random; 0 for none"""
    flip: bool = False
    """mirror every second image, at random"""
    mixup: float = 0.0
    """mix each image and its label with another's in the proportion λ ~ Beta(a, a), for this a; 0 for no mixing"""

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UserError(f"--crop-padding must be at least 0, got {self.crop_padding}")
        if not 0 <= self.mixup < float("inf"):
            raise UserError(f"--mixup must be a finite number >= 0, got {self.mixup}")

    def partners(self, places_R: np.ndarray, batch_size: int) -> np.ndarray:
        """The place of the row that each row is mixed with: its neighbour, or itself where it has none."""
        other_R = places_R ^ 1
        return np.where(other_R < batch_size, other_R, places_R)

    def draws(self, seed: int, step: int, batch_size: int, places_R: np.ndarray) -> "Draws":
        """The draws of these rows of a step's batch."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_DRAW, step))))
        pad = self.crop_padding
        # For the whole batch, so that they do not depend on which rows are this rank's.
        offsets_Bx2 = random.integers(0, 2 * pad + 1, (batch_size, 2))
        flips_B = random.random(batch_size) < (0.5 if self.flip else 0.0)
        shares_B = random.beta(self.mixup, self.mixup, batch_size) if self.mixup else np.ones(batch_size)
        return Draws(pad, offsets_Bx2[places_R], flips_B[places_R], shares_B[places_R].astype(np.float32))


@dataclass(frozen=True)
class Draws:
    """offsets: int [R, 2] of a crop's upper left corner. flips: bool [R]. shares: float32 [R], λ of the row's own."""

    pad: int
    offsets_Rx2: np.ndarray
    flips_R: np.ndarray
    shares_R: np.ndarray

    def moved(self, pixels_RxHxWxC: np.ndarray) -> np.ndarray:
        """The images cropped and mirrored, uint8 of the same shape."""
        R, H, W, _ = pixels_RxHxWxC.shape
        if self.pad:
            p = self.pad
            padded = np.pad(pixels_RxHxWxC, ((0, 0), (p, p), (p, p), (0, 0)))
            i_RxH, j_RxW = (self.offsets_Rx2[:, axis, None] + np.arange(size) for axis, size in ((0, H), (1, W)))
            pixels_RxHxWxC = padded[np.arange(R)[:, None, None], i_RxH[:, :, None], j_RxW[:, None]]
        return np.where(self.flips_R[:, None, None, None], pixels_RxHxWxC[:, :, ::-1], pixels_RxHxWxC)

    def mixed(self, pixels_RxHxWxC: np.ndarray, others_RxHxWxC: np.ndarray) -> np.ndarray:
        """λ x + (1 − λ) x', rounded to uint8."""
        share = self.shares_R[:, None, None, None]
        return np.rint(share * pixels_RxHxWxC + (1 - share) * others_RxHxWxC).astype(np.uint8)
