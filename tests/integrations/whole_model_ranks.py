"""Two ranks: the error of each case's gradient against one process with the whole batch, printed by rank 0 as JSON."""

from __future__ import annotations

import json
import sys
import tempfile

import torch
import torch.distributed as dist

from fsam_core.torch import FunctionalSAM, Step
from fsam_core.torch.from_model import from_model
from integrations import causal_reference, hf_args, rows
from integrations_models import CLIP, RHO, error, llama, moved, token_batches, weights

METHOD, FEATURES = FunctionalSAM(rho=RHO), from_model("lm_head", shift=True)


def plain(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def wrapped(kind: str) -> float:
    """from_model inside DistributedDataParallel or FSDP2."""
    from torch.distributed.fsdp import fully_shard

    batches = token_batches()
    model = llama()
    expected, before = causal_reference(model, batches), weights(model)
    if kind == "ddp":
        outer = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        outer = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Step(outer, optimizer, METHOD, features=FEATURES, clip_norm=CLIP)(batches[dist.get_rank()])
    after = {name: plain(p.detach()).double() for name, p in model.named_parameters()}
    return error({name: x - after[name] for name, x in before.items()}, expected)


def trainer() -> float:
    """FsamTrainer, which Accelerate wraps in DistributedDataParallel: two micro-batches a rank."""
    from fsam_trainers.integrations.hf_trainer import FsamTrainer

    batches = token_batches(4)
    model = llama()
    expected, before = causal_reference(model, batches), weights(model)
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    with tempfile.TemporaryDirectory() as folder:
        options = {"train_dataset": rows(batches), "optimizers": optimizers}
        FsamTrainer(model, hf_args(folder), **options, method=METHOD).train()
    return error(moved(before, model), expected)


def accelerated() -> float:
    """AcceleratedStep on a model that Accelerate prepares for two ranks."""
    from accelerate import Accelerator

    from fsam_trainers.integrations.accelerate import AcceleratedStep

    batches, accelerator = token_batches(), Accelerator(cpu=True)
    model = llama()
    expected, before = causal_reference(model, batches), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outer, optimizer = accelerator.prepare(model, optimizer)
    step = AcceleratedStep(accelerator, outer, optimizer, METHOD, features=FEATURES, clip_norm=CLIP)
    step(batches[accelerator.process_index])
    return error(moved(before, model), expected)


CASES = {"ddp": lambda: wrapped("ddp"), "fsdp": lambda: wrapped("fsdp"), "trainer": trainer, "accelerate": accelerated}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {}
    for case in sys.argv[1:]:
        torch.manual_seed(0)
        try:
            found[case] = CASES[case]()
        except Exception as problem:
            found[case] = f"{type(problem).__name__}: {problem}"
    if dist.get_rank() == 0:
        print("FOUND", json.dumps(found), flush=True)
    dist.destroy_process_group()
