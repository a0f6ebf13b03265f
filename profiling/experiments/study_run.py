"""One run of the study: trained up to a step, or taken from the file of finished runs.

A line of that file is a run, or a beginning of one that tuning has looked at. Whoever runs the study next finds it
there; the run's folder is needed only to go on from such a beginning.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import study_data
from fsam_kernels.options import Loss
from fsam_profiling.sharpness import numerics
from fsam_profiling.sharpness.subjects import Curvatures, Subject
from fsam_trainers import metrics, pretrained
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.data import Corpus
from fsam_trainers.data.batches import windows_of
from fsam_trainers.files import disk_errors
from fsam_trainers.fine_tuning import fine_tuned
from fsam_trainers.loop import train
from fsam_trainers.processes import Stopped
from fsam_trainers.quantize import noisy, rounded
from fsam_trainers.resuming import BranchPoint
from study_plan import REGIMES, Regime, base_settings

WINDOWS = 256  # of held-out text, for what is measured after a run
CURVATURE_WINDOWS = 32  # for the Hessian
FINE_TUNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
FINE_TUNING_STEPS = 125


class Runs(NamedTuple):
    """The runs of a regime.

    Attributes:
        name: of the regime.
        out: the folder of the runs.
        done: the file with a line for each finished run.
    """

    name: str
    out: Path
    done: Path

    @property
    def regime(self) -> Regime:
        return REGIMES[self.name]

    def corpus(self) -> Corpus:
        """The tokens that the regime's runs train on."""
        regime = self.regime
        tokenizer = self.base_corpus().folder / "tokenizer.json" if regime.base and not regime.late else None
        return study_data.corpus(regime.data, regime.max_tokens, regime.model, self.out, tokenizer)

    def base_corpus(self) -> Corpus:
        """The tokens of the runs that they start from."""
        assert self.regime.base is not None
        data, max_tokens, _ = self.regime.base
        return study_data.corpus(data, max_tokens, self.regime.model, self.out)

    def prepare(self) -> None:
        """Make the texts, before several processes want them."""
        self.corpus()
        if self.regime.late:
            tokenizer = self.base_corpus().folder / "tokenizer.json"
            study_data.corpus("prose", None, self.regime.model, self.out, tokenizer)

    def lines(self) -> list[dict[str, Any]]:
        """The file's lines that are of the data of this machine."""
        data = self.corpus().fingerprint
        return [line for line in metrics.read(self.done) if line["data"] == data]

    def figures(self, settings: Settings, label: str, until: int | None = None) -> dict[str, Any]:
        """The run's figures at step `until`, or at its end; losses are None if it has diverged.

        Raises:
            Stopped: when a signal has stopped it; the next call resumes it.
        """
        step, key = until or settings.steps, self.key(settings)
        mine = [line for line in self.lines() if line["key"] == key and line["step"] == step]
        if not any(line["row"] == label for line in mine):
            found = mine[0] if mine else self._trained(settings, key, step)
            named = {"row": label, "seed": settings.seed, "step": step, "key": key, "data": self.corpus().fingerprint}
            mine = [{"settings": _chosen(settings) | _chosen(settings.model), **found, **named}]
            self._append(mine[0])
        return mine[-1]

    def key(self, settings: Settings) -> str:
        """A hash of what is trained: settings that differ from their defaults, the data, the base."""
        own: list[Any] = [
            type(settings).__name__,
            _chosen(settings),
            _chosen(settings.model),
            self.corpus().fingerprint,
        ]
        if self.regime.base:
            base = base_settings(self.regime, settings.seed)
            own += [self.regime.late, _chosen(base), _chosen(base.model), self.base_corpus().fingerprint]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def _append(self, line: dict[str, Any]) -> None:
        with disk_errors(self.done):
            self.done.parent.mkdir(parents=True, exist_ok=True)
            with self.done.open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(line) + "\n")

    def _trained(self, settings: Settings, key: str, step: int) -> dict[str, Any]:
        regime, folder = self.regime, self.out / "runs" / key
        branch = None
        if regime.late:
            base = self.base(settings.seed)
            branch = BranchPoint(base, base_settings(regime, settings.seed).decay_start)
        elif regime.base:
            settings = dataclasses.replace(settings, init_from=str(self.base(settings.seed)))
        first = 0 if branch is None else branch.step
        every = max(1, (settings.steps - first) // regime.evaluations)
        pace = Intervals(every, 16, checkpoint_every=1000, probe_steps=0)
        found = train(settings, self.corpus(), folder, pace, Console(quiet=True), until=step, branch_from=branch)
        if found["status"] == "stopped":
            raise Stopped
        if found["val_loss"] is None:  # diverged
            return {"val_loss": None, "best_val_loss": None, "best_step": 0, "curve": [], "skipped_steps": step}
        seen = [(x["step"], x["val_loss"]) for x in metrics.read(folder / "metrics.jsonl") if x.get("val_loss")]
        best = min(seen, key=lambda point: point[1])
        figures = {"val_loss": seen[-1][1], "best_val_loss": best[1], "best_step": best[0], "curve": seen}
        figures |= {"skipped_steps": found["skipped_steps"], "steps": settings.steps}
        if step == settings.steps:
            figures |= self._afterwards(folder)
            shutil.rmtree(folder)
        return figures

    def base(self, seed: int) -> Path:
        """The folder of AdamW's run that the regime's runs of a seed start from, trained if it is not there."""
        assert self.regime.base is not None
        settings = base_settings(self.regime, seed)
        folder = self.out / "bases" / f"{self.name}-{seed}"
        until = settings.decay_start if self.regime.late else settings.steps
        pace = Intervals(evaluate_every=until // 8, checkpoint_every=1000, probe_steps=0)
        done = folder / "checkpoints" / f"step_{until:08d}"
        if not done.exists():
            found = train(settings, self.base_corpus(), folder, pace, Console(quiet=True), until=until)
            if found["status"] == "stopped":
                raise Stopped
        return folder

    def _afterwards(self, folder: Path) -> dict[str, Any]:
        """What a regime with a base looks at after a run: other weights, other text, and what fine-tuning does."""
        if not self.regime.base:
            return {}
        found = pretrained.find(str(folder), "study")
        old, weights = self.base_corpus(), found.weights()
        if not self.regime.late:
            return {"old_loss": self._loss(found, weights, old)}
        changed = {f"{bits} bits": rounded(weights, bits) for bits in (4, 3)} | {"noise": noisy(weights, 0.1, 0)}
        losses = {name: self._loss(found, one, old) for name, one in changed.items()}
        runs = fine_tuned(
            found, str(self.out / "prose"), list(FINE_TUNING_RATES), folder / "tuned", Console(quiet=True),
            framework="torch", steps=FINE_TUNING_STEPS, batch=self.regime.batch,
        )  # fmt: skip
        prose = study_data.corpus("prose", None, found.config, self.out, found.own_tokenizer())
        tuned = [pretrained.find(run, "study") for run in runs]
        pairs = [[self._loss(x, x.weights(), text) for text in (prose, old)] for x in tuned]
        figures = losses | {"λmax": _largest_eigenvalue(found, weights, _windows(found, old, CURVATURE_WINDOWS))}
        return figures | {"prose": self._loss(found, weights, prose), "fine_tuning": pairs}

    def _loss(self, found: pretrained.Pretrained, weights: dict[str, np.ndarray], text: Corpus) -> float:
        """Mean loss over the first held-out windows of a text."""
        windows, config = _windows(found, text, WINDOWS), dataclasses.replace(found.config, dropout=0.0)
        return float(np.mean(pretrained.inference("torch").window_losses(config, weights, Loss(), windows)))


def _windows(found: pretrained.Pretrained, text: Corpus, most: int) -> np.ndarray:
    """The first held-out windows of a text."""
    length = found.config.seq_len
    return windows_of(text.validation, np.arange(min(most, (text.validation.size - 1) // length)), length)


def _largest_eigenvalue(found: pretrained.Pretrained, weights: dict[str, np.ndarray], windows: np.ndarray) -> float:
    """Of the Hessian of the mean loss over these windows."""
    subject = Subject("study", None, None, found.config, found.soft_cap, "torch", weights, None)
    with Curvatures(windows, "float32", "exact").of(subject) as curvature:
        product = lambda v: curvature.vector(curvature.hessian(curvature.tree(v)))
        ends = numerics.extremes(product, curvature.size, 1, np.random.default_rng(0), dtype=np.float32)
    return ends.largest[0]


def _chosen(settings: Any) -> dict[str, Any]:
    """The values that differ from their defaults: a run stays finished when an option is added."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    changed = {name: value for name, (value, default) in sorted(values.items()) if value != default}
    return {name: value for name, value in changed.items() if name not in ("model", "init_from")}
