"""The tokenizer: byte-level BPE learned from the training split, a given tokenizer.json, or a SentencePiece model."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError, one_line
from fsam_trainers.data.documents import extra

END = "<|endoftext|>"
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")

# Learning time and memory grow with the text, while the merges that pay, the frequent ones, are settled long before.
TRAINING_CHARACTERS = 32_000_000


class Tokenizer(NamedTuple):
    """Text to token ids.

    encode_batch: ids of whole texts. end: the id that ends a document. size: one above the largest id; ids may have
    holes, so this can exceed the number of tokens.
    """

    encode_batch: Callable[[list[str]], list[list[int]]]
    end: int
    size: int

    def encode(self, texts: list[str], starts: list[bool]) -> list[list[int]]:
        """The ids of pieces of documents. One that does not start its document follows a line end or a prompt.

        Some tokenizers put a space before a text. Such a piece is encoded with the line end, whose ids are then
        removed, so that a document has the same ids whole and in pieces.
        """
        if all(starts):
            return self.encode_batch(texts)
        line, word, both = self.encode_batch(["\n", "a", "\na"])
        if both == [*line, *word]:  # it puts nothing there
            return self.encode_batch(texts)
        encoded = self.encode_batch([text if start else f"\n{text}" for text, start in zip(texts, starts, strict=True)])
        for number, start in enumerate(starts):
            if not start:
                ids = encoded[number]
                cut = ids[: len(line)] == line
                encoded[number] = ids[len(line) :] if cut else self.encode_batch([texts[number]])[0]
        return encoded


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The content of a tokenizer.json learned from `texts`: the end token is id 0, then the 256 bytes, then the merges.

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
    return tokenizer.to_str(pretty=True).encode()


def load_tokenizer(content: bytes, path: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer in a file's content, a tokenizer.json or a SentencePiece model; `path` is for messages.

    Raises UserError if it cannot be read, needs more than `vocab_size` ids, or has no token for the end of a text.
    """
    tokenizer = _from_json(content, path) if is_json(content) else _from_sentencepiece(content, path)
    if tokenizer.size > vocab_size:
        raise UserError(
            f"--tokenizer: {path} has {tokenizer.size} tokens, --vocab-size is {vocab_size}: "
            f"it must be at least {tokenizer.size}"
        )
    return tokenizer


def is_json(content: bytes) -> bool:
    """Whether this is a tokenizer.json, and not a SentencePiece model."""
    return content.lstrip()[:1] == b"{"


def _from_json(content: bytes, path: Path | None) -> Tokenizer:
    tokenizers = extra("tokenizers")
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"--tokenizer: {path} is not a tokenizer.json that can be read: {one_line(error)}") from error
    # Encodes text as it is: not cut, not padded, and a "<|endoftext|>" written in a document is ordinary text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    end = next((found for token in _ENDS if (found := tokenizer.token_to_id(token)) is not None), None)
    if end is None:
        raise UserError(f"--tokenizer: {path} has no token for the end of a text: one of {', '.join(_ENDS)}")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(encode_batch, end, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)


def _from_sentencepiece(content: bytes, path: Path | None) -> Tokenizer:
    sentencepiece = extra("sentencepiece")
    model = sentencepiece.SentencePieceProcessor()
    try:
        if not content:
            raise ValueError("it is empty")  # the library accepts that
        model.LoadFromSerializedProto(content)
    except Exception as error:  # RuntimeError, and whatever else the library makes of damaged bytes
        raise UserError(
            f"--tokenizer: {path} is neither a tokenizer.json nor a SentencePiece model: {one_line(error)}"
        ) from error
    if (end := model.eos_id()) < 0:
        raise UserError(f"--tokenizer: {path} has no token for the end of a text: train it with eos_id")
    return Tokenizer(lambda texts: model.encode(texts, num_threads=1) if texts else [], end, model.get_piece_size())
