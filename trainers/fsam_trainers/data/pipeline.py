"""`prepare`: makes a corpus in tokens from a data SPEC, or takes it from the cache."""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data import cache as store
from fsam_trainers.data import hub
from fsam_trainers.data.corpus import Corpus, check_at_least, check_length, dtype_for, fingerprint
from fsam_trainers.data.documents import Columns, Split, content_digest, file_digest
from fsam_trainers.data.encoding import Sink, encode_streams, take_head
from fsam_trainers.data.progress import status
from fsam_trainers.data.records import columns_of
from fsam_trainers.data.sharded import ShardedText, open_sharded
from fsam_trainers.data.specs import Files, find_files, is_hub
from fsam_trainers.data.token_files import open_tokens
from fsam_trainers.data.vocabulary import TRAINING_CHARACTERS, Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 2  # raise it when the same documents and settings are to give other tokens
HELD_OUT_TOKENS = 1 << 16  # tokens that are held out, if there are as many, however few are trained on
CHARACTERS_PER_TOKEN = 4  # about
# Well above any in use. Memory would end before the run begins, in the library that learns the vocabulary.
LARGEST_VOCABULARY = 1 << 23


def prepare(
    spec: str,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    cache: Path | None = None,
    text_column: str | None = None,
    token_dtype: str | None = None,
) -> Corpus:
    """The corpus that `spec` names in tokens, split into training and held-out ones; see `Corpus`.

    spec: "python" (the standard library's sources), a text file, a file of rows (.jsonl, .json, .parquet), a .bin of
        tokens, a folder or glob of one of these, or "hf:NAME[:CONFIG]"; docs/data.md has the rules. About a twentieth
        is held out: whole documents, or the end of a single text.
    vocab_size: every token id is below it. A byte-level BPE vocabulary of that size is learned from the training split.
    seq_len: tokens in a sequence; each split must hold seq_len + 1.
    tokenizer: a tokenizer.json or a SentencePiece .model to use instead of learning one.
    max_tokens: most tokens in the training split; the held-out one then has at most max(max_tokens // 20, 65536).
    cache: folder to keep the tokens in, instead of FSAM_CACHE or the user's cache folder. Files of tokens are used
        where they lie.
    text_column: the column of rows with their text, or two separated by a comma, of prompts and answers; None is
        "text", or else "content", or else "prompt,answer".
    token_dtype: uint16, uint32, int32 or int64, of files of tokens that do not state it; they have any of these dtypes.

    Raises UserError, in one sentence, for anything that is wrong with the arguments, the data or the cache.
    """
    check_sizes(vocab_size, seq_len)
    if max_tokens is not None and max_tokens < seq_len + 1:
        raise UserError(f"--max-tokens: got {max_tokens}, one sequence needs seq_len + 1 = {seq_len + 1}")
    max_validation = None if max_tokens is None else max(max_tokens // 20, HELD_OUT_TOKENS, seq_len + 1)
    files = find(spec, text_column, token_dtype)
    if files is not None and files.kind == "tokens":
        if tokenizer is not None:
            raise UserError(f"--tokenizer: got {tokenizer}, but --data {spec} holds tokens already: leave it out")
        corpus = open_tokens(
            files.paths,
            title=files.title,
            vocab_size=vocab_size,
            token_dtype=token_dtype,
            max_train=max_tokens,
            max_validation=max_validation,
        )
    else:
        limits: dict[Split, int | None] = {"train": max_tokens, "validation": max_validation}
        corpus = _prepare_text(spec, files, vocab_size, tokenizer, limits, cache, columns_of(text_column))
    check_length("training", corpus.train.size, seq_len)
    check_length("validation", corpus.validation.size, seq_len)
    return corpus


def check_sizes(vocab_size: int, seq_len: int) -> None:
    """Raise UserError unless both are at least 1, and a model can have so large a vocabulary."""
    check_at_least("--vocab-size", vocab_size, 1)
    check_at_least("--seq-len", seq_len, 1)
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size: got {vocab_size}, it must be at most {LARGEST_VOCABULARY}")


def find(spec: str, text_column: str | None, token_dtype: str | None) -> Files | None:
    """The files of a SPEC, None of one of `datasets`. Raises UserError for an option that is of no use with them."""
    files = None if is_hub(spec) else find_files(spec, columns_of(text_column))
    kind = "rows" if files is None else files.kind
    what = {"tokens": "token ids", "rows": "rows", "text": "text"}[kind]
    if text_column is not None and kind != "rows":
        raise UserError(f"--text-column: got {text_column!r}, but --data {spec} holds {what}, not rows: leave it out")
    if token_dtype is not None and kind != "tokens":
        raise UserError(f"--token-dtype: got {token_dtype!r}, but --data {spec} holds {what}: leave it out")
    return files


def _prepare_text(
    spec: str,
    files: Files | None,
    vocab_size: int,
    tokenizer_path: Path | None,
    limits: dict[Split, int | None],
    cache: Path | None,
    columns: Columns,
) -> Corpus:
    if files is None and limits["train"] is None:
        raise UserError(
            f"--data {spec}: to be stored, a data set of the hub needs --max-tokens N; --stream yes needs none"
        )
    given, tokenizer = given_tokenizer(tokenizer_path, vocab_size)
    settings = {
        "format": FORMAT,
        "content": _content(spec, files),
        "columns": list(columns),
        "vocab_size": vocab_size,
        "tokenizer": None if given is None else hashlib.blake2b(given).hexdigest(),
        "max_tokens": [limits["train"], limits["validation"]],
    }
    folder = store.cache_root(cache) / entry_name(settings)
    if not folder.exists():
        with status("reading the text") as say:
            text = open_sharded(spec, columns, files)
            store.build_entry(folder, partial(_fill, spec, text, vocab_size, tokenizer, given, limits, say))
    return store.open_entry(folder)


def _content(spec: str, files: Files | None) -> str:
    """Hex digest of what the documents of a SPEC are."""
    if files is None:
        return content_digest("hf", hub.identity(spec, file_digest))
    return content_digest(files.kind, ((path.name, file_digest(path)) for path in files.paths))


def given_tokenizer(path: Path | None, vocab_size: int) -> tuple[bytes, Tokenizer] | tuple[None, None]:
    """The content of a tokenizer's file and the tokenizer in it; (None, None) without a path: one is then learned.

    Raises UserError if it cannot be used, or `vocab_size` is too small to learn one.
    """
    if path is None:
        if vocab_size < 257:
            raise UserError(
                f"--vocab-size: got {vocab_size}, byte-level BPE needs at least 257: 256 bytes and the end of a text"
            )
        return None, None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer: {path} cannot be read: {error.strerror or error}") from error
    return content, load_tokenizer(content, path, vocab_size)


def learn_tokenizer(texts: Iterable[str], vocab_size: int, say: Callable[[str], None]) -> tuple[bytes, Tokenizer]:
    """A tokenizer learned from `texts`, and its content as a tokenizer.json."""
    say(f"learning a vocabulary of {vocab_size:,}")
    content = train_tokenizer(texts, vocab_size)
    return content, load_tokenizer(content, None, vocab_size)


def entry_name(settings: dict[str, Any]) -> str:
    """The name of the cache entry that is made with these settings, plain values."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20).hexdigest()


def _fill(
    spec: str,
    text: ShardedText,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    given: bytes | None,
    limits: dict[Split, int | None],
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """Write the four files of a cache entry into `folder`."""
    streams = text.streams()
    if given is None or tokenizer is None:
        wanted = TRAINING_CHARACTERS
        if limits["train"] is not None:  # about the text that the training split will hold
            wanted = min(wanted, limits["train"] * CHARACTERS_PER_TOKEN)
        texts, streams[0] = take_head(streams[0], wanted)
        given, tokenizer = learn_tokenizer(texts, vocab_size, say)
        del texts
    dtype = dtype_for(vocab_size, prompts=text.prompts)
    with store.durable(folder / "train.bin") as train, store.durable(folder / "validation.bin") as validation:
        sinks: dict[Split, Sink] = {
            "train": Sink(train, dtype, limits["train"]),
            "validation": Sink(validation, dtype, limits["validation"]),
        }
        encode_streams(streams, tokenizer, sinks, lambda tokens: say(f"tokenizing: {tokens:,} training tokens"))
    if not sinks["train"].characters:
        raise UserError(f"--data: {spec} holds no text to train on")
    store.write_tokenizer(folder, given)
    store.write_meta(folder, _meta(text, vocab_size, tokenizer.size, dtype, sinks))


def _meta(text: ShardedText, vocab_size: int, used: int, dtype: np.dtype, sinks: dict[Split, Sink]) -> dict[str, Any]:
    train, validation = sinks["train"], sinks["validation"]
    unit = "prompts with answers" if text.prompts else text.unit
    documents = f" {train.documents + validation.documents:,} {unit}," if unit else ""
    skipped = f" {text.skipped.count:,} skipped ({text.skipped.first})," if text.skipped.count else ""
    vocabulary = f"{vocab_size}" if used == vocab_size else f"{vocab_size} ({used} used)"
    return {
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "train_tokens": train.tokens,
        "validation_tokens": validation.tokens,
        "train_blake2b": train.checksum,
        "validation_blake2b": validation.checksum,
        "fingerprint": fingerprint(vocab_size, dtype, train.checksum, validation.checksum),
        "description": f"{text.title}:{documents}{skipped} {train.tokens:,} train / {validation.tokens:,} validation "
        f"tokens, vocabulary {vocabulary}",
    }
