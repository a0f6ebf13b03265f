"""How much of the head's logit cotangent could be skipped: the mass of its tiles along a training run.

    python -m fsam_profiling.tile_mass --vocab-size 4096 --steps 1500 --out FILE.json      train, measure
    python -m fsam_profiling.tile_mass --read A.json B.json --plot FILE.png                draw what was measured

For a row n with label y the cotangent is softmax(z) − onehot(y). Its entry at y is kept apart (one column a row), so a
tile of columns T carries mass m_nT = Σ_{v ∈ T, v ≠ y} p_nv. A kernel skips a tile for a whole block of rows, and the
contract of skipping is, for every row, Σ_{skipped T} m_nT <= δ: then ‖z̄ − z̃‖₁ <= δ on that row before its weight.
What is counted is the share of (row block × column tile) tiles that such a kernel still has to compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console as Rich
from rich.table import Table

from fsam_core import UserError, backends
from fsam_trainers import engine
from fsam_trainers.console import Console
from fsam_trainers.data import Batches, Corpus, prepare, validation_batches
from fsam_trainers.files import disk_errors, writable, write_json, write_text
from fsam_trainers.models.layout import nested
from fsam_trainers.options import Train
from fsam_trainers.settings import Settings

DELTAS = (1e-4, 1e-3, 1e-2)
COLUMNS = (128, 512, 1024)  # of a tile: a GPU's, and two that suit a TPU's matrix unit
ROWS = (16, 128, 256, 1024)  # of a block: the least a matrix unit takes, a GPU's, and two that suit a TPU
STEPS = (0, 10, 100, 300, 1000)  # and the end
DECADES = np.arange(-12.0, 0.5, 0.5)  # edges of the histogram of log10 masses
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
UPWARDS = tuple(1 - q for q in QUANTILES)  # of what is skipped, for the quantiles of what is left
CHUNK = 256  # rows whose logits exist at once: 256 x 32768 fp32 are 34 MB


def off_target(z_CxV: np.ndarray, labels_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|cotangent| of cross entropy without its one-hot column, and the loss.

    Args:
        z_CxV: logits, float32.
        labels_C: token ids in [0, V).

    Returns:
        p_CxV float32: softmax(z), with 0 at the label; loss_C float64 in nats.
    """
    C = np.arange(len(labels_C))
    top_Cx1 = z_CxV.max(axis=1, keepdims=True)
    gap_C = (z_CxV[C, labels_C] - top_Cx1[:, 0]).astype(np.float64)
    p_CxV = np.exp(z_CxV - top_Cx1)
    p_CxV[C, labels_C] = 0
    others_C = p_CxV.sum(axis=1, dtype=np.float64)
    p_CxV /= (others_C + np.exp(gap_C)).astype(np.float32)[:, None]
    return p_CxV, np.log1p(others_C + np.expm1(gap_C)) - gap_C


def tile_masses(p_CxV: np.ndarray, columns: int) -> np.ndarray:
    """Σ of p over tiles of `columns` neighbouring columns, the last one of what is left: [C, ⌈V/columns⌉] float64."""
    return np.add.reduceat(p_CxV, np.arange(0, p_CxV.shape[1], columns), axis=1, dtype=np.float64)


def skip_greedily(mass_RxT: np.ndarray, delta: float) -> np.ndarray:
    """Which tiles to skip for a whole block of rows, so that no row loses more than `delta`: bool [T].

    Tiles are taken in the order of the largest mass that any row has in them, each if every row can still afford it.
    The bound holds by construction. Sums only grow, so a tile that was refused stays unaffordable: the set cannot be
    added to. It need not be the largest one (that is a knapsack with a limit for every row); `most_skippable` says
    how far off it can be.
    """
    skipped_T = np.zeros(mass_RxT.shape[1], bool)
    spent_R = np.zeros(mass_RxT.shape[0])
    for t in np.argsort(mass_RxT.max(axis=0), kind="stable"):
        then_R = spent_R + mass_RxT[:, t]
        if (then_R <= delta).all():
            skipped_T[t], spent_R = True, then_R
    return skipped_T


def most_skippable(mass_RxT: np.ndarray, delta: float) -> int:
    """No choice of tiles for the whole block skips more than this many with every row's sum <= delta.

    The smaller of two relaxations: what its most demanding row would allow if it were alone, and what the block would
    allow if only the rows' sum (<= R·delta) were bounded. Both are solved exactly by taking the lightest tiles first.
    """
    summed_T = np.sort(mass_RxT.sum(axis=0))
    together = int((np.cumsum(summed_T) <= mass_RxT.shape[0] * delta).sum())
    return min(together, int(skippable_alone(mass_RxT, delta).min()))


