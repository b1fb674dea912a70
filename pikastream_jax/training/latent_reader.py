"""What the face in a latent frame is and does, read off the latents: a measure of error that sees what people look at.

A full smile changes a clip's latents by a fifth of what a turn of the head by six degrees does, so a squared error of latents hardly
asks for it, nor for the finer features of a face. The reader turns latents into the numbers that the renderer was told, each at about
unit variance over people; the DiT's stages then pay for what is misread, with the shares of `EXPRESSION` and of 1/32 for a feature. The
same idea as a face recogniser's loss in avatar systems that train on real video, where it sees pixels.

Whether the lips are closed is read of every video frame, and learned by a cross-entropy. The opening of a latent frame is the mean of four
video frames, a closure lasts one to three, and a squared error is content with 0.12 where 0.04 is true: to a viewer that is a missed p.

The reader is told where mouth and eyes are and how the head stands, so that what it has to say is mostly what is there; only the three
features that set the distance of eyes and mouth can be told from their places. It is not the estimator that `evaluate` measures with:
that one reads pixels, finds the face itself, and has never seen a latent.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.measuring.lipsync import CLOSED, Closures, match_closures
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_data import CROP, ClipWindows, DiTBatch, clip_constants, prepare_batch, windows
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.losses import closure_loss
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.processes import gather
from pikastream_jax.training.settings import Optimiser, StageSettings
from pikastream_jax.weights.safetensors_io import restore_into

# What the face does, and each quantity's share of the error. Captions ask for a smile, brows and a gaze, the noise tells of jumps of the
# eyes and of blinks (`innovations`). How far lips open is learned without this, how wide they are less well.
EXPRESSION = {
    "smile": 0.3, "brow_raise": 0.05, "brow_furrow": 0.05, "gaze_x": 0.05, "gaze_y": 0.05, "blink": 0.3, "opening": 0.05, "width": 0.15,
}  # fmt: skip
TOLD = ("yaw", "pitch", "roll")
# Height and width around the box of each (of "whole": between mouth and eyes), as fractions of the picture's height.
_WINDOWS = {"whole": (0.75, 0.625), "eyes": (0.3125, 0.5), "mouth": (0.375, 0.4375)}
_HIDDEN = (384, 192)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the stage; a row of a batch is a clip."""

    updates: int = 1_000
    batch: int = 48
    latent_frames: int = 5
    noise: float = 0.3
    """Largest standard deviation of the noise in what is read; half of the latent frames have none."""
    closures: float = 0.3
    """Weight of the cross-entropy of closed lips, beside the squared errors."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=2e-3, warmup_steps=50, decay="linear")

    def __post_init__(self):
        super().__post_init__()
        check_closures(self.closures)


def check_closures(weight: float) -> None:
    """Raises ValueError for a setting `closures` that would ask for lips which are wrong."""
    if not weight >= 0:
        raise ValueError(f"closures {weight} must be 0 or more: it is the weight of an error")


_SHARES = {
    "identity": (COLUMNS == "identity") / np.sum(COLUMNS == "identity"),
    "expression": np.array([EXPRESSION.get(column, 0.0) for column in COLUMNS]),
}
_TOLD = np.isin(COLUMNS, TOLD)


class Said(NamedTuple):
    """What the reader says of each latent frame."""

    readings: Float[Array, "b f o"]  # in the order of `true_readings`; those of places and of the head's pose are not trained and mean nothing
    closed: Float[Array, "b f s"]  # logit of closed lips in every video frame


class LatentReader(nnx.Module):
    """One MLP each for the whole face, the eyes and the mouth, over the latents around it; the mouth's also says where the lips are closed."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.stride, self.video_frames = config.flash_vae.spatial_stride, config.flash_vae.temporal_stride
        self.windows = {name: tuple(round(config.latent_grid[0] * share) for share in window) for name, window in _WINDOWS.items()}
        for name, (rows, columns) in self.windows.items():
            inputs = rows * columns * config.dit.latent_channels + 6 + len(TOLD)
            widths = (inputs, *_HIDDEN, READERS[name].outputs + (self.video_frames if name == "mouth" else 0))
            layers = [nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)]
            setattr(self, name, nnx.List(layers))

    def __call__(self, latents: Float[Array, "b f r c z"], boxes: Float[Array, "b f 2 4"], truth: Float[Array, "b f o"]) -> Said:
        """Reads clean latents, or ones with little noise.

        Args:
          boxes: of mouth and eyes in pixels of the picture that the latents show.
          truth: in the order of `true_readings`; of it only the head's pose is looked at.
        """
        b, f, *grid = latents.shape
        latents = latents.reshape(b * f, *grid)
        mouth, eyes = jnp.moveaxis(boxes.reshape(b * f, 2, 2, 2).mean(axis=2) / self.stride, 1, 0)  # middles
        pose = truth.reshape(b * f, -1)[:, _TOLD]
        between = mouth - eyes
        said = []
        for name, middle in (("whole", (mouth + eyes) / 2), ("eyes", eyes), ("mouth", mouth)):
            corner = jnp.round(middle - jnp.array(self.windows[name]) / 2).astype(jnp.int32)
            near = jax.vmap(functools.partial(_window, size=self.windows[name]))(latents, corner)
            x = jnp.concatenate([near.reshape(b * f, -1), middle - corner, between, mouth - middle, pose], axis=-1)
            *hidden, last = getattr(self, name)
            for layer in hidden:
                x = jax.nn.gelu(layer(x))
            said.append(last(x))
        said = jnp.concatenate(said, axis=-1).reshape(b, f, -1)  # the mouth's come last
        return Said(said[..., : -self.video_frames], said[..., -self.video_frames :])


