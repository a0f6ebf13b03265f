"""The study's texts, which any machine has: the standard library, torch and transformers, and prose about all packages.

Of the packages only those of torch and transformers are taken: their versions are pinned, and others need not be UTF-8.
"""

from __future__ import annotations

import importlib.metadata
import pydoc_data.topics
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from fsam_trainers.data import Corpus, prepare
from fsam_trainers.files import disk_errors
from fsam_trainers.models.layout import ModelConfig


@cache
def corpus(data: str, max_tokens: int | None, model: ModelConfig, out: Path, tokenizer: Path | None = None) -> Corpus:
    """The tokens of "python", "packages" or "prose", with a vocabulary of their own where none is given.

    Raises:
        UserError: as `fsam_trainers.data.prepare`.
    """
    packages = f"{sysconfig.get_paths()['purelib']}/t[ro][ra][cn]*/**/*.py"  # tran… and torc…, 104 MB
    specs = {"packages": packages, "prose": str(out / "prose")}
    if data == "prose":
        _write_prose(out / "prose")
    spec, V, L = specs.get(data, data), model.vocab_size, model.seq_len
    return prepare(spec, vocab_size=V, seq_len=L, max_tokens=max_tokens, tokenizer=tokenizer)


def _write_prose(folder: Path) -> None:
    """The language's help topics, and the long descriptions of the installed packages: a file each."""
    texts: dict[str, Any] = dict(pydoc_data.topics.topics)
    for one in importlib.metadata.distributions():
        texts[f"package-{one.metadata['Name']}"] = one.metadata.json.get("description") or ""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = folder / f"{name.replace('/', '-')}.txt"
            if len(text) > 1000 and not path.exists():
                path.write_text(text, encoding="utf-8")
