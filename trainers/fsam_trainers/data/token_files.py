"""Files of token ids, mapped where they lie: nanoGPT's, llm.c's, Megatron's, and those of this project's cache.

What type the ids have is read from the file's header or from a file beside it, or given, and only then judged by the
values: wrongly read ids are numbers too, and would be trained on.
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import CHUNK, DTYPES, Corpus, JoinedTokens, Tokens, checksum, fingerprint
from fsam_trainers.data.documents import HELD_OUT, named_splits, reading
from fsam_trainers.data.kinds import not_text

# llm.c: a header of 256 int32: magic, version, number of tokens. The other magics are its other files'.
_HEADER = 1024
_LLMC = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_LLMC_MAGIC = {20240520, 20240801, 20240326, 20240327, 20240328, 20240335, 20240522}
# Megatron's .idx: this, a version, a code of the dtype, the numbers of sequences and documents, sequence lengths.
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_DTYPES = {4: "int32", 5: "int64", 8: "uint16"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as PyTorch saves weights",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model",
    b"\x1f\x8b\x08": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}
_SAMPLE = 1 << 17  # bytes that are looked at
_HALF = 15  # the upper halves of 32-bit ids are at most this: vocabularies of up to a million


class _Layout(NamedTuple):
    """How a file's ids are stored: dtype, byte at which they begin, and what says so ("" if nothing does)."""

    dtype: str
    begin: int
    source: str


def open_tokens(
    paths: list[Path],
    *,
    title: str,
    vocab_size: int,
    token_dtype: str | None = None,
    max_train: int | None = None,
    max_validation: int | None = None,
) -> Corpus:
    """The corpus in files of token ids.

    Files with "val" or "validation" in their names are the held-out split if there are others, as is val.bin or
    validation.bin beside a single train.bin; otherwise it is the last twentieth. At most `max_train` and
    `max_validation` tokens of each are used. token_dtype: of ids whose type nothing states; None judges by the values.

    Raises UserError for a file of an unknown format or type, one that is not whole, or holds an id of `vocab_size` or
    more.
    """
    if token_dtype is not None and token_dtype not in DTYPES:
        raise UserError(f"--token-dtype: got {token_dtype!r}, it must be {', '.join(DTYPES)}")
    train_paths, validation_paths = named_splits(paths)
    if len(paths) == 1:
        validation_paths = _beside(paths[0])
    layouts = {path: _layout(path, token_dtype, vocab_size) for path in [*train_paths, *validation_paths]}
    first = layouts[train_paths[0]]
    for path, layout in layouts.items():
        if layout.dtype != first.dtype:
            raise UserError(
                f"--data: {train_paths[0]} holds {first.dtype} tokens and {path} {layout.dtype}: give one kind"
            )
    train = _joined([_map(path, layouts[path]) for path in train_paths])
    kept = train.size if validation_paths else train.size - train.size // HELD_OUT
    validation = _joined([_map(path, layouts[path]) for path in validation_paths]) if validation_paths else train[kept:]
    train, validation = train[:kept][:max_train], validation[:max_validation]
    dtype = DTYPES[first.dtype]
    for tokens in (train, validation):
        _check_ids(train_paths[0] if len(paths) == 1 else title, tokens, vocab_size)
    mark = fingerprint(vocab_size, dtype, checksum(train), checksum(validation))
    counts = f"{train.size:,} train / {validation.size:,} validation tokens"
    description = f"{title}: {counts} ({first.dtype} by {first.source}), vocabulary {vocab_size}"
    return Corpus(train, validation, vocab_size, mark, train_paths[0].parent, description)


def _beside(path: Path) -> list[Path]:
    names = (path.name.replace("train", split) for split in ("validation", "val") if "train" in path.name)
    return [other for name in names if (other := path.with_name(name)).is_file()][:1]


def _joined(parts: list[np.ndarray]) -> Tokens:
    return parts[0] if len(parts) == 1 else JoinedTokens(parts)


def _layout(path: Path, given: str | None, vocab_size: int) -> _Layout:
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"--data: {path} is empty")
    with reading(path), path.open("rb") as file:
        sample = file.read(_SAMPLE)
    found = _llmc(path, size, sample) or _megatron(path, size) or _meta(path.parent / "meta.json")
    if found is not None and given not in (None, found.dtype):
        raise UserError(f"--token-dtype: got {given}, {path} holds {found.dtype} by {found.source}: leave it out")
    if found is None and given is not None:
        if _is_wider(sample, given, vocab_size):
            raise UserError(
                f"--token-dtype: got {given}, every other id of {path} is then 0 or nearly: give a wider one"
            )
        found = _Layout(given, 0, "--token-dtype")
    found = found or _judged(path, sample, vocab_size)
    if (size - found.begin) % DTYPES[found.dtype].itemsize:
        raise UserError(f"--data: {path} has {size:,} bytes, which is no whole number of {found.dtype} tokens")
    return found


