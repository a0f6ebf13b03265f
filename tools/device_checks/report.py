"""The results of a run, written as they come, and the time that is left for more."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITE_SECONDS = 5.0  # a file at most this old is what a run that is cut off leaves


class Report:
    """Sections of cases.

    Attributes:
        failed: whether a check failed or a case raised.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.failed = path, False
        self.sections: dict[str, dict[str, Any]] = {}
        self._cases: list[dict[str, Any]] = []
        self._end = self._written = 0.0

    @contextmanager
    def section(self, name: str, seconds: float) -> Iterator[None]:
        """Cases inside belong to this section, and start only while its time lasts."""
        began = time.monotonic()
        self._cases, self._end = [], began + seconds
        self.sections[name] = {"seconds": None, "cases": self._cases}
        print(f"{name}: at most {seconds:.0f} s")
        try:
            yield
        except Exception:
            self._add("section", {"error": traceback.format_exc(limit=-4)})
        finally:
            self.sections[name]["seconds"] = round(time.monotonic() - began, 3)
            self._write()

    def case(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of one case; what it raises is recorded, and the next case goes on."""
        if time.monotonic() > self._end:
            return self._add(name, {"skipped": "no time left"})
        try:
            found = run()
        except Exception:
            found = {"error": traceback.format_exc(limit=-4)}
        return self._add(name, found)

    def check(self, name: str, run: Callable[[], dict[str, float]]) -> None:
        """A case that gives errors, each over the error that is allowed: it fails where one is above 1, or NaN."""

        def checked() -> dict[str, Any]:
            errors = run()
            return {"ok": all(x <= 1 for x in errors.values()), "error_over_allowed": errors}

        self.case(name, checked)

    def summary(self) -> str:
        lines = []
        for name, section in self.sections.items():
            cases = section["cases"]
            count = lambda key, value=None: sum(key in x if value is None else x.get(key) is value for x in cases)
            lines.append(
                f"{name}: {len(cases)} cases in {section['seconds']} s, {count('ok', False)} wrong, "
                f"{count('error')} raised, {count('skipped')} skipped"
            )
        return "\n".join(lines)

    def _add(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        bad = "error" in found or found.get("ok") is False
        self.failed |= bad
        self._cases.append({"case": name, **found})
        text = found["error"].strip().splitlines()[-1] if "error" in found else json.dumps(found, default=str)
        print(f"  {'FAILED ' if bad else ''}{name}: {text}", flush=True)
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._write()
        return found

    def _write(self) -> None:
        # JSON has no NaN and no infinity.
        text = json.dumps({"failed": self.failed, "sections": _plain(self.sections)}, indent=1, default=str)
        self.path.write_text(text)
        self._written = time.monotonic()


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
