"""FlashVAE's streaming decoder on its own: normalised latents in, uint8 frames out, one latent frame at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from benchmarks.torch_path.flash_vae import FlashVAE
from benchmarks.torch_path.graph import capture, preferred_attention
from pikastream_jax.config import Config


class Decoder:
    """The decoder of `batch` streams that run in step, with its window.

    Results are in a buffer that stays: a latent frame's pictures last until the next one's.
    """

    def __init__(
        self, config: Config, vae: FlashVAE, mean: Float[Tensor, "z"], std: Float[Tensor, "z"], *, batch: int, generator: torch.Generator
    ):
        """Args: mean, std: of every latent channel."""
        parameter = vae.latent_in.weight
        self.vae, self.generator = vae, generator
        self.mean, self.std = mean.float().to(parameter.device), std.float().to(parameter.device)
        rows, columns = config.latent_grid
        self.cache = vae.decoder.init_cache(batch, rows, columns, parameter.device, parameter.dtype)
        self.tables = vae.upsampler.tables(rows, columns, parameter.device)
        self.latent = torch.zeros(batch, rows, columns, config.flash_vae.latent_channels, device=parameter.device)
        shape = (batch, config.flash_vae.temporal_stride, config.stream.height, config.stream.width, 3)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
        self._to_pixels = to_pixels
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b r c z"]) -> UInt8[Tensor, "b t h w 3"]:
        """The next latent frame's video frames, on the device."""
        self.latent.copy_(latent)
        self.cache.place()
        if self._replay is not None and self.cache.full:
            self._replay()
        else:
            with preferred_attention():
                self._decode()
        self.cache.advance()
        return self.frames

    def _decode(self) -> None:
        frames = self.vae.decode_step(self.cache, self.latent * self.std + self.mean, self.tables)
        self.frames.copy_(self._to_pixels(frames))

    def fill(self) -> None:
        """A full window with random content: the state in which a speed run measures."""
        self.cache.fill(self.generator)

    def compile(self, mode: str) -> None:
        """See `Stream.compile`."""
        for module in (*self.vae.decoder.blocks, self.vae.upsampler):
            module.compile(mode=mode)
        self.cache.compile(mode)
        self._to_pixels = torch.compile(to_pixels, mode=mode)

    def capture(self) -> None:
        """Captures the decoding of a latent frame as a CUDA graph, which all later ones replay.

        Raises:
          RuntimeError: the window is still filling, which changes the program.
        """
        if not self.cache.full:
            raise RuntimeError("only a decoder with a full window can be captured: call fill, or decode until it is full")
        self.cache.place()
        self._replay = capture(self._decode)


def to_pixels(frames: Float[Tensor, "*b 3"]) -> UInt8[Tensor, "*b 3"]:
    """[-1, 1] to 0-255, rounded."""
    return ((frames.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
