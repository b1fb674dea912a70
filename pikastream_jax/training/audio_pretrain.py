"""Pre-training of the audio encoder: what the lips do, read off the sound alone.

Published systems give their DiT a speech encoder that was trained before (Whisper, wav2vec 2.0); none may be downloaded here, so ours
learns the speech tracks of the corpus first. Learned from the diffusion loss alone, where the lips are a small part of a noisy
picture, the same takes many times as long.

The readout is linear in the mean of a slice's tokens, because cross-attention that does not know yet where to look passes on just
that mean: the DiT finds the lips of all four video frames there from its first update.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.audio.encoder import AudioEncoder
from pikastream_jax.config import Config
from pikastream_jax.data.corpus import TRACKS, VIDEO_FRAMES, augment, load_corpus, window
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.training.clips import SPEECH
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.settings import Optimiser, StageSettings

HELD_OUT = 2_000  # slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the stage; a row of a batch is a slice of sound."""

    updates: int = 1_500
    batch: int = 128
    optimiser: Optimiser = OptimiserConfig(learning_rate=4e-3, warmup_steps=50, decay="linear")


class LipReadout(nnx.Module):
    """The audio encoder and the linear readout that only this stage has."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.audio = AudioEncoder(config.audio, rngs=rngs)
        self.head = nnx.Linear(config.audio.dim, VIDEO_FRAMES * len(TRACKS), rngs=rngs)

    def __call__(self, mel: Float[Array, "b m k"]) -> Float[Array, "b 4 5"]:
        """Speech tracks of the latent frame that a slice ends with, in the order of `TRACKS`."""
        return self.head(self.audio(mel).mean(axis=-2)).reshape(-1, VIDEO_FRAMES, len(TRACKS))


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `audio_pretrain`; it starts from nothing."""
    def build_model(rngs):
        return LipReadout(config, rngs=rngs)

    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    corpus = functools.cache(lambda: load_corpus(SPEECH))

    def initial_state() -> TrainState:
        params = initial_params(build_model, jax.random.key(seed))
        return TrainState.start(params, optimiser)

    def data() -> dict:
        starts = corpus().starts("train", 1, config.audio.mel_frames)
        return {"mel": corpus().mel, "tracks": corpus().tracks, "starts": starts}

    def cut(data, start):
        mel, speech = window(data["mel"], data["tracks"], start, 1, config.audio.mel_frames)
        return mel, jnp.stack([getattr(speech, name) for name in TRACKS], axis=-1)

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        k_start, k_augment = jax.random.split(key)
        start = jax.random.choice(k_start, data["starts"], (settings.batch,))
        mel, truth = jax.vmap(lambda s: cut(data, s))(start)
        mel = jax.vmap(lambda m, k: augment(m, k, config.audio))(mel, jax.random.split(k_augment, settings.batch))
        mel, truth = split_batch((mel, truth))

        def loss(params: Params) -> Float[Array, ""]:
            return jnp.mean((model.bind(params)(mel) - truth) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.descend(gradient, optimiser, settings.ema), {
            "loss": value
        }

    @jax.jit
    def read(params, data, start):
        mel, truth = jax.vmap(lambda s: cut(data, s))(start)
        return model.bind(params)(mel), truth

    def evaluate(state: TrainState) -> dict[str, float]:
        """Error and correlation of every track over the held-out human voice."""
        start = corpus().starts("held_out", 1, config.audio.mel_frames)[:HELD_OUT]
        said, truth = (np.asarray(x) for x in read(state.ema, data(), start))
        r = {name: float(np.corrcoef(said[..., i].ravel(), truth[..., i].ravel())[0, 1]) for i, name in enumerate(TRACKS)}
        return {"loss": float(np.mean((said - truth) ** 2)), **{f"r_{name}": value for name, value in r.items()}}

    return Stage(
        name="audio_pretrain",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        config={"preset": config.name, "audio": dataclasses.asdict(config.audio), "stage": settings.record()},
        evaluate=evaluate,
        evaluate_every=250,
    )
