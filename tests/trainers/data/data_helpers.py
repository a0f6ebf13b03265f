"""Text to make corpora of, and the way back from tokens to text."""

import random

import numpy as np
from tokenizers import Tokenizer

from fsam_trainers.data import Corpus

WORDS = [
    *[
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "naïve",
        "Größe",
        "測試",
        "🙂",
        "costs",
        "42",
        "€",
        "per",
    ],
    "line\n",
    "of\ttext",
]


def prose(words: int, seed: int = 0) -> str:
    """Deterministic text with line ends, tabs and characters of one to four UTF-8 bytes."""
    draw = random.Random(seed)
    return f"#{seed} " + " ".join(draw.choice(WORDS) for _ in range(words))


def documents(tokens: np.ndarray, corpus: Corpus) -> list[str]:
    """The texts that a split of complete documents holds; the end token is id 0."""
    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    ends = np.flatnonzero(tokens == 0)
    assert tokens[-1] == 0
    starts = [0, *(ends[:-1] + 1)]
    return [
        tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in zip(starts, ends, strict=True)
    ]