def skippable_alone(mass_RxT: np.ndarray, delta: float) -> np.ndarray:
    """How many tiles each row could skip if it were not tied to its neighbours: [R]. Lightest first, so it is exact."""
    return (np.cumsum(np.sort(mass_RxT, axis=1), axis=1) <= delta).sum(axis=1)


def share_left(mass_NxT: np.ndarray, rows: int, delta: float) -> tuple[float, float]:
    """Share of the (row block × column tile) tiles left to compute: with greedy skipping, and the least possible.

    Args:
        mass_NxT: tile masses, rows in batch order.
        rows: of a block; a last block of fewer rows counts like the others.
    """
    blocks = [mass_NxT[start : start + rows] for start in range(0, len(mass_NxT), rows)]
    tiles = len(blocks) * mass_NxT.shape[1]
    greedy = sum(int(skip_greedily(block, delta).sum()) for block in blocks)
    most = sum(most_skippable(block, delta) for block in blocks)
    return 1 - greedy / tiles, 1 - most / tiles


def by_need(mass_NxT: np.ndarray, delta: float) -> np.ndarray:
    """Rows in the order of how many tiles each needs when alone, so that those of a block agree: [N]."""
    return np.argsort(-skippable_alone(mass_NxT, delta), kind="stable")


def by_frequency(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Token ids, the most frequent first; equally frequent ones by id: [V]."""
    return np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")


def measure(
    h_NxD: np.ndarray, w_VxD: np.ndarray, labels_N: np.ndarray, orders: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Everything that is recorded of one batch, as plain values.

    Args:
        h_NxD: last hidden states, float32, rows in batch order.
        w_VxD: the head.
        labels_N: token ids.
        orders: name -> permutation of the vocabulary in which its columns lie.

    Returns:
        loss: mean, nats a token. off_target: mean mass beside the target column, which is all that can be skipped.
        columns_left: for each δ, mean share of single columns that a row needs, chosen for it alone: what an order of
            the vocabulary made for that row would reach.
        orders: for each order
            left: {"ROWSxCOLUMNS": [[share left, least possible] for each δ]};
            left_sorted: the same with the rows sorted by `by_need` before they are cut into blocks;
            alone: {"COLUMNS": [mean share of tiles left for each δ]}, each row deciding for itself;
            alone_quantiles: over the rows, of the share of 128-column tiles that one leaves, for each δ;
            quantiles and histogram of the masses of 128-column tiles: of each row's, and of the largest of 128 rows.
    """
    finest = COLUMNS[0]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in orders}
    losses, masses, columns = [], [], []
    for start in range(0, len(h_NxD), CHUNK):
        rows = slice(start, start + CHUNK)
        p_CxV, loss_C = off_target(h_NxD[rows] @ w_VxD.T, labels_N[rows])
        losses.append(loss_C)
        for name, order_V in orders.items():
            parts[name].append(tile_masses(p_CxV[:, order_V], finest))
        masses.append(p_CxV.sum(axis=1, dtype=np.float64))
        p_CxV.sort(axis=1)
        kept_CxV = np.cumsum(p_CxV, axis=1, dtype=np.float64)
        columns.append([(kept_CxV > delta).mean(axis=1) for delta in DELTAS])
    return {
        "rows": len(h_NxD),
        "loss": float(np.concatenate(losses).mean()),
        "off_target": float(np.concatenate(masses).mean()),
        "columns_left": [round(float(x), 4) for x in np.concatenate(columns, axis=1).mean(axis=1)],
        "orders": {name: _tiles(np.concatenate(part)) for name, part in parts.items()},
    }


