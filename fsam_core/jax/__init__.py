"""The step in JAX: a gradient function that replaces `jax.value_and_grad`.

    method = FunctionalSAM(rho=0.5, precondition="adam")
    grad = value_and_grad(features, method, b2=0.95)          # features(params, batch) -> LinearHead, Outputs, Heads
    (loss, info), grads = grad(params, batch, opt_state)      # pure: jit, shard and donate it as usual
    updates, opt_state = tx.update(grads, opt_state, params)

Several micro-batches are `MicroBatches([b0, b1, ...])`; a list is one batch. Everything is a pure function. Randomness
is part of the batch (put the key in it), so both passes see the same dropout. A step without a correction is a separate
program, not a branch of the same one: pass `kind` as a static argument,

    step = jax.jit(step, static_argnames="kind")              # it calls grad(params, batch, opt_state, kind=kind)
    for i in range(steps):
        state = step(state, batch, kind=schedule.kind(i))

With a scope of the upper blocks, XLA drops the work in the lower part that only the gradient at θ would need. If
`features` is a `Staged`, the lower part also runs only once for both passes.
"""

from fsam_core import backends

backends.require("jax")
backends.require("optax")


from fsam_core.ascents import Ascent
from fsam_core.errors import UserError
from fsam_core.jax.check import check
from fsam_core.jax.from_model import from_model
from fsam_core.jax.heads import Heads, LinearHead, Logits, Outputs
from fsam_core.jax.optimizers import adam_state
from fsam_core.jax.staged import Staged
from fsam_core.jax.step import Carry, Info, carry_of, mean_loss, skip_nonfinite, value_and_grad
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Plain
from fsam_core.schedules import Schedule
from fsam_core.scopes import Blocks
from fsam_core.split import MicroBatches
from fsam_kernels.memory import Memory
from fsam_kernels.options import Loss

__all__ = [
    "SAM",
    "Ascent",
    "Blocks",
    "Carry",
    "FunctionalSAM",
    "Heads",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Loss",
    "Memory",
    "MicroBatches",
    "Outputs",
    "Plain",
    "Schedule",
    "Staged",
    "UserError",
    "adam_state",
    "carry_of",
    "check",
    "from_model",
    "mean_loss",
    "skip_nonfinite",
    "value_and_grad",
]
