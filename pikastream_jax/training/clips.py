"""Clips for the DiT's stages: talking faces rendered, encoded by FlashVAE and kept as latents with their sound and captions.

`python -m pikastream_jax.training.clips` makes a folder of records (`training/records.py`) once; the stages then cut random windows out
of them (`training/dit_data.py`). In half of the clips the caption changes, and the face with it, as when a prompt is swapped in mid-stream.
"""

import dataclasses
import hashlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.data.captions import attributes_of, completeness, mentioned, phrases, worded
from pikastream_jax.data.corpus import MEL_FRAMES, MEL_STEP, Corpus, load_corpus, window
from pikastream_jax.data.face import (
    FaceState,
    Identity,
    eyes_box,
    mouth_box,
    presentation_name,
    render,
    sample_identity,
)
from pikastream_jax.data.motion import changed_style, sample_style, style_motion
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.measuring.estimator import true_readings
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.text import Tokenizer
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.innovations import Innovations, fit_innovations
from pikastream_jax.training.losses import psnr, region_weights
from pikastream_jax.training.records import Plan, Records, read_constants, read_record, write_records
from pikastream_jax.training.settings import arguments_of
from pikastream_jax.training.stages import ENCODERS, best_run
from pikastream_jax.weights.safetensors_io import restore_into

