"""Batches of a corpus whose training tokens are made while they are used; `load` chooses between stream and store.

They are shuffled in a bounded buffer, in parts that ranks share, and resume at the exact token.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data import cache as store
from fsam_trainers.data.batches import Batches, check_rows, permutation, windows_of
from fsam_trainers.data.corpus import Corpus, check_at_least, check_length, fingerprint, token_dtype
from fsam_trainers.data.documents import Piece, Split, Stream, encodable
from fsam_trainers.data.encoding import Sink, encode_streams
from fsam_trainers.data.feed import CHUNK, Feed, Tokens, chunks
from fsam_trainers.data.pipeline import (
    CHARACTERS_PER_TOKEN,
    entry_name,
    given_tokenizer,
    is_shard,
    learn_tokenizer,
    prepare,
)
from fsam_trainers.data.progress import status
from fsam_trainers.data.sharded import ShardedText, open_sharded
from fsam_trainers.data.specs import find_files
from fsam_trainers.data.vocabulary import TRAINING_CHARACTERS
from fsam_trainers.data.workers import Place, Workers

STREAMED_BYTES = 1_000_000_000  # files with more than this are streamed where nothing else is asked for
HELD_OUT_TOKENS = 1 << 20  # tokens of the held-out rows that are kept
BUFFER = 2048  # sequences
_FORMAT = 1  # raise it when the same shards and settings are to give other tokens
_WINDOWS = 1  # of the seed's draws: which one is for the order within a buffer (0: of shards, see `feed`)

Choice = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Recipe:
    """What determines the order of a stream's tokens, together with the number of parts.

    text: the shards. tokenizer: a tokenizer.json's content. buffer: windows that are shuffled together.
    Raises UserError if a size does not fit.
    """

    text: ShardedText
    tokenizer: bytes
    seq_len: int
    seed: int
    buffer: int

    def __post_init__(self) -> None:
        check_at_least("--seq-len", self.seq_len, 1)
        check_at_least("--seed", self.seed, 0)
        check_at_least("--shuffle-buffer", self.buffer, 1)


class StreamedBatches:
    """Training batches of this rank, one step after the other.

    The rows are distributed over as many parts as there are ranks when a run starts. Each part's documents, one epoch
    after the other, are one sequence of tokens; its windows of seq_len + 1 tokens (overlapping by one) are shuffled
    within buffers of `buffer` windows. Each micro-batch is the same number of windows from each part, parts in order,
    of which a rank has its own. So the batches of all ranks together depend on (data, tokenizer, seed, parts, buffer,
    micro_batches) and not on how many ranks or workers make them; any number of ranks that divides the parts resumes.

    Raises UserError if a size does not fit, and from `at` where a shard cannot be read or a worker dies.
    """

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        workers: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        micro_batches: int = 1,
    ) -> None:
        check_at_least("--batch", batch_size, 1)
        check_at_least("--data-workers", workers, 0)
        self._recipe, self._batch_size, self._workers = recipe, batch_size, workers
        self._rank, self._ranks, self._micro = rank, ranks, micro_batches
        self._index = 0
        self._last: tuple[int, np.ndarray, dict[str, Any]] | None = None
        self._of = 0
        self._parts: dict[int, _Part] = {}
        self._share(ranks, {})

    @property
    def pids(self) -> list[int]:
        """The ids of the running tokenizing processes."""
        return [pid for part in self._parts.values() for pid in part.pids]

    def at(self, index: int) -> np.ndarray:
        """The batch of step `index`: int32 [batch_size / ranks, seq_len + 1].

        Steps come in order; the step last asked for may be asked for again. Raises UserError for any other.
        """
        for part in self._parts.values():
            part.check()
        if self._last is not None and index == self._last[0]:
            return self._last[1]
        if index != self._index:
            raise UserError(f"step: a stream is at step {self._index} and goes forward one by one, got {index}")
        before = self.state(index)
        each = self._batch_size // self._of
        taken = [part.take(each).reshape(self._micro, each // self._micro, -1) for part in self._parts.values()]
        batch = np.concatenate(taken, axis=1).reshape(each * len(taken), -1)
        self._last = index, batch, before
        self._index += 1
        return batch

    def state(self, index: int) -> dict[str, Any]:
        """What `restore` needs to resume at step `index`, which is the next one or the one last asked for.

        Plain values: {"index", "of", "buffer", "parts": {part: {"epoch", "shard", "row", "token", "block", "used"}}}, a
        hundred bytes a part of this rank's. `merged` puts those of all ranks together.
        """
        if self._last is not None and index == self._last[0]:
            return self._last[2]
        if index != self._index:
            raise UserError(f"step: the state of a stream at step {self._index} was asked for step {index}")
        parts = {str(number): part.state() for number, part in self._parts.items()}
        return {"index": index, "of": self._of, "buffer": self._recipe.buffer, "parts": parts}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume where `state`, that of all ranks, was taken. Raises UserError if buffer or ranks do not fit."""
        if state is None:
            raise UserError("--stream: the checkpoint was made without it; give the same, or another --out")
        if state["buffer"] != (mine := self._recipe.buffer):
            raise UserError(f"--shuffle-buffer: got {mine}, the checkpoint was made with {state['buffer']}: give that")
        self.close()
        self._share(state["of"], state["parts"])
        self._index, self._last = state["index"], None

    def close(self) -> None:
        """End the threads and processes."""
        for part in self._parts.values():
            part.close()

    def _share(self, of: int, states: dict[str, dict[str, int]]) -> None:
        """Make this rank's parts, of `of` parts in all, at their `states` if there are any."""
        if of % self._ranks:
            raise UserError(
                f"--stream: the run's data are in {of} parts, which {self._ranks} ranks cannot share out evenly: "
                "give a number of ranks that divides it"
            )
        check_rows(self._batch_size, self._micro, of)
        each = of // self._ranks
        mine = range(self._rank * each, (self._rank + 1) * each)
        if states and (missing := [number for number in mine if str(number) not in states]):
            raise UserError(
                f"--stream: the checkpoint lacks the state of parts {missing} of {of}: was it made by one rank alone?"
            )
        workers = -(-self._workers // each)  # where a rank has any, each of its parts has one
        self._of = of
        self._parts = {n: _Part(self._recipe, workers, n, of, states.get(str(n), {})) for n in mine}


def merged(states: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The ranks' `state`s of one step as one state; None if they are None."""
    found = [state for state in states if state is not None]
    if not found:
        return None
    return {**found[0], "parts": {number: part for state in found for number, part in state["parts"].items()}}


class _Part:
    """The windows of one part. Nothing is read before the first `take`."""

    def __init__(self, recipe: Recipe, workers: int, number: int, of: int, state: dict[str, int]) -> None:
        self._recipe, self._count = recipe, workers
        self._number, self._of = number, of
        self._start = Place(*(state.get(name, 0) for name in Place._fields))
        self._block, self._used = state.get("block", 0), state.get("used", 0)
        self._feed: Feed | None = None
        self._tokens: Tokens | None = None
        self._buffered: np.ndarray | None = None  # uint32 [buffer · seq_len + 1]
        self._order = np.zeros(0, np.int64)

    @property
    def pids(self) -> list[int]:
        return [] if self._feed is None else self._feed.pids

    def take(self, count: int) -> np.ndarray:
        """The next windows, int32 [count, seq_len + 1]."""
        taken = []
        while count:
            if self._buffered is None or self._used == self._recipe.buffer:
                self._fill()
            assert self._buffered is not None
            chosen = self._order[self._used : self._used + count]
            taken.append(windows_of(self._buffered, chosen, self._recipe.seq_len))
            self._used += chosen.size
            count -= chosen.size
        return np.concatenate(taken)

    def state(self) -> dict[str, int]:
        return {**self._start._asdict(), "block": self._block, "used": self._used}

    def check(self) -> None:
        if self._feed is not None:
            self._feed.check()

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()

    def _fill(self) -> None:
        """Make the next buffer; the first one is that of the state."""
        recipe = self._recipe
        size = recipe.buffer * recipe.seq_len
        if self._tokens is None:
            # The next buffer is made while this one is used.
            ahead = max(2, -(-size * CHARACTERS_PER_TOKEN // CHUNK))
            source = chunks(recipe.text, recipe.seed, self._number, self._of, self._start)
            self._feed = Feed(source, Workers(recipe.tokenizer, self._count), ahead)
            self._tokens = Tokens(self._feed, self._start)
        if self._buffered is not None:
            self._block, self._used = self._block + 1, 0
        self._start = self._tokens.place
        self._buffered = self._tokens.take(size)
        self._order = permutation(recipe.seed, (_WINDOWS, self._number, self._block), recipe.buffer)


# --- the corpus -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamedCorpus:
    """A corpus whose training tokens are made while they are used.

    validation, vocab_size, fingerprint, folder, description: as a `Corpus` has them; the fingerprint covers the names
    and sizes of the shards, the tokenizer and the held-out tokens.
    text: the shards. tokenizer: the content of the tokenizer.json. buffer: sequences that are shuffled together.
    workers: tokenizing processes.
    """

    text: ShardedText
    tokenizer: bytes
    validation: np.ndarray
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
) -> Corpus | StreamedCorpus:
    """The corpus that `spec` names: stored in tokens, see `prepare`, or with stream="yes" streamed.

    "auto" streams what starts with hf:, and files of more than STREAMED_BYTES together, unless `max_tokens` bounds what
    is read. buffer, workers: see `StreamedCorpus`; workers None is one process fewer than there are cores, at least one
    and at most four.

    Raises UserError, in one sentence, for anything that is wrong with the arguments, the data or the cache.
    """
    if stream not in ("auto", "yes", "no"):
        raise UserError(f"--stream: got {stream!r}, it must be auto, yes or no")
    why = "--stream yes" if stream == "yes" else ""
    if stream == "auto" and max_tokens is None:
        why = _too_large_to_store(spec)
    if not why:
        corpus = prepare(
            spec, vocab_size=vocab_size, seq_len=seq_len, tokenizer=tokenizer, max_tokens=max_tokens, cache=cache
        )
        return replace(corpus, description=f"{corpus.description}, stored")
    if max_tokens is not None:
        raise UserError(f"--max-tokens {max_tokens}: a stream has no bound: leave it out, or give --stream no")
    if is_shard(spec):
        raise UserError(f"--stream: --data {spec} holds tokens, which are never read as a whole: leave it out")
    check_at_least("--vocab-size", vocab_size, 1)
    check_at_least("--seq-len", seq_len, 1)
    check_at_least("--shuffle-buffer", buffer, 1)
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) - 1))
    check_at_least("--data-workers", workers, 0)
    return _prepare_stream(spec, why, vocab_size, seq_len, tokenizer, buffer, workers, cache)


