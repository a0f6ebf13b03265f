"""From a data SPEC to batches of token ids: `load` once, then `training_batches` and `validation_batches`.

Of a stored corpus the position in the data is the step index alone; of a stream it is a small state that checkpoints
hold. Either way a run resumes bit for bit.
"""

from fsam_trainers.data.batches import Batch, Batches, validation_batches
from fsam_trainers.data.corpus import Corpus
from fsam_trainers.data.images import ImageBatches, ImageCorpus
from fsam_trainers.data.loading import AnyBatches, AnyCorpus, StreamedCorpus, held_out_batches, load, training_batches
from fsam_trainers.data.pipeline import prepare
from fsam_trainers.data.stream import StreamedBatches, merged

__all__ = [
    "AnyBatches",
    "AnyCorpus",
    "Batch",
    "Batches",
    "Corpus",
    "ImageBatches",
    "ImageCorpus",
    "StreamedBatches",
    "StreamedCorpus",
    "held_out_batches",
    "load",
    "merged",
    "prepare",
    "training_batches",
    "validation_batches",
]
