"""The table of docs/integrations.md: each snippet of that page run as printed, and its gradient's error.

python profiling/experiments/integrations.py
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import integrations_nanodo
from integrations_models import (
    CLIP,
    Nano,
    V,
    causal_loss,
    clipped,
    error,
    joined,
    llama,
    moved,
    reference,
    token_batches,
    weights,
)

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations.md"
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
SNIPPET = re.compile(r"<!-- snippet: (.*?) -->\n```python\n(.*?)```", re.DOTALL)


def snippets() -> dict[str, str]:
    """Name -> code, in the order of the page."""
    return dict(SNIPPET.findall(PAGE.read_text()))


def lines(code: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in code.splitlines())


def causal_reference(model: Any, batches: list[Any]) -> dict[str, Any]:
    """The clipped gradient of a causal model of transformers, over all micro-batches."""
    batch = joined(batches)
    outputs = lambda model: (model(input_ids=batch["input_ids"]).logits,)
    return clipped(reference(model, outputs, lambda z: causal_loss(z, batch["labels"])))


def any_loop(code: str) -> float:
    model, batches = llama(), token_batches()
    expected, before = causal_reference(model, batches), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    exec(code, {"model": model, "optimizer": optimizer, "batches": batches, "torch": torch})
    return error(moved(before, model), expected)


def nanogpt(code: str) -> float:
    model, batches = Nano(), token_batches()
    pairs = [(batch["input_ids"], batch["labels"].clamp(min=-1)) for batch in batches]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    loss = lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1)
    expected, before = clipped(reference(model, lambda model: (model(x, y)[0],), loss)), weights(model)
    given = iter(pairs)
    names = {"grad_clip": CLIP, "iter_num": 0, "max_iters": 1, "gradient_accumulation_steps": len(pairs)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    exec(code, {"model": model, "optimizer": optimizer, "get_batch": lambda split: next(given), **names})
    return error(moved(before, model), expected)


def hf_args(folder: str, **options: Any) -> Any:
    """One step of two micro-batches with SGD at a constant learning rate of 1."""
    from transformers import TrainingArguments

    defaults = {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **options})


def rows(batches: list[dict[str, Any]]) -> Any:
    """The data set that these micro-batches are made of."""
    joint = joined(batches)
    return [{key: x[i] for key, x in joint.items()} for i in range(len(joint["labels"]))]


def transformers(code: str) -> float:
    model, batches = llama(), token_batches()
    expected, before = causal_reference(model, batches), weights(model)
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    with tempfile.TemporaryDirectory() as folder:
        names = {"model": model, "args": hf_args(folder), "data": rows(batches), "optimizers": optimizers}
        exec(code, names)
    return error(moved(before, model), expected)


def peft(code: str) -> float:
    batches, prepare = token_batches(), code.partition("trainer =")
    with tempfile.TemporaryDirectory() as folder:
        names: dict[str, Any] = {"model": llama(), "args": hf_args(folder), "data": rows(batches)}
        exec(prepare[0], names)
        for name, p in names["model"].named_parameters():
            if "lora_B" in name:  # 0 at first, and with it the gradient of the other factor
                torch.nn.init.normal_(p, std=0.1)
        expected, before = causal_reference(names["model"], batches), weights(names["model"])
        exec(prepare[1] + prepare[2], names)
    return error(moved(before, names["model"]), expected)


def lightning_module() -> type:
    """A LightningModule of Llama with SGD."""
    import lightning

    class PlainModel(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    return PlainModel


def lightning_trainer(**options: Any) -> Any:
    """A quiet one on the CPU."""
    import lightning

    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return lightning.Trainer(accelerator="cpu", devices=1, **{"max_epochs": 1, **quiet, **options})


def lightning(code: str) -> float:
    batches, kept = token_batches(), []
    loader: Any = torch.utils.data.DataLoader(rows(batches), batch_size=2)

    class Trainer:
        def fit(self, module: Any, loader: Any) -> None:
            kept.extend([module, causal_reference(module.model, batches), weights(module.model)])
            lightning_trainer().fit(module, loader)

    exec(code, {"PlainModel": lightning_module(), "trainer": Trainer(), "loader": loader})
    module, expected, before = kept
    return error(moved(before, module.model), expected)


def accelerate(code: str) -> float:
    from accelerate import Accelerator

    model, batches = llama(), token_batches()
    expected, before = causal_reference(model, batches), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader: Any = torch.utils.data.DataLoader(rows(batches), batch_size=2)
    exec(code, {"accelerator": Accelerator(cpu=True), "model": model, "optimizer": optimizer, "loader": loader})
    return error(moved(before, model), expected)


def titan_model() -> Any:
    """torchtitan's Llama, two layers of width 32."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    arguments = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=V, multiple_of=16, max_seq_len=12)
    model = Transformer(arguments)
    with torch.no_grad():
        model.init_weights()
    return model


