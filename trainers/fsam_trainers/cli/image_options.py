"""The options of `--task images`, which take the place of those of text in every command that trains."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import tyro

from fsam_core import backends
from fsam_trainers import processes
from fsam_trainers.config import Settings
from fsam_trainers.console import Console
from fsam_trainers.data.images import Augmentation, ImageCorpus, load
from fsam_trainers.models.vit_layout import ViTConfig

MOST_PATCHES = 8  # a side, where no --patch is given


@dataclass(frozen=True)
class _ViT(ViTConfig):
    patch: int = 0
    """pixels of a patch's side, which divide the image's (default: the preset's; of vit-tiny for 8 a side at most)"""

    def __post_init__(self) -> None:
        """Checked later, in `ImageCommand.model`; sizes that images determine are not known yet."""


@dataclass(frozen=True)
class ImageOptions(Augmentation):
    """What to train on."""

    data: str = "digits"
    """digits, fashion, a folder class/*.png|jpg, of IDX or CIFAR's .bin files, .npz, .parquet, or hf:NAME[:CONFIG]"""
    image_size: int | None = None
    """scale and crop files to so many pixels a side (default: the size that all have)"""
    data_workers: int | None = None
    """processes that decode files (default: one fewer than cores, 1 to 4); 0: none but the run's own"""

    def __post_init__(self) -> None:
        """Checked later, in `images`."""

    def images(self) -> ImageCorpus:
        """
        Raises:
            UserError: as `data.images.load`.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Augmentation)}
        return _loaded(self.data, self.image_size, Augmentation(**own), self.data_workers)


@lru_cache(maxsize=2)
def _loaded(data: str, image_size: int | None, augmentation: Augmentation, workers: int | None) -> ImageCorpus:
    """`load`, once for all variants of a comparison."""
    return load(data, image_size=image_size, augmentation=augmentation, workers=workers)


class ImageCommand:
    """What is different in a command that trains on images."""

    run: Any
    corpus: ImageOptions

    def model(self) -> ViTConfig:
        """The model's sizes: the options', and those that the images determine.

        Raises:
            UserError: naming what is wrong, with the options or the images.
        """
        images, given = self.corpus.images(), vars(self.run.model)
        sizes = {"height": images.height, "image_width": images.width, "channels": images.channels}
        patch = given["patch"] or patch_for(images.height, images.width)
        return ViTConfig(**{**given, **sizes, "classes": len(images.classes), "patch": patch})

    def load_corpus(self, settings: Settings, console: Console) -> ImageCorpus:
        """The images; one process of each host reads them before the others."""
        backends.require(*backends.TRAINING[settings.framework])
        found = processes.current().first_on_host(self.corpus.images)
        console.say(found.description)
        return found


def patch_for(height: int, width: int) -> int:
    """The smallest patch of two pixels or more that divides both sides and leaves MOST_PATCHES of a side, or fewer."""
    sides = math.gcd(height, width)
    return next(p for p in range(1, sides + 1) if sides % p == 0 and (p == sides or _fits(p, height, width)))


def _fits(patch: int, height: int, width: int) -> bool:
    return patch > 1 and max(height, width) <= MOST_PATCHES * patch


@lru_cache
def of_images(command: Any) -> Any:
    """The command, a dataclass, with the options of images in place of those of text; itself if it has them."""
    if issubclass(command, ImageCommand):
        return command
    prefixes = tyro.conf.OmitArgPrefixes
    of_run, model = command.RUN, [("model", prefixes[_ViT])]
    run: Any = dataclasses.make_dataclass(of_run.__name__, model, bases=(of_run,), frozen=True)
    fields: list[Any] = [
        ("run", prefixes[run]),
        ("corpus", prefixes[ImageOptions], field(default_factory=ImageOptions)),
    ]
    bases, own = (ImageCommand, command), {"RUN": run, "__doc__": command.__doc__}
    return dataclasses.make_dataclass(command.__name__, fields, bases=bases, frozen=True, kw_only=True, namespace=own)
