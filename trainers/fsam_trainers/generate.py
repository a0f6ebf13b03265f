"""Text from a model, one token after the other: the loop, the draw of a token, and text from ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fsam_core import UserError
from fsam_trainers.data.documents import extra
from fsam_trainers.data.vocabulary import is_json
from fsam_trainers.models.layout import ModelConfig


class CachedDecoder(Protocol):
    """What `jax/inference.py` and `torch/inference.py` provide."""

    config: ModelConfig

    def start(self, tokens: list[int]) -> np.ndarray:
        """Forget what was read, and read tokens, 1 to seq_len of them; the logits of the next one, float32 [V]."""

    def advance(self, token: int) -> np.ndarray:
        """Read one more token, the seq_len-th at most; the logits of the next one."""


def generate(
    model: CachedDecoder, prompt: list[int], count: int, choose: Callable[[np.ndarray], int], end: int
) -> Iterator[int]:
    """At most `count` tokens after a prompt of at least one, up to the token `end`, which is not among them.

    The model has learned seq_len positions. When they are full, the last half of the text is read again from the first
    position on.
    """
    most = model.config.seq_len
    again = max(1, most // 2)
    context = prompt if len(prompt) <= most else prompt[-again:]
    logits_V, read = model.start(context), len(context)
    text = list(prompt)
    for number in range(count):
        token = choose(logits_V)
        if token == end:
            return
        yield token
        text.append(token)
        if number + 1 == count:
            return
        if read < most:
            logits_V, read = model.advance(token), read + 1
        else:
            logits_V, read = model.start(text[-again:]), again


def chooser(
    size: int, *, temperature: float, top_k: int | None, seed: int, soft_cap: float = 0.0
) -> Callable[[np.ndarray], int]:
    """Logits -> the next token among the first `size`: the likeliest at temperature 0, else a draw from p^(1/T).

    Args:
        top_k: draw among the k likeliest; None for all.
        soft_cap: c > 0 for logits c tanh(z / c).

    Raises:
        UserError: from the function, for logits that are not finite.
    """
    random = np.random.Generator(np.random.Philox(seed))

    def choose(logits_V: np.ndarray) -> int:
        z_V = logits_V[:size].astype(np.float64)
        if not np.isfinite(z_V).all():
            raise UserError("MODEL: its logits are not finite: the run has diverged; give another one")
        if temperature == 0:
            return int(z_V.argmax())
        if soft_cap:
            z_V = soft_cap * np.tanh(z_V / soft_cap)
        kept_K = np.argsort(-z_V, kind="stable")[:top_k]
        p_K = np.exp((z_V[kept_K] - z_V[kept_K[0]]) / temperature)
        return int(random.choice(kept_K, p=p_K / p_K.sum()))

    return choose


def decoder(tokenizer: Path) -> Callable[[list[int]], str]:
    """Token ids -> text, by a tokenizer.json or a SentencePiece model that `vocabulary.load_tokenizer` has accepted."""
    content = tokenizer.read_bytes()
    if is_json(content):
        return extra("tokenizers").Tokenizer.from_buffer(content).decode
    model: Any = extra("sentencepiece").SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    return model.decode
