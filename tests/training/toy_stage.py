"""A stage that trains in milliseconds: a small residual MLP on random data, its averaged copy and an extra counter."""

import contextlib
import dataclasses
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, ema_update, make_optimiser
from pikastream_jax.training.settings import Optimiser, StageSettings


def initial_params():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "blocks": {
            0: {
                "up": {"kernel": 0.3 * jax.random.normal(keys[0], (8, 16)), "bias": jnp.zeros(16)},
                "down": {"kernel": 0.3 * jax.random.normal(keys[1], (16, 8))},
            }
        },
        "head": {"kernel": 0.3 * jax.random.normal(keys[2], (8, 4))},
    }


def loss_function(params, key, batch=None):
    x = batch["x"] if batch else split_batch(jax.random.normal(key, (32, 8)))
    block = params["blocks"][0]
    hidden = jax.nn.gelu(x @ block["up"]["kernel"] + block["up"]["bias"])
    predicted = (x + hidden @ block["down"]["kernel"]) @ params["head"]["kernel"]
    return jnp.mean((predicted - jnp.sin(2 * x[:, :4])) ** 2)


class ToyBatches:
    """Element n is drawn from n alone, as a grain.MapDataset's is; element `nan_at` (counted from 0) holds a NaN."""

    def __init__(self, length=60, nan_at=-1):
        self.length, self.nan_at, self.asked = length, nan_at, []

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        self.asked.append(n)
        x = np.random.default_rng(n).normal(size=(32, 8)).astype(np.float32)
        if n == self.nan_at:
            x[3, 5] = np.nan
        return {"x": x}


def toy_stage(total_steps=60, seed=0, nan_loss_at=-1, nan_params_at=-1, **changes):
    """`nan_loss_at`, `nan_params_at`: the update (counted from 1) that spoils the loss, or the parameters alone."""
    # The schedule is of 60 updates and the spoilers are data, so that all toy stages are one program, compiled once.
    optimiser = make_optimiser(initial_params(), OptimiserConfig(3e-2, warmup_steps=5), total_steps=60)

    def init():
        params = initial_params()
        extra = {"total_loss": jnp.float32(0), "nan_at": jnp.array([nan_loss_at, nan_params_at])}
        return TrainState(jnp.int32(0), params, optimiser.init(params), params, extra)

    def update(state, key, data, batch):
        loss, gradients = jax.value_and_grad(loss_function)(state.params, key, batch)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        spoil_loss, spoil_params = state.extra["nan_at"] == state.step + 1
        params = jax.tree.map(lambda p: jnp.where(spoil_params, jnp.nan, p), params)
        loss = jnp.where(spoil_loss, jnp.nan, loss)
        ema = ema_update(state.ema, params, state.step, 0.99)
        extra = {**state.extra, "total_loss": state.extra["total_loss"] + loss}
        return TrainState(state.step, params, opt_state, ema, extra), {"loss": loss, "noise": jax.random.normal(key)}

    fields = {"config": {"widths": (8, 16)}, "evaluate_every": 10} | changes
    evaluate = jax.jit(lambda state, data: {"loss": loss_function(state.ema, jax.random.key(9))})
    return Stage("toy", total_steps, seed, init, update, evaluate=evaluate, **fields)


@contextlib.contextmanager
def full_disk(largest):
    """The system refuses to write more than `largest` bytes to a file, as a full disk refuses any."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the toy."""

    updates: int = 60
    batch: int = 32
    nan_loss_at: int = -1
    optimiser: Optimiser = OptimiserConfig(3e-2, warmup_steps=5)


def build(config, seed, init, settings):
    del config, init
    return toy_stage(total_steps=settings.updates, seed=seed, nan_loss_at=settings.nan_loss_at, config={"stage": settings.record()})
