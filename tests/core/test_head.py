"""The head in the step: the hidden cut, matrix products with the vocabulary, memory. Options: `test_options`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from formula import Formula
from problems import FRAMEWORKS, Weights, adamw, as_torch, batch_of, distance, gradient, values
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_core import SAM, FunctionalSAM, Plain, UserError
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import Memory
from fsam_kernels.options import Loss

RHO, WIDTH, D, V = 0.3, 6, 5, 9
pytestmark = pytest.mark.usefixtures("float64")


def weights_of(tied: bool = False, **more: np.ndarray) -> dict[str, np.ndarray]:
    """A trunk `a` and a head `w`; tied, the trunk reads its input through the head's weight."""
    random = np.random.default_rng(3)
    return {"a": random.normal(size=(D if tied else WIDTH, D)), "w": random.normal(size=(V, D)), **more}


def trunk(p, batch, tied: bool):
    x = p["w"][batch["t"]] if tied else batch["x"]
    z = x @ p["a"]
    return torch.tanh(z) if isinstance(z, torch.Tensor) else jnp.tanh(z)


def kinds(h):
    """The framework's (LinearHead, Logits)."""
    module = in_torch if isinstance(h, torch.Tensor) else in_jax
    return module.LinearHead, module.Logits


def batch_with_tokens(n: int = 12, seed: int = 1) -> dict:
    return {**batch_of(n, seed), "t": np.random.default_rng(seed).integers(0, V, n)}


def quarters(batch: dict) -> list[dict]:
    return [{k: x[i::4] for k, x in batch.items()} for i in range(4)]


# --- the cut at the hidden states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_hidden_cut_of_a_tied_head_is_its_formula(framework):
    """The head's weight has a gradient at θ from the head, and one at θ+ε from the embedding."""
    method, weights = FunctionalSAM(RHO, precondition="adam", cut="hidden"), weights_of(tied=True)
    features = lambda p, b: (lambda h: kinds(h)[0](h, p["w"], b["y"]))(trunk(p, b, True))
    batches = [batch_with_tokens(8, 1), batch_with_tokens(4, 2)]
    expected, _ = Formula(lambda p, b: (trunk(p, b, True), p["w"], None), method)(weights, batches)
    assert distance(gradient(framework, features, method, weights, batches, jit=True)[2], expected) < 1e-12


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_hidden_cut_without_perturbation_is_the_plain_gradient(framework):
    features = lambda p, b: (lambda h: kinds(h)[0](h, p["w"], b["y"], bias=p["b"]))(trunk(p, b, False))
    weights, batch = weights_of(b=np.linspace(-1, 1, V)), quarters(batch_with_tokens())
    got = gradient(framework, features, FunctionalSAM(0.0, cut="hidden"), weights, batch)[2]
    assert distance(got, gradient(framework, features, Plain(), weights, batch)[2]) < 1e-14


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_hidden_cut_needs_a_linear_head(framework):
    logits = lambda p, b: (lambda h: kinds(h)[1](h @ p["w"].T, lambda z: (z**2).sum()))(trunk(p, b, False))
    with pytest.raises(UserError, match="cut: 'hidden' needs features to return a LinearHead"):
        gradient(framework, logits, FunctionalSAM(RHO, cut="hidden"), weights_of(), batch_of())


# --- how much vocabulary work a step does -------------------------------------------------------------------------


HEAD_PRODUCTS = [
    (Plain(), "auto", 3),
    (FunctionalSAM(RHO), "recompute", 6),
    (FunctionalSAM(RHO), "keep", 5),
    (FunctionalSAM(RHO, cut="hidden"), "auto", 3),
    (SAM(RHO), "auto", 6),
]


def products_with(v: int, program: str) -> int:
    """Dots of a compiled program that have an axis of length v in their result or in an operand."""
    shapes = dict(re.findall(r"(%\S+) = \w+\[([\d,]*)\]", program))
    dots = re.findall(r"(%\S+) = \S+ dot\((%[^,\s]+), (%[^,\s)]+)\)", program)
    return sum(any(str(v) in shapes[name].split(",") for name in dot) for dot in dots)


