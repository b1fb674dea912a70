"""Clips of any run for the conditions of held-out clips, as pixels: what they are worth, clip by clip.

Two runs that are judged alike are judged on the same people, words, sound and noise, so `training/compare.py` can take them pair by pair.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pikastream_jax.audio.mel import log_mel
from pikastream_jax.config import Config
from pikastream_jax.data.corpus import MEL_FRAMES, VIDEO_FRAMES, Corpus, dequantise_tracks
from pikastream_jax.data.motion import SpeechTrack
from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.measuring import clip_measures
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards.scoring import Rewards
from pikastream_jax.rewards.shown import MEL_PER_LATENT, Shown, canonical
from pikastream_jax.streaming.state import fill_buffer, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import ModelParams, Models, denoise_chunk
from pikastream_jax.training.dit_data import ClipWindows, DiTBatch, clip_constants, prepare_batch, windows
from pikastream_jax.training.records import Records
from pikastream_jax.training.sampling import Guidance, sample_teacher

# For a batch of conditions and its noise at t = 1 the clean, normalised latents.
Sampler = Callable[[Params, DiTBatch, Float[Array, "b f r c z"]], Float[Array, "b f r c z"]]
BATCH = 10  # clips made at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is judged; equal plans make pairs."""

    clips: int = 200
    latent_frames: int = 9
    seed: int = 0  # of the noise

    def __post_init__(self):
        if self.clips < 2:
            raise ValueError(f"clips {self.clips} must be at least 2: a standard error takes 2")
        if self.latent_frames * VIDEO_FRAMES < 25:
            raise ValueError(f"latent_frames {self.latent_frames} must be at least 7: lips are followed over 25 video frames")


def teacher_sampler(models: Models, steps: int, guidance: Guidance) -> Sampler:
    """The bidirectional teacher in `steps` Euler steps on the stream's shift."""
    stream = models.config.stream
    times = solver_timesteps(steps, stream.shift)

    def sample(params, batch, noise):
        distance = jnp.full(len(noise), float(stream.reference_distance))
        return sample_teacher(models.denoiser, params, batch, noise, times, distance, guidance)[0]

    return sample


