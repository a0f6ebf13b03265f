"""The structure of the packages, read from the source: no import circles, and one direction between packages."""

from __future__ import annotations

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fsam_core": ROOT / "fsam_core",
    "fsam_kernels": ROOT / "kernels" / "fsam_kernels",
    "fsam_trainers": ROOT / "trainers" / "fsam_trainers",
    "fsam_profiling": ROOT / "profiling" / "fsam_profiling",
}
# package -> the other packages it may import
ALLOWED: dict[str, set[str]] = {
    "fsam_kernels": set(),
    "fsam_core": {"fsam_kernels"},
    "fsam_trainers": {"fsam_core", "fsam_kernels"},
    "fsam_profiling": {"fsam_core", "fsam_kernels", "fsam_trainers"},
}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, inside functions too.

    A package's `__init__` is not an import of its modules' own, unless something is taken from it by name.
    """
    files = {_name(package, path): path for package in PACKAGES for path in sorted(PACKAGES[package].rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else str(node.module) for name in full]
            found[module] |= {name for name in names if name in files and name != module}
    return found


def _name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_one_another_in_a_circle():
    assert len(imports()) > 100
    assert circle(imports()) == []


def test_a_circle_would_be_found():
    first, *_ = (module for module, others in imports().items() if others)
    planted = {**imports(), next(iter(imports()[first])): {first}}
    assert circle(planted)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package):
    mine = {m: others for m, others in imports().items() if m.partition(".")[0] == package}
    wrong = {
        (module, other)
        for module, others in mine.items()
        for other in others
        if (top := other.partition(".")[0]) != package and top not in ALLOWED[package]
    }
    assert wrong == set()