def _llmc(path: Path, size: int, sample: bytes) -> _Layout | None:
    if len(sample) < _HEADER:
        return None
    magic, version, count = struct.unpack_from("<3i", sample)
    if magic not in _LLMC_MAGIC:
        return None
    dtype = _LLMC.get((magic, version))
    if dtype is None:
        raise UserError(f"--data: {path} is a file of llm.c, but not of tokens (magic {magic}, version {version})")
    if (held := (size - _HEADER) // DTYPES[dtype].itemsize) != count:
        raise UserError(f"--data: {path} is damaged: its header says {count:,} tokens, it holds {held:,}")
    return _Layout(dtype, _HEADER, "its header")


def _megatron(path: Path, size: int) -> _Layout | None:
    index = path.with_suffix(".idx")
    if not index.is_file():
        return None
    with reading(index), index.open("rb") as file:
        head = file.read(34)
        if len(head) < 34 or head[:17] != _MEGATRON + struct.pack("<Q", 1):
            raise UserError(f"--data: {index} is no index of Megatron's of version 1: remove it if {path} needs none")
        code, sequences, _ = struct.unpack_from("<BQQ", head, 17)
        if code not in _MEGATRON_DTYPES:
            works = ", ".join(_MEGATRON_DTYPES.values())
            raise UserError(f"--data: {index} states the dtype code {code}: token ids are {works}")
        lengths = np.fromfile(file, "<i4", sequences)
    dtype = _MEGATRON_DTYPES[code]
    stated, held = int(lengths.sum(dtype=np.int64)), size // DTYPES[dtype].itemsize
    if stated != held or lengths.size != sequences:
        raise UserError(f"--data: {index} states {stated:,} tokens, {path} holds {held:,}: they do not belong together")
    return _Layout(dtype, 0, index.name)


def _meta(meta: Path) -> _Layout | None:
    if not meta.is_file():
        return None
    with reading(meta):
        try:
            content = json.loads(meta.read_bytes())
        except ValueError as error:
            raise UserError(
                f'--data: {meta} is not JSON: delete it, or write {{"dtype": "uint16"}} or "uint32"'
            ) from error
    if isinstance(content, dict) and "dtype" not in content:
        return None  # somebody else's
    name = content["dtype"] if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"--data: {meta} gives the dtype {name!r}: tokens are {', '.join(DTYPES)}")
    return _Layout(name, 0, "meta.json")


def _judged(path: Path, sample: bytes, vocab_size: int) -> _Layout:
    """The type of ids that nothing states. Refuses what is no file of ids, and what could be another type."""
    foreign = next((what for magic, what in _FOREIGN.items() if sample.startswith(magic)), "")
    if not foreign and len(sample) > 64 and not not_text(path, sample, whole=len(sample) < _SAMPLE):
        foreign = "text"
    if foreign:
        raise UserError(f"--data: {path} is {foreign}, not a file of token ids, for which .bin stands")
    name = "uint16"
    for wider in ("uint32", "int64"):
        if _is_wider(sample, name, vocab_size):
            name = wider
    if name == "uint16" and vocab_size > 1 << 16:
        raise UserError(
            f"--data: {path} does not state the type of its ids, and uint16 cannot hold --vocab-size {vocab_size}: "
            "give --token-dtype uint16 or uint32"
        )
    return _Layout(name, 0, "its values")


def _is_wider(sample: bytes, dtype: str, vocab_size: int) -> bool:
    """Whether ids read with this type are halves of a wider one: every other one is an upper half, 0 or nearly."""
    halves = np.frombuffer(sample[: len(sample) // 16 * 16], DTYPES[dtype])
    largest = min(max(1, vocab_size - 1 >> 16), _HALF)
    return bool(halves.size and halves[1::2].max() <= largest < halves[::2].max())


def _map(path: Path, layout: _Layout) -> np.ndarray:
    with reading(path):
        return np.memmap(path, DTYPES[layout.dtype], mode="r", offset=layout.begin)


def _check_ids(name: object, tokens: Tokens, vocab_size: int) -> None:
    for part in tokens.parts if isinstance(tokens, JoinedTokens) else [tokens]:
        for start in range(0, part.size, CHUNK):
            chunk = part[start : start + CHUNK]
            if (least := int(chunk.min())) < 0:
                raise UserError(f"--data: {name} holds the token id {least}: is it of another type, or damaged?")
            if (largest := int(chunk.max())) >= vocab_size:
                raise UserError(
                    f"--data: {name} holds the token id {largest}, --vocab-size is {vocab_size}: "
                    f"it must be at least {largest + 1}, unless the ids are of another type than {part.dtype}"
                )
