"""From a data SPEC to batches of token ids: `prepare` once, then `Batches` and `validation_batches`.

The position in the data is the step index alone, so a run resumes bit for bit from nothing but its step counter.
"""

from .batches import Batches, validation_batches
from .corpus import Corpus
from .pipeline import prepare

__all__ = ["Batches", "Corpus", "prepare", "validation_batches"]
