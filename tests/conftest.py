"""One thread for each framework: the tests' tensors are too small for more, and several tests run at once.

JAX gets four virtual devices, so that what is sharded can be run sharded.
"""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
# One line a case: seconds each, and another case of the same test says nearly the same.
SLOW_CASES = frozenset((ROOT / "tests" / "slow_cases.txt").read_text().splitlines())

# Before either framework is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the tests' time is XLA's compiler's: without LLVM's optimisations and the emitters of fusions it takes a third
# of it, and what is compiled runs no slower at these sizes. Either alone saves little or, for the trainers, costs.
_XLA_FLAGS = {
    "xla_cpu_multi_thread_eigen": "false",
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_force_host_platform_device_count": "4",
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in _XLA_FLAGS.items()))
# A TPU runtime may be installed for its compiler; there is no TPU to look for. Triton kernels run in its interpreter.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")

# The frameworks' own objects are never garbage: going through them again and again took a fifth of the CPU time in
# which tests are collected, and more later.
gc.set_threshold(100_000, 50, 50)

# The same examples each time, so that a failure belongs to the change that it is seen with.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the cases of `slow_cases.txt` to `make test-all`, and run a file's tests in one process."""
    # What XLA compiles for one test serves the others of its file. Files with the most tests start first.
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    found = {item.nodeid.partition("@")[0]: item for item in items}
    for name in SLOW_CASES & found.keys():
        found[name].add_marker(pytest.mark.slow)
    files = {name.partition("::")[0] for name in found}
    gone = [name for name in SLOW_CASES - found.keys() if name.partition("::")[0] in files and len(files) > 20]
    if gone:
        raise pytest.UsageError(f"tests/slow_cases.txt names no such test: {', '.join(sorted(gone))}")


def pytest_collection_finish():
    """What is imported by now stays."""
    gc.freeze()
