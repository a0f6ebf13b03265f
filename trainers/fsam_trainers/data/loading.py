"""`load`: a corpus stored in tokens, or streamed; `training_batches`: the batches of either."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fsam_core.errors import UserError
from fsam_trainers.data import cache as store
from fsam_trainers.data import hub
from fsam_trainers.data.batches import Batch, Batches, validation_batches
from fsam_trainers.data.corpus import Corpus, Tokens, check_at_least, check_length, dtype_for, fingerprint
from fsam_trainers.data.documents import Piece, Split, Stream, content_digest
from fsam_trainers.data.encoding import Sink, encode_streams
from fsam_trainers.data.images import HeldOut, ImageBatches, ImageCorpus
from fsam_trainers.data.pipeline import (
    FORMAT,
    check_sizes,
    entry_name,
    find,
    given_tokenizer,
    learn_tokenizer,
    prepare,
)
from fsam_trainers.data.progress import status
from fsam_trainers.data.records import columns_of
from fsam_trainers.data.sharded import ShardedText, open_sharded
from fsam_trainers.data.specs import Files
from fsam_trainers.data.stream import Recipe, StreamedBatches
from fsam_trainers.data.vocabulary import TRAINING_CHARACTERS, Tokenizer
from fsam_trainers.data.worker_process import count_for

STREAMED_BYTES = 1_000_000_000  # files with more than this are streamed where nothing else is asked for
HELD_OUT_TOKENS = 1 << 20  # tokens of the held-out rows that are kept
BUFFER = 2048  # sequences

Choice = Literal["auto", "yes", "no"]


@dataclass(frozen=True, eq=False)
class StreamedCorpus:
    """A corpus whose training tokens are made while they are used.

    validation, vocab_size, fingerprint, folder, description: as a `Corpus` has them; the fingerprint covers the names
    and sizes of the shards, the tokenizer and the held-out tokens.
    text: the shards. tokenizer: its file's content. buffer: sequences that are shuffled together.
    workers: tokenizing processes.
    """

    text: ShardedText
    tokenizer: bytes
    validation: Tokens
    vocab_size: int
    fingerprint: str
    folder: Path
    description: str
    buffer: int
    workers: int


def load(
    spec: str,
    *,
    stream: Choice = "auto",
    vocab_size: int,
    seq_len: int,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    buffer: int = BUFFER,
    workers: int | None = None,
    cache: Path | None = None,
    text_column: str | None = None,
    token_dtype: str | None = None,
) -> Corpus | StreamedCorpus:
    """The corpus that `spec` names: stored in tokens, see `prepare`, or with stream="yes" streamed.

    "auto" streams what starts with hf:, and files of more than STREAMED_BYTES together, unless `max_tokens` bounds what
    is read. Files of tokens are never streamed. buffer, workers: see `StreamedCorpus`; workers None is one process
    fewer than there are cores, at least one and at most four. The other arguments are those of `prepare`.

    Raises UserError, in one sentence, for anything that is wrong with the arguments, the data or the cache.
    """
    if stream not in ("auto", "yes", "no"):
        raise UserError(f"--stream: got {stream!r}, it must be auto, yes or no")
    why = "--stream yes" if stream == "yes" else ""
    files = None if stream == "no" or max_tokens is not None else find(spec, text_column, token_dtype)
    if stream == "auto" and max_tokens is None:
        why = _too_large_to_store(files)
    if not why:
        corpus = prepare(
            spec,
            vocab_size=vocab_size,
            seq_len=seq_len,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            cache=cache,
            text_column=text_column,
            token_dtype=token_dtype,
        )
        return replace(corpus, description=f"{corpus.description}, stored")
    if max_tokens is not None:
        raise UserError(f"--max-tokens {max_tokens}: a stream has no bound: leave it out, or give --stream no")
    if files is not None and files.kind == "tokens":
        raise UserError(f"--stream: --data {spec} holds tokens, which are never read as a whole: leave it out")
    check_sizes(vocab_size, seq_len)
    check_at_least("--shuffle-buffer", buffer, 1)
    workers = count_for(workers)
    given, tokens = given_tokenizer(tokenizer, vocab_size)
    text = open_sharded(spec, columns_of(text_column), files)
    return _prepare_stream(spec, files, text, why, vocab_size, seq_len, given, tokens, buffer, workers, cache)


AnyCorpus = Corpus | StreamedCorpus | ImageCorpus
AnyBatches = Batches | StreamedBatches | ImageBatches


def training_batches(corpus: AnyCorpus, seq_len: int, batch_size: int, seed: int, **share: int) -> AnyBatches:
    """The training batches of a corpus, to be closed after use: at(step), state(step), restore(state).

    share: `rank`, `ranks` (0 of 1) and `micro_batches` (1). Rank `rank` of `ranks` gets batch_size / ranks rows of each
    batch: its part of each micro-batch.
    """
    if isinstance(corpus, ImageCorpus):
        return ImageBatches(corpus.train, corpus.augmentation, batch_size, seed, **share)
    if isinstance(corpus, Corpus):
        return Batches(corpus.train, seq_len, batch_size, seed, **share)
    recipe = Recipe(corpus.text, corpus.tokenizer, seq_len, seed, corpus.buffer)
    return StreamedBatches(recipe, batch_size, corpus.workers, **share)


def held_out_batches(corpus: AnyCorpus, seq_len: int, batch_size: int, count: int) -> Sequence[Batch]:
    """What an evaluation reads: the first `count` batches of a text, and all held-out images."""
    if isinstance(corpus, ImageCorpus):
        return HeldOut(corpus.validation, batch_size)
    return validation_batches(corpus.validation, seq_len, batch_size, count)


def _too_large_to_store(files: Files | None) -> str:
    """Why --stream auto streams these files, or a data set of the hub; "" if it does not."""
    if files is None:
        return "a data set of the hub"
    size = 0 if files.kind == "tokens" else files.size
    return f"{size / 1e9:,.1f} GB, more than {STREAMED_BYTES / 1e9:g}" if size > STREAMED_BYTES else ""


def _prepare_stream(
    spec: str,
    files: Files | None,
    text: ShardedText,
    why: str,
    vocab_size: int,
    seq_len: int,
    given: bytes | None,
    tokenizer: Tokenizer | None,
    buffer: int,
    workers: int,
    cache: Path | None,
) -> StreamedCorpus:
    limit = max(HELD_OUT_TOKENS, seq_len + 1)
    settings = {
        "stream format": FORMAT,
        "shards": text.digest,
        "written": _written(spec, files),
        "vocab_size": vocab_size,
        "tokenizer": None if given is None else hashlib.blake2b(given).hexdigest(),
        "held out": limit,
    }
    folder = store.cache_root(cache) / entry_name(settings)
    if not folder.exists():
        with status("reading a sample of the text") as say:
            store.build_entry(folder, partial(_fill, spec, text, vocab_size, tokenizer, given, limit, say))
    entry = store.open_entry(folder)
    check_length("validation", entry.validation.size, seq_len)
    content = store.read_tokenizer(folder)
    mark = hashlib.blake2b(f"fsam stream 1|{text.digest}|{entry.fingerprint}|".encode() + content, digest_size=20)
    description = (
        f"{text.title}: streamed ({why}) from {len(text.train):,} shard{'s' if len(text.train) > 1 else ''}, "
        f"shuffled in buffers of {buffer:,} sequences, {entry.validation.size:,} validation tokens, "
        f"vocabulary {vocab_size}"
    )
    return StreamedCorpus(
        text, content, entry.validation, vocab_size, mark.hexdigest(), folder, description, buffer, workers
    )


def _written(spec: str, files: Files | None) -> str:
    """Hex digest of when the files were written: one that is edited in place may have its old size.

    It is no part of the fingerprint, because a copy on another machine is the same corpus.
    """
    when = lambda path: str(path.stat().st_mtime_ns).encode()
    parts = hub.identity(spec, when) if files is None else [(path.name, when(path)) for path in files.paths]
    return content_digest("written", parts)


def _fill(
    spec: str,
    text: ShardedText,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    given: bytes | None,
    limit: int,
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """Write a cache entry with no training tokens into `folder`."""
    if given is None or tokenizer is None:
        given, tokenizer = learn_tokenizer(_head(spec, text), vocab_size, say)
    dtype = dtype_for(vocab_size, prompts=text.prompts)
    say("tokenizing held-out text")
    with store.durable(folder / "train.bin") as train, store.durable(folder / "validation.bin") as validation:
        sinks: dict[Split, Sink] = {"train": Sink(train, dtype, 0), "validation": Sink(validation, dtype, limit)}
        pieces = (Piece("validation", row) for row in text.sample("validation"))
        encode_streams([Stream(("validation",), pieces)], tokenizer, sinks, lambda tokens: None)
    store.write_tokenizer(folder, given)
    sums = {split: sinks[split].checksum for split in sinks}
    meta: dict[str, Any] = {f"{split}_blake2b": value for split, value in sums.items()}
    meta |= {"dtype": dtype.name, "vocab_size": vocab_size, "description": text.title}
    meta |= {"train_tokens": 0, "validation_tokens": sinks["validation"].tokens}
    store.write_meta(folder, meta | {"fingerprint": fingerprint(vocab_size, dtype, sums["train"], sums["validation"])})


def _head(spec: str, text: ShardedText) -> Iterator[str]:
    """Training text to learn a vocabulary from."""
    seen = 0
    rows = text.sample("train")
    while seen < TRAINING_CHARACTERS and (row := next(rows, None)):
        seen += len(row.whole)
        yield row.whole
    if not seen:
        raise UserError(f"--data {spec} holds no text to train on")