def titan_trainer(kind: type, model: Any, accumulate: int = 2) -> Any:
    """A trainer of that class with what its `train_step` needs, made without `__init__`, which looks for a GPU."""
    from types import SimpleNamespace as Made

    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

    trainer: Any = object.__new__(kind)
    degrees = dict.fromkeys(["dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp", "world_size"], 1)
    trainer.parallel_dims, trainer.device = ParallelDims(**degrees), torch.device("cpu")
    trainer.job_config = JobConfig()
    trainer.job_config.training.max_norm = CLIP
    trainer.job_config.lr_scheduler.warmup_steps = 0
    trainer.model_parts, trainer.model_args, trainer.tokenizer = [model], model.model_args, None
    trainer.optimizers = OptimizersContainer([model], torch.optim.SGD, {"lr": 1.0})
    trainer.lr_schedulers = build_lr_schedulers(trainer.optimizers, trainer.job_config.lr_scheduler, 100)
    trainer.loss_fn, trainer.gradient_accumulation_steps = causal_loss, accumulate
    trainer.train_context, trainer.maybe_enable_amp = nullcontext, nullcontext()
    trainer.checkpointer = Made(maybe_wait_for_staging=lambda: None)
    trainer.logged = []
    trainer.metrics_processor = Made(
        should_log=lambda step: True, log=lambda *figures, **more: trainer.logged.append(figures)
    )
    trainer.step, trainer.ntokens_seen = 1, 0
    return trainer


@contextmanager
def one_rank() -> Iterator[None]:
    """The process group that torchtitan has with one rank, on the CPU."""
    import torchtitan.distributed.parallel_dims as dims

    device, dims.device_type = dims.device_type, "cpu"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        dims.device_type = device


def titan_batches() -> list[Any]:
    """(inputs by name, labels of the next tokens) as torchtitan's loader gives them."""
    return [({"input": b["input_ids"]}, F.pad(b["labels"][:, 1:], (0, 1), value=-100)) for b in token_batches()]


def torchtitan(code: str) -> float:
    import torchtitan.train

    model, batches = titan_model(), token_batches()
    kept: list[type] = []
    x, labels = joined(batches)["input_ids"], joined(batches)["labels"]
    expected = clipped(reference(model, lambda model: (model(x),), lambda z: causal_loss(z, labels)))
    before, main = weights(model), torchtitan.train.main
    torchtitan.train.main = kept.append
    try:
        exec(code, {})
    finally:
        torchtitan.train.main = main
    with one_rank():
        titan_trainer(kept[0], model).train_step(iter(titan_batches()))
    return error(moved(before, model), expected)


CLIENTS: dict[str, Callable[[str], float]] = {
    "any loop": any_loop,
    "nanoGPT": nanogpt,
    "nanodo": integrations_nanodo.error,
    "transformers": transformers,
    "PEFT": peft,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "torchtitan": torchtitan,
}


def measure(client: str) -> tuple[int, float]:
    """(lines of the client's snippet, its gradient's error)."""
    torch.manual_seed(0)
    code = snippets()[client]
    return lines(code), CLIENTS[client](code)


def table() -> str:
    """The table in Markdown."""
    found = ["| client | as printed | lines | error of the gradient |", "|---|---|---|---|"]
    for client in CLIENTS:
        try:
            count, deviation = measure(client)
            found.append(f"| {client} | runs | {count} | {deviation:.0e} |")
        except Exception as problem:
            found.append(f"| {client} | {type(problem).__name__} | {lines(snippets()[client])} | |")
    return "\n".join(found) + "\n"


if __name__ == "__main__":
    text = table()
    PAGE.write_text(TABLE.sub(lambda match: match[1] + text + match[2], PAGE.read_text()))
    print(text)
