"""Batches for the DiT's stages: random windows of the prepared clips, cut on the host and made ready on the device."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8

from pikastream_jax.config import Config
from pikastream_jax.data.corpus import MEL_FRAMES, audio_slices, augment, dequantise_mel
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params
from pikastream_jax.text.tokenizer import COMMA
from pikastream_jax.training.innovations import QUANTITIES, Innovations, innovations
from pikastream_jax.training.losses import region_weights
from pikastream_jax.training.records import Record, Records, read_constants

if TYPE_CHECKING:
    import grain

REGION_WEIGHTS = (5.0, 1.5)  # what the boxes of mouth and eyes add to a latent's weight of 1: they are small and they matter
CROP = 0.75  # share of the picture's sides that is pre-trained on; faces stand in the middle, so any such part holds nearly all that is hard
DROP = 0.1  # share of rows that lose text, audio or reference, each on its own
SHORT = 0.3  # share of captions that are cut at a comma: people write "a woman smiling" and no more
CURATED = 0.25  # share of the clips that are the best, see `clips.quality`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipWindows:
    """Windows of f latent frames as they lie on the disk; latents normalised. What a grain data set of `windows` gives."""

    latents: Float16[np.ndarray, "b f r c z"]
    reference: Float16[np.ndarray, "b r c z"]  # the same person at rest
    boxes: Float[np.ndarray, "b f 2 4"]  # mouth and eyes, pixels, mean over a latent frame
    truth: Float[np.ndarray, "b f o"]  # what the renderer was told, as `true_readings` puts it, mean over a latent frame
    opening: Float16[np.ndarray, "b f s"]  # of the lips in every video frame of a latent frame, 0 closed .. 1
    mel: UInt8[np.ndarray, "b heard k"]  # `dequantise_mel`; from the first mel frame heard to the end of the window
    tokens: Int[np.ndarray, "b 2 l"]  # two captions; the same twice where the clip has one
    valid: Int[np.ndarray, "b 2"]
    frame_prompt: Int[np.ndarray, "b f"]  # which of them each latent frame follows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiTBatch:
    """One batch, clean."""

    latents: Float[Array, "b f r c z"]
    reference: Float[Array, "b r c z"]
    other_reference: Float[Array, "b r c z"]  # another person's, never dropped: what a reference is swapped for in mid-stream
    mel: Float[Array, "b f m k"]  # every latent frame's slice
    tokens: Int[Array, "b s l"]
    valid: Int[Array, "b s"]
    frame_prompt: Int[Array, "b f"]  # which of the s prompts each latent frame follows
    keep_audio: Bool[Array, "b"]
    weight: Float[Array, "b f r c"]  # of the loss; mean 1
    boxes: Float[Array, "b f 2 4"]  # mouth and eyes, in pixels of the part of the picture that the latents show
    truth: Float[Array, "b f o"]  # see `ClipWindows`
    opening: Float[Array, "b f s"]  # see `ClipWindows`
    motion: Float[Array, "b f k"]  # what is new in each latent frame's motion, see `innovations`


def clip_constants(folder: Path) -> dict[str, Any]:
    """What belongs to all clips: `innovations`, which `prepare_batch` needs, and `statistics` of the latents; part of a stage's `data`."""
    constants = read_constants(folder)
    told = {field.name: jnp.asarray(constants[f"innovations.{field.name}"]) for field in dataclasses.fields(Innovations)}
    statistics = LatentStatistics(jnp.asarray(constants["statistics.mean"]), jnp.asarray(constants["statistics.std"]))
    return {"innovations": Innovations(**told), "statistics": statistics}


