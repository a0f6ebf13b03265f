"""The training loop, the same for both frameworks: steps, metrics, evaluation, checkpoints, signals."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsam_core import UserError
from fsam_trainers import metrics, pretrained, processes, registry, resuming
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.data import AnyCorpus, Batch, held_out_batches, merged
from fsam_trainers.engine import Engine, StepReport
from fsam_trainers.files import disk_errors, write_toml
from fsam_trainers.resuming import BranchPoint
from fsam_trainers.saving import Saver
from fsam_trainers.timing import base_step_ms

LAUNCHER_SECONDS = 5.0  # a launcher passes a signal on within this time; its ranks have received it already
SKIPPED_IN_A_ROW = 50  # after so many the run has diverged
SKIPPED_SHARE = 0.25  # of all steps; a run with more has diverged


@dataclass
class Progress:
    """How far a run is: what its checkpoints hold in addition to the state."""

    step: int = 0
    seconds: float = 0.0
    """Of training steps only, without compilation, evaluation and checkpoints."""
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    """Time that training waited for them."""
    skipped_steps: int = 0
    val_loss: float | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, "val_accuracy" say; none of a text."""
    base_step_ms: float | None = None


@dataclass
class Stop:
    """The signal that has asked the run to stop; a second one ends the process at once."""

    signal: int = 0
    previous: dict[int, Any] = field(default_factory=dict)


