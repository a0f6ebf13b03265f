"""Published combinations of the plain gradient g and the perturbed g', as `Perturbed(combine=…)`: ĝ = α g + β g'.

Each is a function of (g·g, g·g', g'·g') that returns (α, β), for numbers and for arrays of either framework. `looksam`
is of two such functions, for `Perturbed(reuse=…)`.
"""

from __future__ import annotations

from typing import Any

from fsam_core.methods import Combine, Reuse


def gsam(alpha: float) -> Combine:
    """GSAM (arXiv 2203.08065): g' − α g_⊥, g_⊥ the part of g orthogonal to g'."""
    return lambda gg, gm, mm: (-alpha, 1 + alpha * gm / _safe(mm))


def renormalised(gg: Any, gm: Any, mm: Any) -> tuple[Any, Any]:
    """StableSAM (arXiv 2401.07250): g' with the length of g."""
    return 0.0, (gg / _safe(mm)) ** 0.5


def looksam(alpha: float) -> Reuse:
    """LookSAM (arXiv 2203.02714): g + α (‖g‖ / ‖c‖) c, c the part of the last corrected step's ĝ across its own g."""
    return Reuse(
        store=lambda gg, gm, mm: (-gm / _safe(gg), 1.0), apply=lambda gg, gc, cc: (1.0, alpha * (gg / _safe(cc)) ** 0.5)
    )


def _safe(square: Any) -> Any:
    """1 for a square of 0."""
    return square + (square == 0)
