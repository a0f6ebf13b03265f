"""A model under torch.compile in the step: one graph for both passes, and the eager step's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import METHODS
from torch import nn

from fsam_core.torch import AdamW, FunctionalSAM, LinearHead, MicroBatches, Schedule, Staged, Step, from_model, masters

V, D = 23, 8
# "eager" runs what dynamo captured; what inductor makes of it is its own affair, and takes a minute.
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator))
        self.up = nn.Parameter(torch.randn(D, 3 * D, generator=generator) * 0.3)
        self.down = nn.Parameter(torch.randn(3 * D, D, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.embedding(x, self.embedding)
        return h + torch.tanh(F.layer_norm(h.cumsum(1), (D,)) @ self.up) @ self.down


def features(model, batch):
    return LinearHead(model(batch["x"]), model.embedding, batch["y"])


def batch(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return dict(zip("xy", torch.randint(0, V, (2, 8, 5), generator=generator), strict=True))


def trained(
    method, backend: str | None, dtype=torch.float32, schedule=None
) -> tuple[list[float], list[torch.Tensor], int]:
    """(losses, weights, how many graphs were made) of six steps."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = Model()
    copies = masters(model, dtype) if dtype != torch.float32 else {}
    run = torch.compile(model, backend=counted, fullgraph=True) if backend else model
    optimizer = AdamW(copies or model.parameters(), lr=0.01, eps=1e-6, copies=copies)
    options = {"clip_norm": 1.0, **({"schedule": schedule} if schedule else {})}
    step = Step(run, optimizer, method, features=features, **options)
    losses = [float(step(MicroBatches([batch(i), batch(i + 100)]))) for i in range(6)]
    assert step.skipped_steps == 0
    return losses, [p.detach().float() for p in model.parameters()], len(graphs)


def assert_same(one, other, tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for x, y in zip(one[1], other[1], strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_compiled_step_equals_eager_with_one_graph_a_mode(method):
    compiled, eager = trained(method, "aot_eager"), trained(method, None)
    assert_same(compiled, eager, 1e-4)
    assert compiled[2] <= 2  # with gradients, and for a pass without; not one more for the perturbed weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_savings_and_masters_compile_once(backend, dtype):
    method = FunctionalSAM(0.1, precondition="adam", fraction=1 / 2, cut="hidden")
    schedule = Schedule(every=2)
    compiled, eager = (trained(method, x, dtype, schedule) for x in (backend, None))
    assert_same(compiled, eager, 1e-5 if dtype == torch.float32 else 2e-2)
    assert compiled[2] == 1


def test_stages_may_be_compiled_each():
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        model = Model()
        lower = wrap(lambda x: F.embedding(x, model.embedding))
        upper = wrap(lambda h: h + torch.tanh(F.layer_norm(h.cumsum(1), (D,)) @ model.up) @ model.down)
        staged = Staged(
            lambda _, b, lower=lower: lower(b["x"]),
            lambda model, h, b, upper=upper: LinearHead(upper(h), model.embedding, b["y"]),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6)
        moved = FunctionalSAM(0.1, scope=lambda name: name in ("up", "down"))
        step = Step(model, optimizer, moved, features=staged)
        losses = [float(step(batch(i))) for i in range(4)]
        results.append((losses, [p.detach() for p in model.parameters()]))
    assert_same(*results, 1e-5)


def test_step_stays_outside_of_what_is_compiled_around_it():
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(V, D), nn.LayerNorm(D), nn.Linear(D, V))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Step(model, optimizer, FunctionalSAM(0.1), features=from_model("2", "y", call=lambda m, b: m(b["x"])))
        call = wrap(lambda given, step=step: step(given))
        results.append([float(call(batch(i))) for i in range(3)])
    assert results[0] == results[1]
