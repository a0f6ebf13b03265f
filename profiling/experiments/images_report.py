"""The tables and plots of `images.py`, and the page that holds those of every set of images."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.figure

from markdown_tables import markdown
from paired import difference, verdict

HEAD = """# Methods on images

This page says what corrections did to Vision Transformers (`vit-tiny`: 4 blocks of width 64): AdamW with its learning
rate tuned, and four corrections at that rate with ρ tuned, each by successive halving with one seed (`fsam tune --task
images`). Then all are trained with the seeds of the tables. "Equal steps" is the same number of steps for all; "equal
operations" is as many steps as AdamW's matrix products allow by the cost model, at which a ratio of 2 is half of the
steps. Differences are to AdamW's run with the same seed, with
the half-width of the 95 % t-interval of their mean; "–" in place of a difference says that the
interval includes 0. Loss and accuracy are those of the last step, over all held-out images.

The head of these models is small, so the exact methods take twice AdamW's products: what makes a correction cheap here
is a part of the batch, fewer blocks or fewer steps, and not the vocabulary ([images](../images.md)).

    python profiling/experiments/images.py --data digits --steps 300

"""


def write(name: str, compared: dict[str, Any], methods: dict[str, str], adamw: dict[str, Any], docs: Path) -> None:
    """Write DOCS/images-NAME.json and .png, and rewrite DOCS/images.md.

    Args:
        compared: budget -> what `fsam compare` found.
        methods: row -> its method, as `fsam compare --methods` has it.
        adamw: AdamW's row of `fsam tune`.
    """
    docs.mkdir(parents=True, exist_ok=True)
    rows = {budget: _rows(found, methods) for budget, found in compared.items()}
    first = next(iter(compared.values()))
    facts = {
        "title": first["title"],
        "data": first["data"]["description"],
        "command": first["command"],
        "adamw_tried": adamw["tried"],
        "methods": methods,
        "seeds": first["seeds"],
        "rows": rows,
    }
    (docs / f"images-{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _plot(rows, docs / f"images-{name}.png")
    pages = [_section(path) for path in sorted(docs.glob("images-*.json"))]
    (docs / "images.md").write_text(HEAD + "\n".join(pages), encoding="utf-8")


def _rows(found: dict[str, Any], methods: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Row -> steps, losses and accuracies by seed, and the differences to AdamW."""
    by_method = {row["method"]: row for row in found["rows"]}
    base = by_method[methods["AdamW"]]
    rows = {}
    for name, method in methods.items():
        one = by_method[method]
        rows[name] = {
            "steps": one["steps"],
            "val_losses": one["val_losses"],
            "val_accuracies": one["val_accuracies"],
            "loss_difference": difference(one["val_losses"], base["val_losses"]),
            "accuracy_difference": difference(one["val_accuracies"], base["val_accuracies"]),
        }
    return rows


def _section(path: Path) -> str:
    facts = json.loads(path.read_text(encoding="utf-8"))
    name = path.stem.removeprefix("images-")
    text = f"## {name}\n\n{facts['data']}. {facts['title'].rpartition(',')[0]}, {facts['seeds']} seeds.\n"
    for budget, label in (("steps", "Equal steps"), ("flops", "Equal operations")):
        lines = []
        for row, one in facts["rows"][budget].items():
            cells = [row, f"{one['steps']:,}", f"{statistics.fmean(one['val_losses']):.4f}"]
            cells += [_signed(one["loss_difference"], 4) if row != "AdamW" else ""]
            cells += [f"{100 * statistics.fmean(one['val_accuracies']):.2f} %"]
            cells += [_signed([100 * x for x in one["accuracy_difference"]], 2) if row != "AdamW" else ""]
            lines.append(cells)
        headings = (label, "steps", "loss", "minus AdamW's", "accuracy", "minus AdamW's")
        text += f"\n{markdown(headings, lines)}\n"
        text += f"\n{_sentence(label, facts['rows'][budget])}\n"
    rates = ", ".join(f"{row} {method.partition(':')[2]}" for row, method in facts["methods"].items())
    return f"{text}\n![losses and accuracies](images-{name}.png)\n\nTuned values: {rates}.\n\n    {facts['command']}\n"


def _sentence(label: str, rows: dict[str, dict[str, Any]]) -> str:
    """One sentence: whose loss differs from AdamW's by more than its interval."""
    found = {name: verdict(*one["loss_difference"]) for name, one in rows.items() if name != "AdamW"}
    said = ", ".join(f"{name} is {x} than AdamW" for name, x in found.items() if x != "no difference")
    none = "no loss differs from AdamW's by more than its interval"
    return f"{label}: {said or none}."


def _signed(found: list[float] | tuple[float, ...], digits: int) -> str:
    value, half = found
    text = f"{value:+.{digits}f} ± {half:.{digits}f}"
    return text if abs(value) > half else f"– ({text})"


def _plot(rows: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (budget, label) in zip(
        figure.subplots(1, 2, sharey=True), (("steps", "equal steps"), ("flops", "equal operations")), strict=True
    ):
        for place, one in enumerate(reversed(rows[budget].values())):
            axes.plot(one["val_losses"], [place] * len(one["val_losses"]), "o", color="tab:blue", alpha=0.5)
            axes.plot(statistics.fmean(one["val_losses"]), place, "|", color="black", markersize=16)
        axes.set_yticks(range(len(rows[budget])), list(reversed(rows[budget])))
        axes.set_xlabel(f"validation loss, {label}")
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=150)
