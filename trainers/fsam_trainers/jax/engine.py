"""Training in JAX: Flax model, AdamW leaf by leaf, jitted and donated steps on a mesh, orbax checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsam_core import backends

for module in ("jax", "flax", "optax", "orbax"):
    backends.require(module)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

import fsam_core.jax as fsam  # noqa: E402
from fsam_core.jax.adamw import AdamW  # noqa: E402
from fsam_core.regions import in_jax  # noqa: E402
from fsam_trainers.config import Settings  # noqa: E402
from fsam_trainers.data.batches import (  # noqa: E402
    Batch,
    each,
    mean_over_targets,
    micro_batches_of,
    named,
    targets_in,
)
from fsam_trainers.engine import Correction, Evaluation, StepReport, Writing  # noqa: E402
from fsam_trainers.jax import mesh, saving  # noqa: E402
from fsam_trainers.models import module_of  # noqa: E402
from fsam_trainers.models.flax_decoder import flattened, nested  # noqa: E402
from fsam_trainers.models.layout import blocks  # noqa: E402
from fsam_trainers.pretrained import initial_weights  # noqa: E402


class State(NamedTuple):
    """Everything a step reads and writes; `average` is None without --ema."""

    params: Any
    opt_state: Any
    carry: fsam.Carry
    average: Any

    def as_saved(self) -> dict[str, Any]:
        """The content of a checkpoint, without norms that are None, for which older ones have no place."""
        carry = {k: x for k, x in self.carry._asdict().items() if k != "norms" or x is not None}
        return {**self._asdict(), "carry": carry}

    @classmethod
    def of_saved(cls, saved: dict[str, Any]) -> State:
        """The inverse of `as_saved`."""
        return cls(**{**saved, "carry": fsam.Carry(**saved["carry"])})


def optimizer(settings: Settings) -> AdamW:
    """AdamW with decoupled weight decay on the matrices; a step that is not finite is skipped."""
    return AdamW(
        learning_rate(settings),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        clip_norm=settings.clip_norm or None,
    )


def learning_rate(settings: Settings) -> optax.Schedule:
    """`Settings.learning_rate_at` as an optax schedule."""
    peak, floor = settings.learning_rate, settings.final_learning_rate
    if settings.learning_rate_schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(settings.steps - settings.warmup, 1), floor)
    else:
        start = settings.decay_start - settings.warmup
        after = optax.join_schedules([optax.constant_schedule(peak), _decay(settings)], [start])
    warmup = optax.linear_schedule(0, peak, settings.warmup)
    return optax.join_schedules([warmup, after], [settings.warmup]) if settings.warmup else after


def _decay(settings: Settings) -> optax.Schedule:
    """The decay of "wsd" by the number of steps since its start."""
    peak, floor, steps = settings.learning_rate, settings.final_learning_rate, settings.steps - settings.decay_start
    power = 1.0 if settings.decay_shape == "linear" else 0.5

    def at(step: Any) -> Any:
        return peak * (1 - (1 - floor) * (step / max(steps, 1)).clip(0, 1) ** power)

    return lambda step: at(jnp.asarray(step))


def gradient_of(settings: Settings) -> Callable[..., Any]:
    """The method's gradient function, as `fsam_core.jax.value_and_grad` returns it."""
    return fsam.value_and_grad(
        _features(settings, trained=True),
        settings.as_method(learning_rate(settings)),
        b2=settings.b2,
        eps=settings.eps,
        clip_norm=settings.clip_norm or None,
        blocks=blocks(settings.model),
        memory=_memory(settings),
        backend=mesh.backend(settings),
        sync=settings.sync if settings.data_parallel > 1 else "global",
        axis="data",
    )


def state_of(settings: Settings, params: Any) -> State:
    """The state before the first step with these params."""
    # A copy: a buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if settings.ema else None
    carry = fsam.carry_of(settings.as_method(), params, settings.schedule())
    return State(params, optimizer(settings).init(params), carry, average)


