"""The pages of docs/ are found from its index, say at their top what they answer, and agree with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in PAGES if page.parent.name != "results"]  # results are written by programs


def links(page: Path) -> list[Path]:
    """The files that a page links to."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [(page.parent / link).resolve() for link in found if "://" not in link]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert [str(link) for link in links(page) if not link.exists()] == []


def test_index_names_every_page():
    index = ROOT / "docs" / "index.md"
    assert set(PAGES) - {index} <= set(links(index))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_begins_with_a_sentence(page):
    title, answer, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert title.startswith("# ")
    assert "\n" not in title
    assert not answer.startswith(("#", "|", "    ", "*", "`" * 3))
    assert answer.endswith((".", "?", ":"))


def test_install_page_names_every_extra():
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))) == set(EXTRAS)


@pytest.mark.parametrize(
    ("machine", "wheels"),
    [
        ({"platform_system": "Linux", "platform_machine": "x86_64"}, {"triton", "libtpu"}),
        ({"platform_system": "Linux", "platform_machine": "aarch64"}, {"triton"}),
        ({"platform_system": "Darwin", "platform_machine": "arm64"}, set()),
    ],
)
def test_a_machine_installs_what_exists_for_it(machine, wheels):
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in (*EXTRAS["triton"], *EXTRAS["tpu"])]
    marked = {x.name for x in wanted if x.marker is None or x.marker.evaluate(machine)} - {"fsam"}
    assert marked == wheels