@pytest.mark.parametrize(("method", "cotangent", "expected"), HEAD_PRODUCTS)
def test_matrix_products_with_the_vocabulary_jax(method, cotangent, expected):
    v, n = 1009, 64
    features = lambda p, b: in_jax.LinearHead(jnp.tanh(b["x"] @ p["a"]), p["w"], b["y"])
    call = in_jax.value_and_grad(features, method, memory=Memory(cotangent, chunk_bytes=n * v * 8 // 2))
    params, batch = values(v=v, dtype="float32"), batch_of(n, v=v, dtype="float32")
    # Two chunks a pass run in a loop, so each product is in the program once.
    assert products_with(v, jax.jit(call).lower(params, batch).compile().as_text()) == expected


class _Products(TorchDispatchMode):
    """Counts matrix products that have an axis of the vocabulary's length."""

    def __init__(self, v: int) -> None:
        super().__init__()
        self.v, self.found = v, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm") and any(self.v in x.shape for x in tensors):
            self.found += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "cotangent", "expected"), HEAD_PRODUCTS)
def test_matrix_products_with_the_vocabulary_torch(method, cotangent, expected):
    v, n = 1009, 64
    model = Weights(values(v=v, dtype="float32"))
    features = lambda p, b: in_torch.LinearHead(torch.tanh(b["x"] @ p["a"]), p["w"], b["y"])
    step = in_torch.Step(model, adamw(model), method, features=features, memory=Memory(cotangent))
    with _Products(v) as counted:
        step.gradient(as_torch(batch_of(n, v=v, dtype="float32")))
    assert counted.found == expected


# --- how the cotangent waits --------------------------------------------------------------------------------------


def test_auto_keeps_what_fits():
    memory = Memory(keep_bytes=1000 * 4096 * 2)
    assert memory.keeps(1000, 4096, 2)
    assert not memory.keeps(1001, 4096, 2)
    assert Memory("keep").keeps(10**6, 10**6, 4)
    assert not Memory("recompute").keeps(1, 1, 2)


@pytest.mark.parametrize(("kind", "chunks"), [("TPU v6 lite", []), ("cpu", ["16"])])
def test_step_is_traced_for_the_device_of_its_mesh(kind, chunks):
    # Of a size that a TPU takes in one chunk.
    n, d, v = 2048, 576, 32768
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=kind.split()[0].lower())
    features = lambda p, b: in_jax.LinearHead(b["x"] * p["a"], p["w"], b["y"])
    like = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    arguments = {"a": like(d), "w": like(v, d)}, {"x": like(n, d), "y": like(n, dtype=jnp.int32)}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        program = str(jax.make_jaxpr(in_jax.value_and_grad(features, FunctionalSAM(RHO)))(*arguments))
    assert program.count("dot_general") == 5
    assert re.findall(r" length=(\d+)", program) == chunks


@pytest.mark.parametrize("options", [{"cotangent": "both"}, {"keep_bytes": 0}, {"chunk_bytes": -1}])
def test_bad_memory_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Memory(**options)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"z_loss": -1.0}, {"soft_cap": 0.0}])
def test_bad_losses_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Loss(**options)


# --- heads that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((D, V))}, "stored the other way round"),
        ({"weight": np.zeros((V, 3))}, r"weight must be \[V, 5\], got \(9, 3\)"),
        ({"layout": "VDD"}, "layout must be 'VD' or 'DV'"),
        ({"bias": np.zeros(3)}, r"bias must be \[9\], got \(3,\)"),
        ({"labels": np.zeros(3, int)}, "leading axes"),
    ],
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_head_that_does_not_fit_is_named(framework, change, message):
    to = (lambda x: x) if framework == "jax" else (lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x)
    fields = {"hidden": np.zeros((4, D)), "weight": np.zeros((V, D)), "labels": np.zeros(4, int), **change}
    fields = {k: to(x) for k, x in fields.items()}
    kind = in_jax.LinearHead if framework == "jax" else in_torch.LinearHead
    with pytest.raises(UserError, match=message):
        gradient(framework, lambda p, b: kind(**fields), Plain(), values(), batch_of())
