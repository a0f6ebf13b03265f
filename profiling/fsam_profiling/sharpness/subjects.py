"""What `fsam sharpness` looks at: the checkpoints of runs, and models without a training state."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fsam_core import MicroBatches, UserError
from fsam_core.curvature import Products
from fsam_kernels import spec
from fsam_kernels.options import Loss
from fsam_trainers import checkpoints, pretrained, registry
from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch, each, micro_batches_of, named, rows_of
from fsam_trainers.device import in_torch
from fsam_trainers.models import module_of
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.models.vit_layout import ViTConfig, config_of

SEQUENCES = 8  # of a micro-batch, at most
ARGUMENT = "RUNS"


class Moments(NamedTuple):
    """AdamW's second moment by flat name, after `steps` steps, and the settings of the direction."""

    second: dict[str, np.ndarray]
    steps: int
    settings: Settings


class Subject(NamedTuple):
    """Weights at which curvature is measured.

    Attributes:
        run: what the run or model is called.
        step: of the run, None for a model without one.
        weights: by flat name, float32.
        moments: None for a model without a training state.
    """

    run: str
    step: int | None
    method: str | None
    config: ModelConfig
    soft_cap: float
    framework: str
    weights: dict[str, np.ndarray]
    moments: Moments | None

    @property
    def label(self) -> str:
        return self.run if self.step is None else f"{self.run} at step {self.step}"


class Source(NamedTuple):
    """Something on the command line.

    Attributes:
        label: what tables call it.
        folders: of the checkpoints there are of it, the oldest first.
    """

    label: str
    model: pretrained.Pretrained
    folders: list[Path]


def find(given: Sequence[str]) -> list[Source]:
    """For each RUN all its checkpoints, for RUN@STEP or a checkpoint's folder that one; or a model without any.

    Each is called by its folder's name, with as many of the folders above it as tell them all apart.

    Raises:
        UserError: where there is none.
    """
    found = [(pretrained.find(one, ARGUMENT), *pretrained.checkpoint_of(Path(one).expanduser())) for one in given]
    whole = [Path(os.path.abspath(run)).parts for _, run, _ in found]
    depth = next(n for n in itertools.count(1) if len({parts[-n:] for parts in whole}) == len(set(whole)))
    sources = []
    for (model, run, step), parts in zip(found, whole, strict=True):
        folders = [one for one in checkpoints.folders(run / "checkpoints") if step in (None, checkpoints.step_of(one))]
        sources.append(Source("/".join(parts[-depth:]), model, folders))
    return sources


def subjects(source: Source, framework: str | None, which: Literal["all", "last"]) -> Iterator[Subject]:
    """The weights at each checkpoint of a source, in order; at the last alone if asked for.

    Raises:
        UserError: for a damaged checkpoint.
    """
    found = source.model
    run = source.label
    if not source.folders:
        chosen = found.framework_for(framework)
        yield Subject(run, None, None, found.config, found.soft_cap, chosen, found.weights(), None)
        return
    for folder in source.folders[-1:] if which == "last" else source.folders:
        one = checkpoints.at(folder.parent, checkpoints.step_of(folder))
        settings = _settings(one.run["settings"])
        weights, moments = _state(settings, one.state)
        chosen = found.framework_for(framework)
        step = int(one.run["progress"]["step"])
        yield Subject(run, step, settings.method, settings.model, settings.soft_cap, chosen, weights, moments)


def _settings(values: dict[str, Any]) -> Settings:
    """The settings of a run for one process on this machine, and for weights that are read from its checkpoint."""
    known = {f.name for f in dataclasses.fields(Settings)}
    alone = {
        "data_parallel": 1,
        "fsdp": 1,
        "tensor_parallel": 1,
        "compile": False,
        "backend": "auto",
        "init_from": None,
    }
    kept = {name: value for name, value in {**values, **alone}.items() if name in known}
    return Settings(**{**kept, "model": config_of(values["model"])})


def _state(settings: Settings, state: Path) -> tuple[dict[str, np.ndarray], Moments]:
    """(the weights, AdamW's second moment) of a checkpoint, read by the framework that wrote it."""
    engine: Any = registry.make(settings)
    engine.restore(state)
    if settings.framework == "jax":
        from fsam_trainers.models.flax_decoder import flattened

        adam = engine.state.opt_state
        second = {name: np.asarray(x) for name, x in flattened(adam.nu).items()}
        return engine.weights(), Moments(second, int(adam.count), settings)
    kept = {name: engine.optimizer.state[p] for name, p in engine.model.named_parameters()}
    second = {name: one["exp_avg_sq"].detach().cpu().numpy() for name, one in kept.items()}
    return engine.weights(), Moments(second, int(next(iter(kept.values()))["step"]), settings)


