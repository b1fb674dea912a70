"""Pre-training of the audio encoder: what the lips do, read off the sound alone.

Published systems give their DiT a speech encoder that was trained before (Whisper, wav2vec 2.0); none may be downloaded here, so ours
learns the speech tracks of the corpus first. Learned from the diffusion loss alone, where the lips are a small part of a noisy
picture, the same takes many times as long.

The readout is linear in the mean of a slice's tokens, because cross-attention that does not know yet where to look passes on just
that mean: the DiT finds the lips of all four video frames there from its first update.

Whether the lips are together is read out on its own, too. A squared error is content with an opening of 0.12 where 0.04 is true, and to a
viewer that is a missed p: encoders trained by it alone read closures with an F1 of 0.80 on a voice they had not heard, and of 0.83 on those
they had, and no stream can close its lips more often where it should than its encoder knows.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pikastream_jax.audio.encoder import AudioEncoder
from pikastream_jax.config import Config
from pikastream_jax.data.corpus import TRACKS, VIDEO_FRAMES, augment, load_corpus, window
from pikastream_jax.measuring.lipsync import CLOSED, Closures, match_closures
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import SPEECH
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.losses import closure_loss
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.origins import origins
from pikastream_jax.training.processes import gather
from pikastream_jax.training.settings import Optimiser, StageSettings
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT = 2_000  # slices
_OPENING = TRACKS.index("mouth_open")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the stage; a row of a batch is a slice of sound."""

    updates: int = 1_500
    batch: int = 128
    closures: float = 0.03
    """Weight of the cross-entropy of closed lips, beside the squared error of the tracks."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=4e-3, warmup_steps=50, decay="linear")


class LipReadout(nnx.Module):
    """The audio encoder and the linear readout that only this stage has."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.audio = AudioEncoder(config.audio, rngs=rngs)
        self.head = nnx.Linear(config.audio.dim, VIDEO_FRAMES * (len(TRACKS) + 1), rngs=rngs)

    def __call__(self, mel: Float[Array, "b m k"]) -> tuple[Float[Array, "b 4 5"], Float[Array, "b 4"]]:
        """Of the latent frame that a slice ends with: speech tracks in the order of `TRACKS`, and the logit of closed lips."""
        said = self.head(self.audio(mel).mean(axis=-2)).reshape(-1, VIDEO_FRAMES, len(TRACKS) + 1)
        return said[..., :-1], said[..., -1]


def readout_losses(tracks: Float[Array, "b 4 5"], logit: Float[Array, "b 4"], truth: Float[Array, "b 4 5"]) -> Metrics:
    """Squared error of the tracks, and binary cross-entropy of closed lips in nats."""
    return {
        "tracks": jnp.mean((tracks - truth) ** 2),
        "closures": closure_loss(logit, truth[..., _OPENING]),
    }


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `audio_pretrain`. It starts from nothing, or, where `init` names `audio`, from the encoder of that run or file."""

    def build_model(rngs):
        return LipReadout(config, rngs=rngs)

    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    corpus = functools.cache(lambda: load_corpus(SPEECH))

    def initial_state() -> TrainState:
        params = initial_params(build_model, jax.random.key(seed))
        if "audio" in init:
            params["audio"] = restore_into(model.abstract["audio"], load_weights(init["audio"], "denoiser")["audio"])
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

        def loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            parts = readout_losses(*model.bind(params)(mel), truth)
            value = parts["tracks"] + settings.closures * parts["closures"]
            return value, {"loss": value} | parts

        gradient, parts = jax.grad(loss, has_aux=True)(state.params)
        return state.descend(gradient, optimiser, settings.ema), parts

    @jax.jit
    def read(params, data, start):
        mel, truth = jax.vmap(lambda s: cut(data, s))(start)
        said = model.bind(params)(mel)
        return said, truth, readout_losses(*said, truth)

    def evaluate(state: TrainState, data: dict) -> dict[str, float]:
        """Errors over the held-out human voice, correlation of every track, and F1 of closures as lip sync is measured."""
        start = corpus().starts("held_out", 1, config.audio.mel_frames)[:HELD_OUT]
        (said, logit), truth, parts = jax.device_get(gather(read(state.ema, data, start)))
        loss = parts["tracks"] + settings.closures * parts["closures"]
        r = {f"r_{name}": float(np.corrcoef(said[..., i].ravel(), truth[..., i].ravel())[0, 1]) for i, name in enumerate(TRACKS)}
        f1 = {
            # The logit as an opening: below CLOSED where lips are rather closed than not.
            "f1_closures": _pooled(start, CLOSED - logit, truth[..., _OPENING]),
            "f1_opening": _pooled(start, said[..., _OPENING], truth[..., _OPENING]),
        }
        return {"loss": float(loss)} | {name: float(value) for name, value in parts.items()} | r | f1

    return Stage(
        name="audio_pretrain",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        config={"preset": config.name, "audio": dataclasses.asdict(config.audio), "stage": settings.record()} | origins({"speech": SPEECH}),
        evaluate=evaluate,
        evaluate_every=settings.every(250),
    )


def _pooled(start: Int[np.ndarray, " n"], said: Float[np.ndarray, "n 4"], true: Float[np.ndarray, "n 4"]) -> float:
    """F1 of closures over the unbroken stretches of slices."""
    gaps = np.flatnonzero(np.diff(start) != 1) + 1
    pairs = zip(np.split(true, gaps), np.split(said, gaps), strict=True)
    return sum((match_closures(t.ravel(), s.ravel()) for t, s in pairs), start=Closures(0, 0, 0)).f1
