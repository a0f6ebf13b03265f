"""Training in PyTorch: the same model and settings, AdamW in one pass, torch.distributed.checkpoint.

Of several ranks each takes its part of every micro-batch, in DistributedDataParallel or, where --fsdp or
--tensor-parallel share weights out, under FSDP2.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core import MicroBatches, backends
from fsam_core.schedules import ALWAYS, Schedule

backends.require("torch")

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402

import fsam_core.torch as fsam  # noqa: E402
from fsam_core.torch.dtensor import local_parts  # noqa: E402
from fsam_trainers import processes  # noqa: E402
from fsam_trainers.config import Settings  # noqa: E402
from fsam_trainers.data.batches import (  # noqa: E402
    Batch,
    each,
    mean_over_targets,
    micro_batches_of,
    rows_of,
    targets_in,
)
from fsam_trainers.device import in_torch  # noqa: E402
from fsam_trainers.engine import Correction, Evaluation, StepReport, Writing  # noqa: E402
from fsam_trainers.models import module_of  # noqa: E402
from fsam_trainers.models.layout import blocks  # noqa: E402
from fsam_trainers.pretrained import initial_weights  # noqa: E402
from fsam_trainers.torch import mesh, saving  # noqa: E402


def optimizer(model: torch.nn.Module, settings: Settings, copies: Any = None) -> fsam.AdamW:
    """AdamW with decoupled weight decay on the matrices, one pass over the state; its checkpoints are torch.optim's.

    `copies` are the model's parameters -> those of another that computes with them, rounded.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    made = backends.load("torch", settings.backend).AdamW
    betas = (settings.b1, settings.b2)
    adamw = made(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, copies=copies)
    # The state is made here: get_state_dict makes missing state by taking a step, which a checkpoint would count.
    for p in model.parameters():
        zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[p] = {"step": torch.tensor(0.0), **zeros}
    return adamw


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Loading with or without a process group: no warning that there is none, and plain exceptions.

    A `CheckpointException` holds one exception a rank, and is not an `Exception`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except dcp.CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None


def _compile(model: torch.nn.Module) -> None:
    """Compile each block in place, so that parameters keep their names; all blocks and both passes share one graph."""
    for block in model.children():
        block.compile(fullgraph=True)


def _whole(p: Any) -> torch.Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def placed(batch: Batch, device: Any) -> Any:
    """The batch on a device; indices are int64 there. The host does not wait for earlier work of a CUDA device."""

    def of(x: np.ndarray) -> torch.Tensor:
        here = torch.from_numpy(x)
        here = here.long() if here.dtype == torch.int32 else here
        if torch.device(device).type != "cuda":
            return here.to(device)
        return here.pin_memory().to(device, non_blocking=True)

    return each(of, batch)


