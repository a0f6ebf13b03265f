"""What a user should believe about the methods: tuned runs in five regimes, several seeds, resumable by run.

    python profiling/experiments/study.py --regimes scarce,repeated --jobs 2 --minutes 60

Each finished run is a line of docs/results/study/REGIME.jsonl and is not repeated: stopped at any moment, killed or out
of minutes, the same command resumes, also on another machine with the same texts. `study_plan` has the regimes and
their rows, and `study_report` makes the page of whatever is there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import study_report
from fsam_core import UserError
from fsam_trainers.console import Console
from fsam_trainers.processes import Stopped
from fsam_trainers.tuning import Candidate, Values, text, tune
from study_plan import ADAMW, DECAY, REGIMES, TUNING_SEED, Entry, at_equal_time, entries, settings_of
from study_run import Runs

GRACE = 30.0  # seconds in which a run that is to stop writes its checkpoint


@dataclass(frozen=True)
class Study:
    """Train the rows of some regimes; the same command resumes."""

    regimes: str = ",".join(REGIMES)
    """which, in this order, separated by commas"""
    jobs: int = 1
    """rows at once, each on one core"""
    minutes: float = math.inf
    """stop after so many; a run that is under way writes a checkpoint first"""
    out: Path = Path("runs/study")
    """folder of the runs, their bases, the prose, and the page study.html"""
    results: Path = Path("docs/results")
    """folder that receives study/REGIME.jsonl, study.md and the plots"""


def main() -> None:
    """The command."""
    study = tyro.cli(Study, prog="python profiling/experiments/study.py")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(execute(study, Console()))
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def execute(study: Study, console: Console) -> int:
    """Run what there is time for, then write the page; 0 if nothing is missing, 3 if something is.

    Raises:
        UserError: for an unknown regime, and as the runs.
    """
    names = study.regimes.split(",")
    if unknown := [name for name in names if name not in REGIMES]:
        raise UserError(f"--regimes: {', '.join(unknown)} is not known; use some of {', '.join(REGIMES)}")
    deadline = time.time() + 60 * study.minutes
    try:
        for name in names:
            _regime(study, Runs(name, study.out, study.results / "study" / f"{name}.jsonl"), deadline, console)
    except (Stopped, BrokenProcessPool):
        console.say("stopped; the same command resumes")
    study_report.write(study.results, study.out)
    return 3 if any(study_report.missing(study.results / "study", name) for name in names) else 0


def _regime(study: Study, runs: Runs, deadline: float, console: Console) -> None:
    """Train a regime's rows in processes, which a signal stops at once."""
    runs.prepare()
    with ProcessPoolExecutor(
        study.jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(deadline,)
    ) as pool:
        try:
            _train_rows(pool, runs, deadline, console)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while children := multiprocessing.active_children():
                for child in children:
                    child.terminate()  # a run under way writes a checkpoint
                for child in children:  # one that has begun a row which the pool had handed over already is told again
                    child.join(GRACE / len(children))
            raise


def _train_rows(pool: ProcessPoolExecutor, runs: Runs, deadline: float, console: Console) -> None:
    """Tune AdamW's learning rate, then the decay that other rows stand on, then everything else at once."""
    regime, tuned = runs.regime, dict[str, dict[str, float]]()
    if regime.base:
        tunes = any(entry.row.tunes for entry in entries(regime))
        every = max((regime.seeds_of(entry.label) for entry in entries(regime)), key=len)
        for _ in pool.map(runs.base, [*every, *[TUNING_SEED] * tunes]):
            console.say(f"{runs.name}: a base")
    for label in [ADAMW] * bool(regime.rivals) + [DECAY] * bool(regime.on_decay):
        rate = tuned.get(ADAMW, {})
        tuned[label] = pool.submit(tune_entry, runs, Entry(label, regime.rivals[label]), rate, deadline).result()
        console.say(f"{runs.name}: {label} {tuned[label]}")
    base, decayed = tuned.get(ADAMW, {}), {**tuned.get(ADAMW, {}), **tuned.get(DECAY, {})}
    # A row at equal time has the ρ of the row by itself.
    for late in (False, True):
        futures: dict[Future[dict[str, float]], str] = {}
        for entry in (x for x in entries(regime) if x.equal_time is late):
            known = tuned.get(entry.label.removesuffix(", equal time"), {})
            at = (runs, entry, decayed if entry.on_decay else base, known, deadline)
            futures[pool.submit(train_entry, *at)] = entry.label
        for future in as_completed(futures):
            tuned[futures[future]] = future.result()
            console.say(f"{runs.name}: {futures[future]} {future.result()}")


def tune_entry(runs: Runs, entry: Entry, given: dict[str, float], deadline: float) -> dict[str, float]:
    """The best value of a row's option, by its name; nothing where none is tuned.

    Args:
        given: values that other rows have tuned.

    Raises:
        Stopped: at the deadline, or by a signal.
    """
    regime, row = runs.regime, entry.row
    if not row.tunes:
        return {}

    def loss_at(one: Candidate, step: int) -> float:
        if time.time() > deadline:
            raise Stopped
        until = None if step == one.settings.steps else step
        loss = runs.figures(one.settings, f"{entry.label} (tuning)", until)["val_loss"]
        return math.inf if loss is None else loss

    def candidate_of(point: Values) -> Candidate:
        tried = {name: float(value) for name, value in point}
        steps = round(regime.steps * (regime.tuning_rho if row.tunes == "rho" else 1))
        return Candidate(settings_of(regime, row, {**given, **tried}, TUNING_SEED, steps), Path(text(point)))

    best = tune({row.tunes: row.values}, candidate_of, loss_at, Console(quiet=True))
    return {name: float(value) for name, value in best.values.items()}


def train_entry(
    runs: Runs, entry: Entry, given: dict[str, float], known: dict[str, float], deadline: float
) -> dict[str, float]:
    """Train a row's seeds with the values in `known`, or those that `tune_entry` finds; returns them.

    Raises:
        Stopped: as `tune_entry`.
    """
    regime, row = runs.regime, entry.row
    values = known or tune_entry(runs, entry, given, deadline)
    for seed in regime.seeds_of(entry.label):
        if time.time() > deadline:
            raise Stopped
        settings = settings_of(regime, row, {**given, **values}, seed)
        if entry.equal_time:
            settings = settings_of(regime, row, {**given, **values}, seed, at_equal_time(regime, settings))
        runs.figures(settings, entry.label)
    return values


def _begin_worker(deadline: float) -> None:
    """One core for this process, which stops at the deadline, and where the study is killed."""
    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while time.time() < deadline and os.getppid() == parent:
            time.sleep(1)
        while True:  # the first signal has a run write a checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
