"""A model as a folder that other programs read: safetensors under this project's names, or under transformers'."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core import UserError
from fsam_trainers import transformers_folders
from fsam_trainers.data.vocabulary import load_tokenizer
from fsam_trainers.files import begin_folder, disk_errors, publish, write_json
from fsam_trainers.pretrained import MODEL_TYPE, Pretrained, optional

FORMATS = ("safetensors", "hf")


def export(found: Pretrained, form: str, out: Path) -> None:
    """Write the model into the new folder `out`: config.json, model.safetensors (float32), and its tokenizer if any.

    Args:
        form: "safetensors" (flat names and sizes of `models/layout.py`) or "hf" (transformers' names).

    Raises:
        UserError: when the folder is in use, transformers cannot represent the model, or the disk refuses.
    """
    if form not in FORMATS:
        raise UserError(f"--to must be {' or '.join(FORMATS)}, got {form!r}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is there already; give a new folder")
    save = optional("safetensors.numpy", found.where).save_file
    config, tensors = _as_hf(found) if form == "hf" else (_as_ours(found), found.weights())
    folder = begin_folder(out)
    try:
        with disk_errors(out):
            # transformers asks for the framework that wrote the file.
            save(
                {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
            )
            write_json(folder / "config.json", config)
            if found.tokenizer is not None:
                shutil.copyfile(found.tokenizer, folder / found.tokenizer.name)
                if form == "hf" and found.tokenizer.name == "tokenizer.json":
                    write_json(folder / "tokenizer_config.json", _tokenizer_config(found))
            publish(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_ours(found: Pretrained) -> dict[str, Any]:
    return {"model_type": MODEL_TYPE, "model": dataclasses.asdict(found.config), "soft_cap": found.soft_cap}


def _as_hf(found: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if found.config.FAMILY != "decoder":
        raise UserError(f"{found.where} is a model of images, which --to hf does not write; give --to safetensors")
    if found.soft_cap:
        cap = f"--soft-cap {found.soft_cap}"
        raise UserError(f"{found.where} was trained with {cap}, which transformers' do not have; give --to safetensors")
    end = None if found.tokenizer is None else _end(found)
    return transformers_folders.to_hf(found.config, found.weights(), end, found.where)


def _end(found: Pretrained) -> int:
    path = found.own_tokenizer()
    return load_tokenizer(path.read_bytes(), path, found.config.vocab_size).end


def _tokenizer_config(found: Pretrained) -> dict[str, Any]:
    content = json.loads(found.own_tokenizer().read_text(encoding="utf-8"))
    ends = [one["content"] for one in content.get("added_tokens", []) if one["id"] == _end(found)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": found.config.seq_len,
        **({"bos_token": ends[0], "eos_token": ends[0]} if ends else {}),
    }
