"""The Python on README and the pages of docs/ runs as printed, page by page.

docs/integrations.md and docs/checkpoints.md have tests of their own (`tests/integrations/test_page.py`,
`tests/trainers/test_export.py`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType
from torch import distributed

from fsam_core import FunctionalSAM
from fsam_core import jax as in_jax
from fsam_core.torch import LinearHead, from_model
from integrations_models import V, causal_loss, llama, token_batches

ROOT = Path(__file__).parent.parent
TESTED_ELSEWHERE = {"integrations.md", "checkpoints.md"}


def blocks(page: Path) -> list[str]:
    """The Python of a page, also where it is indented in a list."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


class Tied(nn.Module):
    """tanh of the embeddings' rows, times the embedding or a head."""

    features_only: bool = True

    @nn.compact
    def __call__(self, tokens_BxL):
        w_VxD = self.param("w", nn.initializers.normal(0.3), (V, 8))
        h_BxLxD = jnp.tanh(w_VxD[tokens_BxL])
        return (h_BxLxD, w_VxD) if self.features_only else nn.Dense(V, use_bias=False, name="lm_head")(h_BxLxD)


def jax_batch() -> dict[str, jax.Array]:
    tokens_BxL = jax.random.randint(jax.random.key(0), (8, 6), 0, V)
    return {"tokens": tokens_BxL[:, :-1], "labels": tokens_BxL[:, 1:]}


def readme(transformers: str, pytorch: str, in_jax: str, folder: Path) -> None:
    rows = [{key: x[i] for key, x in batch.items()} for batch in token_batches(2, rows=8) for i in range(8)]
    rows = rows[:-3]  # a last batch that cannot be cut
    llama().save_pretrained(folder / "model")
    transformers = transformers.replace("runs/hf", str(folder / "run")).replace("max_steps=100", "max_steps=2")
    trainer = run(transformers, name=str(folder / "model"), rows=rows)["trainer"]
    assert trainer.state.global_step == 2
    assert trainer.fsam_step.info.perturbation_norm == pytest.approx(0.2, rel=1e-4)

    found = run(pytorch, model=llama(), loader=token_batches(3, rows=8))
    assert math.isfinite(float(found["loss"]))
    assert found["step"].info.perturbation_norm == pytest.approx(0.2, rel=1e-4)

    model, batch = Tied(), jax_batch()
    params = model.init(jax.random.key(0), batch["tokens"])
    found = run(in_jax, model=model)
    _, _, info = found["step"](params, found["tx"].init(params), batch)
    assert float(info.perturbation_norm) == pytest.approx(0.2, rel=1e-4)


def loops(check: str, with_from_model: str, own_update: str, folder: Path) -> None:
    model, flax_model, batch, batch_jax = llama(), Tied(features_only=False), token_batches()[0], jax_batch()
    params = flax_model.init(jax.random.key(0), batch_jax["tokens"])
    found = run(with_from_model, flax_model=flax_model)

    def loss_of(params, batch):
        logits = flax_model.apply(params, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    names = {"features_jax": found["features_jax"], "loss_of": loss_of, "params": params, "batch_jax": batch_jax}
    run(check, model=model, features=found["features"], batch=batch, **names)

    from fsam_core.torch import Step

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = Step(model, optimizer, FunctionalSAM(0.1), features=from_model("lm_head", shift=True))
    before = model(**batch).loss.item()
    assert before == pytest.approx(causal_loss(model(**batch).logits, batch["labels"]).item())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run(own_update, step=step, batch=batch, torch=torch, model=model, optimizer=optimizer, scheduler=scheduler)
    assert model(**batch).loss.item() < before


def methods(roles: str, ascent: str, folder: Path) -> None:
    assert run(roles)["blocks"].count == 12
    method = run(ascent)["method"]
    assert method.ascent.name == "surprise"
    grad = in_jax.value_and_grad(lambda p, b: in_jax.LinearHead(b["x"], p["w"], b["y"]), method, b2=0.9)
    params = {"w": jnp.ones((4, 3))}
    (_, info), _ = grad(params, {"x": jnp.eye(3), "y": jnp.arange(3)}, optax.adam(0.1).init(params))
    assert float(info.perturbation_norm) == pytest.approx(0.5, rel=1e-5)


def cost(preset: str, by_hand: str, folder: Path) -> None:
    assert 1 < run(preset)["found"].flops_ratio < 1.15
    from fsam_core import cost

    assert 1 < cost.estimate(run(by_hand, cost=cost)["mine"], cost.Options(fraction=0.5), tokens=8192).flops_ratio < 2


def scale(mesh: str, local: str, in_torch: str, folder: Path) -> None:
    model, batch = Tied(), jax_batch()
    features = lambda params, batch: in_jax.LinearHead(*model.apply(params, batch["tokens"]), batch["labels"])
    params = model.init(jax.random.key(0), batch["tokens"])
    method, adam = FunctionalSAM(0.2, precondition="adam"), optax.adam(0.1, b2=0.95)
    names = {"jax": jax, "AxisType": AxisType, "fsam": in_jax, "features": features, "method": method}

    def step(state, batch):
        return jax.jit(in_jax.value_and_grad(features, method, b2=0.95))(params, batch, adam.init(params))

    plain = step(None, batch)
    # As many devices as the tests have.
    found = run(mesh.replace("(4, 2)", "(2, 2)"), state=None, batch=batch, step=step, **names)
    for expected, got in zip(jax.tree.leaves(plain), jax.tree.leaves(found["state"]), strict=True):
        np.testing.assert_allclose(expected, got, rtol=1e-4, atol=1e-6)
    grad = run(local, **names)["grad"]
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        (_, info), _ = jax.jit(grad)(params, batch, adam.init(params))
    assert float(info.perturbation_norm) == pytest.approx(0.2, rel=1e-4)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch_model = llama()
    torch_model.trunk = lambda tokens: torch_model.model(tokens).last_hidden_state
    # One rank of 32; what the others would send is not computed. Real ranks: tests/core/test_tensor_ranks.py.
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    try:
        parts = (init_device_mesh, parallelize_module, ColwiseParallel, fully_shard, LinearHead)
        found = run(in_torch.replace('"cuda"', '"cpu"'), model=torch_model, **{x.__name__: x for x in parts})
        weight = torch_model.lm_head.weight
        assert isinstance(weight, DTensor)
        assert weight.device_mesh.mesh_dim_names == ("data", "tensor")
        assert weight.placements[1] == Shard(0)
    finally:
        distributed.destroy_process_group()


PAGES = {"README.md": readme, **{f"docs/{x.__name__}.md": x for x in (loops, methods, cost, scale)}}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_the_page_runs(page, tmp_path):
    PAGES[page](*blocks(ROOT / page), folder=tmp_path)


def test_no_page_has_python_that_is_not_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    having = {str(page.relative_to(ROOT)) for page in pages if blocks(page) and page.name not in TESTED_ELSEWHERE}
    assert having == PAGES.keys()
