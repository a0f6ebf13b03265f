"""One thread for each framework: the tests' tensors are too small for more, and several tests run at once.

JAX gets four virtual devices, so that what is sharded can be run sharded.
"""

import os

# Before either framework is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_XLA_FLAGS = {
    "xla_cpu_multi_thread_eigen": "false",
    "xla_backend_optimization_level": "1",
    "xla_force_host_platform_device_count": "4",
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in _XLA_FLAGS.items()))
# A TPU runtime may be installed for its compiler; there is no TPU to look for. Triton kernels run in its interpreter.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")
