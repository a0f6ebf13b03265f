"""Weights to start from, evaluate, sample or export: of a run, a folder of safetensors, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core import backends
from fsam_core.errors import UserError, one_line
from fsam_trainers import checkpoints, transformers_folders
from fsam_trainers.config import Settings
from fsam_trainers.data.records import columns_of
from fsam_trainers.data.specs import find_files, is_hub
from fsam_trainers.files import checksum, copy_file
from fsam_trainers.models.layout import ModelConfig, initial, shapes
from fsam_trainers.models.vit_layout import config_of

MODEL_TYPE = "fsam-decoder"  # in the config.json of a folder in this project's layout
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_WHAT_WORKS = "a run's folder, RUN@STEP, a folder with config.json and *.safetensors, or hf:NAME"
_SAMPLE = 2**20  # bytes at either end of a file of weights, which tell it from another
_READING = ("text_column", "token_dtype")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model's sizes, and its weights when they are asked for.

    source: what it was found by. where: "ARGUMENT: SOURCE", how its errors begin. weights: reads them, float32 by
    flat name; of a run with --ema their average. fingerprint: another for other weights. tokenizer: its file, None
    where there is none. framework, method, steps: of a run. soft_cap: of the logits, 0 for none. trained_on: the
    --data of a run. reading: its --text-column and --token-dtype where they were given.
    """

    source: str
    where: str
    config: ModelConfig
    weights: Callable[[], dict[str, np.ndarray]]
    fingerprint: str
    tokenizer: Path | None
    framework: str | None = None
    method: str | None = None
    steps: int | None = None
    soft_cap: float = 0.0
    trained_on: str | None = None
    reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def data(self) -> str:
        """What is read where no --data is given: what a run was trained on, else the default of `fsam train`."""
        return self.trained_on or ("python" if self.config.FAMILY == "decoder" else "digits")

    def framework_for(self, asked: str | None) -> str:
        """The framework to compute in: the one asked for, else the run's, else the first that is installed.

        Raises:
            UserError: for another name.
        """
        if asked is not None and asked not in backends.TRAINING:
            raise UserError(f"--framework must be jax or torch, got {asked!r}")
        installed = (name for name in backends.TRAINING if importlib.util.find_spec(name))
        return asked or self.framework or next(installed, "jax")

    def tokenizer_for(self, spec: str, given: Path | None, text_column: str | None = None) -> Path | None:
        """The tokenizer's file for the data SPEC: the given one, else the model's own, none for files of tokens.

        Raises:
            UserError: where text needs one and there is none: it would be given other ids than the model knows.
        """
        if given is not None or (not is_hub(spec) and find_files(spec, columns_of(text_column)).kind == "tokens"):
            return given
        return self.own_tokenizer()

    def own_tokenizer(self) -> Path:
        """
        Raises:
            UserError: where there is none.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.where} has no {' or '.join(TOKENIZERS)} beside its weights; give --tokenizer FILE")
        return self.tokenizer


def find(source: str, argument: str) -> Pretrained:
    """The model that `source` names.

    RUN is the newest checkpoint of a run, RUN@STEP or RUN/checkpoints/step_… another one. A FOLDER has safetensors, or
    hf:NAME is one of the hub.

    Args:
        argument: how messages call it, "--init-from" say.

    Raises:
        UserError: where there is none, or this decoder cannot represent it.
    """
    where = f"{argument}: {source}"
    folder = _from_hub(source, where) if source.startswith("hf:") else Path(source).expanduser()
    if folder.is_file():
        _refuse_pickles([folder], where)
        raise UserError(f"{where} is a file; give {_WHAT_WORKS}")
    run, step = checkpoint_of(folder)
    if (run / "checkpoints").is_dir():
        return _of_run(run, step, source, where)
    if (folder / "config.json").is_file():
        return _of_folder(folder, source, where)
    if folder.is_dir():
        _refuse_pickles(sorted(folder.iterdir()), where)
    what = "holds neither checkpoints nor a config.json" if folder.is_dir() else "is not there"
    raise UserError(f"{where} {what}; give {_WHAT_WORKS}")


def checkpoint_of(folder: Path) -> tuple[Path, int | None]:
    """(RUN, STEP) of RUN@STEP and of a checkpoint's folder; of anything else (itself, None)."""
    run, at, step = str(folder).rpartition("@")
    if at and step.isdigit() and not folder.exists():
        return Path(run), int(step)
    if folder.parent.name == "checkpoints" and (folder / "run.json").is_file():
        return folder.parent.parent, checkpoints.step_of(folder)
    return folder, None


def initial_weights(settings: Settings) -> dict[str, np.ndarray]:
    """The weights before the first step, float32 by flat name: those of --init-from, else drawn by --seed.

    Raises:
        UserError: as `check_sizes`.
    """
    if settings.init_from is None:
        return initial(settings.model, settings.seed)
    found = find(settings.init_from, "--init-from")
    check_sizes(found, settings.model)
    weights = found.weights()
    if "positions" in weights:
        weights["positions"] = weights["positions"][: settings.model.seq_len]
    return weights


def check_sizes(found: Pretrained, mine: ModelConfig) -> None:
    """Whether a model can begin with these weights.

    Raises:
        UserError: when the sizes are not those of the model that is named; --seq-len and --dropout may be others.
    """
    for field in dataclasses.fields(mine):
        got, theirs = getattr(mine, field.name), getattr(found.config, field.name)
        if field.name == "seq_len" and got <= theirs:
            continue
        if field.name != "dropout" and got != theirs:
            option = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{found.where} has {option} {theirs}, got {option} {got}; leave the option out")


