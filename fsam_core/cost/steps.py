"""The work of one step, counted from `products`: operations and bytes by region, memory, collectives.

Operations are those of matrix products. Bytes are those of the work between products. Parameter work is counted
exactly, as each pass reads and writes it; elementwise work on logits and activations is approximate (the constants
below). The bytes of a product itself are assumed to be hidden behind its operations.

Importing this imports neither framework.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fsam_core.cost.products import PLAIN, Model, Options, Pass, passes
from fsam_core.methods import Perturbed
from fsam_core.regions import Region
from fsam_core.schedules import Kind
from fsam_kernels.memory import chunk_rows, head_bytes
from fsam_kernels.options import CROSS_ENTROPY

# Bytes of parameter work for each float32 parameter (AdamW: 4 reads and 3 writes, and so on).
NORM, PRECONDITIONED, PLAIN_NORM, PERTURB, PERTURB_PLAIN, ADAMW = 4, 8, 4, 16, 12, 28
GRADIENT, ACCUMULATE = 4, 12  # one write; two reads and one write
# g_B from its two parts, and ĝ = g_B + w (g'_S − g_S): fused in XLA, one operation after the other in PyTorch.
MERGE, COMBINE = {"jax": 12, "torch": 28}, {"jax": 16, "torch": 24}
# A split step's sum of two gradients, each by its share of the tokens; PyTorch scales one and accumulates onto it.
SPLIT = {"jax": 12, "torch": 20}
# Reads and writes of a chunk's logits. PyTorch: maximum, difference, exponential, sum, scale; XLA fuses them.
LOGIT_PASSES = {"torch": 8, "jax": 4}
LOGIT_EXPONENTIALS = {"torch": 1, "jax": 2}
# Reads and writes of a saved value, forward and backward.
ACTIVATION_PASSES = 2, 4


@dataclass(frozen=True)
class Work:
    """The work of one region of a step, on one device. Works add up.

    Attributes:
        trunk, attention, head: operations of products, 2 for a multiply-add.
        kept: operations of the head from a kept cotangent, all rows at once; `head` goes chunk by chunk.
        bytes: bytes read and written between the products.
        exponentials: the number of exp, tanh and the like.
        normals: the number of random normal values, for a random ascent.
    """

    trunk: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    kept: float = 0.0
    bytes: float = 0.0
    exponentials: float = 0.0
    normals: float = 0.0

    @property
    def flops(self) -> float:
        return self.trunk + self.attention + self.head + self.kept

    def __add__(self, other: Work) -> Work:
        return Work(**{name: x + getattr(other, name) for name, x in vars(self).items()})

    def __mul__(self, share: float) -> Work:
        return Work(**{name: share * x for name, x in vars(self).items()})


class Collectives(NamedTuple):
    """All-reduces over the devices: the number for gradients, their total bytes, and the number for scalars.

    Bytes are those of the reduced arrays; a ring moves 2 (n − 1) / n times as many in and out of each of n devices. The
    scalars are needed only where gradients are sharded; elsewhere each device has all terms of the norm.
    """

    gradients: float = 0.0
    bytes: float = 0.0
    scalars: float = 0.0


NONE = Collectives()


@dataclass(frozen=True)
class StepCost:
    """The work, memory and communication of one step on one device.

    Attributes:
        regions: work by the names of `fsam_core.regions`.
        memory: bytes by content at the peak, weights and moments included.
        taken_bytes: memory newly allocated from the system in each step. The first touch of a page costs time on a CPU;
            the allocators of accelerators keep their memory.
        collectives: over data-parallel devices.
    """

    regions: Mapping[Region, Work] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    taken_bytes: float = 0.0
    collectives: Collectives = NONE

    @property
    def work(self) -> Work:
        return sum(self.regions.values(), Work())

    @property
    def flops(self) -> float:
        return self.work.flops

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())


def step(model: Model, o: Options, tokens: float, kind: Kind) -> StepCost:
    """A step of that kind on `tokens` tokens over all devices and micro-batches."""
    return _Counter(model, o, tokens / o.devices, kind).step()


class _Counter:
    """Computes the figures of one step, each by its own formula."""

    def __init__(self, model: Model, o: Options, tokens: float, kind: Kind) -> None:
        self.model, self.o, self.N, self.kind = model, o, tokens, kind
        method = o.method
        self.perturbed = isinstance(method, Perturbed) and kind == "corrected"
        self.exact = isinstance(method, Perturbed) and method.exact
        self.remembers = isinstance(method, Perturbed) and bool(method.direction.remembers)
        self.splits = self.perturbed and o.form == "split"
        self.draws = self.perturbed and o.ascent == "random"
        self.q = o.fraction if self.perturbed else 1.0
        self.micro = self.N / o.micro_batches
        # Micro-batches and rows of one of them, of the whole batch and of S.
        self.in_S = max(1.0, self.q * o.micro_batches)
        self.rows_S = min(self.micro, self.q * self.N)
        self.base, self.second = PLAIN, Pass()
        if self.perturbed:
            self.base, self.second = passes(model, o, self.chunks(self.rows_S))
        self.moved = model.perturbed(o.scope) if self.perturbed else 0.0

    def step(self) -> StepCost:
        regions = self.products()
        for name, work in self.between().items():
            regions[name] = regions.get(name, Work()) + work
        memory = self.memory()
        ours = {name: work for name, work in regions.items() if work != Work()}
        return StepCost(ours, memory, self.taken(memory), self.collectives())

    # --- products -----------------------------------------------------------------------------------------------------

    def products(self) -> dict[Region, Work]:
        return self._of_pass("base forward", "base backward", self.base) | self._of_pass(
            "second forward", "second backward", self.second
        )

    def _of_pass(self, forward: Region, backward: Region, p: Pass) -> dict[Region, Work]:
        """The products of a pass, and its elementwise work."""
        m, o, N = self.model, self.o, self.N
        again = p.inputs * o.remat
        values = N * m.saved_values * o.itemsize
        below = Work(
            trunk=N * m.trunk_flops * p.forward,
            attention=N * m.attention_flops * p.forward,
            bytes=values * ACTIVATION_PASSES[0] * p.forward,
            exponentials=N * m.exponentials * p.forward,
        )
        back = Work(
            trunk=N * m.trunk_flops * (p.inputs + p.weights + again),
            attention=N * m.attention_flops * (m.attention_backward * p.inputs + again),
            bytes=values * (ACTIVATION_PASSES[1] * p.inputs + ACTIVATION_PASSES[0] * again),
            exponentials=N * m.exponentials * (p.inputs + again),
        )
        logits = N * m.vocabulary * p.logits
        whole = (p.hbar + p.wbar) * self._is_whole(p)
        head = Work(
            head=N * m.head_flops * (p.head - whole),
            kept=N * m.head_flops * whole,
            bytes=logits * o.itemsize * LOGIT_PASSES[o.framework] + self._accumulated(p),
            exponentials=logits * LOGIT_EXPONENTIALS[o.framework],
        )
        if p.inputs:
            return {forward: below, backward: back + head}
        return {forward: below + head}

    def _accumulated(self, p: Pass) -> float:
        """w̄ is read and written for each chunk except the first."""
        if not p.wbar or self._is_whole(p):
            return 0.0
        micro = self.o.micro_batches if p is self.base else self.in_S
        rows = self.micro if p is self.base else self.rows_S
        return 8.0 * self.model.head_parameters * micro * (self.chunks(rows) - 1)

    def _is_whole(self, p: Pass) -> bool:
        """Whether the pass starts from a kept cotangent, in one product over all rows."""
        return p is self.second and self.o.cotangent == "keep" and self.o.path != "sam"

    def chunks(self, rows: float) -> int:
        """The number of chunks of the head for the rows of one micro-batch."""
        o, V = self.o, self.model.vocabulary
        if o.framework == "torch":
            return math.ceil(rows / chunk_rows(V, o.itemsize, 4, CROSS_ENTROPY, o.chunk_bytes))
        least = math.ceil(rows / max(1, o.chunk_bytes // (V * (4 + o.itemsize))))
        divides = (m for m in range(least, 2 * least + 1) if rows % m == 0)
        return next(divides, least)

    # --- between the products -----------------------------------------------------------------------------------------

    def between(self) -> dict[Region, Work]:
        """Parameter work: writing and adding gradients, norms, the perturbation, the update."""
        P, s, o = self.model.parameters, self.moved, self.o
        found: dict[Region, Work] = {"update": Work(bytes=(NORM + ADAMW) * P)}
        if self.kind == "reused":
            found["update"] += Work(bytes=ACCUMULATE * P)
        found["base backward"] = Work(bytes=self._gradient(self.base, o.micro_batches))
        if not self.perturbed:
            return found
        adam = o.precondition is not None
        drawn = s if self.draws else 0.0
        norms = NORM + (PRECONDITIONED if adam else PLAIN_NORM)
        found["norm"] = Work(bytes=s * norms + 4 * drawn, normals=drawn)
        found["perturb"] = Work(bytes=s * (PERTURB if adam else PERTURB_PLAIN))
        after = self._gradient(self.second, self.in_S)
        if self.splits:
            after += SPLIT[o.framework] * P
        elif not self.exact:
            after += (COMBINE[o.framework] + (MERGE[o.framework] if self.q < 1 else 0)) * P
        if o.between == "reuse":
            after += ACCUMULATE * P
        found["second backward"] = Work(bytes=after)
        return found

    def _gradient(self, p: Pass, micro: float) -> float:
        """Bytes of writing a pass's gradient and adding up micro-batches; a tied weight has two gradients."""
        if not p.inputs:
            return 0.0
        m = self.model
        return m.parameters * (GRADIENT + ACCUMULATE * (micro - 1)) + m.tied * ACCUMULATE * m.head_parameters * micro

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, float]:
        """At the larger of two peaks: with the activations of the base pass, or of the second pass."""
        m, o = self.model, self.o
        P = m.parameters
        always = {"weights": 4.0 * P, "moments": 8.0 * P}
        if o.dtype != "float32" and o.framework == "torch":
            always["compute copy"] = 2.0 * P
        always["carried from step to step"] = 4.0 * P * (self.remembers + (o.between == "reuse"))
        kept = self._kept()
        # PyTorch perturbs the compute copies of its masters in place; JAX casts θ or θ+ε within each pass.
        moved = 4.0 * self.moved * ("compute copy" not in always)
        cast = 2.0 * P * (o.dtype != "float32" and o.framework == "jax")
        rest = self.perturbed and not self.exact and self.q < 1
        gradient_of_S = 4.0 * P * (rest and not self.splits)
        rows = self.micro if o.micro_batches > 1 or not rest else self.N * (1 - self.q)
        base = {
            **self._at_work(rows, self.base, o.micro_batches > 1),
            "cast weights": cast,
            "kept cotangent": kept,
            "gradient of S": gradient_of_S,
        }
        moments = [always | base]
        if self.second != Pass():
            moments.append(
                always
                | self._at_work(self.rows_S, self.second, self.in_S > 1)
                | {
                    "kept cotangent": kept,
                    "cast weights": cast,
                    "perturbed weights": moved,
                    "gradient of B": 4.0 * P * (not self.exact or o.between == "reuse"),
                }
            )
        elif self.perturbed:
            moments[0]["perturbed weights"] = moved
        return {name: x for name, x in max(moments, key=lambda x: sum(x.values())).items() if x}

    def _at_work(self, rows: float, p: Pass, adds_up: bool) -> dict[str, float]:
        """Activations of `rows` rows and the head's working memory; the backward pass frees them for gradients."""
        m, o = self.model, self.o
        inner = m.saved_values * (1 / m.layers if o.remat else 1) + (m.layers * m.width * m.tokens if o.remat else 0)
        activations = rows * inner * o.itemsize if p.inputs else rows * m.saved_values / m.layers * o.itemsize
        head = 0.0
        if p.logits:
            shape = (o.framework, int(rows), m.width, m.vocabulary, o.itemsize)
            head = head_bytes(*shape, gradient=p.wbar > 0, chunk_bytes=o.chunk_bytes)
        elif p.wbar:
            head = rows * m.width * o.itemsize + 4.0 * m.head_parameters
        gradient = 4.0 * m.parameters if p.inputs or p.weights else 0.0
        grows = max(0.0, gradient - activations - head)  # beyond the memory freed by the backward pass
        total = 4.0 * m.parameters * adds_up
        return {"activations": activations, "head": head, "gradient": grows + total}

    def _kept(self) -> float:
        """What is stored of all of S for the second pass."""
        m, o = self.model, self.o
        if not self.perturbed or self.second == Pass() or o.path == "sam":
            return 0.0
        rows = self.rows_S if o.ascent == "micro" else self.q * self.N
        if o.cut == "hidden":
            return rows * m.width * o.itemsize + 4.0 * m.head_parameters
        return rows * (m.vocabulary if o.cotangent == "keep" else m.width) * o.itemsize + 20.0 * rows

    def taken(self, memory: Mapping[str, float]) -> float:
        """XLA allocates all temporaries of a program at each call; PyTorch allocates each large tensor."""
        state = ("weights", "moments", "compute copy", "carried from step to step")
        if self.o.framework == "jax":
            return sum(x for name, x in memory.items() if name not in state)
        m, o, total = self.model, self.o, 4.0 * self.moved + self._kept()
        for p, micro, rows in ((self.base, o.micro_batches, self.micro), (self.second, self.in_S, self.rows_S)):
            chunk = min(rows, chunk_rows(m.vocabulary, o.itemsize, 4, CROSS_ENTROPY, o.chunk_bytes)) * m.vocabulary * 4
            each = rows * m.saved_values * o.itemsize * (p.inputs > 0)
            each += 4.0 * m.parameters * (p.inputs > 0)
            each += 8.0 * m.head_parameters * (m.tied and p.inputs > 0)
            each += chunk * self.chunks(rows) * (p.logits > 0)
            total += micro * each
        return total + 4.0 * m.parameters * (self.perturbed and not self.exact)

    # --- collectives --------------------------------------------------------------------------------------------------

    def collectives(self) -> Collectives:
        """AdamW reduces its gradient and, where that is sharded, its norm.

        An ascent from the batch's gradient needs that reduced first; a known ascent, or one of each device's own, does
        not. On part of the batch, g_S and the gradient of the rest are reduced separately; in a split step g_R and ĝ.
        """
        if self.o.devices == 1:
            return NONE
        P = 4.0 * self.model.parameters
        method = self.o.method
        if not self.perturbed:
            return Collectives(1, P, 1)
        assert isinstance(method, Perturbed)
        of_batch = method.direction.source in ("full", "part", "rest")
        first = 4.0 * self.moved if self.exact and self.o.between != "reuse" else P
        apart = not self.exact and self.o.fraction < 1 and not self.splits
        return Collectives(1 + of_batch + apart, P + of_batch * first + apart * P, 3)
