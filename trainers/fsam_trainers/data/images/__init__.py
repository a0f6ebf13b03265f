"""From a data SPEC to batches of images: `load` once, then `ImageBatches` and `HeldOut`.

The position in the data is the step index alone, so that a run resumes at the exact image.
"""

from fsam_trainers.data.images.augmentation import Augmentation
from fsam_trainers.data.images.batches import HeldOut, ImageBatches
from fsam_trainers.data.images.loading import ImageCorpus, load

__all__ = ["Augmentation", "HeldOut", "ImageBatches", "ImageCorpus", "load"]
