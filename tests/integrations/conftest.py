"""What the tests of integrations share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    """Models are drawn alike in each test, and Accelerate's states, one for a process, are new."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
