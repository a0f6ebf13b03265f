"""`prepare`: makes a corpus in tokens from a data SPEC, or takes it from the cache."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data import cache as store
from fsam_trainers.data.corpus import Corpus, check_at_least, check_length, fingerprint, token_dtype
from fsam_trainers.data.documents import Source, Split, reading
from fsam_trainers.data.encoding import Sink, encode_streams, take_head
from fsam_trainers.data.hub import hub_source
from fsam_trainers.data.progress import status
from fsam_trainers.data.records import is_records, records_source
from fsam_trainers.data.shards import open_shards
from fsam_trainers.data.specs import existing, is_glob, matches, path_of
from fsam_trainers.data.text import file_source, files_source, folder_source, python_source
from fsam_trainers.data.vocabulary import TRAINING_CHARACTERS, load_tokenizer, size, train_tokenizer

_FORMAT = 1  # raise it when the same documents and settings are to give other tokens
HELD_OUT_TOKENS = 1 << 16  # tokens that are held out, if there are as many, however few are trained on
CHARACTERS_PER_TOKEN = 4  # about


def prepare(
    spec: str,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    cache: Path | None = None,
) -> Corpus:
    """The corpus that `spec` names in tokens, split into training and held-out ones: uint16, or uint32 above 65536 ids.

    spec: "python" (the standard library's sources), a text file or folder, a .jsonl / .jsonl.gz / .json.gz / .parquet
        file or a folder of them, a .bin of tokens, or "hf:NAME[:CONFIG]". About a twentieth is held out: whole
        documents, or the end of a single text.
    vocab_size: every token id is below it. A byte-level BPE vocabulary of that size is learned from the training split.
    seq_len: tokens in a sequence; each split must hold seq_len + 1.
    tokenizer: a tokenizer.json to use instead of learning one.
    max_tokens: most tokens in the training split; the held-out one then has at most max(max_tokens // 20, 65536).
    cache: folder to keep the tokens in, instead of FSAM_CACHE or the user's cache folder. A .bin is used where it lies.

    Raises UserError, in one sentence, for anything that is wrong with the arguments, the data or the cache.
    """
    check_at_least("--vocab-size", vocab_size, 1)
    check_at_least("--seq-len", seq_len, 1)
    if vocab_size > 1 << 31:
        raise UserError(f"--vocab-size: got {vocab_size}, token ids must fit in 32 signed bits: at most {1 << 31}")
    if max_tokens is not None and max_tokens < seq_len + 1:
        raise UserError(f"--max-tokens: got {max_tokens}, one sequence needs seq_len + 1 = {seq_len + 1}")
    max_validation = None if max_tokens is None else max(max_tokens // 20, HELD_OUT_TOKENS, seq_len + 1)
    if is_shard(spec):
        if tokenizer is not None:
            raise UserError(f"--tokenizer: got {tokenizer}, but --data {spec} holds tokens already: leave it out")
        corpus = open_shards(path_of(spec), vocab_size=vocab_size, max_train=max_tokens, max_validation=max_validation)
    else:
        corpus = _prepare_text(spec, vocab_size, tokenizer, max_tokens, max_validation, cache)
    check_length("training", corpus.train.size, seq_len)
    check_length("validation", corpus.validation.size, seq_len)
    return corpus


def open_source(spec: str, max_tokens: int | None) -> Source:
    """The documents that a SPEC names. Raises UserError if there are none, or the SPEC is of no known kind."""
    if spec == "python":
        return python_source()
    if spec.startswith("hf:"):
        return hub_source(spec, max_tokens)
    if is_glob(spec):
        files = matches(spec)
        return records_source(files.title, files.paths) if files.rows else files_source(files.title, files.paths)
    path = existing(spec)
    if path.is_file():
        return records_source(path.name, [path]) if is_records(path) else file_source(path)
    with reading(path):
        records = sorted(child for child in path.iterdir() if is_records(child) and child.is_file())
    return records_source(path.resolve().name, records) if records else folder_source(path)


def is_shard(spec: str) -> bool:
    """Whether the SPEC is a file of tokens."""
    return spec.endswith(".bin") and not spec.startswith("hf:") and os.path.isfile(path_of(spec))


def _prepare_text(
    spec: str,
    vocab_size: int,
    tokenizer_path: Path | None,
    max_tokens: int | None,
    max_validation: int | None,
    cache: Path | None,
) -> Corpus:
    given, tokenizer = given_tokenizer(tokenizer_path, vocab_size)
    source = open_source(spec, max_tokens)
    settings = {
        "format": _FORMAT,
        "content": source.digest,
        "vocab_size": vocab_size,
        "tokenizer": None if given is None else hashlib.blake2b(given).hexdigest(),
        "max_tokens": [max_tokens, max_validation],
    }
    folder = store.cache_root(cache) / entry_name(settings)
    if not folder.exists():
        limits: dict[Split, int | None] = {"train": max_tokens, "validation": max_validation}
        with status("reading the text") as say:
            store.build_entry(folder, partial(_fill, spec, source, vocab_size, tokenizer, given, limits, say))
    return store.open_entry(folder)


def given_tokenizer(path: Path | None, vocab_size: int) -> tuple[bytes, Any] | tuple[None, None]:
    """The content of a tokenizer.json and the tokenizer in it; (None, None) without a path: one is then learned.

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


def learn_tokenizer(texts: Iterable[str], vocab_size: int, say: Callable[[str], None]) -> tuple[bytes, Any]:
    """A tokenizer learned from `texts`, and its content as a tokenizer.json."""
    say(f"learning a vocabulary of {vocab_size:,}")
    tokenizer = train_tokenizer(texts, vocab_size)
    return tokenizer.to_str(pretty=True).encode(), tokenizer


def entry_name(settings: dict[str, Any]) -> str:
    """The name of the cache entry that is made with these settings, plain values."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20).hexdigest()


def _fill(
    spec: str,
    source: Source,
    vocab_size: int,
    tokenizer: Any,
    given: bytes | None,
    limits: dict[Split, int | None],
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """Write the four files of a cache entry into `folder`."""
    streams = source.open()
    if tokenizer is None:
        wanted = TRAINING_CHARACTERS
        if limits["train"] is not None:  # about the text that the training split will hold
            wanted = min(wanted, limits["train"] * CHARACTERS_PER_TOKEN)
        texts, streams[0] = take_head(streams[0], wanted)
        given, tokenizer = learn_tokenizer(texts, vocab_size, say)
        del texts
    dtype = token_dtype(vocab_size)
    with store.durable(folder / "train.bin") as train, store.durable(folder / "validation.bin") as validation:
        sinks: dict[Split, Sink] = {
            "train": Sink(train, dtype, limits["train"]),
            "validation": Sink(validation, dtype, limits["validation"]),
        }
        encode_streams(streams, tokenizer, sinks, lambda tokens: say(f"tokenizing: {tokens:,} training tokens"))
    if not sinks["train"].characters:
        raise UserError(f"--data: {spec} holds no text to train on")
    with store.durable(folder / "tokenizer.json") as file:
        file.write(given or b"")
    store.write_meta(folder, _meta(source, vocab_size, size(tokenizer), dtype, sinks))


def _meta(source: Source, vocab_size: int, used: int, dtype: np.dtype, sinks: dict[Split, Sink]) -> dict[str, Any]:
    train, validation = sinks["train"], sinks["validation"]
    documents = f" {train.documents + validation.documents:,} {source.unit}," if source.unit else ""
    vocabulary = f"{vocab_size}" if used == vocab_size else f"{vocab_size} ({used} used)"
    return {
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "train_tokens": train.tokens,
        "validation_tokens": validation.tokens,
        "train_blake2b": train.checksum,
        "validation_blake2b": validation.checksum,
        "fingerprint": fingerprint(vocab_size, dtype, train.checksum, validation.checksum),
        "description": f"{source.title}:{documents} {train.tokens:,} train / {validation.tokens:,} validation tokens, "
        f"vocabulary {vocabulary}",
    }