def _tiles(mass_NxT: np.ndarray) -> dict[str, Any]:
    """`measure`'s record of one order, from the masses of the narrowest tiles."""
    wider = {columns: tile_masses(mass_NxT, columns // COLUMNS[0]) for columns in COLUMNS}
    peak = np.maximum.reduceat(mass_NxT, np.arange(0, len(mass_NxT), 128), axis=0)
    left: dict[str, list[tuple[float, ...]]] = {}
    left_sorted: dict[str, list[tuple[float, ...]]] = {}
    for columns, mass in wider.items():
        for rows in ROWS:
            for found, order in ((left, lambda mass, _: np.arange(len(mass))), (left_sorted, by_need)):
                shares = [share_left(mass[order(mass, delta)], rows, delta) for delta in DELTAS]
                found[f"{rows}x{columns}"] = [tuple(round(x, 4) for x in pair) for pair in shares]
    return {
        "left": left,
        "left_sorted": left_sorted,
        "alone": {
            str(columns): [round(1 - float(skippable_alone(mass, delta).mean()) / mass.shape[1], 4) for delta in DELTAS]
            for columns, mass in wider.items()
        },
        "alone_quantiles": [
            [round(float(x), 4) for x in 1 - np.quantile(skippable_alone(mass_NxT, delta), UPWARDS) / mass_NxT.shape[1]]
            for delta in DELTAS
        ],
        **{f"{name}_of_row": value for name, value in _distribution(mass_NxT).items()},
        **{f"{name}_of_128_rows": value for name, value in _distribution(peak).items()},
    }


def _distribution(mass: np.ndarray) -> dict[str, list[float]]:
    """Quantiles of log10 mass, and the share of masses in each half decade of `DECADES` (lighter ones in the first)."""
    log = np.log10(np.maximum(mass.ravel(), 1e-300))
    counts, _ = np.histogram(np.clip(log, DECADES[0], DECADES[-1]), DECADES)
    return {
        "log10_quantiles": [round(float(x), 2) for x in np.quantile(log, QUANTILES)],
        "histogram": [round(float(x), 4) for x in counts / log.size],
    }


@dataclass(frozen=True)
class Options:
    """Train with the project's trainer and measure which tiles of the cotangent could be skipped on the way."""

    vocab_size: int = 4096
    """size of the vocabulary"""
    steps: int = 1500
    """optimizer steps; measured at 0, 10, 100, 300, 1000 and the end"""
    method: str = "adamw"
    """adamw, sam, precond-sam, functional-sam, precond-functional-sam, logit-sam"""
    preset: str = "tiny"
    """model size, as in `fsam train`"""
    data: str = "python"
    """as in `fsam train`"""
    max_tokens: int | None = None
    """read at most this many training tokens"""
    batch: int | None = None
    """sequences a step"""
    seed: int = 0
    """of the initial weights and the order of the data"""
    framework: str = "jax"
    """jax or torch"""
    rows: int = 2048
    """tokens measured at each step, of the batches about to be trained on and of held-out text"""
    weights: Path | None = None
    """keep the weights of the measured steps in this folder; taken from there if the same run left them"""
    out: Path | None = None
    """write the figures here, as JSON"""
    read: tuple[Path, ...] = ()
    """instead of training: figures of earlier calls"""
    plot: Path | None = None
    """draw the figures into this PNG"""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Train and measure: {"settings", "data", "deltas", …, "measured": [{"step", "split", …as `measure`}]}.

    Raises:
        UserError: naming the option that is wrong.
    """
    same = {k: getattr(options, k) for k in ("vocab_size", "steps", "preset", "batch", "framework")}
    settings = Train(**same).settings(options.method, options.seed)
    length = settings.model.seq_len
    if options.rows < 1 or options.rows % length:
        raise UserError(f"--rows must be a multiple of the sequence length {length}, got {options.rows}")
    corpus = prepare(options.data, vocab_size=settings.model.vocab_size, seq_len=length, max_tokens=options.max_tokens)
    console.say(corpus.description)
    V, sequences = settings.model.vocab_size, options.rows // length
    orders = {"ids": np.arange(V), "frequency": by_frequency(np.asarray(corpus.train), V)}
    held_out = validation_batches(corpus.validation, length, sequences, 1)[0]
    batches = Batches(corpus.train, length, settings.batch, settings.seed)
    measured = []
    for step, weights in weights_along(settings, corpus, batches, options.weights, console):
        coming = [batches.at(step + i) for i in range(-(-sequences // settings.batch))]
        for split, tokens in (("training", np.concatenate(coming)[:sequences]), ("held out", held_out)):
            found = measure(*_head(settings, weights, tokens), orders)
            measured.append({"step": step, "split": split, **found})
            left = found["orders"]["frequency"]["left"]["128x128"][1][0]
            console.say(f"step {step}, {split}: loss {found['loss']:.3f}, {left:.1%} of the 128x128 tiles left at 1e-3")
    return {
        "settings": settings.as_dict(),
        "data": {
            "description": corpus.description,
            "fingerprint": corpus.fingerprint,
            "training_tokens": int(corpus.train.size),
        },
        "deltas": DELTAS,
        "log10_mass_edges": DECADES.tolist(),
        "quantiles": QUANTILES,
        "measured": measured,
    }


def weights_along(
    settings: Settings, corpus: Corpus, batches: Batches, folder: Path | None, console: Console
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Train, and yield (steps taken, weights by flat name) at `STEPS` and at the end; read from `folder` if kept there.

    Raises:
        UserError: when `folder` holds the weights of another run.
    """
    marks = sorted({*(step for step in STEPS if step < settings.steps), settings.steps})
    this = {"settings": settings.as_dict(), "data": corpus.fingerprint}
    if folder is not None and (folder / "run.json").exists():
        if json.loads((folder / "run.json").read_text()) != this:
            raise UserError(f"--weights: {folder} holds those of another run; give another folder")
        if all((folder / f"{step}.npz").exists() for step in marks):
            for step in marks:
                with np.load(folder / f"{step}.npz") as kept:
                    yield step, dict(kept)
            return
    if folder is not None:
        write_json(folder / "run.json", this)
    model = engine.make(settings)
    model.prepare(batches.at(0))
    for step in range(settings.steps + 1):
        if step in marks:
            weights = {name: np.array(value) for name, value in model.weights().items()}
            if folder is not None:
                with disk_errors(folder):
                    np.savez(folder / f"{step}.npz", **weights)  # type: ignore[arg-type]
            yield step, weights
        if step < settings.steps:
            report = model.step(batches.at(step), step)()
            if step % 100 == 99:
                console.say(f"step {step + 1} of {settings.steps}: loss {report.loss:.4f}")


def _head(
    settings: Settings, weights: dict[str, np.ndarray], tokens_BxL1: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model's last hidden states [N, D], its head [V, D] and the labels [N] for a batch, as NumPy arrays."""
    if settings.framework == "jax":
        from fsam_trainers.models import flax_decoder

        decoder = flax_decoder.Decoder(settings.model)
        head: Any = flax_decoder.features(decoder, nested(weights), {"tokens": tokens_BxL1})
        return np.asarray(head.hidden), np.asarray(head.weight), np.asarray(head.labels)
    import torch

    from fsam_trainers.models import torch_decoder

    model = torch_decoder.Decoder(settings.model)
    torch_decoder.load(model, weights)
    with torch.no_grad():
        head = torch_decoder.features(model.eval(), torch.from_numpy(tokens_BxL1).long())
    return head.hidden.numpy(), head.weight.detach().numpy(), head.labels.numpy()


def compact(figures: dict[str, Any]) -> str:
    """`figures` as JSON with one line for each measured batch."""
    measured = ",\n".join(json.dumps(x) for x in figures["measured"])
    rest = json.dumps({k: v for k, v in figures.items() if k != "measured"})
    return f'{rest[:-1]}, "measured": [\n{measured}\n]}}\n'


def title(figures: dict[str, Any]) -> str:
    """One run in a line: vocabulary, method, batch, passes over the training tokens, seed."""
    s, m = figures["settings"], figures["settings"]["model"]
    passes = s["steps"] * s["batch"] * m["seq_len"] / figures["data"]["training_tokens"]
    batch = f"{s['batch']} x {m['seq_len']} tokens, {passes:.1f} passes"
    return f"V = {m['vocab_size']}, {s['method']}, {batch}, seed {s['seed']}"


def table(figures: dict[str, Any]) -> Table:
    """Share of tiles left, one line for each measured batch and order of the vocabulary."""
    shown = Table(title=f"{title(figures)}: share of tiles left (least possible)")
    for column in ("step", "split", "loss", "order", "128x128, δ 1e-4", "1e-3", "1e-2"):
        shown.add_column(column)
    for column in ("1e-3, rows sorted", "256x512", "1024x1024", "a row alone, 128", "single columns"):
        shown.add_column(column)
    middle = DELTAS.index(1e-3)
    for batch in figures["measured"]:
        for order, found in batch["orders"].items():
            left = found["left"]
            tiles = [f"{share:.3f} ({least:.3f})" for share, least in left["128x128"]]
            tiles.append(f"{found['left_sorted']['128x128'][middle][0]:.3f}")
            tiles += [f"{left[name][middle][0]:.3f}" for name in ("256x512", "1024x1024")]
            rows = [f"{found['alone']['128'][middle]:.3f}", f"{batch['columns_left'][middle]:.3f}"]
            shown.add_row(str(batch["step"]), batch["split"], f"{batch['loss']:.3f}", order, *tiles, *rows)
    return shown


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Masses of the tiles along the first run; what is left of every run at δ = 1e-3: along it, and over block sizes.

    Of the batches about to be trained on, vocabulary sorted by frequency.
    """
    import matplotlib.figure

    from fsam_trainers.report import COLOURS

    figure = matplotlib.figure.Figure(figsize=(13, 4.4), layout="constrained")
    masses, along, blocks = figure.subplots(1, 3)
    training = [[x for x in figures["measured"] if x["split"] == "training"] for figures in runs]
    middle = DELTAS.index(1e-3)

    shown = [batch for batch in training[0] if batch["step"] not in (10, 300)]
    for shade, batch in zip(np.linspace(0.3, 1, len(shown)), shown, strict=True):
        heights = batch["orders"]["frequency"]["histogram_of_row"]
        label = f"step {batch['step']}, loss {batch['loss']:.2f}"
        masses.stairs(heights, DECADES, color=COLOURS[0], alpha=shade, label=label, linewidth=1.2 + shade)
    heights = shown[-1]["orders"]["frequency"]["histogram_of_128_rows"]
    label = f"step {shown[-1]['step']}, largest of 128 rows"
    masses.stairs(heights, DECADES, color="black", linestyle="--", label=label)
    masses.set_title(title(runs[0]), fontsize="small")
    masses.set_xlabel("log10 of the mass in a 128-column tile")
    masses.set_ylabel("share of the tiles")
    masses.legend(frameon=False, fontsize="small", loc="upper left")

    for figures, batches, colour in zip(runs, training, COLOURS * len(runs), strict=False):
        found = [x["orders"]["frequency"] for x in batches]
        at = [x["step"] for x in batches]
        along.plot(at, [x["left"]["128x128"][middle][0] for x in found], color=colour, marker="o", markersize=4)
        along.plot(at, [x["alone"]["128"][middle] for x in found], color=colour, linestyle=":", marker=".")
        shares = [found[-1]["alone"]["128"][middle], *(found[-1]["left"][f"{n}x128"][middle][0] for n in ROWS)]
        label = f"{title(figures)}, loss {batches[-1]['loss']:.2f}"
        blocks.plot(range(len(shares)), shares, color=colour, marker="o", markersize=4, label=label)
        grouped = [shares[0], *(found[-1]["left_sorted"][f"{n}x128"][middle][0] for n in ROWS)]
        blocks.plot(range(len(grouped)), grouped, color=colour, linestyle="--", marker=".")
    along.set_xscale("symlog", linthresh=10)
    along.set_xlabel("optimizer steps")
    along.set_title("128 x 128 tiles; dotted: each row deciding alone", fontsize="small")
    blocks.set_xticks(range(len(ROWS) + 1), ["1", *map(str, ROWS)])
    blocks.set_xlabel("rows that share a decision (128-column tiles)")
    blocks.set_title("end of each run; dashed: rows sorted by need first", fontsize="small")
    for axis in (along, blocks):
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 1.03)
        axis.set_ylabel("share of the tiles left at δ = 1e-3")
    for axis in (masses, along, blocks):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = blocks.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    with disk_errors(path):
        figure.savefig(path, dpi=130)


def main() -> None:
    options = tyro.cli(Options, prog="python -m fsam_profiling.tile_mass")
    console = Console()
    try:
        _main(options, console)
    except UserError as error:
        raise SystemExit(f"tile_mass: error: {error}") from None


def _main(options: Options, console: Console) -> None:
    for name, path in (("--out", options.out), ("--plot", options.plot)):
        if path is not None:
            writable(name, path)
    if options.plot is not None:
        backends.require("matplotlib")
    if options.read:
        runs = [_read(path) for path in options.read]
    else:
        runs = [run(options, console)]
        if options.out is not None:
            write_text(options.out, compact(runs[0]))
    for figures in runs:
        Rich(width=170).print(table(figures))
    if options.plot is not None:
        plot(options.plot, runs)


def _read(path: Path) -> dict[str, Any]:
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return {**figures, "measured": list(figures["measured"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--read: {path} holds no figures of this command: {error}") from error


if __name__ == "__main__":
    main()
