"""Which devices JAX looks for. libtpu is also installed for its compiler alone, on machines without a TPU."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

# A TPU shows itself as a device file, by Google's number on the PCI bus, or in the environment of its virtual machine.
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR", "JAX_FORCE_TPU_INIT")
PCI_VENDORS, GOOGLE = "/sys/bus/pci/devices/*/vendor", "0x1ae0"
NVIDIA_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def skip_absent_tpu() -> None:
    """Keep JAX from looking for a TPU where libtpu is installed and no TPU is: it would print a screen of warnings.

    Must run before JAX is imported. JAX_PLATFORMS is left alone where it is set, and where a plugin of JAX other than
    CUDA's is installed.
    """
    if "JAX_PLATFORMS" in os.environ or "jax" in sys.modules or importlib.util.find_spec("libtpu") is None:
        return
    plugins = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    if has_tpu() or not all("cuda" in name for name in plugins):
        return
    has_gpu = bool(plugins) and any(map(os.path.exists, NVIDIA_FILES))
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if has_gpu else "cpu"


def has_tpu() -> bool:
    """Whether this machine shows a TPU."""
    if any(name in os.environ for name in TPU_VARIABLES) or any(glob.glob(pattern) for pattern in TPU_FILES):
        return True
    return any(Path(vendor).read_text().strip() == GOOGLE for vendor in glob.glob(PCI_VENDORS))