def step_of(settings: Settings) -> Callable[..., tuple[State, fsam.Info]]:
    """(state, micro-batches, kind) -> (state, info): one step, pure; `kind` as in `fsam_core.schedules`, static."""
    gradient, adamw = gradient_of(settings), optimizer(settings)

    def step(state: State, batch: Any, kind: Any) -> tuple[State, fsam.Info]:
        (_, info), grads, carry = gradient(state.params, batch, state.opt_state, state.carry, kind=kind)
        with in_jax("update"):
            params, opt_state = adamw.step(state.params, grads, state.opt_state, info)
        average = state.average
        if average is not None:
            # The first step copies the weights, as PyTorch's AveragedModel does.
            rate = jnp.where(state.opt_state.count == 0, 1.0, jnp.where(info.finite, 1 - settings.ema, 0.0))
            average = optax.incremental_update(params, average, rate)
        return State(params, opt_state, carry, average), info

    return step


def products_of(settings: Settings) -> Callable[[State, Any], tuple[jax.Array, ...]]:
    """(state, micro-batches) -> ‖g‖², ‖ĝ‖², ‖ĝ − g‖² and ĝᵀg."""
    gradient = gradient_of(settings)

    def products(state: State, batch: Any) -> tuple[jax.Array, ...]:
        of = lambda kind: gradient(state.params, batch, state.opt_state, state.carry, kind=kind)[1]
        g, g_hat = of("plain"), of("corrected")
        difference = jax.tree.map(jnp.subtract, g_hat, g)
        return tuple(optax.tree.vdot(a, b) for a, b in ((g, g), (g_hat, g_hat), (difference, difference), (g_hat, g)))

    return products


def _memory(settings: Settings) -> fsam.Memory:
    return fsam.Memory(settings.cotangent, row_axes=mesh.row_axes(settings))


def _features(settings: Settings, *, trained: bool) -> Callable[..., fsam.LinearHead | fsam.Logits]:
    """The model's features function, with the trained loss or the reported one."""
    loss = settings.losses()[0 if trained else 1]
    module = module_of("flax", settings.model)
    model = module.Model(settings.model, remat=settings.remat)
    if trained and settings.scope.startswith("top:"):
        below = settings.model.layers - int(settings.scope.removeprefix("top:"))
        return module.staged(model, below, loss, jnp.dtype(settings.dtype))
    return partial(module.features, model, loss=loss, dtype=jnp.dtype(settings.dtype))


def evaluated(settings: Settings) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """(params, batch) -> (the reported loss, how many labels are among the k likeliest, for each k of the model)."""
    features, top = _features(settings, trained=False), settings.model.top

    def of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        head: Any = features(params, batch)
        mean_loss = fsam.mean_loss(lambda *_: head, memory=_memory(settings), backend=mesh.backend(settings))
        loss = mean_loss(params, batch)
        if not top:
            return loss, jnp.zeros(0)
        z_NxV = jnp.matmul(head.hidden, head.weight.T, preferred_element_type=jnp.float32) + head.bias
        own_Nx1 = jnp.take_along_axis(z_NxV, head.labels[:, None], 1)
        above_N = jnp.where(head.labels < 0, z_NxV.shape[1], (z_NxV > own_Nx1).sum(1))
        return loss, jnp.stack([(above_N < k).sum() for k in top])

    return of


