"""The step in PyTorch: `Step` replaces forward, backward and `optimizer.step()`.

    step = Step(model, optimizer, FunctionalSAM(rho=0.5, precondition="adam"), features=features, clip_norm=1.0)
    loss = step(batch)             # or step(MicroBatches([b0, b1, ...])); scheduler, logging and saving as usual

`features(model, batch)` returns a `LinearHead`, `Outputs`, `Logits` or `Heads`. The optimizer is the user's own, and
its checkpoints stay valid without fsam. Between calls the model holds θ, never θ+ε, also after a pass that raised.

The model may be wrapped in DistributedDataParallel or FSDP2's `fully_shard`. Every rank calls the step with its part of
the batch. All of them take the step that one process would take with the whole batch, and each target token has the
same weight. The vocabulary of the head may be sharded over ranks that have the same part of the batch (docs/scale.md).

`AdamW` is torch.optim.AdamW in one pass over the state, clipping included. With `copies=masters(model, torch.bfloat16)`
it updates float32 masters of a bfloat16 model. The perturbation is then computed from the masters and written once, to
the model's weights.
"""

from fsam_core import backends

backends.require("torch")

from fsam_core.ascents import Ascent
from fsam_core.errors import UserError
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Plain
from fsam_core.schedules import Schedule
from fsam_core.scopes import Blocks
from fsam_core.split import MicroBatches
from fsam_core.torch.check import Deviation, check
from fsam_core.torch.comm_hook import reduce_upcast
from fsam_core.torch.evaluation import mean_loss
from fsam_core.torch.from_model import from_model
from fsam_core.torch.heads import Heads, LinearHead, Logits, Outputs
from fsam_core.torch.info import Info
from fsam_core.torch.loss_scale import LossScale
from fsam_core.torch.staged import Staged
from fsam_core.torch.step import Step
from fsam_core.torch.weights import masters
from fsam_kernels.memory import Memory
from fsam_kernels.options import Loss
from fsam_kernels.torch.adamw import AdamW

__all__ = [
    "SAM",
    "AdamW",
    "Ascent",
    "Blocks",
    "Deviation",
    "FunctionalSAM",
    "Heads",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Loss",
    "LossScale",
    "Memory",
    "MicroBatches",
    "Outputs",
    "Plain",
    "Schedule",
    "Staged",
    "Step",
    "UserError",
    "check",
    "from_model",
    "masters",
    "mean_loss",
    "reduce_upcast",
]
