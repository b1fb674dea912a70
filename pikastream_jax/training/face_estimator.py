"""The stage that trains the estimator of `pikastream_jax/measuring/`: rendered faces, degraded as a generator degrades them.

`python train.py face_estimator --updates 1500 --out runs/face_estimator` trains it in some 7 minutes of one CPU core, and
`python -m pikastream_jax.training.face_estimator --run runs/face_estimator` puts the result among the package's assets.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.data.face import map_renders, render, sample_identity
from pikastream_jax.measuring.estimator import (
    READERS,
    SIZE,
    WEIGHTS,
    FaceEstimator,
    crop_origin,
    true_outputs,
    true_places,
)
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights, updates_done
from pikastream_jax.training.faces import FaceBatch, random_states
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.settings import Optimiser, StageSettings
from pikastream_jax.weights.safetensors_io import save

HELD_OUT_SEED = 2_000_003
_JITTER = 5.0  # pixels by which a crop may miss, as the first reader does
_STRIDE = 16  # pixels of a patch of the model under test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the stage; a row of a batch is a picture."""

    updates: int = 1_500
    batch: int = 32
    optimiser: Optimiser = OptimiserConfig(
        learning_rate=3e-3, warmup_steps=50, decay="cosine", final_fraction=0.02
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EstimatorBatch:
    """By reader: pixels ``[b, h, w, 3]`` in [-1, 1] and what it should say ``[b, outputs]``."""

    pixels: dict[str, Float[Array, "b h w 3"]]
    truth: dict[str, Float[Array, "b o"]]


def estimator_batch(key: Array, batch: int, degraded: bool = True) -> EstimatorBatch:
    """`batch` random people, each in one random state."""

    def one(key):
        k_identity, k_state, k_jitter, k_degrade = jax.random.split(key, 4)
        identity = sample_identity(k_identity)
        state = jax.tree.map(lambda leaf: leaf[0], random_states(k_state, 1))
        places = true_places(identity, state)
        pixels = {"whole": render(identity, state, size=SIZE // 2)}
        for name in ("eyes", "mouth"):
            miss = jax.random.uniform(jax.random.fold_in(k_jitter, len(name)), (2,), minval=-_JITTER, maxval=_JITTER)
            y, x = crop_origin(name, places[f"{name}_y"] + miss[0], places[f"{name}_x"] + miss[1])
            pixels[name] = render(
                identity, state, size=SIZE, origin=(y, x), crop=(READERS[name].height, READERS[name].width)
            )
        if degraded:
            keys = dict(zip(pixels, jax.random.split(k_degrade, len(pixels)), strict=True))
            patch = {"whole": _STRIDE // 2}
            pixels = {name: degrade(keys[name], p, patch.get(name, _STRIDE)) for name, p in pixels.items()}
        return EstimatorBatch(pixels, true_outputs(identity, state))

    return map_renders(one, jax.random.split(key, batch))


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


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `face_estimator`. It depends on no preset and takes no weights.

    Raises:
      ValueError: the preset's pictures are not 256x256.
    """
    if (config.stream.height, config.stream.width) != (SIZE, SIZE):
        raise ValueError(f"face_estimator reads {SIZE}x{SIZE}, preset {config.name} makes another size: use tiny")
    build_model = lambda rngs: FaceEstimator(rngs=rngs)  # noqa: E731
    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def initial_state() -> TrainState:
        params = initial_params(build_model, jax.random.key(seed))
        return TrainState.start(params, optimiser)

    def loss(params: Params, batch: EstimatorBatch) -> tuple[Array, dict[str, Array]]:
        estimator = model.bind(params)
        parts = {}
        for name, pixels in batch.pixels.items():
            error = _smooth_absolute(getattr(estimator, name)(pixels) - batch.truth[name])
            split = len(READERS[name].quantities)
            parts |= {name: error[:, :split].mean(), f"{name}_identity": error[:, split:].mean()}
        return sum(parts.values()), parts

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        rows = estimator_batch(key, settings.batch)
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
        return state.descend(gradient, optimiser, settings.ema), {"loss": value, **parts}

    held_out = functools.cache(lambda: jax.jit(estimator_batch, static_argnums=1)(jax.random.key(HELD_OUT_SEED), 192))

    jitted_loss = jax.jit(loss)

    def evaluate(state: TrainState, data: dict) -> dict[str, float]:
        value, parts = jitted_loss(state.ema, held_out())
        return {"loss": float(value)} | {name: float(figure) for name, figure in parts.items()}

    return Stage(
        name="face_estimator",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        config={"stage": settings.record()},
        evaluate=evaluate,
        evaluate_every=settings.every(200),
    )


def _smooth_absolute(error: Array) -> Array:
    """Quadratic within a tenth of a standard deviation, absolute beyond it: some parameters cannot be seen in a turned face."""
    return jnp.sqrt(error * error + 0.01) - 0.1


def face_misreading(estimator: FaceEstimator, output: Float[Array, "b t h w 3"], batch: FaceBatch) -> Float[Array, ""]:
    """How differently mouth and eyes read in `output` and in the batch's own pictures, in standard deviations over people.

    A squared error of pixels is content with eyes that are soft: their outline is a pixel wide. Every second frame is read, and only
    where the crop holds all that a reader sees.
    """
    crop = jnp.asarray(output.shape[2:4])
    total = jnp.zeros(())
    for name, index in (("mouth", 0), ("eyes", 1)):
        size = (READERS[name].height, READERS[name].width)
        boxes = batch.boxes[:, 1::2, index]
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        corner = crop_origin(name, middle[..., 0], middle[..., 1]) - batch.origin[:, None].astype(jnp.int32)
        inside = jnp.all((corner >= 0) & (corner <= crop - jnp.asarray(size)), axis=-1)

        def read(video: Float[Array, "b t h w 3"], name=name, size=size, corner=corner) -> Float[Array, "b s o"]:
            cut = jax.vmap(jax.vmap(lambda picture, at: jax.lax.dynamic_slice(picture, (at[0], at[1], 0), (*size, 3))))
            seen = cut(video[:, 1::2], corner)
            return getattr(estimator, name)(seen.reshape(-1, *size, 3)).reshape(*corner.shape[:2], -1)

        error = _smooth_absolute(read(output) - read(batch.video)).mean(axis=-1)
        total = total + jnp.sum(inside * error) / jnp.maximum(jnp.sum(inside), 1)
    return total


def export(run: Path, out: Path = WEIGHTS) -> None:
    """Writes the averaged weights of a run as the estimator's file, in float16: its errors matter more than its range.

    Args:
      run: folder that `train.py face_estimator` wrote.
      out: file to write.
    """
    record = json.loads((run / "config.json").read_text())
    made = {"stage": record["stage"], "seed": str(record["seed"]), "updates": str(updates_done(run))}
    save(out, load_weights(run), made, dtype=jnp.float16)
    print(out)


if __name__ == "__main__":
    tyro.cli(export)
