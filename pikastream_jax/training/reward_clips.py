"""Pictures and clips that rewards are trained and measured on: drawn once at a stage's start and kept as bytes.

Where a FlashVAE is given, a share of them passes through it, so that a reward does not learn to tell what has been through the autoencoder.
Everything is a function of the seed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree, UInt8

from pikastream_jax.config import Config
from pikastream_jax.data.corpus import FPS, MEL_FRAMES, SPLITS, VIDEO_FRAMES, load_corpus, window
from pikastream_jax.data.face import FaceState, Identity, map_renders, render, sample_identity
from pikastream_jax.data.motion import sample_style, style_motion
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.nn.layers import functional
from pikastream_jax.rewards import SIDE, Shown, canonical
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import SPEECH, reference_state
from pikastream_jax.weights.safetensors_io import restore_into

LONGEST = 12  # latent frames of a clip
_DRAWN = 64  # pictures of one call, whatever is asked for: one program for all pools and all stages
_TOLD = 32  # clips of one call
_PASSED = 4  # clips of one call of FlashVAE


def pixels(levels: UInt8[Array, "*b"]) -> Float[Array, "*b"]:
    """Bytes -> [-1, 1]."""
    return levels.astype(jnp.float32) / 127.5 - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TalkingClips:
    """n true clips of t = 4 f video frames, or a part of their pictures."""

    video: UInt8[Array, "n t h w 3"]
    reference: UInt8[Array, "n 128 128 3"]
    sound: Float32[Array, "n m k"]  # mel of f + 2 latent frames, the first of them before the clip
    activity: Float32[Array, " n"]  # mean of the track of that name: 0 silence .. 1 speech
    states: Float32[Array, "n t 15"]  # what the renderer was told: the fields of `FaceState` in their order

    def shown(self, shift: int = 0) -> Shown:
        """The clips as rewards see them.

        Args:
          shift: video frames by which the sound comes from later than the picture, -4 to 4.
        """
        f = self.video.shape[1] // VIDEO_FRAMES
        begin = MEL_FRAMES + shift * MEL_FRAMES // VIDEO_FRAMES
        mel = self.sound[:, begin : begin + f * MEL_FRAMES].reshape(-1, f, MEL_FRAMES, self.sound.shape[-1])
        return Shown(pixels(self.video), pixels(self.reference), mel)


class Painter:
    """Draws pictures as a viewer gets them: 128x128, a share of them through FlashVAE."""

    def __init__(self, config: Config, flash_vae: Path | None, share: float):
        """Args:
        flash_vae: run or .safetensors; nothing is passed through it where it is None.
        share: of the clips that pass.
        """
        self.share = share if flash_vae else 0.0
        self.size = min(config.stream.height, config.stream.width)
        self.temporal_stride = config.flash_vae.temporal_stride
        if flash_vae:
            model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
            params = restore_into(model.abstract, load_weights(flash_vae, "flash_vae"))

            @jax.jit
            def through(params, video):
                vae = model.bind(params)
                return _levels(canonical(vae.decode(vae.encode(pixels(video))[0])))

            self._through = functools.partial(through, params)

    def clips(self, identities: Identity, states: FaceState) -> UInt8[np.ndarray, "n t 128 128 3"]:
        """Clips of n people in t states each (leaves [n] and [n, t]); the first ones of them have passed through FlashVAE."""
        n, t = states.yaw.shape
        passed = round(self.share * n)

        def drawn(rows: slice, size: int) -> np.ndarray:
            people = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[rows], t, axis=0), identities)
            moments = jax.tree.map(lambda leaf: np.asarray(leaf)[rows].reshape(-1), states)
            return draw(people, moments, size).reshape(-1, t, size, size, 3)

        parts = [drawn(slice(passed, n), SIDE)] if passed < n else []
        if passed:
            parts.insert(0, in_parts(self._through, drawn(slice(0, passed), self.size), _PASSED))
        return np.concatenate(parts)

    def stills(self, identities: Identity, states: FaceState) -> UInt8[np.ndarray, "n 128 128 3"]:
        """One picture each; FlashVAE sees a still as equal frames."""
        n = states.yaw.shape[0]
        passed = round(self.share * n)
        people = jax.tree.map(np.asarray, (identities, states))
        first, rest = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], people) for rows in (slice(0, passed), slice(passed, n)))
        parts = [draw(*rest, SIDE)] if passed < n else []
        if passed:
            equal = draw(*first, self.size)[:, None].repeat(self.temporal_stride, axis=1)
            parts.insert(0, in_parts(self._through, equal, 4 * _PASSED)[:, -1])
        return np.concatenate(parts)


def draw(identities: Identity, states: FaceState, size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """n pictures of n people in one state each."""
    return in_parts(functools.partial(_draw, size=size), (identities, states), _DRAWN)


@functools.partial(jax.jit, static_argnames="size")
def _draw(people: tuple[Identity, FaceState], size: int) -> UInt8[Array, "n s s 3"]:
    return map_renders(lambda person: _levels(render(*person, size=size)), people)


def _levels(picture: Float[Array, "*b"]) -> UInt8[Array, "*b"]:
    return jnp.clip(jnp.round((picture + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def in_parts(function: Callable[[PyTree], PyTree], tree: PyTree, length: int) -> PyTree[np.ndarray]:
    """`function` over stretches of `length` rows, the last one filled up: one program whatever the number of rows."""
    rows = len(jax.tree.leaves(tree)[0])
    results = []
    for start in range(0, rows, length):
        index = np.minimum(np.arange(start, start + length), rows - 1)
        results.append(jax.device_get(function(jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], tree))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *results)


Change = Callable[[Array, FaceState], FaceState]  # (key, states of a clip) -> other states


def talking_clips(
    config: Config,
    painter: Painter,
    split: str,
    seed: int,
    count: int,
    latent_frames: int,
    *,
    part: tuple[slice, slice] = (slice(None), slice(None)),
    change: Change | None = None,
) -> TalkingClips:
    """People who talk and listen, as `training.clips` makes them: another person, style and stretch of speech in each.

    Args:
      split: of the corpus.
      latent_frames: at most `LONGEST`.
      part: rows and columns of the pictures that are kept.
      change: what is done to the states before they are drawn.
    """
    corpus = load_corpus(SPEECH)
    rng = np.random.default_rng([seed, count, latent_frames])
    starts = rng.choice(corpus.starts(split, LONGEST + 2, MEL_FRAMES), count)
    # Seeds of splits must not meet: a person of the training clips is no held-out person.
    key = jax.random.fold_in(jax.random.key(seed), SPLITS.index(split))
    keys = jax.random.key_data(jax.random.split(key, count))
    mel, tracks = jnp.asarray(corpus.mel), jnp.asarray(corpus.tracks)
    identities, states, rest, sound, activity = in_parts(lambda rows: _told(*rows, mel, tracks), (keys, starts), _TOLD)
    frames = slice(VIDEO_FRAMES, VIDEO_FRAMES * (latent_frames + 1))
    states = jax.tree.map(lambda leaf: leaf[:, frames], states)
    if change is not None:
        states = jax.jit(jax.vmap(change))(jax.random.split(jax.random.fold_in(key, 1), count), states)
    return TalkingClips(
        video=painter.clips(identities, states)[:, :, *part],
        reference=painter.stills(identities, rest),
        sound=sound[:, : MEL_FRAMES * (latent_frames + 2)],
        activity=activity[:, frames].mean(axis=1),
        states=np.stack(jax.tree.leaves(states), axis=-1),
    )


@jax.jit
def _told(keys: Array, starts: Array, mel: Array, tracks: Array):
    """Who, states, the reference's state, sound and activity of clips of `LONGEST` latent frames and one more at both ends.

    Always of that length, and a fixed number at a time, because compiling this takes longer than running it.
    """

    def one(key, start):
        k_identity, k_style, k_motion, k_reference = jax.random.split(jax.random.wrap_key_data(key), 4)
        sound, speech = window(mel, tracks, start, LONGEST + 2, MEL_FRAMES)
        states = style_motion(k_motion, sample_style(k_style), speech, FPS)
        return sample_identity(k_identity), states, reference_state(k_reference), sound, speech.activity

    return jax.vmap(one)(keys, starts)


def grain(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Noise of unit variance, uniform: on a CPU normal noise for whole videos takes longer than the network that sees them."""
    return (jax.random.bits(key, shape, jnp.uint8).astype(jnp.float32) / 127.5 - 1.0) * math.sqrt(3.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Stretches of clips."""

    video: Float[Array, "b t h w 3"]
    sound: Float[Array, "b m k"]
    states: Float[Array, "b t 15"]


def window_of(clips: TalkingClips, index: Int[Array, " b"], offset: Int[Array, " b"], frames: int) -> Window:
    """`frames` video frames and their sound from frame `offset` of the clips `index`."""

    def one(index, offset):
        video = jax.lax.dynamic_slice_in_dim(clips.video[index], offset, frames)
        per_frame = MEL_FRAMES // VIDEO_FRAMES
        sound = jax.lax.dynamic_slice_in_dim(clips.sound[index], MEL_FRAMES + per_frame * offset, per_frame * frames)
        return Window(pixels(video), sound, jax.lax.dynamic_slice_in_dim(clips.states[index], offset, frames))

    return jax.vmap(one)(index, offset)


def check_latent_frames(latent_frames: int, needed: int) -> None:
    """Raises ValueError unless clips of `latent_frames` hold windows of `needed` video frames and are not too long."""
    least = math.ceil(needed / VIDEO_FRAMES)
    if not least <= latent_frames <= LONGEST:
        raise ValueError(f"latent_frames {latent_frames} must lie in {least} to {LONGEST}: a window has {needed} video frames")
