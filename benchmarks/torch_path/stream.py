"""One chunk: audio tokens in, uint8 frames out, with rolling caches: what `pikastream_jax.streaming.step` computes, as fast as PyTorch can.

What makes it fast: parameters and activations in bfloat16, fused projections, caches that attention reads without a copy
(`cache.py`), blocks compiled once for all layers (`Stream.compile`), and two CUDA graphs, one for a chunk's denoising and one for the
decoding of a latent frame (`Stream.capture`), so that a chunk costs the host a handful of launches.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from benchmarks.torch_path import weights as weights_io
from benchmarks.torch_path.cache import RollingCache
from benchmarks.torch_path.decoder import Decoder
from benchmarks.torch_path.dit import FP8_LAYERS, KeysValues
from benchmarks.torch_path.encoders import Denoiser
from benchmarks.torch_path.flash_vae import FlashVAE
from benchmarks.torch_path.fp8 import to_fp8
from benchmarks.torch_path.graph import capture, preferred_attention
from benchmarks.torch_path.rope import Rope
from pikastream_jax.config import Config

COMPILE_MODE = "max-autotune-no-cudagraphs"  # of `torch.compile`; the graphs of `capture` take the place of the compiler's own


def build(
    config: Config,
    device: torch.device | str,
    dtype: torch.dtype,
    fp8: bool = False,
    seed: int = 0,
    *,
    weights: Path | None = None,
    batch: int = 1,
) -> "Stream":
    """A stream with weights, at its start: it still needs a reference and a prompt, or `Stream.fill` for a speed run.

    Args:
      dtype: of parameters, activations and caches.
      fp8: the matrix products of the DiT's blocks in e4m3; the encoders, the keys and values of text and sound, and FlashVAE stay in `dtype`.
      seed: of random weights, where `weights` is None, and of `fill`.
      weights: a safetensors file of this configuration.
      batch: streams that run in step.
    """
    decoder = build_decoder(config, device, dtype, seed, weights=weights, batch=batch)
    denoiser = _with_weights(lambda: Denoiser(config), device, dtype, decoder.generator, weights, "denoiser")
    if fp8:
        for block in denoiser.dit.blocks:
            to_fp8(block, FP8_LAYERS)
    return Stream(config, denoiser, decoder, batch=batch)


def build_decoder(
    config: Config, device: torch.device | str, dtype: torch.dtype, seed: int = 0, *, weights: Path | None = None, batch: int = 1
) -> Decoder:
    """FlashVAE's decoder alone, at the start of a stream; see `build`."""
    generator = torch.Generator(device).manual_seed(seed)
    vae = _with_weights(lambda: FlashVAE(config.flash_vae), device, dtype, generator, weights, "flash_vae")
    channels = config.flash_vae.latent_channels
    statistics = {"mean": torch.zeros(channels), "std": torch.ones(channels)}
    if weights is not None:
        statistics = weights_io.read_part(weights, "statistics")
    return Decoder(config, vae, **statistics, batch=batch, generator=generator)


def _with_weights(
    create: Callable[[], nn.Module],
    device: torch.device | str,
    dtype: torch.dtype,
    generator: torch.Generator,
    weights: Path | None,
    part: str,
) -> nn.Module:
    """A module made on the device itself, with its part of a file or with random weights."""
    with torch.device("meta"):
        module = create()
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    if weights is None:
        weights_io.randomise(module, generator)
    else:
        weights_io.load(module, weights_io.read_part(weights, part))
    return module


