"""Small sets of real files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Two classes of ten 8 x 12 colour images, in PNG and JPEG."""
    root = tmp_path_factory.mktemp("folder")
    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for i in range(10):
            pixels = random.integers(128 * label, 128 * label + 128, (8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root
