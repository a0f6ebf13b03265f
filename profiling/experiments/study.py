"""What each saving loses of the gain: many short tuned runs on the trainers' own data, three seeds, resumable by run.

    python profiling/experiments/study.py --out runs/study --jobs 2

There are two regimes: one pass over the data, and many passes over a small part of it, where AdamW overfits. In each
regime AdamW's learning rate is tuned; then, with that rate, weight decay and dropout (the rivals that a user would try
first), the exact method's ρ and SAM's. Every variant uses these values. All variants are trained with three seeds, in
the second regime also on top of the best rival, and with as many steps as AdamW's time pays for (by measured cost).

A finished run is a line in a file and is not repeated: stopped at any moment, the same command resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console as Rich

from fsam_core import UserError
from fsam_trainers import metrics, timing
from fsam_trainers.config import Settings
from fsam_trainers.data import Batches, prepare
from fsam_trainers.files import disk_errors, write_json
from fsam_trainers.presets import preset
from fsam_trainers.tuning import sweep

METHOD = "precond-functional-sam"
SMALL = 8_000
# Regime -> tokens of data; None for as many as one pass takes.
REGIMES: dict[str, int | None] = {"many passes": SMALL, "one pass": None}
# Evaluations of a run. The best one comes before the end in many passes, and is the last in one pass.
EVALUATIONS = {"many passes": 10, "one pass": 4}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
DECAYS = (1e-2, 0.1, 0.3, 1.0)
DROPOUTS = (0.05, 0.1, 0.2, 0.3)
RHOS = (0.05, 0.1, 0.2, 0.4)
SAM_RHOS = (0.02, 0.05, 0.1, 0.2)

# Name -> (method, settings that it changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "AdamW, average of the weights": ("adamw", {"ema": 0.98}),
    "SAM": ("sam", {}),
    "exact": (METHOD, {}),
    **{
        f"q = 1/{n}, ascent {ascent}": (METHOD, {"correction_fraction": 1 / n, "ascent": ascent})
        for n in (2, 4, 8)
        for ascent in ("full", "part")
    },
    "hidden cut": (METHOD, {"cut": "hidden"}),
    "q = 1/8, hidden cut": (METHOD, {"correction_fraction": 1 / 8, "cut": "hidden"}),
    "upper half of the blocks": (METHOD, {"scope": "top:2"}),
    "last quarter of the run": (METHOD, {"start": 0.75}),
    "previous gradient": (METHOD, {"ascent": "previous"}),
    "momentum": (METHOD, {"ascent": "momentum"}),
}
EQUAL_TIME = tuple(name for name, (method, _) in VARIANTS.items() if method != "adamw")
RIVALS = ("AdamW, weight decay", "AdamW, dropout")
# Kinds of rows, named after a variant's name.
SAME_TIME, BEST_RIVAL = "AdamW's time", "on top of the best rival"


@dataclass(frozen=True)
class Study:
    """Train every variant in both regimes; the same command resumes."""

    out: Path = Path("runs/study")
    """folder of the runs and of results.json"""
    done: Path = Path("docs/results/study-runs.jsonl")
    """file that receives a line for each finished run"""
    steps: int = 160
    """optimizer steps of a run; the whole plan then takes two hours or more on two cores"""
    batch: int = 8
    """sequences a step"""
    seeds: int = 3
    """of every variant; tuning takes the first"""
    jobs: int = 1
    """runs at once, each on one core; time is measured before, with nothing else running"""
    data: str = "python"
    """as in `fsam train`"""
    preset: str = "tiny"
    """model size"""


@dataclass(frozen=True)
class Run:
    """One run of the plan: its folder's name, its settings, how many tokens it may see and how often it evaluates."""

    name: str
    settings: Settings
    max_tokens: int
    evaluations: int


def main() -> None:
    """The command."""
    study = tyro.cli(Study, prog="python profiling/experiments/study.py")
    try:
        execute(study, Rich())
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def execute(study: Study, rich: Rich) -> dict[str, Any]:
    """Run the whole plan; returns the content of `results.json`, which it writes."""
    study.out.mkdir(parents=True, exist_ok=True)
    costs = _costs(study)
    options = {**dataclasses.asdict(study), "out": str(study.out), "done": str(study.done)}
    found: dict[str, Any] = {"study": options, "complete": False, "costs": costs, "regimes": {}}

    def add(regime: str, plan: Iterator[tuple[str, list[Run]]]) -> None:
        found["regimes"][regime]["rows"] |= _rows(study, plan, rich)
        write_json(study.out / "results.json", found)

    for regime in REGIMES:
        found["regimes"][regime] = {"tuned": _tune(study, regime, rich), "rows": {}}
        add(regime, _plan(study, regime, found["regimes"][regime]["tuned"]))
    for regime, of in found["regimes"].items():
        add(regime, _at_equal_time(study, regime, of["tuned"], costs))
    add("many passes", _on_the_best_rival(study, found["regimes"]["many passes"]["tuned"]))
    write_json(study.out / "results.json", found | {"complete": True})
    return found