class Stream:
    """`batch` streams that run in step, with the same number of prompt tokens.

    Results are in buffers that stay: a step's frames last until the next step.
    """

    def __init__(self, config: Config, denoiser: Denoiser, decoder: Decoder, *, batch: int):
        self.config, self.denoiser, self.decoder, self.batch = config, denoiser, decoder, batch
        self.generator = decoder.generator
        dit, stream = config.dit, config.stream
        parameter = denoiser.dit.patch_in.weight
        self.device, self.dtype = parameter.device, parameter.dtype
        options = dict(device=self.device, dtype=self.dtype)
        rows, columns = config.latent_grid
        self.rope = Rope(dit.head_dim, *config.token_grid, self.device)
        self.cache = RollingCache(
            self.rope,
            layers=dit.blocks,
            batch=batch,
            heads=dit.heads,
            head_dim=dit.head_dim,
            chunk=stream.chunk,
            window=stream.window,
            sink=stream.sink,
            reference_distance=stream.reference_distance,
            **options,
        )
        self.timesteps = _solver_timesteps(stream.steps, stream.shift)
        forwards = [*self.timesteps[:-1], 0.0] if stream.clean_pass else self.timesteps[:-1]
        self.forward_times = torch.tensor(forwards, dtype=torch.float32, device=self.device)[:, None, None]

        # What a chunk takes and gives, at addresses that a captured graph keeps.
        audio = config.audio
        self.audio = torch.zeros(batch, stream.chunk, audio.tokens, audio.dim, **options)
        self.noise = torch.zeros(batch, stream.chunk, rows, columns, dit.latent_channels, device=self.device)
        self.motion = torch.zeros(batch, stream.chunk, dit.motion, **options)
        self.latents = torch.zeros_like(self.noise)
        self.text: KeysValues | None = None
        shape = (batch, config.chunk_frames, stream.height, stream.width, 3)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._replay: Callable[[], None] | None = None

    # Between two chunks

    @torch.no_grad()
    def install_reference(self, reference: Float[Tensor, "b r c z"]) -> None:
        """Overwrites the reference by that of other (normalised) latents and empties the sink, which still shows the old face."""
        with preferred_attention():
            keys, values = self.denoiser.dit.reference_keys_values(reference.to(self.device, self.dtype), self.rope)
        first = self.cache.sink * self.cache.tokens
        self.cache.raw[:, :, first : first + keys.shape[2]] = keys
        self.cache.values[:, :, first : first + keys.shape[2]] = values
        self.cache.sink_count = 0

    @torch.no_grad()
    def install_prompt(self, tokens: Int[Tensor, "b l"], valid: int) -> None:
        """Overwrites the prompt, the same number of tokens in every row; only those are kept, so attention needs no mask.

        A prompt of another length than the one before undoes `capture`.
        """
        lengths = torch.full((self.batch,), valid, device=self.device)
        with preferred_attention():
            text = self.denoiser.text(tokens.to(self.device), lengths)[:, :valid]
            self._keep_text(self.denoiser.dit.text_keys_values(text))

    def _keep_text(self, text: KeysValues) -> None:
        if self.text is not None and self.text[0].shape == text[0].shape:
            for kept, new in zip(self.text, text, strict=True):
                kept.copy_(new)
        else:
            self.text, self._replay = text, None

    @torch.no_grad()
    def fill(self) -> None:
        """Random caches and prompt, as full as they get, and random inputs: the state in which a speed run measures."""
        config = self.config
        self.cache.fill(self.generator)
        self.decoder.fill()
        shape = (config.dit.blocks, self.batch, config.text.length, config.dit.heads, config.dit.head_dim)
        keys, values = (torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype) for _ in range(2))
        self._keep_text((keys, values))
        for buffer in (self.audio, self.noise, self.motion):
            buffer.normal_(generator=self.generator)

    # A chunk

    @torch.no_grad()
    def step(
        self,
        audio: Float[Tensor, "b f a c"] | None = None,
        noise: Float[Tensor, "b f r c z"] | None = None,
        motion: Float[Tensor, "b f m"] | None = None,
    ) -> UInt8[Tensor, "b t h w 3"]:
        """The next chunk's frames, on the device.

        Args:
          audio: audio tokens, which `Denoiser.audio` makes; None keeps the last chunk's.
          noise, motion: standard normal; None draws them.

        Raises:
          RuntimeError: there is no prompt.
        """
        self.denoise(audio, noise, motion)
        per_latent = self.config.flash_vae.temporal_stride
        for index in range(self.config.stream.chunk):
            decoded = self.decoder.decode(self.latents[:, index])
            self.frames[:, index * per_latent : (index + 1) * per_latent].copy_(decoded)
        return self.frames

    @torch.no_grad()
    def denoise(self, audio: Tensor | None = None, noise: Tensor | None = None, motion: Tensor | None = None) -> Float[Tensor, "b f r c z"]:
        """The next chunk's normalised latents; see `step`. A service decodes and shows them one latent frame at a time."""
        if self.text is None:
            raise RuntimeError("the stream has no prompt: call install_prompt, or fill for a speed run")
        if audio is not None:
            self.audio.copy_(audio)
        for buffer, given in ((self.noise, noise), (self.motion, motion)):
            if given is None:
                buffer.normal_(generator=self.generator)
            else:
                buffer.copy_(given)
        self.cache.place()
        if self._replay is not None and self.cache.full:
            self._replay()
        else:
            with preferred_attention():
                self._denoise()
        self.cache.advance()
        return self.latents

    def _denoise(self) -> None:
        """From noise to latents in few Euler steps; the last one's keys and values stay in the cache."""
        dit, stream = self.denoiser.dit, self.config.stream
        self.cache.turn()
        audio = dit.audio_keys_values(self.audio)
        # All steps' modulations at once: their large, thin product reads its weights once per chunk.
        embeddings, modulations = dit.time(self.forward_times.expand(-1, self.batch, stream.chunk), self.motion)
        self.latents.copy_(self.noise)
        for step in range(stream.steps):
            time = embeddings[step], modulations[step]
            velocity = dit(self.latents, time, self.text, audio, self.cache)
            self.latents += float(self.timesteps[step + 1] - self.timesteps[step]) * velocity
        if stream.clean_pass:
            dit(self.latents, (embeddings[-1], modulations[-1]), self.text, audio, self.cache)

    # Speed

    def compile(self, mode: str = COMPILE_MODE) -> None:
        """Compiles what a step runs, at its next run: a block once for all its layers, since one graph of all of them takes minutes.

        Call it in the state to be timed (`fill`): a filling cache would be compiled anew at every size.

        Args:
          mode: of `torch.compile`.
        """
        dit = self.denoiser.dit
        for block in dit.blocks:
            block.compile(mode=mode)
            attention = block.audio_attention
            attention.keys_values = torch.compile(attention.keys_values, mode=mode)
        for name in ("embed", "time", "unembed"):
            setattr(dit, name, torch.compile(getattr(dit, name), mode=mode))
        self.cache.compile(mode)
        self.decoder.compile(mode)

    def capture(self) -> None:
        """Captures a chunk's denoising and a latent frame's decoding as CUDA graphs, which all later steps replay.

        Raises:
          RuntimeError: the stream has no prompt, or its caches are still filling, which changes the program.
        """
        if self.text is None or not self.cache.full:
            raise RuntimeError("only a stream with a prompt and full caches can be captured: call fill, or step until the window is full")
        self.cache.place()
        self._replay = capture(self._denoise)
        self.decoder.capture()


def _solver_timesteps(steps: int, shift: float) -> np.ndarray:
    """The timesteps at which the network is evaluated, from 1 down, and the final 0: [steps + 1], float32."""
    t = 1.0 - np.arange(steps + 1) / steps
    return (shift * t / (1.0 + (shift - 1.0) * t)).astype(np.float32)
