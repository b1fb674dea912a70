"""The model ready to stream: weights loaded and in serving form, the step compiled, sessions with plain arrays in and out."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pikastream_jax.audio.slices import chunk_sample_counts, max_chunk_samples
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.streaming.compiling import stream_options
from pikastream_jax.streaming.package import Package, load_package
from pikastream_jax.streaming.serving_form import serving_models, serving_params
from pikastream_jax.streaming.state import (
    StepInputs,
    StreamState,
    fill_buffer,
    init_state,
    install_prompt,
    install_reference,
)
from pikastream_jax.streaming.step import ModelParams, generate_step
from pikastream_jax.text.prompts import with_gaze

PSNR_WARNING = 24.0  # dB; references of the training distribution are reproduced better than this


class Generator:
    """Holds the weights and the compiled programs. Sessions share it and nothing else."""

    psnr_warning = PSNR_WARNING

    def __init__(self, package: Package):
        self.config = config = package.config
        self.tokenizer = package.tokenizer
        # Only what serving needs is kept: of the single projections nothing remains once the package is gone.
        self.models = models = serving_models(package.models)
        self.params = serving_params(package.models, package.params)
        self.fps, self.sample_rate = config.stream.fps, config.audio.sample_rate
        self.height, self.width = config.stream.height, config.stream.width
        self.chunk_frames = config.chunk_frames

        def step(params: ModelParams, state: StreamState, inputs: StepInputs):
            return generate_step(models, params, state, inputs)

        def still_video(image: UInt8[Array, "h w 3"]):
            still = image.astype(jnp.float32) / 127.5 - 1.0
            return jnp.broadcast_to(still, (1, config.flash_vae.temporal_stride, *still.shape))

        def encode_reference(params: ModelParams, image: UInt8[Array, "h w 3"]):
            latents, _ = models.flash_vae.bind(params.flash_vae).encode(still_video(image))
            normalised = params.statistics.normalise(latents[:, 0])
            denoiser = models.denoiser.bind(params.denoiser)
            return Reference(denoiser.dit.reference_keys_values(normalised), normalised)

        def reference_psnr(params: ModelParams, image: UInt8[Array, "h w 3"], latents: Float[Array, "b r c z"]):
            decoded = models.flash_vae.bind(params.flash_vae).decode(params.statistics.restore(latents)[:, None])
            error = jnp.mean((jnp.clip(decoded, -1.0, 1.0) - still_video(image)) ** 2)
            return 10.0 * jnp.log10(4.0 / error)

        def start(params: ModelParams, rng: Array, reference: Reference, prompt: tuple[KeysValues, Array]):
            # Copies: a state is donated to its first step, and a prompt may begin many streams.
            state = install_prompt(dataclasses.replace(init_state(config, 1), rng=rng), *jax.tree.map(jnp.copy, prompt))
            silence = models.denoiser.bind(params.denoiser).audio.from_samples(jnp.zeros(config.audio.context_samples))
            return fill_buffer(config, install_reference(state, reference.keys_values), reference.latents, silence)

        def encode_prompt(params: ModelParams, tokens: Array, valid: Array):
            return models.denoiser.bind(params.denoiser).text_conditions(tokens[None, None], valid[None, None])

        def reconstruct(params: ModelParams, video: UInt8[Array, "t h w 3"]):
            vae = models.flash_vae.bind(params.flash_vae)
            frames = video.astype(jnp.float32) / 127.5 - 1.0
            grouped = frames.reshape(-1, 1, config.flash_vae.temporal_stride, *frames.shape[1:])
            rows, columns = config.flash_vae.grid(*frames.shape[1:3])

            def one(caches, frames):
                encoder, (mean, _) = vae.encode_step(caches[0], frames)
                decoder, out = vae.decode_step(caches[1], mean)
                return (encoder, decoder), out

            caches = vae.init_encode_cache(1, rows, columns), vae.init_decode_cache(1, rows, columns)
            _, out = jax.lax.scan(one, caches, grouped)
            return jnp.round((jnp.clip(out.reshape(frames.shape), -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

        # The step alone is donated its state: installing a reference or a prompt happens between two chunks.
        self._step = jax.jit(step, donate_argnums=1, compiler_options=stream_options())
        self._encode_reference = jax.jit(encode_reference, compiler_options=stream_options())
        self._reference_psnr = jax.jit(reference_psnr)
        self._encode_prompt = jax.jit(encode_prompt)
        self._start = jax.jit(start)
        self._reconstruct = jax.jit(reconstruct)

    def chunk_samples(self, index: int) -> int:
        """Samples that chunk `index` (from 0) takes; computed from the count, so the clock never drifts."""
        return sum(chunk_sample_counts(self.config, index * self.config.stream.chunk))

    def session(self, image: UInt8[np.ndarray, "h w 3"], prompt: str, seed: int) -> "Session":
        """A new stream of one face.

        Args:
          image: the reference, of the generator's height and width.
          prompt: expression, gaze, head motion; may be empty.
          seed: of everything that sound and prompt leave open: head motion, blinks.

        Raises:
          ValueError: the picture has another size.
        """
        return Session(self, image, prompt, seed)

    def encode_reference(self, image: UInt8[np.ndarray, "h w 3"]) -> "Reference":
        """What a picture is to the DiT."""
        expected = (self.config.stream.height, self.config.stream.width, 3)
        if image.shape != expected:
            raise ValueError(f"the reference has shape {image.shape}, the model takes {expected}: resize it first")
        return self._encode_reference(self.params, jnp.asarray(image))

    def reference_psnr(self, image: UInt8[np.ndarray, "h w 3"], reference: "Reference") -> float:
        """How well FlashVAE reproduces the picture, in dB."""
        return float(self._reference_psnr(self.params, jnp.asarray(image), reference.latents))

    def encode_prompt(self, prompt: str) -> tuple[KeysValues, Array]:
        """A prompt's keys and values, and how many tokens count; `with_gaze` adds eye contact where the prompt names no gaze."""
        tokens, valid = self.tokenizer.encode(with_gaze(prompt))
        return self._encode_prompt(self.params, jnp.asarray(tokens), jnp.asarray(valid, jnp.int32))

    def start(self, reference: "Reference", prompt: tuple[KeysValues, Array], seed: int) -> StreamState:
        """The state before the first sound."""
        return self._start(self.params, jax.random.key_data(jax.random.key(seed))[None], reference, prompt)

    def run_step(self, state: StreamState, inputs: StepInputs) -> tuple[StreamState, UInt8[Array, "b t h w 3"]]:
        """The compiled step; `state` is donated."""
        return self._step(self.params, state, inputs)

    def compiled_steps(self) -> int:
        """How often the step was compiled; 1 for ever once warm."""
        return self._step._cache_size()

    def reconstruct(self, video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """Video through FlashVAE's encoder and streaming decoder; t is a multiple of the temporal stride."""
        return np.asarray(self._reconstruct(self.params, jnp.asarray(video)))

    def warm_up(self) -> None:
        """Compiles the step before the first sound arrives."""
        config = self.config
        inputs = StepInputs(
            jnp.zeros((1, max_chunk_samples(config))), jnp.asarray([chunk_sample_counts(config, 0)], jnp.int32)
        )
        jax.block_until_ready(self.run_step(init_state(config, 1), inputs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reference:
    """A picture as the DiT sees it."""

    keys_values: KeysValues
    latents: Float[Array, "b r c z"]  # normalised


class Session:
    """One stream: its state, and how many chunks it has made."""

    def __init__(self, generator: Generator, image: UInt8[np.ndarray, "h w 3"], prompt: str, seed: int):
        self._generator = generator
        self._chunk = 0
        reference = generator.encode_reference(image)
        self.reconstruction_psnr = generator.reference_psnr(image, reference)
        self._state = generator.start(reference, generator.encode_prompt(prompt), seed)

    def step(self, audio: Float32[np.ndarray, " n"]) -> UInt8[Array, "t h w 3"]:
        """The next chunk of sound -> the frames of the oldest chunk that is ready, already on their way to host memory.

        The call does not wait for the device; `np.asarray` of the result does. In the rolling schedule the first `StreamConfig.delay` calls
        give no frame (t = 0), and `finish` gives those that are left.

        Args:
          audio: `generator.chunk_samples(index)` samples of mono sound in [-1, 1].

        Raises:
          ValueError: another number of samples.
        """
        config = self._generator.config
        counts = chunk_sample_counts(config, self._chunk * config.stream.chunk)
        if len(audio) != sum(counts):
            raise ValueError(f"chunk {self._chunk} takes {sum(counts)} samples, got {len(audio)}")
        padded = np.zeros((1, max_chunk_samples(config)), np.float32)
        padded[0, : len(audio)] = audio
        inputs = StepInputs(jnp.asarray(padded), jnp.asarray([counts], jnp.int32))
        self._state, frames = self._generator.run_step(self._state, inputs)
        self._chunk += 1
        frames = frames[0] if self._chunk > config.stream.delay else frames[0, :0]
        frames.copy_to_host_async()
        return frames

    def finish(self) -> Iterator[UInt8[Array, "t h w 3"]]:
        """The frames of each chunk still in flight when the sound ends; they hear silence after it. None in the sequential schedule."""
        left = min(self._generator.config.stream.delay, self._chunk)
        while left:
            frames = self.step(np.zeros(self._generator.chunk_samples(self._chunk), np.float32))
            if len(frames):
                left -= 1
                yield frames


def load_generator(weights: Path | None = None, **stream: Any) -> Generator:
    """The generator of a weights file, the shipped one by default, with the step compiled.

    Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder, so the next start is quick.

    Args:
      weights: the file.
      stream: fields of `StreamConfig` that shall differ from the file's or the preset's, as of `load_package`.

    Raises:
      FileNotFoundError, ValueError: see `load_package`.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "pikastream-jax"))
    generator = Generator(load_package(weights, **stream))
    generator.warm_up()
    return generator

