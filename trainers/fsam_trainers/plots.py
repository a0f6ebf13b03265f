"""The look of every picture in a report: SVG text, narrow enough for a phone, its legend beside the curves."""

from __future__ import annotations

import io
import re
from typing import Any

from fsam_core import backends

backends.require("matplotlib")

import matplotlib as mpl  # noqa: E402
import matplotlib.figure  # noqa: E402

WIDTH = 4.8  # inches
# Okabe and Ito's palette, which colour-blind readers can distinguish.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "osD^vP"


def new_figure(height: float) -> tuple[Any, Any]:
    """(figure, its axes) of the usual width and `height` inches."""
    figure = matplotlib.figure.Figure(figsize=(WIDTH, height), layout="constrained")
    axis = figure.subplots()
    bare(axis)
    return figure, axis


def bare(axis: Any) -> None:
    """Without a frame, with small labels."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def legend_below(figure: Any, axis: Any, columns: int = 2) -> None:
    """The legend of `axis` under the figure, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 60 // columns else columns
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def as_svg(figure: Any) -> str:
    """The picture as the text of an <svg> element, deterministic and without a background."""
    held = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "fsam", "svg.fonttype": "path"}):
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = held.getvalue()
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text[text.index("<svg") :], count=1)
