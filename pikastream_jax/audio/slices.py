"""Which samples each latent frame hears."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config


def chunk_sample_counts(config: Config, first_latent: int) -> list[int]:
    """New samples that each latent frame of a chunk needs beyond the frame before it, the look-ahead included.

    Computed from absolute ends, so rounding never accumulates.
    """
    ahead = config.audio.look_ahead
    ends = [0 if n < 0 else config.latent_end_sample(n) + ahead for n in range(first_latent - 1, first_latent + config.stream.chunk)]
    return [later - earlier for earlier, later in zip(ends[:-1], ends[1:], strict=True)]


def max_chunk_samples(config: Config) -> int:
    """No chunk needs more new samples than this."""
    per_latent = config.flash_vae.temporal_stride * config.audio.sample_rate / config.stream.fps
    return int(config.stream.chunk * per_latent) + config.stream.chunk + 1 + config.audio.look_ahead


def chunk_slices(
    context: Float[Array, "b c"], audio: Float[Array, "b m"], samples: Int[Array, "b f"], length: int
) -> tuple[Float[Array, "b c"], Float[Array, "b f n"]]:
    """Appends a chunk's sound to the context and cuts every latent frame's slice.

    Args:
      context: the last c >= `length` samples of the stream so far.
      audio: the chunk's new samples, at the front; what follows them is ignored.
      samples: new samples of every latent frame; sums to at most m.
      length: samples in a slice.

    Returns:
      The context for the next chunk, and the slices.
    """

    def one(context, audio, samples):
        stream = jnp.concatenate([context, audio])
        ends = context.shape[0] + jnp.cumsum(samples)
        slices = jax.vmap(lambda end: jax.lax.dynamic_slice(stream, (end - length,), (length,)))(ends)
        return jax.lax.dynamic_slice(stream, (ends[-1] - context.shape[0],), context.shape), slices

    return jax.vmap(one)(context, audio, samples)