def training_batches(
    corpus: Corpus | StreamedCorpus, seq_len: int, batch_size: int, seed: int, **share: int
) -> Batches | StreamedBatches:
    """The training batches of a corpus, to be closed after use: at(step), state(step), restore(state).

    share: `rank`, `ranks` (0 of 1) and `micro_batches` (1). Rank `rank` of `ranks` gets batch_size / ranks rows of each
    batch: its part of each micro-batch.
    """
    if isinstance(corpus, Corpus):
        return Batches(corpus.train, seq_len, batch_size, seed, **share)
    recipe = Recipe(corpus.text, corpus.tokenizer, seq_len, seed, corpus.buffer)
    return StreamedBatches(recipe, batch_size, corpus.workers, **share)


def _too_large_to_store(spec: str) -> str:
    """Why --stream auto streams this SPEC; "" if it does not."""
    if spec.startswith("hf:"):
        return "a data set of the hub"
    if spec == "python" or is_shard(spec):
        return ""
    size = find_files(spec).size
    return f"{size / 1e9:,.1f} GB, more than {STREAMED_BYTES / 1e9:g}" if size > STREAMED_BYTES else ""


def _prepare_stream(
    spec: str,
    why: str,
    vocab_size: int,
    seq_len: int,
    tokenizer_path: Path | None,
    buffer: int,
    workers: int,
    cache: Path | None,
) -> StreamedCorpus:
    given, tokenizer = given_tokenizer(tokenizer_path, vocab_size)
    text = open_sharded(spec)
    limit = max(HELD_OUT_TOKENS, seq_len + 1)
    settings = {
        "stream format": _FORMAT,
        "shards": text.digest,
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
    content = (folder / "tokenizer.json").read_bytes()
    mark = hashlib.blake2b(f"fsam stream 1|{text.digest}|{entry.fingerprint}|".encode() + content, digest_size=20)
    description = (
        f"{text.title}: streamed ({why}) from {len(text.train):,} shard{'s' if len(text.train) > 1 else ''}, "
        f"shuffled in buffers of {buffer:,} sequences, {entry.validation.size:,} validation tokens, "
        f"vocabulary {vocab_size}"
    )
    return StreamedCorpus(
        text, content, entry.validation, vocab_size, mark.hexdigest(), folder, description, buffer, workers
    )


def _fill(
    spec: str,
    text: ShardedText,
    vocab_size: int,
    tokenizer: Any,
    given: bytes | None,
    limit: int,
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """Write a cache entry with no training tokens into `folder`."""
    if given is None:
        given, tokenizer = learn_tokenizer(_head(spec, text), vocab_size, say)
    dtype = token_dtype(vocab_size)
    say("tokenizing held-out text")
    with store.durable(folder / "train.bin") as train, store.durable(folder / "validation.bin") as validation:
        sinks: dict[Split, Sink] = {"train": Sink(train, dtype, 0), "validation": Sink(validation, dtype, limit)}
        pieces = (Piece("validation", encodable(row.text), row.ends) for row in text.sample("validation"))
        encode_streams([Stream(("validation",), pieces)], tokenizer, sinks, lambda tokens: None)
    with store.durable(folder / "tokenizer.json") as file:
        file.write(given)
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
        seen += len(row.text)
        yield encodable(row.text)
    if not seen:
        raise UserError(f"--data {spec} holds no text to train on")