SPEECH = Path("data/speech_features.npz")
CHANGES = 0.5  # share of clips whose caption changes somewhere in their middle half
# What `quality` goes by; the higher, the better.
MEASURES = {
    "reconstruction": "PSNR in dB of mouth and eyes through FlashVAE, in the middle of the clip",
    "calm": "minus the mean speed of the head, radians a second",
    "facing": "minus the largest angle that the head is turned or bowed by, radians",
    "told": "share of what there is to say that the caption says; of two captions the lesser",
    "speech": "share of the clip in which somebody speaks; half is enough",
    "clear": "dB between the loudest and the quietest twentieth of the sound, so little noise",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """n clips as they come from the device."""

    latents: Float[Array, "n f r c z"]  # not normalised
    reference: Float[Array, "n r c z"]  # the same person at rest
    boxes: Float[Array, "n f 2 4"]  # mouth and eyes, pixels, mean over a latent frame
    truth: Float[Array, "n f o"]  # what the renderer was told, as `true_readings` puts it, mean over a latent frame
    opening: Float[Array, "n f s"]  # of the lips in every video frame of a latent frame, 0 closed .. 1, as lip sync is measured
    reconstruction: Float[Array, "n"]  # of MEASURES, as the next ones
    calm: Float[Array, "n"]
    facing: Float[Array, "n"]
    speech: Float[Array, "n"]


def reference_state(key: Array) -> FaceState:
    """A face as on a portrait: eyes open, mouth closed, turned a little, neutral or with a light smile."""
    k = jax.random.split(key, 6)

    def within(key, limit):
        return jax.random.uniform(key, minval=-limit, maxval=limit)

    zero = jnp.zeros(())
    rest = {field.name: zero for field in dataclasses.fields(FaceState)}
    return FaceState(
        **rest
        | {
            "yaw": within(k[0], 0.12),
            "pitch": within(k[1], 0.06),
            "roll": within(k[2], 0.06),
            "smile": jax.random.uniform(k[3], maxval=0.5),
            "gaze_x": within(k[4], 0.15),
            "gaze_y": within(k[5], 0.1),
        }
    )


def encode_clips(
    config: Config, vae: FlashVAE, identities: Identity, states: FaceState, references: FaceState
) -> tuple[Float[Array, "n f r c z"], Float[Array, "n r c z"], Float[Array, "n f 2 4"], Float[Array, "n s h w 3"]]:
    """Renders and encodes n clips latent frame by latent frame, and their references as s equal frames.

    Args:
      states: leaves [n, t].

    Returns:
      Latents, those of the references, boxes of mouth and eyes, and the pictures of the middle latent frame (number f // 2).
    """
    size, stride = config.stream.height, config.flash_vae.temporal_stride
    n, t = states.yaw.shape
    length = t // stride
    start = vae.init_encode_cache(n, *config.latent_grid)

    def boxes_of(identity, state):
        return jnp.stack([mouth_box(identity, state, size), eyes_box(identity, state, size)])

    def each(function, states):
        return jax.vmap(jax.vmap(function, in_axes=(None, 0)))(identities, states)

    def step(carry, now):
        (cache, middle), (number, states) = carry, now
        # The reference comes last, as a clip of its own: so renderer and encoder are compiled once.
        cache = jax.tree.map(lambda fresh, used: jnp.where(number == length, fresh, used), start, cache)
        frames = each(lambda identity, state: render(identity, state, size=size), states)
        cache, (mean, _) = vae.encode_step(cache, frames)
        return (cache, jnp.where(number == length // 2, frames, middle)), (mean, each(boxes_of, states).mean(axis=1))

    def grouped(moving, still):
        still = jnp.repeat(still[:, None], stride, axis=1)
        return jnp.moveaxis(jnp.concatenate([moving, still], axis=1).reshape(n, length + 1, stride), 1, 0)

    middle = jnp.zeros((n, stride, size, size, 3))
    inputs = jnp.arange(length + 1), jax.tree.map(grouped, states, references)
    (_, middle), (latents, boxes) = jax.lax.scan(step, (start, middle), inputs)
    return jnp.moveaxis(latents[:-1], 0, 1), latents[-1], jnp.moveaxis(boxes[:-1], 0, 1), middle


def reconstruction(
    vae: FlashVAE, latents: Float[Array, "n f r c z"], boxes: Float[Array, "n f 2 4"], middle: Float[Array, "n s h w 3"]
) -> Float[Array, "n"]:
    """PSNR in dB of mouth and eyes in the middle latent frame, decoded as a stream decodes it; see `encode_clips`."""
    number = latents.shape[1] // 2
    stretch = slice(max(0, number - vae.config.window), number + 1)
    decoded = vae.decode(latents[:, stretch])[:, -middle.shape[1] :]
    inside = region_weights(boxes[:, number], *middle.shape[2:4], (1.0, 1.0)) - 1.0
    error = jnp.mean((decoded - middle) ** 2, axis=(1, 4))
    return psnr(jnp.sum(inside * error, axis=(1, 2)) / jnp.sum(inside, axis=(1, 2)))


def drawer(
    config: Config, model: Functional, corpus: Corpus, latent_frames: int
) -> Callable[[Params, Key[Array, "n"], Int[Array, "n"], Int[Array, "n"]], tuple[Drawn, Any, Any, Any]]:
    """The program that draws n clips: (FlashVAE's parameters, keys, first latent frames in the corpus, latent frames at which the manner
    changes) -> the clips, who is in them, and the manners before and after."""
    fps, stride = config.stream.fps, config.flash_vae.temporal_stride
    frames = latent_frames * stride
    mel, tracks = jnp.asarray(corpus.mel), jnp.asarray(corpus.tracks)

    def move(key, start, change):
        k_identity, k_first, k_second, k_motion, k_reference = jax.random.split(key, 5)
        identity, first, second = sample_identity(k_identity), sample_style(k_first), sample_style(k_second)
        _, speech = window(mel, tracks, start, latent_frames, config.audio.mel_frames)
        states = style_motion(k_motion, changed_style(first, second, change * stride, frames, fps), speech, fps)
        truth = jax.vmap(lambda state: true_readings(identity, state))(states).reshape(latent_frames, stride, -1).mean(axis=1)
        # A closure lasts a video frame or three, so a mean over a latent frame's four does not tell of it. As the renderer draws it.
        opening = jnp.clip(states.mouth_open, 0.0, 1.0).reshape(latent_frames, stride)
        turns = jnp.stack([jnp.abs(jnp.diff(angle)) for angle in (states.yaw, states.pitch, states.roll)])
        measures = {
            "calm": -jnp.mean(turns) * fps,
            "facing": -jnp.max(jnp.hypot(states.yaw, states.pitch)),
            "speech": jnp.minimum(jnp.mean(speech.activity), 0.5),
        }
        return identity, first, second, states, reference_state(k_reference), truth, opening, measures

    @jax.jit
    def draw(params, keys, starts, changes):
        vae = model.bind(params)
        identities, first, second, states, references, truth, opening, measures = jax.vmap(move)(keys, starts, changes)
        latents, at_rest, boxes, middle = encode_clips(config, vae, identities, states, references)
        restored = reconstruction(vae, latents, boxes, middle)
        return Drawn(latents, at_rest, boxes, truth, opening, restored, **measures), identities, first, second

    return draw


def clip_maker(
    config: Config, model: Functional, params: Params, corpus: Corpus, tokenizer: Tokenizer, latent_frames: int, seed: int, batch: int
) -> Callable[[str, int, int], Iterator[dict[str, np.ndarray]]]:
    """The `make` of `write_records`: a clip is a function of the seed, its split and its number, whatever is made beside it.

    Args:
      batch: clips drawn at a time.
    """
    draw = drawer(config, model, corpus, latent_frames)
    history = config.audio.mel_frames - MEL_FRAMES

    def make(split: str, first: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        starts = corpus.starts(split, latent_frames, config.audio.mel_frames)
        split_seed = zlib.crc32(split.encode())

        def group(begin: int):
            # The last group is filled up with clips that are thrown away, so that one program is compiled.
            rngs = [np.random.default_rng([seed, split_seed, number]) for number in range(begin, begin + batch)]
            start = np.array([rng.choice(starts) for rng in rngs])
            change = np.array([_change(rng, latent_frames) for rng in rngs])
            keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(jnp.asarray([rng.integers(2**31) for rng in rngs]))
            return rngs, start, change, draw(params, keys, start, change)

        # While captions are written for one group, the device draws the next.
        coming = group(first)
        for begin in range(first, first + count, batch):
            rngs, start, change, drawing = coming
            if begin + batch < first + count:
                coming = group(begin + batch)
            drawn, identities, *styles = jax.device_get(drawing)
            for row in range(min(batch, first + count - begin)):
                clip, identity, *manners = jax.tree.map(lambda leaf, row=row: leaf[row], (drawn, identities, *styles))
                changes = change[row] < latent_frames
                captions, told = _captions(rngs[row], identity, manners if changes else manners[:1])
                tokens, valid = tokenizer.encode_batch((captions * 2)[:2])
                sound = corpus.mel[MEL_FRAMES * start[row] - history : MEL_FRAMES * (start[row] + latent_frames)]
                loudest, quietest = np.percentile(sound.max(axis=1), [95, 5]) * MEL_STEP
                measured = {name: getattr(clip, name) for name in MEASURES if hasattr(clip, name)} | {"told": told, "clear": loudest - quietest}
                yield {
                    # Not normalised: the statistics are known when all clips are.
                    "latents": clip.latents.astype(np.float16),
                    "reference": clip.reference.astype(np.float16),
                    "boxes": clip.boxes,
                    "truth": clip.truth,
                    "opening": clip.opening.astype(np.float16),
                    "mel": sound,
                    "tokens": tokens,
                    "valid": valid,
                    "frame_prompt": (np.arange(latent_frames) >= change[row]).astype(np.int32),
                    "measures": np.array([measured[name] for name in MEASURES], np.float32),
                }

    return make


def _change(rng: np.random.Generator, latent_frames: int) -> int:
    """Latent frame at which the second caption begins, in the middle half; the clip's length for never."""
    if rng.random() >= CHANGES:
        return latent_frames
    return int(rng.integers(latent_frames // 4, latent_frames - latent_frames // 4))


def _captions(rng: np.random.Generator, identity: Identity, manners: list[Any]) -> tuple[list[str], float]:
    """A caption of each manner, and how complete the least complete is."""
    captions, told = [], []
    for manner in manners:
        attributes = attributes_of(manner)
        said = mentioned(rng, attributes)
        captions.append(worded(rng, said, presentation_name(identity)))
        told.append(completeness(attributes, said))
    return captions, min(told)


def quality(measures: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n"]:
    """Of each clip the worst of its ranks: the share of clips that are no better than it by one measure.

    The best quarter by this number are the clips that pass a threshold in every measure, each set at the same rank.
    """
    ranks = [np.searchsorted(np.sort(column), column, side="right") for column in np.asarray(measures).T]
    return (np.min(ranks, axis=0) / len(measures)).astype(np.float32)


def conclude(open_split: Callable[[str], Records], statistics: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """What belongs to all clips together, measured on the training clips; see `load_clip_record` and `windows`.

    Args:
      statistics: of the latents, where others than these clips' own shall hold; see `statistics_of`.
    """
    records = open_split("train")
    stacked = records.stacked("truth", "measures")
    fitted = fit_innovations(stacked["truth"])
    return {
        **(statistics or _latent_statistics(records)),
        "quality": quality(stacked["measures"]),
        **{f"innovations.{field.name}": np.asarray(getattr(fitted, field.name)) for field in dataclasses.fields(Innovations)},
    }


def _latent_statistics(records: Records) -> dict[str, np.ndarray]:
    """Mean and standard deviation of every channel."""
    total, squares, count = 0.0, 0.0, 0
    for number in range(len(records)):
        latents = records[number]["latents"]
        flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
        total, squares, count = total + flat.sum(axis=0), squares + (flat**2).sum(axis=0), count + len(flat)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return {
        "statistics.mean": mean.astype(np.float32),
        "statistics.std": np.where(deviation > 1e-3, deviation, 1.0).astype(np.float32),  # a dead channel stays as it is
    }


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Render and encode the clips that the DiT's stages train on. The same command again goes on where it was stopped."""

    config: str = "tiny"
    """Preset in configs/."""
    runs: Path | None = None
    """Folder of all runs, runs/CONFIG by default."""
    flash_vae: Path | None = None
    """Run folder or .safetensors of FlashVAE; by default that of the streaming stage, whose encoder the adversarial one keeps."""
    out: Path | None = None
    """Folder to write; by default `clips` within the folder of all runs."""
    count: int = 1000
    """Training clips."""
    held_out: int = 200
    """Held-out clips."""
    latent_frames: int = 18
    """Length of a clip."""
    seed: int = 0
    """Everything random follows from it."""
    like: Path | None = None
    """File that streams, such as the shipped one, whose latent statistics are kept: for a DiT that goes on from its weights."""
    batch: int | None = None
    """Clips drawn at a time; by default 1 on a CPU, where more gain nothing, and 16 elsewhere."""
    shard: int = 100
    """Clips of a shard, which is what is lost at most when the command is stopped."""
    speech: Path = SPEECH
    """Speech features, see pikastream_jax.data.corpus."""


def main() -> int:
    try:
        arguments = arguments_of(Arguments, "clips", sys.argv[1:])
        config = preset(arguments.config)
        for name, least in {"batch": 1, "latent_frames": 4}.items():
            if (value := getattr(arguments, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        runs = arguments.runs or Path("runs") / config.name
        flash_vae = arguments.flash_vae or best_run(runs, ENCODERS, "--flash-vae")
        folder = arguments.out or runs / "clips"
        model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
        params = restore_into(model.abstract, load_weights(flash_vae, "flash_vae"))
        corpus = load_corpus(arguments.speech)
        tokenizer = Tokenizer.learn(phrases(), config.text.vocabulary, config.text.length)
        made_with = {
            "config": config.name,
            "seed": arguments.seed,
            "latent_frames": arguments.latent_frames,
            "flash_vae": digest(*jax.tree.leaves(params)),
            "speech": digest(corpus.mel, corpus.tracks),
            "words": tokenizer.words,
        }
        kept = None
        if arguments.like is not None:
            kept = statistics_of(arguments.like, config)
            made_with["statistics"] = digest(*kept.values())
        plan = Plan({"train": arguments.count, "held_out": arguments.held_out}, arguments.shard, made_with)
        batch = arguments.batch or (1 if jax.default_backend() == "cpu" else 16)
        make = clip_maker(config, model, params, corpus, tokenizer, arguments.latent_frames, arguments.seed, batch)
        made, started = 0, time.monotonic()

        def counted(split: str, first: int, count: int) -> Iterator[dict[str, np.ndarray]]:
            nonlocal made
            for clip in tqdm(make(split, first, count), desc=f"{split} from {first}", total=count, unit="clip"):
                made += 1
                yield clip

        write_records(folder, plan, counted, lambda open_split: conclude(open_split, kept))
    except (ValueError, OSError) as error:
        print(f"clips: {error}", file=sys.stderr)
        return 1
    rate = made / (time.monotonic() - started)
    print(f"{folder}: {arguments.count} training clips and {arguments.held_out} held out, of {arguments.latent_frames} latent frames; ", end="")
    print(f"{made} made now, {rate:.2f} a second")
    return 0


def statistics_of(path: Path, config: Config) -> dict[str, np.ndarray]:
    """The latent statistics of a file that streams, as `conclude` names them.

    Raises:
      ValueError: it has none, or those of latents with other channels.
    """
    found = load_weights(path).get("statistics", {})
    kept = {f"statistics.{name}": np.asarray(found.get(name), np.float32) for name in ("mean", "std")}
    wanted = (config.flash_vae.latent_channels,)
    if wrong := [array.shape for array in kept.values() if array.shape != wanted]:
        raise ValueError(f"--like {path}: its latent statistics have shape {wrong[0]}, those of {config.name} have {wanted}; take a file made by training.export")
    return kept


def digest(*arrays: Array) -> str:
    """A short name for the bytes of arrays."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def load_clip_record(folder: Path, length: int) -> tuple[Tokenizer, LatentStatistics]:
    """The tokenizer and the latent statistics that belong to the clips.

    Args:
      length: tokens of a prompt.
    """
    tokenizer = Tokenizer(read_record(folder)["made_with"]["words"], length)
    constants = read_constants(folder)
    return tokenizer, LatentStatistics(constants["statistics.mean"], constants["statistics.std"])


if __name__ == "__main__":
    sys.exit(main())