def train(
    settings: Settings,
    corpus: AnyCorpus,
    out: Path,
    intervals: Intervals,
    console: Console,
    base_ms: float | None = None,
    *,
    until: int | None = None,
    fresh: bool = False,
    branch_from: BranchPoint | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train in the folder `out`, or resume or extend the run that is there.

    Args:
        settings: what to train; a checkpoint in `out` must have been made with the same, but for the run's end.
        corpus: tokens; likewise.
        out: receives metrics.jsonl, config.toml and checkpoints/.
        base_ms: milliseconds of an AdamW step; None to measure them.
        until: the step to pause at; None for the end.
        fresh: whether a run in `out` is deleted first.
        branch_from: the checkpoint of another run to start from.
        options: of the command, besides `settings` and `intervals`, for config.toml.

    Returns:
        The run's figures: what `fsam train --json` writes. "status" is "finished", "paused" (at `until`), "stopped" (by
        a signal) or "diverged".

    Raises:
        UserError: for a folder that holds another run or damaged checkpoints, or a full disk.
    """
    root = out / "checkpoints"
    with (
        _locked(out),
        _signals() as stop,
        contextlib.closing(processes.batches(settings, corpus)) as batches,
        Saver(root, intervals.keep) as saver,
    ):
        held_out = held_out_batches(corpus, settings.model.seq_len, settings.batch, intervals.evaluation_batches)
        run: dict[str, Any] = {"settings": settings.as_dict(), "data": corpus.fingerprint}
        kept = settings.decay_start if settings.learning_rate_schedule == "wsd" else 0
        run |= {"kept_step": kept} if 0 < kept < settings.steps else {}
        now = Progress(base_step_ms=base_ms)

        def start() -> tuple[resuming.Start | None, dict[str, str] | None]:
            begun = resuming.begun_of(settings)
            if fresh:
                resuming.clear(out, settings, corpus.fingerprint, corpus.folder, branch_from)
            found = resuming.start(out, settings, corpus.fingerprint, branch_from, begun, console)
            values = {**(options or {}), **vars(intervals), **settings.as_dict()}
            write_toml(out / "config.toml", {**values.pop("model"), **values})
            pretrained.keep_tokenizer(corpus.folder, out)
            return found, begun

        found, begun = processes.current().from_main(start)
        run |= {"begun": begun} if begun else {}
        if found:
            batches.restore(found.checkpoint.run.get("stream"))
            now = Progress(**found.checkpoint.run["progress"])
            branch = found.branch or found.checkpoint.run.get("branch")
            run |= {"branch": branch} if branch else {}
        elif intervals.probe_steps and base_ms is None and settings.method != "adamw":
            console.say("timing AdamW steps for comparison")
            now.base_step_ms = base_step_ms(settings, batches.at(0), intervals.probe_steps)
        model = registry.make(settings)
        if found:
            model.restore(found.checkpoint.state, found.source)
            console.say(f"{'branching' if found.source else 'resuming'} {out} at step {now.step} of {settings.steps}")
        main = processes.current().is_main
        given = (out, now.step, intervals.log, run["settings"], console.warn)
        lines = metrics.open_lines(*given) if main else _Nowhere()

        def checkpoint() -> None:
            began = time.perf_counter()
            where = {"progress": vars(now), "stream": merged(processes.current().gathered(batches.state(now.step)))}
            saver.save(now.step, {**run, **where}, model)
            now.checkpoints += 1
            now.checkpoint_seconds += time.perf_counter() - began

        def evaluate() -> None:
            now.val_loss, now.accuracies = model.evaluate(held_out)
            line = {"step": now.step, "seconds": now.seconds, "val_loss": now.val_loss, **now.accuracies}
            if settings.ema:
                line["val_loss_without_ema"] = model.evaluate(held_out, average=False).loss
            lines.write(line)
            console.evaluated(now.step, now.val_loss, now.accuracies)

        last: list[Batch] = []  # the batch of the last step

        def batch(index: int) -> Batch:
            last[:] = [batches.at(index)]
            return last[0]

        due = Due(intervals, min(settings.steps, until or settings.steps), kept)
        with console.progress(settings, now) as bar, contextlib.closing(lines):
            if now.step < due.end:
                model.prepare(batches.at(now.step))
            in_a_row, first, lost = 0, now.step, False
            for report, milliseconds in _steps(model, batch, due, now, stop, saver):
                in_a_row = in_a_row + 1 if report.skipped else 0
                if report.skipped:
                    now.skipped_steps += 1
                    console.warn(f"step {now.step} skipped: loss or a norm was not finite ({report})")
                if lost := in_a_row >= SKIPPED_IN_A_ROW:
                    console.warn(f"{in_a_row} steps in a row were not finite; checkpoints up to then are in {root}")
                    now.val_loss = None
                    break
                line = _line(settings, now, report, milliseconds)
                if due.correction(now.step) and (found_correction := model.correction(last[0], now.step - 1)):
                    line |= found_correction._asdict()
                if due.sharpness(now.step):
                    line |= _shares(settings, held_out[0], model)
                lines.write(line)
                bar(report.loss, milliseconds)
                if due.evaluation(now.step):
                    evaluate()
                if due.checkpoint(now.step):
                    checkpoint()
            if stop.signal and not lost and first < now.step < due.end and not due.checkpoint(now.step):
                checkpoint()
            saver.wait()
        status = "diverged" if lost else _status(settings, now, stop)
        return processes.current().from_main(lambda: _figures(settings, corpus, model, now, out, stop, status))


@dataclass(frozen=True)
class Due:
    """What follows which step of a run up to step `end`."""

    intervals: Intervals
    end: int
    kept: int
    """A step with a checkpoint that stays; 0 for none."""

    def evaluation(self, step: int) -> bool:
        return step == self.end or _divides(self.intervals.evaluate_every, step)

    def checkpoint(self, step: int) -> bool:
        return step in (self.end, self.kept) or _divides(self.intervals.checkpoint_every, step)

    def correction(self, step: int) -> bool:
        return _divides(self.intervals.correction_every, step)

    def sharpness(self, step: int) -> bool:
        return _divides(self.intervals.sharpness_every, step)

    def anything(self, step: int) -> bool:
        return any(x(step) for x in (self.evaluation, self.checkpoint, self.correction, self.sharpness))


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _steps(
    model: Engine, batch: Callable[[int], Batch], due: Due, now: Progress, stop: Stop, saver: Saver
) -> Iterator[tuple[StepReport, float]]:
    """Take the remaining steps; yields the report and the milliseconds of each, after `now` was updated.

    If the framework computes in the background, the next step is started before the last one is waited for, so that the
    device does not wait for the host. Before an evaluation or a checkpoint this waits for the step.
    """
    waiting: Callable[[], StepReport] | None = None
    began = time.perf_counter()

    def finished(report: Callable[[], StepReport]) -> tuple[StepReport, float]:
        nonlocal began
        seen, ended = report(), time.perf_counter()
        seconds, began = ended - began, ended
        now.step += 1
        now.seconds += seconds
        return seen, 1000 * seconds

    for index in range(now.step, due.end):
        # All ranks stop after the same step. A signal during the wait takes effect before the next step.
        if agreed := saver.poll(stop.signal):
            stop.signal = agreed
            break
        started = model.step(batch(index), index)
        if waiting:
            yield finished(waiting)
        waiting = started
        if due.anything(index + 1) or not model.asynchronous:
            yield finished(waiting)
            waiting, began = None, time.perf_counter()
    if waiting:
        yield finished(waiting)


def _shares(settings: Settings, batch: Batch, model: Engine) -> dict[str, float]:
    """The shares of H g at θ. The profiling package measures them; nothing else of it is imported."""
    if processes.current().count > 1:
        raise UserError("--sharpness-every takes one process; give the checkpoints to `fsam sharpness` afterwards")
    measured = importlib.import_module("fsam_profiling.sharpness.during")
    return measured.shares_of(settings, batch, model.weights())


def _line(settings: Settings, now: Progress, report: StepReport, milliseconds: float) -> dict[str, Any]:
    completed = now.step - 1 - now.skipped_steps + report.skipped  # before this step; `now` counts it
    return {
        "step": now.step,
        "tokens": now.step * settings.tokens_per_step,
        "seconds": now.seconds,
        "step_ms": milliseconds,
        "learning_rate": settings.learning_rate_at(completed),
        "rho": settings.rho_at(completed) if settings.kind(completed) == "corrected" else 0.0,
        "kind": settings.kind(completed),
        "skipped_steps": now.skipped_steps,
        **report._asdict(),
    }


def _figures(
    settings: Settings, corpus: AnyCorpus, model: Engine, now: Progress, out: Path, stop: Stop, status: str
) -> dict[str, Any]:
    lines = [x for x in metrics.read(out / "metrics.jsonl") if "loss" in x]
    milliseconds = statistics.median(x["step_ms"] for x in lines) if lines else None
    base = milliseconds if settings.method == "adamw" else now.base_step_ms
    last = [x["loss"] for x in lines[-20:] if x["loss"] is not None]
    return {
        "status": status,
        "signal": stop.signal,
        "method": settings.method,
        "framework": settings.framework,
        "backend": model.backend,
        "device": model.device,
        "params": settings.model.parameters,
        "non_embedding_params": settings.model.non_embedding_parameters,
        "steps": now.step,
        "tokens": now.step * settings.tokens_per_step,
        "seconds": now.seconds,
        "step_ms_median": milliseconds,
        "base_step_ms": base,
        "cost_ratio": _mean_of_medians(lines) / base if lines and base else None,
        "checkpoint_ms": 1000 * now.checkpoint_seconds / now.checkpoints if now.checkpoints else None,
        "train_loss": statistics.fmean(last) if last else None,
        "val_loss": now.val_loss,
        **now.accuracies,
        "skipped_steps": now.skipped_steps,
        "settings": settings.as_dict(),
        "data": {"description": corpus.description, "fingerprint": corpus.fingerprint},
        "out": str(out),
    }


def _mean_of_medians(lines: list[dict[str, Any]]) -> float:
    """Milliseconds of the run's average step: the median of each kind of step, weighted by their numbers."""
    kinds: dict[str, list[float]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line["step_ms"])
    return sum(statistics.median(of) * len(of) for of in kinds.values()) / len(lines)


