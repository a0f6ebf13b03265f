"""What the tests of integrations share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_models():
    """Models are drawn alike in each test."""
    torch.manual_seed(0)