def _window(latents: Float[Array, "r c z"], corner: Int[Array, "2"], size: tuple[int, int]) -> Float[Array, "h w z"]:
    """Part of the latents, zero where it reaches beyond them."""
    margin = max(size)
    padded = jnp.pad(latents, ((margin, margin), (margin, margin), (0, 0)))
    return jax.lax.dynamic_slice(padded, (corner[0] + margin, corner[1] + margin, 0), (*size, latents.shape[-1]))


def reading_error(said: Said, true: Float[Array, "b f o"], opening: Float[Array, "b f s"]) -> dict[str, Float[Array, ""]]:
    """What is wrong in what was said.

    Args:
      true: the readings that it is held against.
      opening: the true one of every video frame, see `ClipWindows`.

    Returns:
      Squared error of the face's own features (their mean), `identity`, and of its `expression` (shares of `EXPRESSION`), and the
      cross-entropy of closed lips, `closures`.
    """
    error = jnp.mean((said.readings - true) ** 2, axis=(0, 1))
    parts = {name: error @ jnp.asarray(shares, jnp.float32) for name, shares in _SHARES.items()}
    return parts | {"closures": closure_loss(said.closed, opening)}


def misreading(
    reader: LatentReader, batch: DiTBatch, velocity: Float[Array, "b f r c z"], noise: Float[Array, "b f r c z"], t: Float[Array, "b f"]
) -> dict[str, Float[Array, ""]]:
    """`reading_error` of the clean latents that a velocity at x_t points to, against what is read off the true ones.

    Near t = 0, where the two hardly differ, identity and expression are next to nothing. Closed lips are held against the lips of the clip
    itself, which the latents of a teacher's trajectory may have missed; their error is then what the reader errs in by itself. Where t is
    near 1 and nothing but the sound tells of the lips, it is least where they are as closed as the sound makes likely.
    """
    predicted = batch.latents - t[:, :, None, None, None] * (velocity - (noise - batch.latents))
    true = reader(batch.latents, batch.boxes, batch.truth).readings
    return reading_error(reader(predicted, batch.boxes, batch.truth), true, batch.opening)


def closures_read(logit: Float[np.ndarray, "b f s"], opening: Float[np.ndarray, "b f s"]) -> dict[str, float]:
    """`f1_closures`, of runs of closed video frames as lip sync is measured, and `closed_right`, the share of video frames on the right side."""
    said = CLOSED - logit.reshape(len(logit), -1)  # as an opening: below CLOSED where lips are rather closed than not
    true = opening.astype(np.float32).reshape(said.shape)
    closures = sum(map(match_closures, true, said), start=Closures(0, 0, 0))
    return {"f1_closures": closures.f1, "closed_right": float(np.mean((said < CLOSED) == (true < CLOSED)))}


def reader_model(config: Config) -> Functional:
    """The reader as a function of its parameters."""
    return functional(lambda rngs: LatentReader(config, rngs=rngs))


def load_reader(config: Config, path: Path) -> Params:
    """The parameters of a `LatentReader` from a run or a .safetensors file."""
    return restore_into(reader_model(config).abstract, load_weights(path))


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `latent_reader`. `init` names `clips`."""
    model = reader_model(config)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def initial_state() -> TrainState:
        return TrainState.start(initial_params(lambda rngs: LatentReader(config, rngs=rngs), jax.random.key(seed)), optimiser)

    def loss(params: Params, latents: Float[Array, "b f r c z"], batch: DiTBatch) -> tuple[Float[Array, ""], dict]:
        said = model.bind(params)(latents, batch.boxes, batch.truth)
        parts = reading_error(said, batch.truth, batch.opening)
        value = parts["identity"] + parts["expression"] + settings.closures * parts["closures"]
        return value, ({"loss": value} | parts, said.closed)

    def update(state: TrainState, key: Array, data: dict, batch: ClipWindows) -> tuple[TrainState, dict]:
        k_data, k_level, k_noise = jax.random.split(key, 3)
        rows = split_batch(prepare_batch(config, data, batch, k_data, crop=CROP))
        level = jax.random.uniform(k_level, (settings.batch, settings.latent_frames, 1, 1, 1), minval=-settings.noise, maxval=settings.noise)
        latents = rows.latents + jnp.maximum(level, 0.0) * jax.random.normal(k_noise, rows.latents.shape)
        gradient, (parts, _) = jax.grad(loss, has_aux=True)(state.params, latents, rows)
        return state.descend(gradient, optimiser, settings.ema), parts

    unseen = functools.cache(lambda: windows(config, init["clips"], "held_out", 96, settings.latent_frames, None)[0])

    @jax.jit
    def read(params, data, batch):
        rows = prepare_batch(config, data, batch, jax.random.key(0), train=False, crop=CROP)
        return loss(params, rows.latents, rows)[1]

    def held_out(state: TrainState, data: dict) -> dict[str, float]:
        """Errors, and of closed lips the F1 of closures as lip sync is measured and the share of video frames that are right."""
        parts, logit = jax.device_get(gather(read(state.ema, data, unseen())))
        return parts | closures_read(logit, unseen().opening)

    return Stage(
        name="latent_reader",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=lambda: clip_constants(init["clips"]),
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config={"preset": config.name, "stage": settings.record()},
        evaluate=held_out,
        evaluate_every=settings.every(250),
    )
