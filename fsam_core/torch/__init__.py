"""The step in PyTorch: an object to put where forward, backward and `optimizer.step()` stand.

    step = Step(model, optimizer, FunctionalSAM(rho=0.5, precondition="adam"), features=features, clip_norm=1.0)
    loss = step(batch)             # or step([micro0, micro1, ...]); scheduler, logging and saving as usual

`features(model, batch)` returns a `LinearHead` or `Logits`. The optimizer stays the user's own: its state and its
checkpoints know nothing of fsam. Outside a call the model holds θ, never θ+ε, also when a pass raised.

The model may be in DistributedDataParallel or under FSDP2's `fully_shard`: every rank calls the step with its part of
the batch, and all take the step that one process would take with the whole, each target token weighing the same. Its
head's vocabulary may be cut over ranks that have the same part of the batch (docs/scale.md).

`AdamW` is torch.optim.AdamW in one pass over the state, clipping included. With `copies=masters(model, torch.bfloat16)`
it updates float32 masters of a model whose own weights are bfloat16; the perturbation is then taken from the masters,
and written once, over the model's weights.
"""

from fsam_core import backends

backends.require("torch")

from fsam_core.ascents import Ascent
from fsam_core.errors import UserError
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Plain
from fsam_core.schedules import Schedule
from fsam_core.scopes import Blocks
from fsam_core.torch.heads import LinearHead, Logits
from fsam_core.torch.loss_scale import LossScale
from fsam_core.torch.parallel import reduce_upcast
from fsam_core.torch.staged import Staged
from fsam_core.torch.step import Info, Step, mean_loss
from fsam_core.torch.weights import masters
from fsam_kernels.memory import Memory
from fsam_kernels.options import Loss
from fsam_kernels.torch.adamw import AdamW

__all__ = [
    "SAM",
    "AdamW",
    "Ascent",
    "Blocks",
    "FunctionalSAM",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Loss",
    "LossScale",
    "Memory",
    "Plain",
    "Schedule",
    "Staged",
    "Step",
    "UserError",
    "masters",
    "mean_loss",
    "reduce_upcast",
]
