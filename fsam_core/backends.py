"""The choice of backend: the argument, else FSAM_BACKEND, else `auto`, the fastest one for the device.

A backend is a package `fsam_kernels.<name>` with one module per operation. `auto` chooses by device and gives its
reason. A backend that is named explicitly is used or fails; it never falls back to another.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

from fsam_core.errors import UserError, one_line

# Framework -> its backends, most specialised last. The first is plain framework code for any device.
BACKENDS: dict[str, tuple[str, ...]] = {"jax": ("xla", "pallas"), "torch": ("torch", "triton")}
# Framework -> the packages that training in it needs.
TRAINING: dict[str, tuple[str, ...]] = {"jax": ("jax", "optax", "flax", "orbax.checkpoint"), "torch": ("torch",)}
# Package -> the pip extra that installs it, where the names differ.
_EXTRA = {
    **dict.fromkeys(("optax", "flax", "orbax"), "jax"),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **dict.fromkeys(("tokenizers", "platformdirs"), "text"),
    **dict.fromkeys(("sentencepiece", "datasets", "pyarrow"), "data"),
    **dict.fromkeys(("sklearn", "PIL"), "images"),
}
_NEEDS = {"xla": ("jax", "optax"), "pallas": ("jax", "optax"), "torch": ("torch",), "triton": ("torch", "triton")}


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, as `fsam backends` prints them."""

    name: str
    reason: str


def require(*modules: str) -> None:
    """Import the modules ("jax", "orbax.checkpoint", "torch", …).

    Raises:
        UserError: with the pip command that installs one that is missing or cannot be imported.
    """
    for module in modules:
        package = module.partition(".")[0]
        extra = f"'fsam[{_EXTRA.get(package, package)}]'"
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install {extra}")
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises anything
            raise UserError(
                f"{module} is installed but cannot be imported ({one_line(error)}): "
                f"pip install --force-reinstall {extra}"
            ) from error


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def built(name: str) -> bool:
    """Whether this distribution contains backend `name`."""
    return importlib.util.find_spec(f"fsam_kernels.{name}") is not None


def choose(framework: str, backend: str | None = None) -> Choice:
    """The backend for `framework` ("jax" or "torch"), and the reason.

    Raises:
        UserError: for a backend that is unknown, belongs to the other framework or is not part of this version, and for
            missing packages.
    """
    known = BACKENDS[framework]
    asked, source = (backend, "asked for") if backend else (os.environ.get("FSAM_BACKEND"), "FSAM_BACKEND")
    if asked and asked != "auto":
        if asked not in known:
            raise UserError(
                f"backend: {asked!r} ({source}) is not a backend of {framework}: use auto, {', '.join(known)}"
            )
        if not built(asked):
            have = ", ".join(name for name in known if built(name))
            raise UserError(f"backend: {asked!r} ({source}) is not part of this version, which has {have}")
        require(*_NEEDS[asked])
        return Choice(asked, source)
    plain, *special = known
    require(*_NEEDS[plain])
    if not built(special[-1]):
        return Choice(plain, "auto: the only one built")
    if framework == "torch":
        # By count Triton moves 6 bytes a bfloat16 logit between the products, the plain code 44. Not timed on a GPU.
        return Choice(plain, "auto: triton moves fewer bytes by count, but was not timed on a GPU; ask for it by name")
    try:
        device = importlib.import_module("jax").default_backend()
    except (RuntimeError, AssertionError) as error:  # JAX raises either if JAX_PLATFORMS names what is not here
        raise UserError(f"backend: JAX finds no device to run on ({one_line(error)}): set JAX_PLATFORMS=cpu") from error
    if device == "tpu":
        return Choice("pallas", "auto: fewer cycles than xla by the TPU compiler's own estimate (docs/head.md)")
    return Choice(plain, f"auto: pallas is for TPUs, this is {device}")


def check_device(backend: str, device: str) -> None:
    """Check that the backend's kernels run on the model's device.

    Raises:
        UserError: for Triton kernels on a CPU, outside its interpreter.
    """
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "backend: 'triton' runs on a GPU and the model is on the CPU; use backend='torch', or TRITON_INTERPRET=1 "
            "to run its kernels in the interpreter, slowly"
        )


def load(framework: str, backend: str | None = None) -> ModuleType:
    """The chosen backend's package: `linear_cross_entropy`, `logit_vjp`, `preconditioned_norm`, `perturb`.

    Raises:
        UserError: as `choose`.
    """
    return importlib.import_module(f"fsam_kernels.{choose(framework, backend).name}")
