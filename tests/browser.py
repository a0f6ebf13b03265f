"""Pages in a headless browser: what does not fit into the width of a screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# A frame's media queries see the frame's width, and a window of less than 500 pixels cannot be had.
SCRIPT = """
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = frame.clientWidth;
    const box = x => x.getBoundingClientRect();
    const isOut = x => box(x).width && (box(x).right > width + 1 || box(x).left < -1);
    const isCut = x => x.scrollWidth > x.clientWidth + 1 && getComputedStyle(x).overflowX != "visible";
    const all = [...page.body.querySelectorAll("*")].filter(x => !x.closest("svg") || x.tagName == "svg");
    return {width, scroll: page.documentElement.scrollWidth,
            wrong: all.filter(x => isOut(x) || isCut(x)).map(x => x.tagName + " " + x.textContent.slice(0, 40))};
  });
  document.title = JSON.stringify(found);
};
"""


def browser() -> str | None:
    """The first browser that is installed."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def overflowing(pages: Sequence[str], widths: Sequence[int], folder: Path) -> list[dict]:
    """For each page at each width: the width, that of its content, and elements that are out of the screen or cut."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:600px" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in widths
    )
    path = folder / "frames.html"
    path.write_text(f"<!doctype html><script>{SCRIPT}</script>{frames}", encoding="utf-8")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom")
    done = subprocess.run([browser(), *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))