class JaxEngine:
    """See `engine.Engine`."""

    asynchronous = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.backend = mesh.backend(settings)
        self.device = jax.devices()[0].device_kind
        self.mesh = mesh.make(settings)
        params = mesh.placed(self.mesh, nested(initial_weights(settings)))
        self._key = jax.random.key(settings.seed)
        init = partial(state_of, settings)
        with jax.set_mesh(self.mesh):
            self._places = mesh.places(self.mesh, jax.eval_shape(init, params))
            self.state = jax.jit(init, out_shardings=self._places)(params)
        self._jitted = jax.jit(
            step_of(settings),
            donate_argnums=0,
            static_argnames="kind",
            out_shardings=(self._places, mesh.everywhere(self.mesh)),
        )
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._completed = 0  # steps that are known to be finite
        self._unread: list[jax.Array] = []  # whether later steps are finite, in order
        self._products = jax.jit(products_of(settings))
        self._evaluated = jax.jit(evaluated(settings))

    def prepare(self, batch: Batch) -> None:
        with jax.set_mesh(self.mesh):
            for kind in sorted({self.settings.kind(i) for i in range(self.settings.steps)}):
                self._compiled[kind] = self._jitted.lower(self.state, self._parts(batch, 0), kind=kind).compile()

    def step(self, batch: Batch, index: int) -> Callable[[], StepReport]:
        kind = self._kind()
        if kind not in self._compiled:
            self._compiled[kind] = partial(self._jitted, kind=kind)
        with jax.set_mesh(self.mesh):
            self.state, info = self._compiled[kind](self.state, self._parts(batch, index))
        self._unread.append(info.finite)

        def report() -> StepReport:
            got = jax.device_get(info)
            if got.bad_label >= 0:
                V = self.settings.model.vocab_size
                raise fsam.UserError(f"--data: a token id must be below the vocabulary's {V}, got {int(got.bad_label)}")
            base, final, epsilon = (float(x) for x in (got.base_norm, got.grad_norm, got.perturbation_norm))
            return StepReport(float(got.loss), base, final, epsilon, skipped=not got.finite)

        return report

    def _kind(self) -> str:
        """The kind of the next step, by the number of completed ones.

        Whether the last step was skipped is unknown while it runs. This waits for it only if the kind depends on it.
        """
        while len(self._unread) > 1 or len({self.settings.kind(n) for n in self._possible()}) > 1:
            self._completed += bool(self._unread.pop(0))
        return self.settings.kind(self._completed)

    def _possible(self) -> range:
        """The possible numbers of completed steps."""
        return range(self._completed, self._completed + len(self._unread) + 1)

    def correction(self, batch: Batch, index: int) -> Correction | None:
        if self.settings.method == "adamw":
            return None
        with jax.set_mesh(self.mesh):
            return Correction.of(*map(float, self._products(self.state, self._parts(batch, index))))

    def evaluate(self, batches: Sequence[Batch], average: bool = True) -> Evaluation:
        params = self.state.average if average and self.state.average is not None else self.state.params
        with jax.set_mesh(self.mesh):
            found = [(targets_in(x), *self._evaluated(params, self._whole(x))) for x in batches]
        counts, losses, correct = zip(*found, strict=True) if found else ((), (), ())
        loss, top = mean_over_targets([float(x) for x in losses], counts), self.settings.model.top
        return Evaluation.of(loss, top, np.sum([np.zeros(len(top)), *map(np.asarray, correct)], axis=0), sum(counts))

    def _whole(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch that every process has in full."""
        return named(each(lambda x: mesh.rows(self.mesh, x), batch))

    def state_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state))

    def save(self, folder: Path) -> Writing:
        return saving.begin(self.state.as_saved(), folder)

    def restore(self, folder: Path, source: Settings | None = None) -> None:
        # With the shardings of this mesh; the checkpoint may be of another.
        if source is None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.state.as_saved())
        else:
            with jax.set_mesh(self.mesh):
                state = jax.eval_shape(partial(state_of, source), self.state.params)
                places = mesh.places(self.mesh, state)
            placed = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            like = jax.tree.map(placed, state, places).as_saved()
        with ocp.StandardCheckpointer() as checkpointer:
            # Without the copy a restored buffer may be memory that XLA does not own and cannot take as a donation.
            found = State.of_saved(jax.tree.map(jnp.copy, checkpointer.restore(folder.absolute(), like)))
        if source is not None:
            average = found.average if source.ema else jax.tree.map(jnp.copy, found.params)
            found = found._replace(carry=self.state.carry, average=average if self.settings.ema else None)
        self.state = found
        self._completed, self._unread = int(self.state.opt_state.count), []

    def weights(self) -> dict[str, np.ndarray]:
        return flattened(jax.tree.map(mesh.whole, self.state.params))

    def _parts(self, batch: Batch, index: int) -> fsam.MicroBatches:
        split = micro_batches_of(batch, self.settings.micro_batches)
        parts = [named(each(lambda x: mesh.own_rows(self.mesh, x), one)) for one in split]
        if self.settings.model.dropout:
            key = jax.random.fold_in(self._key, index)
            for i, part in enumerate(parts):
                part["key"] = jax.random.fold_in(key, i)
        return fsam.MicroBatches(parts)