def _rows(study: Study, plan: Iterator[tuple[str, list[Run]]], rich: Rich) -> dict[str, list[dict[str, Any]]]:
    rows = dict(plan)
    figures = _all(study, [run for runs in rows.values() for run in runs], rich)
    return {name: [figures[run.name] for run in runs] for name, runs in rows.items()}


# --- the plan ---------------------------------------------------------------------------------------------------------


def settings_of(study: Study, variant: str, **options: Any) -> Settings:
    """The settings of one of `VARIANTS`, whose own changes take precedence over `options`."""
    method, changes = VARIANTS[variant]
    size = preset(study.preset)
    chosen = {"learning_rate": size.learning_rate, "rho": size.rho, "dropout": 0.0, **options, **changes}
    model = size.model(tied=True, dropout=chosen.pop("dropout"))
    run: dict[str, Any] = {"framework": "jax", "steps": study.steps, "warmup": min(1000, study.steps // 10)}
    return Settings(method=method, model=model, batch=study.batch, **run, **chosen)


def _tune(study: Study, regime: str, rich: Rich) -> dict[str, Any]:
    """The best learning rate, and with it ρ's, weight decay and dropout, each by the validation loss at the end."""

    def best(label: str, values: tuple[float, ...], of: Any) -> float:
        def losses_of(values: Sequence[float]) -> dict[float, float]:
            runs = {value: _run(study, regime, f"tune {label} {value:g}", of(value)) for value in values}
            figures = _all(study, list(runs.values()), rich)
            return {value: figures[run.name]["val_loss"] for value, run in runs.items()}

        chosen, losses = sweep(values, losses_of, below=1.0 if label == "dropout" else math.inf)
        swept[label] = {f"{value:g}": loss for value, loss in losses.items()}
        return chosen

    swept: dict[str, dict[str, float]] = {}
    rate = best("rate", RATES, lambda x: settings_of(study, "AdamW", learning_rate=x))
    at_rate = lambda variant, **more: settings_of(study, variant, learning_rate=rate, **more)
    decay = best("decay", DECAYS, lambda x: at_rate("AdamW", weight_decay=x))
    dropout = best("dropout", DROPOUTS, lambda x: at_rate("AdamW", dropout=x))
    rho = best("rho", RHOS, lambda x: at_rate("exact", rho=x))
    sam_rho = best("sam rho", SAM_RHOS, lambda x: at_rate("SAM", rho=x))
    with_decay = min(swept["decay"].values()) <= min(swept["dropout"].values())
    rival = {"weight_decay": decay} if with_decay else {"dropout": dropout}
    chosen = {"learning_rate": rate, "weight_decay": decay, "dropout": dropout, "rho": rho, "sam_rho": sam_rho}
    rich.print(f"{regime}: tuned {chosen}, best rival {rival}")
    return {**chosen, "rival": rival, "rival_row": RIVALS[0 if with_decay else 1], "swept": swept}


def _plan(study: Study, regime: str, tuned: dict[str, Any]) -> Iterator[tuple[str, list[Run]]]:
    """Each row's name and its runs, one a seed."""
    for name in VARIANTS:
        yield _row(study, regime, tuned, name, name)
    yield _row(study, regime, tuned, "AdamW", RIVALS[0], weight_decay=tuned["weight_decay"])
    yield _row(study, regime, tuned, "AdamW", RIVALS[1], dropout=tuned["dropout"])


def _on_the_best_rival(study: Study, tuned: dict[str, Any]) -> Iterator[tuple[str, list[Run]]]:
    """Rows of the regime of many passes with the rival's weight decay or dropout too."""
    for name in VARIANTS:
        if name != "AdamW":
            yield _row(study, "many passes", tuned, name, f"{name} | {BEST_RIVAL}", **tuned["rival"])


def _at_equal_time(
    study: Study, regime: str, tuned: dict[str, Any], costs: Mapping[str, float]
) -> Iterator[tuple[str, list[Run]]]:
    """Rows with as many steps as AdamW's time pays for."""
    for name in EQUAL_TIME:
        label, runs = _row(study, regime, tuned, name, f"{name} | {SAME_TIME}")
        steps = max(1, round(study.steps / costs[name]))
        cut = [dataclasses.replace(run.settings, steps=steps, warmup=min(1000, steps // 10)) for run in runs]
        yield label, [dataclasses.replace(run, settings=one) for run, one in zip(runs, cut, strict=True)]


def _row(
    study: Study, regime: str, tuned: dict[str, Any], name: str, label: str, **options: Any
) -> tuple[str, list[Run]]:
    method, _ = VARIANTS[name]
    if method != "adamw":
        options["rho"] = tuned["sam_rho" if method == "sam" else "rho"]
    one = settings_of(study, name, learning_rate=tuned["learning_rate"], **options)
    return label, [
        _run(study, regime, f"{label} seed {seed}", dataclasses.replace(one, seed=seed)) for seed in range(study.seeds)
    ]


def _run(study: Study, regime: str, name: str, settings: Settings) -> Run:
    few = REGIMES[regime]
    # One pass over exactly the tokens of the longest run.
    tokens = study.steps * study.batch * settings.model.seq_len + study.batch * settings.model.seq_len
    return Run(f"{regime} | {name}", settings, few or tokens, EVALUATIONS[regime])


# --- runs -------------------------------------------------------------------------------------------------------------


def _all(study: Study, runs: list[Run], rich: Rich) -> dict[str, dict[str, Any]]:
    """Figures of each run by name; missing ones are trained, `jobs` at once."""
    trained = done_runs(study.done)
    waiting = list({key(study, run): run for run in runs if key(study, run) not in trained}.values())
    study.done.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, study.done.open("a", encoding="utf-8") as file:
        pool = ThreadPoolExecutor(study.jobs)
        stack.callback(pool.shutdown, cancel_futures=True)  # runs that have not begun when one fails or Ctrl-C comes
        futures = {pool.submit(_train, study, run): run for run in waiting}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            trained[key(study, run)] = figures = future.result()
            line = {"run": key(study, run), "name": run.name, "max_tokens": run.max_tokens, **figures}
            with disk_errors(study.done):
                file.write(json.dumps(line) + "\n")
                file.flush()
            rich.print(f"{count}/{len(waiting)} {run.name}: {figures['val_loss']:.4f}", highlight=False)
    return {run.name: trained[key(study, run)] for run in runs}


def done_runs(file: Path) -> dict[str, dict[str, Any]]:
    """Figures of each run of the file by its key."""
    return {line["run"]: line for line in (metrics.read(file) if file.exists() else [])}


def _train(study: Study, run: Run) -> dict[str, Any]:
    """Figures of one run in a process of its own, on one core.

    Raises:
        UserError: with the last line of the process's stderr, where it failed.
    """
    folder = study.out / key(study, run)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "name": run.name,
        "settings": run.settings.as_dict(),
        "data": study.data,
        "max_tokens": run.max_tokens,
        "evaluations": run.evaluations,
        "out": str(folder),
    }
    write_json(folder / "run.json", options)
    one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | {"XLA_FLAGS": one_thread, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("study_run.py")), str(folder / "run.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"study: run {run.name!r} failed: {said}")
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def key(study: Study, run: Run) -> str:
    """A hash of what is trained, so that a run that two rows share (tuned values, first seed) is trained once.

    It covers the settings that differ from their defaults: a run stays finished when a new setting is added.
    """
    trained = json.dumps([study.data, run.max_tokens, _chosen(run.settings), _chosen(run.settings.model)])
    return hashlib.sha256(trained.encode()).hexdigest()[:16]


def _chosen(settings: Any) -> dict[str, Any]:
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in sorted(values.items()) if value != default and name != "model"}


def _costs(study: Study) -> dict[str, float]:
    """Cost ratio of every variant, measured once."""
    path = study.out / "costs.json"
    if not path.exists():
        variants = {name: settings_of(study, name) for name in VARIANTS}
        settings = variants["AdamW"]
        corpus = prepare(
            study.data, vocab_size=settings.model.vocab_size, seq_len=settings.model.seq_len, max_tokens=SMALL
        )
        tokens = Batches(corpus.train, settings.model.seq_len, settings.batch, 0).at(0)
        found = timing.measure(variants, tokens, repeats=40)
        write_json(path, {name: one._asdict() for name, one in found.items()})
    return {name: one["ratio"] for name, one in json.loads(path.read_text(encoding="utf-8")).items()}


if __name__ == "__main__":
    main()