def micro_batches(windows: Batch) -> list[Batch]:
    """The windows, or images, in parts of equal size, of at most SEQUENCES each."""
    count = rows_of(windows)
    parts = next(m for m in range(1, count + 1) if count % m == 0 and count // m <= SEQUENCES)
    return micro_batches_of(windows, parts)


class Curvatures:
    """Makes the `Curvature` of each subject over the same windows, in the subject's framework.

    The loss is the reported one, without label smoothing and z-loss. Compiled programs serve all checkpoints of a run.
    """

    def __init__(self, windows: Batch, dtype: str, products: Products) -> None:
        self._parts, self._dtype, self._products = micro_batches(windows), dtype, products
        self._last: tuple[Any, Any] | None = None

    @contextmanager
    def of(self, subject: Subject) -> Iterator[Any]:
        """Within the block, JAX computes in `dtype`.

        Raises:
            UserError: as the framework's Curvature.
        """
        loss = Loss(soft_cap=subject.soft_cap or None)
        config = dataclasses.replace(subject.config, dropout=0.0)
        if subject.framework == "torch":
            yield self._in_torch(config, loss, subject.weights)
            return
        import jax

        with jax.enable_x64(self._dtype == "float64"):
            yield self._in_jax(config, loss, subject.weights)

    def _in_torch(self, config: ModelConfig, loss: Loss, weights: dict[str, np.ndarray]) -> Any:
        import torch

        from fsam_core.torch.curvature import Curvature
        from fsam_trainers.torch.engine import placed

        device, module = in_torch(), module_of("torch", config)
        model = module.Model(config, weights=weights).eval().to(device, getattr(torch, self._dtype))
        batch = MicroBatches(placed(part, device) for part in self._parts)
        return Curvature(model, partial(module.features, loss=loss), batch, products=self._products)

    def _in_jax(self, config: ModelConfig, loss: Loss, weights: dict[str, np.ndarray]) -> Any:
        import jax
        import jax.numpy as jnp

        from fsam_core.jax.curvature import Curvature
        from fsam_trainers.models.flax_decoder import nested

        dtype = jnp.dtype(self._dtype)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), nested(weights))
        if self._last is not None and self._last[0] == (config, loss):
            return self._last[1].at(params)
        module = module_of("flax", config)
        features = partial(module.features, module.Model(config), loss=loss, dtype=dtype)
        batch = MicroBatches(named(each(jnp.asarray, part)) for part in self._parts)
        found = Curvature(features, params, batch, products=self._products)
        self._last = (config, loss), found
        return found


def as_tree(subject: Subject, flat: dict[str, np.ndarray]) -> Any:
    """Arrays by flat name in the form that the subject's framework has them."""
    if subject.framework == "torch":
        import torch

        return {name: torch.from_numpy(np.array(x)) for name, x in flat.items()}
    from fsam_trainers.models.flax_decoder import nested

    tree: Any = nested(flat)
    return tree


def adam_direction(moments: Moments, gradient: np.ndarray, second: np.ndarray) -> np.ndarray:
    """d = g / (sqrt(v̂) + ε) as the run's next step would take it, from g[P] and v[P]."""
    settings, count = moments.settings, moments.steps
    current = settings.second_moment == "current"
    clip = spec.clip_factor([gradient], settings.clip_norm or None)
    correction = spec.bias_correction(count + 1, settings.b2, current=current)
    return spec.direction(
        gradient, second, clip=clip, b2=settings.b2, eps=settings.eps, correction=correction, current=current
    )


def windows(sources: Sequence[Source], data: str | None, tokenizer: Path | None, tokens: int) -> Batch:
    """The held-out windows that all sources are measured on, int32 [W, seq_len + 1], about `tokens` tokens.

    Of models of images, as many images as have about `tokens` patches.

    Args:
        data: a text or a set of images; None for that of the first run.

    Raises:
        UserError: where the models take other tokens or sizes of vocabulary, or other images.
    """
    first, data = sources[0].model.config, data or sources[0].model.data
    if isinstance(first, ViTConfig):
        return _images([source.model for source in sources], data, max(1, tokens // first.seq_len))
    from fsam_trainers.evaluation import held_out

    length = min(source.model.config.seq_len for source in sources)
    count = max(1, tokens // length)
    reading = pretrained.reading_of([source.model for source in sources], data)
    every = [held_out(source.model, data, tokenizer, length, count, reading) for source in sources]
    for source, own in zip(sources, every, strict=True):
        if not np.array_equal(own, every[0]):
            raise UserError(
                f"{ARGUMENT}: {source.model.source} has another tokenizer than {sources[0].model.source}, so their "
                "losses are of other tokens; give them to a command each"
            )
    return every[0]


def _images(models: Sequence[pretrained.Pretrained], data: str, count: int) -> Batch:
    from fsam_trainers.image_evaluation import held_out

    every = [held_out(data, model, count) for model in models]
    if any(digest != every[0][1] for _, digest in every):
        raise UserError(f"{ARGUMENT}: the models take images of other sizes; give them to a command each")
    batches = list(every[0][0])
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
