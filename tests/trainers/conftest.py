import argparse
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """The user's own cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A real text of a few thousand words: the source of a module every Python has."""
    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path
