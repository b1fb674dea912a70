"""Clips for the DiT's stages: talking faces rendered, encoded by FlashVAE and kept as latents.

`python -m pikastream_jax.training.clips --flash-vae runs/vae_streaming --out runs/clips.safetensors` makes them once; the stages
then cut random windows out of them. The sound is not copied: a clip remembers where in the speech corpus it lies.
"""

import dataclasses
import json
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tyro
from jaxtyping import Array, Float, Float16, Int
from tqdm import tqdm

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.data.captions import caption_batch, phrases
from pikastream_jax.data.corpus import Corpus, load_corpus, window
from pikastream_jax.data.face import FaceState, Identity, eyes_box, mouth_box, render, sample_identity
from pikastream_jax.data.motion import Style, style_motion
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.latents import LatentStatistics, measure_statistics
from pikastream_jax.measuring.estimator import true_readings
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.text import Tokenizer
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.weights.safetensors_io import restore_into

SPEECH = Path("data/speech_features.npz")
HELD_OUT_CLIPS = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of f latent frames, latents normalised."""

    latents: Float16[Array, "n f r c z"]
    reference: Float16[Array, "n r c z"]  # the same person at rest
    boxes: Float[Array, "n f 2 4"]  # mouth and eyes, pixels, mean over a latent frame
    truth: Float[Array, "n f o"]  # what the renderer was told, as `true_readings` puts it, mean over a latent frame
    speech_start: Int[Array, "n"]  # the clip's first latent frame in the corpus
    tokens: Int[Array, "n l"]  # caption
    valid: Int[Array, "n"]


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


def encode_clip(
    config: Config, vae: FlashVAE, identity: Identity, states: FaceState, reference: FaceState
) -> tuple[Float[Array, "f r c z"], Float[Array, "r c z"], Float[Array, "f 2 4"]]:
    """Renders and encodes one clip latent frame by latent frame, and its reference as equal frames."""
    size, stride = config.stream.height, config.flash_vae.temporal_stride
    rows, columns = config.latent_grid

    def draw(state):
        return render(identity, state, size=size)

    def step(cache, states):
        frames = jax.vmap(draw)(states)
        cache, (mean, _) = vae.encode_step(cache, frames[None])
        boxes = jax.vmap(lambda s: jnp.stack([mouth_box(identity, s, size), eyes_box(identity, s, size)]))(states)
        return cache, (mean[0], boxes.mean(axis=0))

    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, stride), states)
    _, (latents, boxes) = jax.lax.scan(step, vae.init_encode_cache(1, rows, columns), grouped)
    still = jnp.broadcast_to(draw(reference), (1, stride, size, size, 3))
    return latents, vae.encode(still)[0][0, 0], boxes


def make_clips(
    config: Config,
    model: Functional,
    params: Params,
    corpus: Corpus,
    starts: Int[np.ndarray, "s"],
    count: int,
    latent_frames: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """`count` clips as NumPy arrays (latents not normalised yet) and their captions; a function of `seed` alone."""
    identities = jax.jit(jax.vmap(sample_identity))(jax.random.split(jax.random.fold_in(jax.random.key(seed), count), count))
    captions, styles = caption_batch(seed, count, identities)
    rng = np.random.default_rng(seed)
    begin = rng.choice(starts, count)
    tracks = jnp.asarray(corpus.tracks)
    mel = jnp.asarray(corpus.mel)

    @jax.jit
    def one(params, mel, tracks, key, identity: Identity, style: Style, start):
        k_motion, k_reference = jax.random.split(key)
        _, speech = window(mel, tracks, start, latent_frames, config.audio.mel_frames)
        states = style_motion(k_motion, style, speech, config.stream.fps)
        told = jax.vmap(lambda state: true_readings(identity, state))(states)
        truth = told.reshape(latent_frames, config.flash_vae.temporal_stride, -1).mean(axis=1)
        return *encode_clip(config, model.bind(params), identity, states, reference_state(k_reference)), truth

    made = []
    for index in tqdm(range(count), desc="clips", unit="clip"):
        identity, style = jax.tree.map(operator.itemgetter(index), (identities, styles))
        key = jax.random.fold_in(jax.random.key(seed), index)
        made.append(jax.device_get(one(params, mel, tracks, key, identity, style, int(begin[index]))))
    arrays = dict(zip(("latents", "reference", "boxes", "truth"), map(np.stack, zip(*made, strict=True)), strict=True))
    return arrays | {"speech_start": begin.astype(np.int32)}, captions


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Render and encode the clips that the DiT's stages train on."""

    flash_vae: Path
    """Run folder or .safetensors of FlashVAE."""
    out: Path
    """File to write, .safetensors."""
    config: str = "tiny"
    """Preset in configs/."""
    count: int = 1000
    """Training clips."""
    latent_frames: int = 18
    """Length of a clip."""
    seed: int = 0
    """Everything random follows from it."""
    speech: Path = SPEECH
    """Speech features, see pikastream_jax.data.corpus."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    config = preset(arguments.config)
    model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
    params = restore_into(model.abstract, load_weights(arguments.flash_vae))
    corpus = load_corpus(arguments.speech)
    length = arguments.latent_frames
    parts, captions = {}, {}
    for split, count, seed in (("train", arguments.count, arguments.seed), ("held_out", HELD_OUT_CLIPS, arguments.seed + 777_777)):
        starts = corpus.starts(split, length, config.audio.mel_frames)
        parts[split], captions[split] = make_clips(config, model, params, corpus, starts, count, length, seed)
    tokenizer = Tokenizer.learn(phrases(), config.text.vocabulary, config.text.length)
    statistics = measure_statistics(parts["train"]["latents"].reshape(-1, config.flash_vae.latent_channels))
    tensors = {"statistics.mean": np.asarray(statistics.mean), "statistics.std": np.asarray(statistics.std)}
    for split, arrays in parts.items():
        tokens, valid = tokenizer.encode_batch(captions[split])
        for name in ("latents", "reference"):
            arrays[name] = np.asarray(statistics.normalise(arrays[name]), np.float16)
        tensors |= {f"{split}.{name}": value for name, value in (arrays | {"tokens": tokens, "valid": valid}).items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"words": list(tokenizer.words), "seed": arguments.seed, "flash_vae": str(arguments.flash_vae), "config": config.name}
    safetensors.numpy.save_file(tensors, arguments.out, metadata={"clips": json.dumps(record)})
    print(f"{arguments.count} clips of {length} latent frames in {arguments.out}")


def load_clips(path: Path, split: str) -> Clips:
    """Clips of one split ("train" or "held_out") of a file made by this module.

    Raises:
      ValueError: the file lacks arrays that clips have.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        wanted = {field.name: f"{split}.{field.name}" for field in dataclasses.fields(Clips)}
        if missing := set(wanted.values()) - set(file.keys()):
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: make the clips anew with pikastream_jax.training.clips")
        return Clips(**{name: file.get_tensor(key) for name, key in wanted.items()})


def load_clip_record(path: Path, length: int) -> tuple[Tokenizer, LatentStatistics]:
    """The tokenizer and the latent statistics that belong to the clips.

    Args:
      length: tokens of a prompt.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        record = json.loads(file.metadata()["clips"])
        statistics = LatentStatistics(file.get_tensor("statistics.mean"), file.get_tensor("statistics.std"))
    return Tokenizer(record["words"], length), statistics


if __name__ == "__main__":
    main()