class TorchEngine:
    """See `engine.Engine`.

    On a device a step's figures are read when its report is asked for. What the next step needs of them, whether this
    one was skipped, then stays on the device: the learning rate is looked up there by the optimizer's step count, and
    the average moves by a share that is 0 after a skipped step. On a CPU, and where `fsam_core.torch.Step` leaves the
    decision to the host, the figures are known before the update. A schedule or ρ that depends on the number of
    completed steps waits for it at the beginning of a step.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.backend = backends.choose("torch", settings.backend).name
        self._ranks = processes.current()
        mesh.check(settings, self._ranks.count)
        is_sharded = mesh.is_sharded(settings)
        self._device = in_torch()
        self.device = str(self._device)
        self.asynchronous = self._device.type != "cpu"
        if self._ranks.count > 1 and self._device.type != "cpu":
            self._device = torch.device(self._device.type, self._ranks.local_rank)
        module = module_of("torch", settings.model)
        self.model = module.Model(settings.model, remat=settings.remat, weights=initial_weights(settings))
        self.model.to(self._device)
        self._average: torch.optim.swa_utils.AveragedModel | None = None
        if settings.ema:
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema)
            self._average = torch.optim.swa_utils.AveragedModel(self.model, self._device, multi_avg_fn=decay)
        # The passes run the model itself, or a half-precision copy of it whose masters are the model.
        self._running: torch.nn.Module = self.model
        copies: dict[torch.Tensor, torch.nn.Parameter] = {}
        if not is_sharded and settings.dtype != "float32":
            self._running = copy.deepcopy(self.model).to(getattr(torch, settings.dtype))
            copies = dict(zip(self.model.parameters(), self._running.parameters(), strict=True))
        if settings.compile:
            _compile(self._running)
        if is_sharded:
            for model in (self.model, *([] if self._average is None else [self._average.module])):
                mesh.shard(model, settings, self._device.type, self._ranks.count)
        elif self._ranks.count > 1:
            self._running = torch.nn.parallel.DistributedDataParallel(self._running)
            if copies:
                self._running.register_comm_hook(None, fsam.reduce_upcast)
        self.optimizer = optimizer(self.model, settings, copies)
        trained, reported = settings.losses()
        self._heads: list[Any] = []  # of the last evaluated batch
        reporting = partial(module.features, loss=reported)
        self._loss = fsam.mean_loss(self._remembered(reporting), backend=settings.backend)
        features: Any = partial(module.features, loss=trained)
        if settings.scope.startswith("top:"):
            below = settings.model.layers - int(settings.scope.removeprefix("top:"))
            features = module.staged(below, trained)
        self._step = fsam.Step(
            self._running,
            self.optimizer,
            settings.as_method(),
            features=features,
            clip_norm=settings.clip_norm or None,
            schedule=settings.schedule(),
            blocks=blocks(settings.model),
            memory=fsam.Memory(settings.cotangent),
            backend=settings.backend,
            sync=settings.sync,
            loss_scale=fsam.LossScale() if settings.dtype == "float16" else None,
        )

    def prepare(self, batch: Batch) -> None:
        """Nothing is compiled."""

    def step(self, batch: Batch, index: int) -> Callable[[], StepReport]:
        self._seed(index)
        # As in JAX, a skipped step does not advance the schedule.
        rate = self._rate() if self.asynchronous else self.settings.learning_rate_at(self._step.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._running.train()
        self._step(self._parts(batch))
        read, skipped = self._step.last()
        self._update_average(skipped)

        def report() -> StepReport:
            info = read()
            return StepReport(info.loss, info.base_norm, info.grad_norm, info.perturbation_norm, info.skipped)

        return report

    def _rate(self) -> torch.Tensor:
        """The learning rate of the next step, whose number need not be known to the host."""
        count = next(iter(self.optimizer.state.values()))["step"].long().clamp(max=self.settings.steps)
        return self._rates.take(count.to(self._device, non_blocking=True))

    @cached_property
    def _rates(self) -> torch.Tensor:
        """The learning rate after 0, 1, … completed steps, in float32 as CUDA's fused AdamW takes it."""
        rates = [self.settings.learning_rate_at(n) for n in range(self.settings.steps + 1)]
        return torch.tensor(rates, dtype=torch.float32, device=self._device)

    @torch.no_grad()
    def _update_average(self, skipped: bool | torch.Tensor) -> None:
        """Average the weights of a step that was taken.

        Args:
            skipped: a scalar on the device, 1.0 for yes, where the host does not know it.
        """
        if self._average is None or skipped is True:
            return
        if not isinstance(skipped, torch.Tensor):
            self._average.update_parameters(self.model)
            return
        # The same by tensors: the first weights are copied, and a skipped step has a share of 0.
        count, taken = self._average.n_averaged, 1 - skipped
        share = torch.where(count == 0, 1.0, 1 - self.settings.ema) * taken
        averages, weights = (local_parts(p.detach() for p in x.parameters()) for x in (self._average, self.model))
        self._step.ops.lerp_(averages, weights, share)
        count += taken.long()

    def correction(self, batch: Batch, index: int) -> Correction | None:
        if self.settings.method == "adamw" or self.settings.dtype == "float16":
            return None
        self._running.train()
        plain, corrected = Schedule(start=sys.maxsize), ALWAYS
        g, g_hat = (self._gradient(schedule, batch, index) for schedule in (plain, corrected))
        products = torch.zeros(4, dtype=torch.float64)
        for a, b in zip(g, g_hat, strict=True):
            a, b = _whole(a).double().flatten(), _whole(b).double().flatten()
            products += torch.stack([a @ a, b @ b, (b - a).square().sum(), a @ b]).cpu()
        return Correction.of(*products.tolist())

    def _gradient(self, schedule: Schedule, batch: Batch, index: int) -> list[torch.Tensor]:
        """The gradient of a step by this schedule, for each parameter; the step itself counts nothing."""
        self._seed(index)
        step = copy.copy(self._step)
        step.schedule = schedule
        step.gradient(self._parts(batch))
        found = [torch.full_like(p, torch.nan) if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.grad = None
        return found

    def _seed(self, index: int) -> None:
        """Seed the dropout of step `index`."""
        if self.settings.model.dropout:
            rank, count = self._row_rank
            own = [rank] if count > 1 else []
            seed = np.random.SeedSequence([self.settings.seed, index, *own]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed))

    def _parts(self, batch: Batch) -> MicroBatches:
        return MicroBatches(map(self._placed, micro_batches_of(batch, self.settings.micro_batches)))

    def evaluate(self, batches: Sequence[Batch], average: bool = True) -> Evaluation:
        model = self._average.module if average and self._average is not None else self._running
        model.eval()
        losses, counts = [], []
        # Targets and correct ones, summed over the ranks; a batch that all ranks have in full is counted by each.
        seen = np.zeros(1 + len(self.settings.model.top))
        for batch in batches:
            own, parts = self._share(batch, model)
            losses.append(float(self._loss(model, self._placed(own))))
            counts.append(targets_in(batch))
            seen += np.array([targets_in(own), *self._correct()]) * parts / self._row_rank[1]
        if self.settings.model.top:
            seen = np.sum(self._ranks.gathered(seen), axis=0)
        return Evaluation.of(mean_over_targets(losses, counts), self.settings.model.top, seen[1:].tolist(), seen[0])

    def _remembered(self, features: Callable[..., Any]) -> Callable[..., Any]:
        """The features function, which keeps its last head for the accuracies."""

        def of(model: Any, batch: Any) -> Any:
            self._heads[:] = [features(model, batch)]
            return self._heads[0]

        return of if self.settings.model.top else features

    @torch.no_grad()
    def _correct(self) -> list[float]:
        """How many labels of the last evaluated batch are among the k likeliest, for each k of the model."""
        if not self._heads:
            return []
        head = self._heads.pop()
        z_NxV = (head.hidden @ _whole(head.weight).T + _whole(head.bias)).float()
        own_Nx1 = z_NxV.gather(1, head.labels.clamp(min=0)[:, None])
        above_N = (z_NxV > own_Nx1).sum(1).masked_fill(head.labels < 0, z_NxV.shape[1])
        return [float((above_N < k).sum()) for k in self.settings.model.top]

    def _share(self, batch: Batch, model: torch.nn.Module) -> tuple[Batch, int]:
        """This rank's rows, one of so many parts, if the loss is a mean over the ranks and the rows divide evenly."""
        rank, count = self._row_rank
        alone = count == 1 or (model is not self._running and not mesh.is_sharded(self.settings))
        if alone or rows_of(batch) % count:
            return batch, 1
        return micro_batches_of(batch, count)[rank], count

    @property
    def _row_rank(self) -> tuple[int, int]:
        """(the index of this rank's part of a batch, the number of parts)."""
        replicas = self.settings.tensor_parallel
        return self._ranks.rank // replicas, self._ranks.count // replicas

    def state_bytes(self) -> int:
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        average = [] if self._average is None else self._average.parameters()
        return sum(x.nbytes for x in [*self.model.parameters(), *moments, *average])

    def save(self, folder: Path) -> Writing:
        return saving.begin(self._state(), folder)

    def restore(self, folder: Path, source: Settings | None = None) -> None:
        state = self._state()
        if source is not None:
            state["step"] = {name: state["step"][name] for name in ("steps", "skipped_steps")}
            if not source.ema:
                state.pop("average", None)
        with _plain_errors():
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for master, p in self.optimizer.copies.items():
            p.data.copy_(master.detach())
        self._step.load_state_dict(state["step"])
        if self._average is not None and "average" in state:
            self._average.load_state_dict(state["average"])
        elif self._average is not None:  # its first update copies the weights; an evaluation may come before
            self._average.module.load_state_dict(self.model.state_dict())

    def weights(self) -> dict[str, np.ndarray]:
        return {name: _whole(p).detach().cpu().numpy() for name, p in self.model.named_parameters()}

    def _state(self) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # torch.optim.AdamW takes no tensor from a checkpoint
        model, optim = get_state_dict(self.model, self.optimizer)
        average = {} if self._average is None else {"average": self._average.state_dict()}
        return {"model": model, "optimizer": optim, "step": self._step.state_dict(), **average}

    def _placed(self, batch: Batch) -> Any:
        return placed(batch, self._device)