def windows(
    config: Config, folder: Path, split: str, batch: int, frames: int, seed: int | None, *, curated: bool = False
) -> "grain.MapDataset[ClipWindows]":
    """Batches of windows of `frames` latent frames, without end; element n is the batch of update n, wherever one starts.

    With several processes it is the batch of all of them, of which each takes its rows.

    Args:
      folder: of clips, see `training/clips.py`.
      seed: every clip once in each round, in an order and with an offset of its own; None for clips in order, from their start.
      curated: the best `CURATED` of the training clips alone.

    Raises:
      ValueError: the clips are shorter, or were made for another preset; `curated` held-out clips. See also `Records`.
    """
    import grain

    records = Records(folder, split, [*(field.name for field in dataclasses.fields(ClipWindows))])
    constants = read_constants(folder)
    _check_preset(config, records, frames)
    mean, deviation = constants["statistics.mean"], constants["statistics.std"]
    history = config.audio.mel_frames - MEL_FRAMES

    def cut(record: Record, offset: int) -> ClipWindows:
        """Without the batch's axis."""
        stretch = slice(offset, offset + frames)

        def normalised(latents):
            return ((latents.astype(np.float32) - mean) / deviation).astype(np.float16)

        return ClipWindows(
            latents=normalised(record["latents"][stretch]),
            reference=normalised(record["reference"]),
            boxes=record["boxes"][stretch],
            truth=record["truth"][stretch],
            opening=record["opening"][stretch],
            mel=record["mel"][MEL_FRAMES * offset : MEL_FRAMES * (offset + frames) + history],
            tokens=record["tokens"],
            valid=record["valid"],
            frame_prompt=record["frame_prompt"][stretch],
        )

    source = grain.MapDataset.source(records)
    if curated:
        if split != "train":
            raise ValueError(f"curated clips of {split!r}: only training clips are curated, for all that is measured is measured on all")
        source = grain.MapDataset.source(_Chosen(records, best_clips(constants["quality"])))
    if seed is None:
        rows = source.repeat().map(lambda record: cut(record, 0))
    else:
        latest = records.fields["latents"][0][0] - frames
        rows = source.seed(seed).shuffle().repeat().random_map(lambda record, rng: cut(record, int(rng.integers(latest + 1))))
    return rows.batch(batch, batch_fn=lambda rows: jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


def best_clips(quality: Float[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """Numbers of the best `CURATED` of the clips, in order; at least one."""
    best = np.argsort(-quality, kind="stable")[: max(1, round(CURATED * len(quality)))]
    return np.sort(best)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some of the records."""

    records: Records
    numbers: Int[np.ndarray, "m"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.numbers[index]]


def _check_preset(config: Config, records: Records, frames: int) -> None:
    length, *latent = records.fields["latents"][0]
    mel = (MEL_FRAMES * (length - 1) + config.audio.mel_frames, config.audio.mels)
    wanted = {
        "latents": (length, *config.latent_grid, config.dit.latent_channels),
        "mel": mel,
        "tokens": (2, config.text.length),
    }
    for name, shape in wanted.items():
        found = tuple(records.fields[name][0])
        if found != shape:
            raise ValueError(f"{records.folder}: {name} have the shape {found}, preset {config.name} needs {shape}: make clips of this preset")
    if not 1 <= frames <= length:
        raise ValueError(f"{records.folder}: windows of {frames} latent frames out of clips of {length}: ask for 1 to {length}")


def prepare_batch(
    config: Config, data: dict[str, Any], batch: ClipWindows, key: Array, *, train: bool = True, drop: float = DROP, crop: float = 1.0
) -> DiTBatch:
    """What a stage trains on, inside jit, from what the host has cut.

    Args:
      data: has `clip_constants`.
      train: augment the sound, cut captions and drop conditions.
      drop: share of rows that lose text, audio or reference, each on its own, in training.
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
    b, frames = batch.latents.shape[:2]
    k_augment, k_drop, k_cut, k_crop, k_motion = jax.random.split(key, 5)
    mel = dequantise_mel(batch.mel)
    if train:
        mel = jax.vmap(lambda mel, key: augment(mel, key, config.audio))(mel, jax.random.split(k_augment, b))
    boxes = batch.boxes
    weight = region_weights(_latent_boxes(boxes, config.flash_vae.spatial_stride), rows, columns, REGION_WEIGHTS)
    keep = jax.random.uniform(k_drop, (3, b)) >= (drop if train else 0.0)
    latents, reference = batch.latents.astype(jnp.float32), batch.reference.astype(jnp.float32)
    other = jnp.roll(reference, 1, axis=0)
    valid = _cut_captions(k_cut, batch.tokens, batch.valid) if train else batch.valid
    if crop < 1.0:
        corner, size = _random_part(config, k_crop, b, crop)
        latents, weight, references = (_cropped(x, corner, size) for x in (latents, weight, jnp.stack([reference, other], axis=1)))
        reference, other = references[:, 0], references[:, 1]
        boxes = boxes - config.flash_vae.spatial_stride * jnp.tile(corner, 2)[:, None, None]
    return DiTBatch(
        latents=latents,
        reference=jnp.where(keep[0][:, None, None, None], reference, 0.0),
        other_reference=other,
        mel=audio_slices(mel, frames, config.audio.mel_frames),
        tokens=batch.tokens,
        valid=jnp.where(keep[1][:, None], valid, 1),  # the start token alone is the empty prompt
        frame_prompt=batch.frame_prompt,
        keep_audio=keep[2],
        weight=weight / jnp.mean(weight, axis=(2, 3), keepdims=True),
        boxes=boxes,
        truth=batch.truth,
        opening=batch.opening.astype(jnp.float32),
        motion=innovations(data["innovations"], batch.truth, k_motion),
    )


def text_kept(params: Params) -> Params:
    """A denoiser's parameters, of which the text encoder's are not trained.

    It knows what prompts mean from `text_pretrain`. What a caption is worth to the DiT's losses is too little to keep that: Muon's
    updates are as large for a weak gradient as for a strong one, and took what a smile is called out of the encoder again.
    """
    return params | {"text": jax.lax.stop_gradient(params["text"])}


def without_text(batch: DiTBatch) -> DiTBatch:
    """The same with the empty prompt."""
    return dataclasses.replace(batch, valid=jnp.ones_like(batch.valid))


def without_audio(batch: DiTBatch) -> DiTBatch:
    """The same with no sound given, which is not silence."""
    return dataclasses.replace(batch, keep_audio=jnp.zeros_like(batch.keep_audio))


def without_reference(batch: DiTBatch) -> DiTBatch:
    """The same with no reference given."""
    return dataclasses.replace(batch, reference=jnp.zeros_like(batch.reference))


def _cut_captions(key: Array, tokens: Int[Array, "*b l"], valid: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """How many tokens of each caption are left when `SHORT` of those with commas end before one of them."""
    k_short, k_comma = jax.random.split(key)
    comma = (tokens == COMMA) & (jnp.arange(tokens.shape[-1]) < valid[..., None])
    end = jnp.argmax(comma * jax.random.uniform(k_comma, comma.shape), axis=-1)
    short = jax.random.uniform(k_short, valid.shape) < SHORT
    return jnp.where(short & comma.any(axis=-1), end, valid)


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
