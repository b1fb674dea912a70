"""The 3D-convolutional decoder that FlashVAE's is measured against; no preset streams with it.

Built as the decoders of current video VAEs are (Wan 2.1, "Wan: Open and Advanced Large-Scale Video Generative Models", 2025, and before it
CogVideoX and Open-Sora): residual blocks of two causal 3x3x3 convolutions, RMSNorm and SiLU; nearest-neighbour upsampling with a convolution;
twice the frames by twice the channels; widths that halve towards the picture (4, 4, 2, 1 times the last). Left out: the attention in
the middle, so that it is all convolution. As in FlashVAE the first latent frame is four video frames like every other.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.config import FlashVAEConfig
from pikastream_jax.flash_vae.model import DECODER_PARTS, FlashVAE
from pikastream_jax.nn.layers import RMSNorm, functional, parameter_count

_KERNEL = 3  # taps in time, rows, columns


class CausalConv(nnx.Module):
    """A 3x3x3 (or 1x3x3) convolution; a frame sees itself and the two before it, zeros before the first.

    The kernel is one matrix [taps x in, out]: so the optimiser sees a hidden matrix, as FlashVAE's are. Frames of the taps in time go side by side as
    channels, which leaves a convolution over rows and columns: on a CPU four times as fast as XLA's in 3D.
    """

    def __init__(self, dim_in: int, dim_out: int, taps: int = _KERNEL, *, rngs: nnx.Rngs):
        self.taps = taps
        fan_in = _KERNEL * _KERNEL * taps * dim_in
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (fan_in, dim_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim_out))

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        b, t, h, w, _ = x.shape
        if self.taps > 1:
            x = jnp.pad(x, ((0, 0), (self.taps - 1, 0), (0, 0), (0, 0), (0, 0)))
            x = jnp.concatenate([x[:, tap : tap + t] for tap in range(self.taps)], axis=-1)
        kernel = self.kernel[...].reshape(_KERNEL, _KERNEL, x.shape[-1], -1)
        x = jax.lax.conv_general_dilated(
            x.reshape(b * t, h, w, -1), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.reshape(b, t, h, w, -1) + self.bias[...]


class Residual(nnx.Module):
    """Norm, SiLU, convolution, twice, added to the input."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([RMSNorm(dim) for _ in range(2)])
        self.convolutions = nnx.List([CausalConv(dim, dim, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b t h w d"]:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(jax.nn.silu(norm(y)))
        return x + y


class Upsample(nnx.Module):
    """Twice the rows and columns, and twice the frames where asked for."""

    def __init__(self, dim_in: int, dim_out: int, in_time: bool, *, rngs: nnx.Rngs):
        self.expand = CausalConv(dim_in, 2 * dim_in, rngs=rngs) if in_time else None
        self.smooth = CausalConv(dim_in, dim_out, taps=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b s y x o"]:
        if self.expand is not None:
            b, t, h, w, d = x.shape
            x = self.expand(x).reshape(b, t, h, w, 2, d).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, d)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.smooth(x)


class Conv3DDecoder(nnx.Module):
    """Latents -> video in [-1, 1], as `FlashVAE.decode`."""

    def __init__(self, config: FlashVAEConfig, width: float, *, rngs: nnx.Rngs):
        """width: channels at the picture's size, not yet rounded, see `matching_width`.

        Raises:
          ValueError: a stride that is no power of two, or more doublings in time than in space.
        """
        in_time = _doublings("temporal_stride", config.temporal_stride)
        widths = _widths(config, width)
        if in_time >= len(widths):
            raise ValueError(
                f"conv3d: temporal_stride {config.temporal_stride} must not exceed spatial_stride {config.spatial_stride}"
            )
        self.latent_in = CausalConv(config.latent_channels, widths[0], rngs=rngs)
        self.middle = nnx.List([Residual(widths[0], rngs=rngs) for _ in range(2)])
        steps = zip(widths[:-1], widths[1:], strict=True)
        self.up = nnx.List(
            [Upsample(wide, narrow, level < in_time, rngs=rngs) for level, (wide, narrow) in enumerate(steps)]
        )
        self.blocks = nnx.List([Residual(dim, rngs=rngs) for dim in widths[1:]])
        self.norm = RMSNorm(widths[-1])
        self.head = CausalConv(widths[-1], 3, rngs=rngs)

    def __call__(self, latents: Float[Array, "b f r c z"]) -> Float[Array, "b t h w 3"]:
        """A whole clip; no video frame depends on a later latent frame."""
        x = self.latent_in(latents)
        for block in self.middle:
            x = block(x)
        for up, block in zip(self.up, self.blocks, strict=True):
            x = block(up(x))
        return self.head(jax.nn.silu(self.norm(x)))


def decoder_parameters(config: FlashVAEConfig) -> int:
    """Number of parameters of FlashVAE's decoder."""
    abstract = functional(lambda rngs: FlashVAE(config, rngs=rngs)).abstract
    return parameter_count({name: abstract[name] for name in DECODER_PARTS})


def conv3d_parameters(config: FlashVAEConfig, width: float) -> int:
    """Number of parameters of `Conv3DDecoder(config, width)`, by hand: a width is found in no time, where tracing takes seconds each."""
    widths, in_time = _widths(config, width), _doublings("temporal_stride", config.temporal_stride)

    def convolution(dim_in: int, dim_out: int, taps: int = _KERNEL) -> int:
        return _KERNEL * _KERNEL * taps * dim_in * dim_out + dim_out

    def residual(dim: int) -> int:
        return 2 * (dim + convolution(dim, dim))

    total = convolution(config.latent_channels, widths[0]) + 2 * residual(widths[0])
    for level, (wide, narrow) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        total += (level < in_time) * convolution(wide, 2 * wide) + convolution(wide, narrow, taps=1) + residual(narrow)
    return total + widths[-1] + convolution(widths[-1], 3)


@functools.cache
def matching_width(config: FlashVAEConfig) -> float:
    """The width with which `Conv3DDecoder` has as many parameters as FlashVAE's decoder, within 5%.

    Raises:
      ValueError: there is none: FlashVAE's decoder is too small, and one channel more is more than that.
    """
    wanted = decoder_parameters(config)
    low, high = 0.0, 1.0
    while conv3d_parameters(config, high) < wanted:
        low, high = high, 2 * high
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (middle, high) if conv3d_parameters(config, middle) < wanted else (low, middle)
    best = min((low, high), key=lambda width: abs(conv3d_parameters(config, width) - wanted))
    if abs(conv3d_parameters(config, best) - wanted) > 0.05 * wanted:
        raise ValueError(
            f"conv3d: {conv3d_parameters(config, best)} parameters is as near as it comes to the {wanted} of FlashVAE's decoder: "
            "take a larger preset"
        )
    return best


def _widths(config: FlashVAEConfig, width: float) -> list[int]:
    """Channels from the latents' grid to the picture's. Levels round up at different widths, so that sizes come in small steps."""
    doublings = _doublings("spatial_stride", config.spatial_stride)
    levels = range(doublings + 1)
    return [max(1, int(width * min(4, 2 ** (doublings - level)) + level / len(levels))) for level in levels]


def _doublings(name: str, stride: int) -> int:
    if stride & (stride - 1):
        raise ValueError(f"conv3d: {name} {stride} must be a power of two")
    return stride.bit_length() - 1