def student_sampler(models: Models) -> Sampler:
    """The student as it streams, in the schedule and the steps of the models' configuration, chunk by chunk with the inference step itself."""
    config = models.config
    stream, size = config.stream, config.stream.chunk
    waiting = stream.in_flight - size

    def sample(params, batch, noise):
        denoiser = models.denoiser.bind(params)
        b, frames = noise.shape[:2]
        if frames % size:
            raise ValueError(f"{frames} latent frames are not whole chunks of {size}: use a multiple")
        text, valid = denoiser.text_conditions(batch.tokens, batch.valid)
        silence = log_mel(jnp.zeros(config.audio.context_samples), config.audio)
        state = install_reference(init_state(config, b), denoiser.dit.reference_keys_values(batch.reference))
        state = dataclasses.replace(state, rng=jax.random.key_data(jax.random.split(jax.random.key(0), b)))
        state = fill_buffer(config, state, batch.reference, denoiser.audio(silence))
        # A rolling stream also hears what comes before the clip and after its end: silence.
        mel = jnp.concatenate([jnp.broadcast_to(silence, (b, waiting, *silence.shape)), batch.mel] + [jnp.broadcast_to(silence, (b, waiting, *silence.shape))], axis=1)
        motion = jnp.pad(batch.motion, ((0, 0), (waiting, waiting), (0, 0)))
        late = jax.random.normal(jax.random.key(1), (b, waiting, *noise.shape[2:]))
        noise = jnp.concatenate([noise, late], axis=1)

        def one(state, chunk):
            heard, told = (jax.lax.dynamic_slice_in_dim(leaf, chunk * size, stream.in_flight, axis=1) for leaf in (mel, motion))
            prompt = jax.lax.dynamic_index_in_dim(batch.frame_prompt, jnp.minimum(chunk * size, frames - 1), axis=1, keepdims=False)
            rows = jnp.arange(b)
            now = jax.tree.map(lambda leaf, old: leaf[:, rows, prompt][:, :, None].astype(old.dtype), text, state.text)
            state = install_prompt(state, now, valid[rows, prompt][:, None])
            conditions = denoiser.conditions(state.text, state.text_valid, heard, told)
            fresh = jax.lax.dynamic_slice_in_dim(noise, chunk * size, size, axis=1)
            state, clean = denoise_chunk(models, params, state, conditions, fresh)
            return dataclasses.replace(state, chunk_count=state.chunk_count + 1), clean

        _, chunks = jax.lax.scan(one, state, jnp.arange(frames // size + stream.delay))
        return jnp.moveaxis(chunks, 0, 1)[:, stream.delay :].reshape(b, frames, *noise.shape[2:])

    return sample


def true_sampler(params: Params, batch: DiTBatch, noise: Float[Array, "b f r c z"]) -> Float[Array, "b f r c z"]:
    """The held-out clips themselves, drawn and encoded: no model of these latents can do better."""
    del params, noise
    return batch.latents


class HeldOut:
    """The held-out clips that a plan names: batches of conditions with their noise, and the truth of every clip.

    Raises:
      FileNotFoundError, ValueError: no clips, too few or too short ones, ones of another preset or whose sound `corpus` does not hold.
    """

    def __init__(self, config: Config, folder: Path, corpus: Corpus, plan: Plan):
        self.config, self.folder, self.plan = config, folder, plan
        records = Records(folder, "held_out", ("mel", "truth"))
        if len(records) < plan.clips:
            raise ValueError(f"{folder} holds {len(records)} clips out, {plan.clips} are asked for: ask for fewer, or make clips with --held-out {plan.clips}")
        self._windows = windows(config, folder, "held_out", BATCH, plan.latent_frames, None)
        self._data = clip_constants(folder)
        history = config.audio.mel_frames - MEL_FRAMES
        find = speech_finder(corpus)
        self.truths = []
        for index in range(plan.clips):
            record = records[index]
            track = find(record["mel"][history:], plan.latent_frames)
            self.truths.append(clip_measures.clip_truth(record["truth"][: plan.latent_frames], track))
        self._prepare = jax.jit(lambda data, windows, key: prepare_batch(config, data, windows, key, train=False))

    def batches(self) -> Iterator[tuple[DiTBatch, Float[Array, "b f r c z"]]]:
        """Conditions and noise, `BATCH` clips at a time; the last batch runs over the plan's end where that is no multiple."""
        for n in range(-(-self.plan.clips // BATCH)):
            cut: ClipWindows = self._windows[n]
            k_batch, k_noise = jax.random.split(jax.random.fold_in(jax.random.key(self.plan.seed), n))
            batch = self._prepare(self._data, cut, k_batch)
            yield batch, jax.random.normal(k_noise, batch.latents.shape)


def speech_finder(corpus: Corpus) -> Callable[[UInt8[np.ndarray, "m k"], int], SpeechTrack]:
    """A function that finds where in the corpus a piece of sound comes from: (its mel from a latent frame's beginning on, latent frames) -> the
    tracks of those latent frames, one value per video frame.

    Clips keep their sound as the corpus has it, byte by byte, and the mean of the lips over a latent frame; a frame's own is in the corpus.
    """
    everything, bands = np.ascontiguousarray(corpus.mel).tobytes(), corpus.mel.shape[1]

    def find(mel: UInt8[np.ndarray, "m k"], latent_frames: int) -> SpeechTrack:
        wanted, at = np.ascontiguousarray(mel).tobytes(), -1
        step = MEL_FRAMES * bands  # a latent frame's bytes
        while (at := everything.find(wanted, at + 1)) >= 0 and at % step:
            continue
        if at < 0:
            raise ValueError("the sound of a held-out clip is not in the speech features: give those that the clips were made with (--speech)")
        first = at // step * VIDEO_FRAMES
        track = dequantise_tracks(jnp.asarray(corpus.tracks[first : first + latent_frames * VIDEO_FRAMES]))
        return jax.tree.map(np.asarray, track)

    return find


@dataclasses.dataclass(frozen=True)
class Judge:
    """What judges: FlashVAE's decoder, the estimator and the metric it tells people apart by, and the rewards where there are any."""

    models: Models
    params: ModelParams  # the denoiser's are not looked at
    estimator: Estimator
    metric: IdentityMetric
    rewards: Rewards | None
    reward_params: dict[str, Params]

    @functools.cached_property
    def _program(self) -> Callable:
        """Compiled once for each sampler: runs that are sampled alike should share theirs."""
        return jax.jit(self._made, static_argnums=0)

    def judge(self, held_out: HeldOut, sampler: Sampler, params: Params, shown: Callable[[int], Any] = lambda count: None) -> dict[str, Float[np.ndarray, " n"]]:
        """Every measure of every clip of the plan: those of `clip_measures.MEASURES`, and `reward_NAME`.

        Args:
          shown: is told how many clips each batch had.
        """
        plan, rows = held_out.plan, []
        identities = np.stack([truth.identity for truth in held_out.truths])
        for batch, noise in held_out.batches():
            first = len(rows)
            frames, scores = jax.device_get(self._program(sampler, params, self.params, self.reward_params, batch, noise))
            count = min(len(frames), plan.clips - first)
            reading = self.estimator(frames[:count].reshape(-1, *frames.shape[2:]))
            reading = jax.tree.map(lambda leaf, t=frames.shape[1]: leaf.reshape(-1, t, *leaf.shape[1:]), reading)
            for row in range(count):
                own = jax.tree.map(lambda leaf, row=row: leaf[row], reading)
                others = clip_measures.other_people(identities, first + row)
                found = clip_measures.measured(frames[row], own, held_out.truths[first + row], others, self.metric)
                rows.append(found | {f"reward_{name}": float(values[row]) for name, values in scores.items()})
            shown(count)
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}

    def _made(self, sampler: Sampler, params: Params, served: ModelParams, reward_params: dict[str, Params], batch: DiTBatch, noise: Array):
        """Pixels as a viewer gets them, and every reward's score."""
        vae = self.models.flash_vae.bind(served.flash_vae)

        def decoded(latents):
            return jnp.clip(vae.decode(served.statistics.restore(latents)), -1.0, 1.0)

        latents = sampler(params, batch, noise)
        # One clip after another: what the decoder holds in between is large.
        video = jax.lax.map(lambda clip: decoded(clip[None])[0], latents)
        frames = jnp.round((video + 1.0) * 127.5).astype(jnp.uint8)
        if self.rewards is None:
            return frames, {}
        reference = decoded(batch.reference[:, None])[:, -1]
        shown = Shown(canonical(video), canonical(reference), batch.mel[:, :, -MEL_PER_LATENT:])
        return frames, self.rewards.scores(reward_params, shown)


def directions(judged: dict[str, np.ndarray]) -> dict[str, int]:
    """For each measure 1 where more is better, -1 where less is, 0 where neither."""
    return {name: 1 if name.startswith("reward_") else clip_measures.MEASURES[name] for name in judged}
