"""The matrix products of a step: a model and the options of a step as numbers, and the products they need.

They are counted, not measured. The unit for the trunk is its forward pass over the whole batch, the unit for the head
one product h Wᵀ of the whole batch, 2·N·D·V operations. AdamW is therefore forward 1, backward 2, head 3.

Importing this imports neither framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fsam_core import schedules
from fsam_core.errors import UserError, check_choice, is_number, is_whole
from fsam_core.methods import SAM, Form, FunctionalSAM, LogitSAM, Path, Perturbed, Plain
from fsam_core.schedules import Schedule

Framework = Literal["jax", "torch"]
Dtype = Literal["float32", "bfloat16", "float16"]
_CLASSES: dict[str, Any] = {"sam": SAM, "functional": FunctionalSAM, "logit": LogitSAM}


@dataclass(frozen=True)
class Model:
    """A decoder as numbers. `decoder` computes them from sizes; for other models give the counts yourself.

    Attributes:
        layers: the number of blocks, all alike.
        width: D of the last hidden states.
        vocabulary: V of the head.
        parameters: the number of parameters, embeddings and head included.
        trunk_flops: operations a token of the products with weights in one forward pass, without the head: twice the
            number of weights a token is multiplied with.
        attention_flops: operations a token of the scores and their product with values, over the whole L×L square.
        saved_values: values a token saved for the backward pass, over all blocks.
        exponentials: exp, tanh and erf a token of the forward pass, over all blocks.
        tied: whether the head's weight is the embedding.
        tokens: tokens of the trunk a row of the head; above 1, read "a token" above as "a row of the head".
        attention_backward: attention's backward products relative to its forward ones: 2, or 2.5 where the scores are
            recomputed (FlashAttention, PyTorch's `scaled_dot_product_attention`).

    Raises:
        UserError: for a count that is not > 0.
    """

    layers: int
    width: int
    vocabulary: int
    parameters: int
    trunk_flops: float
    attention_flops: float = 0.0
    saved_values: float = 0.0
    exponentials: float = 0.0
    tied: bool = True
    tokens: float = 1.0
    attention_backward: float = 2.5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "vocabulary", "parameters", "trunk_flops"):
            if not getattr(self, name) > 0:
                raise UserError(f"model: {name} must be > 0, got {getattr(self, name)!r}")

    @property
    def head_flops(self) -> float:
        """Operations of one product of a token with the head."""
        return 2.0 * self.width * self.vocabulary

    @property
    def head_parameters(self) -> int:
        return self.width * self.vocabulary

    def perturbed(self, scope: str) -> float:
        """The number of parameters that a scope perturbs."""
        if scope == "no-head":
            return self.parameters - self.head_parameters
        if scope == "norms":
            return (2 * self.layers + 1) * self.width
        if scope.startswith("top:"):
            weights = self.trunk_flops / 2 / self.tokens
            return blocks_of(scope) / self.layers * weights + (not self.tied) * self.head_parameters
        return self.parameters


def decoder(
    layers: int,
    width: int,
    mlp: int,
    heads: int,
    seq_len: int,
    vocabulary: int,
    *,
    tied: bool = True,
    framework: Framework = "torch",
    kv_heads: int | None = None,
    head_width: int | None = None,
    gated: bool = False,
    rotary: bool = False,
) -> Model:
    """The trainers' pre-norm decoder, without biases.

    A block's products are those with [D, A + 2E], [A, D], [D, F] and [F, D], where A features are of queries and E of
    keys and of values; a gated MLP has two with [D, F]. The values saved for the backward pass are counted as in
    Korthikanti et al. (arXiv 2205.05198), without dropout: the inputs and outputs of the two norms, q, k, v, the result
    of attention, the residual stream, and the MLP's tensors of width F, two or, gated, four. The trainers' JAX decoder
    also saves the scores, their softmax and the inputs of the MLP's derivative; PyTorch recomputes these.

    Args:
        mlp: hidden units of the MLP, F.
        kv_heads: heads of keys and values (default: all).
        head_width: features of a head (default: width / heads).
        gated: whether the MLP's hidden units are a product of two.
        rotary: whether positions are rotations, and no parameters.
    """
    d = head_width or width // heads
    a, e = heads * d, (kv_heads or heads) * d
    weights = layers * (2 * width * (a + e) + (2 + gated) * width * mlp)
    scores = heads * seq_len
    mlp_kept = 4 * mlp if gated else 2 * mlp
    kept = 4 * width + 2 * (a + e) + mlp_kept + (2 * scores + 2 * mlp if framework == "jax" else 0)
    embedded = vocabulary * (1 if tied else 2) + (0 if rotary else seq_len)
    return Model(
        layers=layers,
        width=width,
        vocabulary=vocabulary,
        parameters=weights + (2 * layers + 1 + embedded) * width,
        trunk_flops=2 * weights,
        attention_flops=4 * layers * seq_len * a,
        saved_values=layers * kept,
        exponentials=layers * (mlp + scores),
        tied=tied,
        attention_backward=2 if framework == "jax" else 2.5,
    )


@dataclass(frozen=True)
class Options:
    """The options of a step, named as in `fsam_core.methods.Perturbed` and `fsam_core.schedules.Schedule`.

    Attributes:
        path: "base" is AdamW, which ignores the fields up to `probability`.
        fraction, strength, form, ascent, ascent_fraction, cut, scope, precondition: as in `Perturbed`.
        cotangent: "keep" or "recompute", see `fsam_kernels.memory.Memory`.
        every, between, probability: as in `Schedule`.
        start: the share of the run before the first correction.
        micro_batches: the number of micro-batches a device and step.
        remat: activation checkpointing: every backward pass runs the blocks' forward pass once more.
        dtype: dtype of products and saved values; weights, moments and gradients are float32.
        devices: the number of data-parallel devices, each with all weights.
        framework: XLA merges two evaluations at the same weights and drops unused gradients; PyTorch does neither.
        chunk_bytes: working memory of the head's chunks of rows.

    Raises:
        UserError: for any other value, and for options that exclude each other.
    """

    path: Path = "functional"
    fraction: float = 1.0
    strength: float = 1.0
    form: Form = "correction"
    ascent: str = "full"
    ascent_fraction: float | None = None
    cut: str = "logits"
    cotangent: str = "recompute"
    scope: str = "all"
    precondition: str | None = "adam"
    every: int = 1
    between: str = "plain"
    start: float = 0.0
    probability: float = 1.0
    micro_batches: int = 1
    remat: bool = False
    dtype: Dtype = "float32"
    devices: int = 1
    framework: Framework = "torch"
    chunk_bytes: int = 2**29

    def __post_init__(self) -> None:
        for name, allowed in (
            ("path", get_args(Path)),
            ("cotangent", ("keep", "recompute")),
            ("dtype", get_args(Dtype)),
            ("framework", get_args(Framework)),
        ):
            check_choice(name, getattr(self, name), allowed)
        for name in ("micro_batches", "devices", "chunk_bytes"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
        if not is_number(self.start) or not 0 <= self.start <= 1:
            raise UserError(f"start must be a share of the run, in [0, 1], got {self.start!r}")
        if not isinstance(self.scope, str):
            raise UserError(f"scope: the cost of {self.scope!r} is not known; use all, no-head, norms or top:K")
        schedule = Schedule(self.every, probability=self.probability, between=self.between)  # type: ignore[arg-type]
        schedules.check(schedule, self.method)

    @property
    def method(self) -> Plain | Perturbed:
        """The method of these options; its ρ is arbitrary."""
        if self.path == "base":
            return Plain()
        names = ("precondition", "fraction", "strength", "form", "ascent", "ascent_fraction", "cut", "scope")
        return _CLASSES[self.path](1.0, **{name: getattr(self, name) for name in names})

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def shares(self) -> dict[schedules.Kind, float]:
        """Kind of step -> its share of the run, averaged over the random draws."""
        if self.path == "base":
            return {"plain": 1.0}
        after = 1.0 - self.start
        corrected = after * self.probability / self.every
        reused = after - corrected if self.between == "reuse" else 0.0
        found: dict[schedules.Kind, float] = {"corrected": corrected, "reused": reused}
        return {kind: x for kind, x in (*found.items(), ("plain", 1 - corrected - reused)) if x > 0}

    @property
    def micro_batches_of_S(self) -> float:
        """The number of micro-batches in S; below 1 it is a slice of one."""
        return self.fraction * self.micro_batches


class Pass(NamedTuple):
    """The products of one pass.

    Attributes:
        forward: the trunk's forward pass.
        inputs, weights: its gradients with respect to the inputs of its products, and to their weights.
        logits, hbar, wbar: h Wᵀ (again where the cotangent is recomputed), z̄ W and z̄ᵀ h.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    logits: float = 0.0
    hbar: float = 0.0
    wbar: float = 0.0

    @property
    def head(self) -> float:
        return self.logits + self.hbar + self.wbar


PLAIN = Pass(1, 1, 1, 1, 1, 1)


def passes(model: Model, o: Options, chunks: int = 2) -> tuple[Pass, Pass]:
    """(the base pass, the second pass) of a corrected step; the head processes S in `chunks` chunks of rows.

    The only pass of a step at θ+ε (sam with an ascent known before the step) counts as the base pass.
    """
    method = o.method
    if not isinstance(method, Perturbed):
        return PLAIN, Pass()
    q, exact, known = o.fraction, method.exact, method.direction.known
    xla, micro = o.framework == "jax", method.direction.source == "micro"
    is_top = o.scope.startswith("top:")
    top = blocks_of(o.scope) / model.layers if is_top else 1.0
    if top > 1:
        raise UserError(f"scope: {o.scope!r} asks for more than the {model.layers} blocks of the model")
    # S is one micro-batch, so none of its results has to be stored while another runs.
    one = micro or o.micro_batches == 1 or (q < 1 and o.micro_batches_of_S <= 1)
    r = method.share if exact and method.direction.source == "part" else 1.0
    reuses = o.between == "reuse"
    # `Staged` runs the blocks below the perturbed ones once.
    staged = is_top and one and o.path != "logit" and (xla or not micro) and r == 1 and not reuses
    lean = xla and exact and not reuses  # gradients that ε does not need are left out
    # XLA merges two evaluations at the same weights if both save the same values for a backward pass. Otherwise its
    # simplifier changes one of them before they are compared (jaxlib 0.10, CPU, counted in the compiled programs).
    merges = xla and one and not micro
    f = top if staged or (merges and not lean and o.path != "logit") else 1.0
    merged = xla and one and chunks == 1  # without a loop, XLA can merge products of both passes
    head_moves = o.scope == "all" or (is_top and not model.tied)
    hidden = float(o.cut == "hidden")
    again = 0.0 if hidden or o.cotangent == "keep" or merged else 1.0
    pulled = 1.0 - hidden
    if o.form == "split":  # R at θ; S at θ+ε, and for a functional z̄ its forward pass at θ
        functional = o.path == "functional"
        rest, seen = 1 - q, q * functional
        base = Pass(rest + seen, rest, rest, rest + seen, rest + hidden * seen, rest + hidden * seen)
        head = (again, pulled, pulled) if functional else (1.0, 1.0, 1.0)
        return base, Pass(q, q, q, *(q * x for x in head))
    if exact and known:
        if o.path == "sam":
            return PLAIN, Pass()
        if o.path == "functional":
            return Pass(1, 0, 0, 1, hidden, hidden), Pass(f, 1, 1, again, pulled, pulled)
        return Pass(1, logits=1), Pass(f, 1, 1, again, 1, 1)
    if exact:
        alone = o.path != "functional"  # without a vjp at θ there is no evaluation at θ either
        needed = {"no-head": 1.0, "norms": 0.0}.get(o.scope, top) if lean else top if staged else 1.0
        wbar = max(hidden, r * (head_moves or not lean))
        inputs = r * (top if lean or staged else 1.0)
        base = Pass(r if alone else 1, inputs, r * needed, r if alone else 1, max(hidden, r), wbar)
    else:
        below = (1 - q) + q * top if staged else 1.0
        base = Pass(1, below, below, 1, 1, 1)
    if o.path == "functional":
        hbar = 0.0 if merged and not head_moves else pulled
        second = Pass(q * f, q, q, q * again, q * hbar, q * pulled)
    elif o.path == "sam":
        second = Pass(q * f, q, q, q, q, q)
    else:
        # The base pass already contains part of the forward passes at θ+ε and, once more, at θ.
        below, seen = 0.0, q if merges else 0.0
        if merges and lean:
            below, seen = r * (1 - top), r * (o.scope in ("all", "no-head"))
        second = Pass(q - below + q - seen, q, q, q * (1 + again), q, q)
    return base, second


def blocks_of(scope: str) -> int:
    """K of "top:K"."""
    return int(scope.removeprefix("top:"))
