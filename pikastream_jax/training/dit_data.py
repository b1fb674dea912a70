"""Batches for the DiT's stages: random windows of the prepared clips with their sound, captions and references."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.data.corpus import audio_slices, augment, load_corpus, window
from pikastream_jax.nn.layers import Params
from pikastream_jax.text.tokenizer import COMMA
from pikastream_jax.training.clips import SPEECH, load_clips
from pikastream_jax.training.innovations import QUANTITIES, fit_innovations, innovations
from pikastream_jax.training.losses import region_weights

REGION_WEIGHTS = (5.0, 1.5)  # what the boxes of mouth and eyes add to a latent's weight of 1: they are small and they matter
CROP = 0.75  # share of the picture's sides that is trained on; faces stand in the middle, so any such part holds nearly all that is hard
DROP = 0.1  # share of rows that lose text, audio or reference, each on its own
SHORT = 0.3  # share of captions that are cut at a comma: people write "a woman smiling" and no more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiTBatch:
    """One batch, clean."""

    latents: Float[Array, "b f r c z"]
    reference: Float[Array, "b r c z"]
    mel: Float[Array, "b f m k"]  # every latent frame's slice
    tokens: Int[Array, "b l"]
    valid: Int[Array, "b"]
    keep_audio: Bool[Array, "b"]
    weight: Float[Array, "b f r c"]  # of the loss; mean 1
    boxes: Float[Array, "b f 2 4"]  # mouth and eyes, in pixels of the part of the picture that the latents show
    truth: Float[Array, "b f o"]  # see `Clips`
    motion: Float[Array, "b f k"]  # what is new in each latent frame's motion, see `innovations`


def load_data(clips: Path, speech: Path = SPEECH) -> dict[str, Any]:
    """Everything a stage draws from: training and held-out clips, and the corpus."""
    corpus = load_corpus(speech)
    train = load_clips(clips, "train")
    return {
        "train": train,
        "held_out": load_clips(clips, "held_out"),
        "innovations": fit_innovations(np.asarray(train.truth)),
        "mel": corpus.mel,
        "tracks": corpus.tracks,
    }


def text_kept(params: Params) -> Params:
    """A denoiser's parameters, of which the text encoder's are not trained.

    It knows what prompts mean from `text_pretrain`. What a caption is worth to the DiT's losses is too little to keep that: Muon's
    updates are as large for a weak gradient as for a strong one, and took what a smile is called out of the encoder again.
    """
    return params | {"text": jax.lax.stop_gradient(params["text"])}


def draw_batch(
    config: Config,
    data: dict[str, Any],
    split: str,
    key: Array,
    batch: int,
    frames: int,
    *,
    train: bool = True,
    crop: float = 1.0,
) -> DiTBatch:
    """Random windows of `frames` latent frames.

    Args:
      train: augment the sound and drop conditions; otherwise clips are taken in order, from their start.
      crop: share of the picture's height and width (in whole tokens, rounded up) that a random part takes, the same part of video and
        reference. RoPE is relative and the DiT has no other notion of place, so to it a part is a picture with less around.

    Raises:
      ValueError: the preset hears ahead, for which the prepared sound is not cut, or is told of another number of motions.
    """
    if config.dit.motion != len(QUANTITIES):
        raise ValueError(f"dit.motion {config.dit.motion}: clips tell of {len(QUANTITIES)} ({', '.join(QUANTITIES)}), use that")
    if config.audio.look_ahead:
        raise ValueError(f"audio.look_ahead {config.audio.look_ahead}: the clips' sound ends with its latent frame, use 0")
    rows, columns = config.latent_grid
    clips = data[split]
    count, length = clips.latents.shape[:2]
    k_clip, k_offset, k_augment, k_drop, k_cut, k_crop, k_motion = jax.random.split(key, 7)
    if train:
        index = jax.random.randint(k_clip, (batch,), 0, count)
        offset = jax.random.randint(k_offset, (batch,), 0, length - frames + 1)
    else:
        index, offset = jnp.arange(batch) % count, jnp.zeros(batch, jnp.int32)

    def one(index, offset, key):
        latents = jax.lax.dynamic_slice_in_dim(clips.latents[index], offset, frames)
        boxes = jax.lax.dynamic_slice_in_dim(clips.boxes[index], offset, frames)
        mel, _ = window(data["mel"], data["tracks"], clips.speech_start[index] + offset, frames, config.audio.mel_frames)
        if train:
            mel = augment(mel, key, config.audio)
        truth = jax.lax.dynamic_slice_in_dim(clips.truth[index], offset, frames)
        return latents, boxes, truth, audio_slices(mel, frames, config.audio.mel_frames)

    latents, boxes, truth, mel = jax.vmap(one)(index, offset, jax.random.split(k_augment, batch))
    weight = region_weights(_latent_boxes(boxes, config.flash_vae.spatial_stride), rows, columns, REGION_WEIGHTS)
    keep = jax.random.uniform(k_drop, (3, batch)) >= (DROP if train else 0.0)
    reference = clips.reference[index].astype(jnp.float32)
    tokens, valid = clips.tokens[index], clips.valid[index]
    if train:
        valid = _cut_captions(k_cut, tokens, valid)
    if crop < 1.0:
        corner, size = _random_part(config, k_crop, batch, crop)
        latents, weight, reference = (_cropped(x, corner, size) for x in (latents, weight, reference[:, None]))
        reference = jnp.squeeze(reference, 1)
        boxes = boxes - config.flash_vae.spatial_stride * jnp.tile(corner, 2)[:, None, None]
    return DiTBatch(
        latents=latents.astype(jnp.float32),
        reference=jnp.where(keep[0][:, None, None, None], reference, 0.0),
        mel=mel,
        tokens=tokens,
        valid=jnp.where(keep[1], valid, 1),  # the start token alone is the empty prompt
        keep_audio=keep[2],
        weight=weight / jnp.mean(weight, axis=(2, 3), keepdims=True),
        boxes=boxes,
        truth=truth,
        motion=innovations(data["innovations"], truth, k_motion),
    )


def without_text(batch: DiTBatch) -> DiTBatch:
    """The same with the empty prompt."""
    return dataclasses.replace(batch, valid=jnp.ones_like(batch.valid))


def without_audio(batch: DiTBatch) -> DiTBatch:
    """The same with no sound given, which is not silence."""
    return dataclasses.replace(batch, keep_audio=jnp.zeros_like(batch.keep_audio))


def without_reference(batch: DiTBatch) -> DiTBatch:
    """The same with no reference given."""
    return dataclasses.replace(batch, reference=jnp.zeros_like(batch.reference))


def _cut_captions(key: Array, tokens: Int[Array, "b l"], valid: Int[Array, "b"]) -> Int[Array, "b"]:
    """How many tokens of each caption are left when `SHORT` of those with commas end before one of them."""
    k_short, k_comma = jax.random.split(key)
    comma = (tokens == COMMA) & (jnp.arange(tokens.shape[1]) < valid[:, None])
    end = jnp.argmax(comma * jax.random.uniform(k_comma, comma.shape), axis=1)
    short = jax.random.uniform(k_short, valid.shape) < SHORT
    return jnp.where(short & comma.any(axis=1), end, valid)


def _random_part(config: Config, key: Array, batch: int, share: float) -> tuple[Int[Array, "b 2"], tuple[int, int]]:
    """First row and column in latents, for each row of the batch, and how many of both: whole tokens."""
    patch = config.dit.patch
    size = tuple(math.ceil(share * tokens) for tokens in config.token_grid)
    room = jnp.array(config.token_grid) - jnp.array(size) + 1
    return patch * jax.random.randint(key, (batch, 2), 0, room), (patch * size[0], patch * size[1])


def _cropped(x: Float[Array, "b f r c ..."], corner: Int[Array, "b 2"], size: tuple[int, int]) -> Float[Array, "b f h w ..."]:
    return jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, (0, *c, *[0] * (x.ndim - 3)), (x.shape[0], *size, *x.shape[3:])))(x, corner)


def _latent_boxes(boxes: Float[Array, "*b n 4"], stride: int) -> Float[Array, "*b n 4"]:
    """Boxes in latents that hold every latent the pixel box touches."""
    low, high = jnp.floor(boxes[..., :2] / stride), jnp.ceil(boxes[..., 2:] / stride)
    return jnp.concatenate([low, high], axis=-1)


def weighted_velocity_loss(
    velocity: Float[Array, "b f r c z"], wanted: Float[Array, "b f r c z"], weight: Float[Array, "b f r c"]
) -> Float[Array, ""]:
    """Squared error, weighted per latent; flow matching wants noise - clean."""
    error = velocity - wanted
    return jnp.mean(weight * jnp.mean(error * error, axis=-1))