def _status(settings: Settings, now: Progress, stop: Stop) -> str:
    if now.step < settings.steps:
        return "stopped" if stop.signal else "paused"
    too_many = now.skipped_steps > SKIPPED_SHARE * now.step
    return "diverged" if too_many or now.val_loss is None or not math.isfinite(now.val_loss) else "finished"


class _Nowhere:
    """The metrics of every rank but the main one: discarded."""

    def write(self, value: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock: two runs would overwrite each other's checkpoints."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(_lock(out))

        processes.current().from_main(lock)
        yield


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out: another process is training in {out}; wait for it, or give another --out"
            ) from None
        yield


@contextlib.contextmanager
def _signals() -> Iterator[Stop]:
    stop = Stop()

    began = 0.0

    def handle(number: int, _frame: Any) -> None:
        nonlocal began
        # Ctrl-C reaches the ranks twice: directly, and through their launcher. That is one signal.
        again = stop.signal and time.monotonic() - began > LAUNCHER_SECONDS
        if not stop.signal:
            stop.signal, began = number, time.monotonic()
        if again or processes.current().count == 1:
            for one, previous in stop.previous.items():  # a second signal ends the process
                signal.signal(one, previous)
        if again:
            signal.raise_signal(number)

    stop.previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in stop.previous.items():
            signal.signal(number, previous)
