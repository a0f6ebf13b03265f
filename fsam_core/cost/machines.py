"""Machines as operations and bytes a second, and the time of a step on one."""

from __future__ import annotations

from dataclasses import dataclass

from fsam_core.cost.steps import StepCost, Work
from fsam_core.errors import UserError, check_choice


@dataclass(frozen=True)
class Machine:
    """Rates of one device.

    Attributes:
        name: its name in tables.
        flops_per_s: the rate of matrix products.
        bytes_per_s: memory bandwidth, reading and writing together.
        head_flops_per_s, kept_flops_per_s: the rate of the head's products by chunks of rows, and over all rows at
            once; None for `flops_per_s`.
        taken_bytes_per_s: the rate of touching memory for the first time; None where that is free.
        exponentials_per_s, normals_per_s: their rates; None where they are hidden behind the bytes.
        memory_bytes: its memory; None where it is not known.

    Raises:
        UserError: for a rate that is not > 0.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    head_flops_per_s: float | None = None
    kept_flops_per_s: float | None = None
    taken_bytes_per_s: float | None = None
    exponentials_per_s: float | None = None
    normals_per_s: float | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and value is not None and not value > 0:
                raise UserError(f"machine: {name} must be > 0, got {value!r}")

    def seconds_of(self, work: Work) -> float:
        """The sum of both, not the maximum: products and the work between them run one after the other."""
        products = (work.trunk + work.attention) / self.flops_per_s
        products += work.head / (self.head_flops_per_s or self.flops_per_s)
        products += work.kept / (self.kept_flops_per_s or self.flops_per_s)
        between = work.bytes / self.bytes_per_s + _at(work.exponentials, self.exponentials_per_s)
        return products + between + _at(work.normals, self.normals_per_s)

    def seconds(self, step: StepCost) -> float:
        return self.seconds_of(step.work) + _at(step.taken_bytes, self.taken_bytes_per_s)


def _at(amount: float, rate: float | None) -> float:
    return amount / rate if rate else 0.0


# Published peaks of one device: dense bfloat16 products, bandwidth, and GB of memory, some of it the runtime's. NVIDIA:
# data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (half of the figures with sparsity); AMD: data sheet
# of the MI300X; Google: the pages of the TPU versions at cloud.google.com/tpu/docs, one chip.
PUBLISHED: dict[str, Machine] = {
    name: Machine(name, flops, bytes_, memory_bytes=gb * 1e9)
    for name, flops, bytes_, gb in (
        ("a100", 312e12, 2039e9, 80),
        ("h100", 989e12, 3350e9, 80),
        ("h200", 989e12, 4800e9, 141),
        ("b200", 2250e12, 8000e9, 180),
        ("mi300x", 1307e12, 5300e9, 192),
        ("v4", 275e12, 1228e9, 32),
        ("v5e", 197e12, 819e9, 16),
        ("v5p", 459e12, 2765e9, 95),
        ("v6e", 918e12, 1640e9, 32),
        ("tpu7x", 2307e12, 7380e9, 192),
    )
}


def published(name: str) -> Machine:
    """The machine of that name.

    Raises:
        UserError: for an unknown one.
    """
    check_choice("machine", name, PUBLISHED)
    return PUBLISHED[name]
