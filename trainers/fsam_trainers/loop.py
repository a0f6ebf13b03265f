"""The training loop, the same for both frameworks: steps, metrics, evaluation, checkpoints, signals."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsam_core import UserError
from fsam_trainers import checkpoints, metrics, processes, registry
from fsam_trainers.config import Intervals, Settings, difference
from fsam_trainers.console import Console
from fsam_trainers.data import Batches, Corpus, StreamedBatches, StreamedCorpus, merged, validation_batches
from fsam_trainers.engine import Engine, StepReport
from fsam_trainers.files import disk_errors
from fsam_trainers.saving import Saver
from fsam_trainers.timing import base_step_ms

LAUNCHER_SECONDS = 5.0  # a launcher passes a signal on within this time; its ranks have received it already
SKIPPED_IN_A_ROW = 50  # after so many the run has diverged


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
    base_step_ms: float | None = None


@dataclass
class Stop:
    """The signal that has asked the run to stop; a second one ends the process at once."""

    signal: int = 0
    previous: dict[int, Any] = field(default_factory=dict)


def train(
    settings: Settings,
    corpus: Corpus | StreamedCorpus,
    out: Path,
    intervals: Intervals,
    console: Console,
    base_ms: float | None = None,
) -> dict[str, Any]:
    """Train in the folder `out`, or resume the run that is there.

    Args:
        settings: what to train; a checkpoint in `out` must have been made with the same.
        corpus: tokens; likewise.
        out: receives metrics.jsonl and checkpoints/.
        base_ms: milliseconds of an AdamW step; None to measure them.

    Returns:
        The run's figures: what `fsam train --json` writes. "status" is "finished" or "stopped" (by a signal).

    Raises:
        UserError: for a folder that holds another run or damaged checkpoints, a full disk, or a run that diverged.
    """
    root = out / "checkpoints"
    with (
        _locked(out),
        _signals() as stop,
        contextlib.closing(processes.batches(settings, corpus)) as batches,
        Saver(root, intervals.keep) as saver,
    ):
        held_out = validation_batches(
            corpus.validation, settings.model.seq_len, settings.batch, intervals.evaluation_batches
        )
        run = {"settings": settings.as_dict(), "data": corpus.fingerprint}
        now = Progress(base_step_ms=base_ms)

        def newest() -> checkpoints.Checkpoint | None:
            found = checkpoints.newest(root, console.warn)
            if found:
                _same_run(run, found.run, out)
            return found

        found = processes.current().from_main(newest)
        if found:
            batches.restore(found.run.get("stream"))
            now = Progress(**found.run["progress"])
        elif intervals.probe_steps and base_ms is None and settings.method != "adamw":
            console.say("timing AdamW steps for comparison")
            now.base_step_ms = base_step_ms(settings, batches.at(0), intervals.probe_steps)
        model = registry.make(settings)
        if found:
            model.restore(found.state)
            console.say(f"resuming {out} at step {now.step} of {settings.steps}")
        main = processes.current().is_main
        lines = metrics.JsonLines(out / "metrics.jsonl", now.step) if main else _Nowhere()

        def checkpoint() -> None:
            began = time.perf_counter()
            where = {"progress": vars(now), "stream": merged(processes.current().gathered(batches.state(now.step)))}
            saver.save(now.step, {**run, **where}, model)
            now.checkpoints += 1
            now.checkpoint_seconds += time.perf_counter() - began

        def evaluate() -> None:
            now.val_loss = model.evaluate(held_out)
            lines.write({"step": now.step, "seconds": now.seconds, "val_loss": now.val_loss})
            console.evaluated(now.step, now.val_loss)

        with console.progress(settings, now) as bar, contextlib.closing(lines):
            if now.step < settings.steps:
                model.prepare(batches.at(now.step))
            in_a_row, first = 0, now.step
            for report, milliseconds in _steps(model, batches, settings, now, stop, intervals, saver):
                in_a_row = in_a_row + 1 if report.skipped else 0
                if report.skipped:
                    now.skipped_steps += 1
                    console.warn(f"step {now.step} skipped: loss or a norm was not finite ({report})")
                if in_a_row >= SKIPPED_IN_A_ROW:
                    saver.wait()
                    raise UserError(
                        f"{in_a_row} steps in a row were not finite: the run has diverged; lower --learning-rate "
                        f"{settings.learning_rate} or --rho {settings.rho}. Checkpoints up to then are in {root}"
                    )
                lines.write(_line(settings, now, report, milliseconds))
                bar(report.loss, milliseconds)
                if _due(now.step, intervals.evaluate_every, settings.steps):
                    evaluate()
                if _due(now.step, intervals.checkpoint_every, settings.steps):
                    checkpoint()
            if stop.signal and first < now.step < settings.steps and not _due(now.step, intervals.checkpoint_every, 0):
                checkpoint()
            saver.wait()
        return processes.current().from_main(lambda: _figures(settings, corpus, model, now, out, stop))


def _steps(
    model: Engine,
    batches: Batches | StreamedBatches,
    settings: Settings,
    now: Progress,
    stop: Stop,
    intervals: Intervals,
    saver: Saver,
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

    for index in range(now.step, settings.steps):
        # All ranks stop after the same step. A signal during the wait takes effect before the next step.
        if agreed := saver.poll(stop.signal):
            stop.signal = agreed
            break
        started = model.step(batches.at(index), index)
        if waiting:
            yield finished(waiting)
        waiting = started
        pause = any(_due(index + 1, n, settings.steps) for n in (intervals.evaluate_every, intervals.checkpoint_every))
        if pause or not model.asynchronous:
            yield finished(waiting)
            waiting, began = None, time.perf_counter()
    if waiting:
        yield finished(waiting)


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _line(settings: Settings, now: Progress, report: StepReport, milliseconds: float) -> dict[str, Any]:
    completed = now.step - 1 - now.skipped_steps + report.skipped  # before this step; `now` counts it
    return {
        "step": now.step,
        "tokens": now.step * settings.tokens_per_step,
        "seconds": now.seconds,
        "step_ms": milliseconds,
        "learning_rate": settings.learning_rate_at(completed),
        "kind": settings.kind(completed),
        **report._asdict(),
    }


def _figures(
    settings: Settings, corpus: Corpus | StreamedCorpus, model: Engine, now: Progress, out: Path, stop: Stop
) -> dict[str, Any]:
    lines = [x for x in metrics.read(out / "metrics.jsonl") if "loss" in x]
    milliseconds = statistics.median(x["step_ms"] for x in lines) if lines else None
    base = milliseconds if settings.method == "adamw" else now.base_step_ms
    last = [x["loss"] for x in lines[-20:] if x["loss"] is not None]
    return {
        "status": "stopped" if stop.signal and now.step < settings.steps else "finished",
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


def _same_run(mine: dict[str, Any], other: dict[str, Any], out: Path) -> None:
    if changed := difference(mine["settings"], other["settings"]):
        raise UserError(f"--out: {out} holds a run with {changed}; give the same settings, or another --out")
    if mine["data"] != other["data"]:
        raise UserError(f"--out: {out} holds a run on other data or another tokenizer; give the same, or another --out")


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
