"""From a data SPEC to batches of token ids: `load` once, then `training_batches` and `validation_batches`.

Of a stored corpus the position in the data is the step index alone; of a stream it is a small state that checkpoints
hold. Either way a run resumes bit for bit.
"""

from .batches import Batches, validation_batches
from .corpus import Corpus
from .pipeline import prepare
from .stream import StreamedBatches, merged
from .streaming import StreamedCorpus, load, training_batches

__all__ = [
    "Batches",
    "Corpus",
    "StreamedBatches",
    "StreamedCorpus",
    "load",
    "merged",
    "prepare",
    "training_batches",
    "validation_batches",
]
