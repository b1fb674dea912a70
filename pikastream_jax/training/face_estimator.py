"""The stage that trains the estimator of `pikastream_jax/measuring/`: rendered faces, degraded as a generator degrades them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.data.face import render, sample_identity
from pikastream_jax.measuring.estimator import (
    HEAD_OUTPUTS,
    MOUTH_CROP,
    MOUTH_OUTPUTS,
    SIZE,
    FaceEstimator,
    mouth_centre,
    mouth_origin,
    true_outputs,
)
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.training.faces import random_states
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.optimiser import OptimiserConfig, ema_update, make_optimiser

HELD_OUT_SEED = 2_000_003
BATCH, UPDATES = 48, 1_000
EMA = 0.99
OPTIMISER = OptimiserConfig(learning_rate=3e-3, warmup_steps=50, decay="cosine", final_fraction=0.02, muon=True)
_JITTER = 5.0  # pixels by which the crop may miss the middle of the mouth, as the first network does


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EstimatorBatch:
    """Pictures for both networks and what they should say."""

    whole: Float[Array, "b 128 128 3"]
    mouth: Float[Array, "b 64 64 3"]
    head_truth: Float[Array, "b h"]
    mouth_truth: Float[Array, "b m"]


def estimator_batch(key: Array, batch: int, degraded: bool = True) -> EstimatorBatch:
    """`batch` random people, each in one random state."""

    def one(key):
        k_identity, k_state, k_jitter, k_whole, k_mouth = jax.random.split(key, 5)
        identity = sample_identity(k_identity)
        state = jax.tree.map(lambda leaf: leaf[0], random_states(k_state, 1))
        head_truth, mouth_truth = true_outputs(identity, state)
        miss = jax.random.uniform(k_jitter, (2,), minval=-_JITTER, maxval=_JITTER)
        y, x = mouth_centre(identity, state)
        origin = mouth_origin(y + miss[0], x + miss[1])
        whole = render(identity, state, size=SIZE // 2)
        mouth = render(identity, state, size=SIZE, origin=(origin[0], origin[1]), crop=(MOUTH_CROP, MOUTH_CROP))
        if degraded:
            whole, mouth = degrade(k_whole, whole, patch=8), degrade(k_mouth, mouth, patch=16)
        return EstimatorBatch(whole, mouth, head_truth, mouth_truth)

    # One after another: the renderer is several times faster in a loop than in a batch.
    return jax.lax.map(one, jax.random.split(key, batch))


def degrade(key: Array, picture: Float[Array, "h w 3"], patch: int) -> Float[Array, "h w 3"]:
    """What an autoencoder does to a picture, each at random strength and each absent from many pictures.

    Blur, an offset per patch of the model, a tint of the whole, and noise.
    """
    k = jax.random.split(key, 8)
    h, w, c = picture.shape
    blur, patches, tint, noise = jax.random.uniform(k[0], (4,)) * (jax.random.uniform(k[1], (4,)) < 0.5)
    # Branches, so that what is absent costs nothing.
    picture = jax.lax.cond(blur > 0, lambda p: p + blur * (_blur(_blur(p)) - p), lambda p: p, picture)
    offset = 0.06 * patches * jax.random.normal(k[2], (h // patch, 1, w // patch, 1, c))
    picture = (picture.reshape(h // patch, patch, w // patch, patch, c) + offset).reshape(h, w, c)
    picture = picture + 0.05 * tint * jax.random.normal(k[3], (c,))
    picture = jax.lax.cond(
        noise > 0, lambda p: p + 0.06 * noise * jax.random.normal(k[4], p.shape), lambda p: p, picture
    )
    return jnp.clip(picture, -1.0, 1.0)


def _blur(picture: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Weights 1/4, 1/2, 1/4 each way."""
    p = jnp.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.25 * (p[:-2] + p[2:]) + 0.5 * p[1:-1]
    return 0.25 * (rows[:, :-2] + rows[:, 2:]) + 0.5 * rows[:, 1:-1]


def build(config: Config, seed: int, init: dict[str, Path]) -> Stage:
    """The stage `face_estimator`. It depends on no preset and takes no weights.

    Raises:
      ValueError: the preset's pictures are not 256x256, or `init` is not empty.
    """
    if (config.stream.height, config.stream.width) != (SIZE, SIZE):
        raise ValueError(f"face_estimator reads {SIZE}x{SIZE}, preset {config.name} makes another size: use tiny")
    if init:
        raise ValueError(f"face_estimator starts from nothing: leave out --init {', '.join(init)}")
    build_model = lambda rngs: FaceEstimator(rngs=rngs)  # noqa: E731
    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, OPTIMISER, UPDATES)

    def initial_state() -> TrainState:
        params = initial_params(build_model, jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params), params, {})

    def loss(params: Params, batch: EstimatorBatch) -> tuple[Array, dict[str, Array]]:
        estimator = model.bind(params)
        head = _smooth_absolute(estimator.whole(batch.whole) - batch.head_truth)
        mouth = _smooth_absolute(estimator.mouth(batch.mouth) - batch.mouth_truth)
        split = len(HEAD_OUTPUTS)
        parts = {"head": head[:, :split].mean(), "identity": head[:, split:].mean(), "mouth": mouth.mean()}
        return sum(parts.values()), parts

    def update(state: TrainState, key: Array, data: dict) -> tuple[TrainState, dict]:
        batch = estimator_batch(key, BATCH)
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return TrainState(state.step, params, opt_state, ema_update(state.ema, params, state.step, EMA), {}), {
            "loss": value,
            **parts,
        }

    held_out = functools.cache(lambda: jax.jit(estimator_batch, static_argnums=1)(jax.random.key(HELD_OUT_SEED), 192))

    @jax.jit
    def errors(params, batch):
        estimator = model.bind(params)
        return loss(params, batch), jnp.abs(estimator.mouth(batch.mouth) - batch.mouth_truth).mean(0)

    def evaluate(state: TrainState) -> dict[str, float]:
        (value, parts), mouth = errors(state.ema, held_out())
        named = {f"{name}_error": mouth[i] * scale for i, (name, (_, scale)) in enumerate(MOUTH_OUTPUTS.items())}
        return {"loss": float(value)} | {name: float(figure) for name, figure in (parts | named).items()}

    return Stage(
        name="face_estimator",
        total_steps=UPDATES,
        seed=seed,
        init=initial_state,
        update=update,
        config={"batch": BATCH, "optimiser": dataclasses.asdict(OPTIMISER), "ema": EMA},
        evaluate=evaluate,
        evaluate_every=200,
    )


def _smooth_absolute(error: Array) -> Array:
    """Quadratic within a tenth of a standard deviation, absolute beyond it: some parameters cannot be seen in a turned face."""
    return jnp.sqrt(error * error + 0.01) - 0.1
