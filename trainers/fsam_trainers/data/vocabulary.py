"""The tokenizer: byte-level BPE learned from the training split, or one that is given as a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsam_core.errors import UserError
from fsam_trainers.data.documents import extra, one_line

END = "<|endoftext|>"
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")

# Learning time and memory grow with the text, while the merges that pay, the frequent ones, are settled long before.
TRAINING_CHARACTERS = 32_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` learned from `texts`: the end token is id 0, then the 256 bytes, then the merges.

    It has at most `vocab_size` tokens, fewer where the text is too short for as many merges. The same texts give the
    same tokenizer in any process.
    """
    tokenizers = extra("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once is no pattern
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),  # every byte, also those not seen
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load_tokenizer(content: bytes, path: Path | None, vocab_size: int) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json's content; `path` is where it came from, for messages.

    Raises UserError if it cannot be read, needs more than `vocab_size` ids, or has no token for the end of a text.
    """
    tokenizers = extra("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"--tokenizer: {path} is not a tokenizer.json that can be read: {one_line(error)}") from error
    needed = size(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"--tokenizer: {path} has {needed} tokens, --vocab-size is {vocab_size}: it must be at least {needed}"
        )
    if all(tokenizer.token_to_id(token) is None for token in _ENDS):
        raise UserError(f"--tokenizer: {path} has no token for the end of a text: one of {', '.join(_ENDS)}")
    return _plain(tokenizer)


def end_id(tokenizer: Any) -> int:
    """The id of the token that ends a document."""
    return next(found for token in _ENDS if (found := tokenizer.token_to_id(token)) is not None)


def size(tokenizer: Any) -> int:
    """The least vocabulary size that holds every id; ids may have holes, so this can exceed the number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _plain(tokenizer: Any) -> Any:
    """Encodes text as it is: not cut, not padded, and a "<|endoftext|>" written in a document is ordinary text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