def keep_tokenizer(corpus_folder: Path, out: Path) -> None:
    """Copy a corpus's tokenizer into a run's folder, where `find` looks for it. Files of tokens may have none.

    Raises:
        UserError: when the disk refuses.
    """
    for name in TOKENIZERS:
        if (corpus_folder / name).is_file():
            copy_file(corpus_folder / name, out / name)


def _of_run(out: Path, step: int | None, source: str, where: str) -> Pretrained:
    try:
        root = out / "checkpoints"
        found = checkpoints.newest(root, lambda text: None) if step is None else checkpoints.at(root, step)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--out: ')}") from error
    if found is None:
        raise UserError(f"{where} holds no checkpoint yet; give a run that has saved one")
    settings = found.run["settings"]
    config = config_of(settings["model"])
    framework, averaged, options = settings["framework"], bool(settings["ema"]), _options_of(out)

    def weights() -> dict[str, np.ndarray]:
        try:
            return inference(framework).read(found.state, config, averaged=averaged)
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt) or found.folder.is_dir():
                raise
            raise UserError(
                f"{where}: its run went on and deleted {found.folder.name} before that was read; try again, or have "
                "the run --keep more"
            ) from error

    return Pretrained(
        source,
        where,
        config,
        weights,
        checksum(found.folder / "files.json"),
        _tokenizer_in(out),
        framework,
        settings["method"],
        found.run["progress"]["step"],
        settings["soft_cap"],
        options.get("data"),
        {name: options[key] for name in _READING if (key := name.replace("_", "-")) in options},
    )


def reading_of(models: Sequence[Pretrained], spec: str) -> Mapping[str, Any]:
    """How the text `spec` is read: as the first of the models that was trained on it has read it."""
    return next((found.reading for found in models if found.trained_on == spec), {})


def _options_of(run: Path) -> dict[str, Any]:
    # A run that was started from Python has no such file, or one without the name of a text.
    with contextlib.suppress(OSError, ValueError):
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    return {}


def _of_folder(folder: Path, source: str, where: str) -> Pretrained:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = described["model_type"]
        if kind == MODEL_TYPE:
            config = config_of(described["model"])
            return _loaded(folder, source, where, config, float(described["soft_cap"]), dict)
        config, renamed = transformers_folders.from_hf(described, where)
        return _loaded(folder, source, where, config, 0.0, renamed)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its config.json cannot be used: {one_line(error)}") from error


def _loaded(
    folder: Path,
    source: str,
    where: str,
    config: ModelConfig,
    soft_cap: float,
    renamed: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> Pretrained:
    # Mistral's folders have the same weights once more, under names of its own, in consolidated.safetensors.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_pickles(sorted(folder.iterdir()), where)
        raise UserError(f"{where} has a config.json and no *.safetensors beside it; give {_WHAT_WORKS}")

    def weights() -> dict[str, np.ndarray]:
        read: dict[str, np.ndarray] = {}
        for file in files:
            read |= _tensors(file, where)
        found, expected = renamed(read), shapes(config)
        for name, shape in expected.items():
            if name not in found or found[name].shape != shape:
                got = f"of shape {list(found[name].shape)}" if name in found else "missing"
                raise UserError(f"{where}: {name} is {got}, and config.json makes it {list(shape)}")
        return {name: np.asarray(found[name], np.float32) for name in expected}

    return Pretrained(source, where, config, weights, _fingerprint(files), _tokenizer_in(folder), soft_cap=soft_cap)


def _fingerprint(files: Sequence[Path]) -> str:
    """Of files of weights: their sizes, and what is at either end. To read them whole may take minutes."""
    found = hashlib.blake2b()
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(f"{path.name} {size} ".encode() + file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            found.update(file.read())
    return found.hexdigest()


def _tensors(file: Path, where: str) -> dict[str, np.ndarray]:
    safetensors = optional("safetensors", where)
    optional("ml_dtypes", where)  # with it NumPy knows bfloat16
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:  # OSError, SafetensorError
        raise UserError(f"{where}: {file.name} cannot be read: {one_line(error)}") from error


def optional(module: str, where: str) -> Any:
    """An optional package.

    Raises:
        UserError: starting with `where`, with the pip command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: {module} is not installed: pip install {module}") from error


def _from_hub(source: str, where: str) -> Path:
    name = source.removeprefix("hf:")
    if Path(name).is_dir():
        return Path(name)
    optional("huggingface_hub", where)
    try:
        return _snapshot(name)
    except Exception as error:  # the client lets the errors of several libraries through
        raise UserError(f"{where} cannot be taken from the hub: {one_line(error)}") from error


@cache
def _snapshot(name: str) -> Path:
    """The hub's files of a model; asked for once, so that all runs of a command begin alike."""
    hub = importlib.import_module("huggingface_hub")
    wanted = ["*.safetensors", "*.json", "tokenizer.model"]
    return Path(hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*"]))


def _refuse_pickles(paths: list[Path], where: str) -> None:
    if found := next((path for path in paths if path.suffix in _PICKLES), None):
        raise UserError(
            f"{where}: {found.name} holds pickled weights, which may run any code when they are read; "
            "convert them to safetensors"
        )


def _tokenizer_in(folder: Path) -> Path | None:
    return next((path for name in TOKENIZERS if (path := folder / name).is_file()), None)


def inference(framework: str) -> Any:
    """The module `inference` of a framework; only that one is imported.

    Raises:
        UserError: when it is not installed.
    """
    backends.require(*backends.TRAINING[framework])
    return importlib.import_module(f"fsam_trainers.{framework}.inference")
